"""A class in a Python file of the user's: ``FILE.py:CLASS`` with options, loaded and called.

The file is run as a Python module, and the class called with the options as keyword arguments;
whatever goes wrong on the way is a ConfigError of one line with the place in the user's file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from pyvmm.errors import ConfigError
from pyvmm.host import files, handed
from pyvmm.virtio import defects

_BOOLEANS = {
    **dict.fromkeys(("1", "yes", "true", "on"), True),
    **dict.fromkeys(("0", "no", "false", "off"), False),
}
_LONGEST = 16 << 20  # bytes of a source that is handed over
_CO_VARKEYWORDS = 0x08  # inspect.CO_VARKEYWORDS; inspect itself is a slow import

T = TypeVar("T")


class UserClass(NamedTuple):
    """The class `class_name` in the file `path`, its `options` as (name, text), and the option of
    the command line that asked for it."""

    path: str
    class_name: str
    options: tuple[tuple[str, str], ...]
    option: str

    def __str__(self) -> str:
        return f"{self.path}:{self.class_name}"

    def wrong(self, message: str, *, cure: str = "") -> ConfigError:
        """The error that says so."""
        return ConfigError(message, cure=cure, option=self.option)

    def load(self, base: type[T], advice: str) -> type[T]:
        """The class, which must derive from `base`; `advice` is for one that does not. Raises
        ConfigError."""
        names = vars(self._load_module())
        found = names.get(self.class_name)
        if isinstance(found, type) and issubclass(found, base):
            return found
        others = [
            name
            for name, value in names.items()
            if isinstance(value, type)
            and issubclass(value, base)
            and value.__module__ == names["__name__"]
        ]
        what = f"is not a {base.__name__}" if self.class_name in names else "is not there"
        raise self.wrong(
            f"{self.class_name} in {self.path} {what}",
            cure=f"there is {', '.join(others)}" if others else advice,
        )

    def make(self, found: type[T]) -> T:
        """An instance of the class that `load` gave. Raises ConfigError."""
        arguments = Signature.of(found).arguments(self)
        try:
            return found(**arguments)
        except (Exception, SystemExit) as error:
            if isinstance(error, ConfigError):
                raise
            raise self._failed(f"{self} cannot be made", error) from error

    def inside(self, found: type, visible: Callable[[str, str], str]) -> UserClass:
        """The same for an emulated host: `visible` makes a path one that is seen there, and paths
        among the options no longer depend on the current directory."""
        kinds = Signature.of(found).kinds
        options = tuple(
            (name, os.path.abspath(text) if kinds.get(name) == "Path" else text)
            for name, text in self.options
        )
        return self._replace(path=visible(self.path, self.option), options=options)

    def _load_module(self) -> Any:
        from importlib.machinery import SourceFileLoader
        from importlib.util import module_from_spec, spec_from_loader

        path = self.path
        real = os.path.realpath(path)
        name = f"pyvmm_user:{real}"  # one module however often the file is named
        if name in sys.modules:
            return sys.modules[name]
        given = handed.take(path)
        if given is None and not os.path.isfile(real):
            raise self.wrong(f"there is no file {path}")
        folder = os.path.dirname(real)
        if folder not in sys.path:
            sys.path.append(folder)  # for modules beside it, behind all others
        loader: Any
        loader = SourceFileLoader(name, real) if given is None else _Handed(real, given)
        found = spec_from_loader(name, loader)
        assert found is not None and found.loader is not None
        module = sys.modules[name] = module_from_spec(found)
        try:
            found.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            if isinstance(error, OSError) and error.filename == real:
                raise self.wrong(f"cannot read {path}: {error.strerror}") from None
            raise self._failed(f"{path} cannot be imported", error) from error
        return module

    def _failed(self, what: str, error: BaseException) -> ConfigError:
        """One line for what the user's code raised; `error` is the cause, which --debug shows."""
        text, place = " ".join(str(error).split()), defects.users_place(error)
        if isinstance(error, SyntaxError):
            text, place = error.msg, f"{error.filename}:{error.lineno}" if error.filename else place
        line = ": ".join(filter(None, (what, type(error).__name__, text)))
        return self.wrong(f"{line} ({place})" if place else line)


class _Handed:
    """Loads a module from a file that somebody else has opened, at `path`."""

    def __init__(self, path: str, fd: int) -> None:
        self._path = path
        self._fd = fd

    def create_module(self, spec: Any) -> None:
        """The usual module."""

    def exec_module(self, module: Any) -> None:
        module.__file__ = self._path
        try:
            source = files.read_open(self._fd, _LONGEST)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._path) from None
        exec(compile(source, self._path, "exec"), vars(module))


class Signature:
    """The options that a class takes: the arguments of its __init__ and what they are said to be.

    `kinds` has the names of the annotated types, as they stand in the source.
    """

    def __init__(
        self, names: tuple[str, ...], needed: tuple[str, ...], kinds: Mapping[str, str], open: bool
    ) -> None:
        self.names = names
        self.needed = needed
        self.kinds = kinds
        self.open = open

    @classmethod
    def of(cls, found: type) -> Signature:
        init: Any = found.__init__  # type: ignore[misc]
        code = getattr(init, "__code__", None)
        if code is None:  # object's own, or not written in Python
            return cls((), (), {}, open=init is not object.__init__)
        positional = code.co_varnames[1 : code.co_argcount]
        keywords = code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount]
        free = positional[: len(positional) - len(init.__defaults__ or ())]
        needed = (*free, *(name for name in keywords if name not in (init.__kwdefaults__ or {})))
        kinds = {
            name: (kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind)))
            .removesuffix("| None")
            .strip()
            for name, kind in init.__annotations__.items()
        }
        open = bool(code.co_flags & _CO_VARKEYWORDS)
        return cls((*positional, *keywords), needed, kinds, open)

    def arguments(self, user: UserClass) -> dict[str, Any]:
        """The options' values. Raises ConfigError for one that the class does not take."""
        given = dict(user.options)
        for name in given:
            if name not in self.names and not self.open:
                cure = f"there is {', '.join(self.names)}" if self.names else "it takes none"
                raise user.wrong(f"{user} has no option {name!r}", cure=cure)
        missing = [name for name in self.needed if name not in given]
        if missing:
            raise user.wrong(f"{user} needs {', '.join(f'{name}=' for name in missing)}")
        return {name: self._value(user, name, text) for name, text in given.items()}

    def _value(self, user: UserClass, name: str, text: str) -> Any:
        kind = self.kinds.get(name, "")
        try:
            if kind == "int":
                return int(text, 0)
            if kind == "float":
                return float(text)
            if kind == "bool":
                return _BOOLEANS[text.lower()]
        except (ValueError, KeyError):
            raise user.wrong(f"cannot read {name}={text!r} of {user} as {kind}") from None
        if kind == "Path":
            from pathlib import Path

            return Path(text)
        return text
