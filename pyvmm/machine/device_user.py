"""``--device FILE.py:CLASS``: a virtio device that the user wrote.

The file is run as a Python module, and CLASS, a `pyvmm.virtio.device.VirtioDevice`, is called with
the options as keyword arguments. Where the machine runs in an emulated host both happen twice:
here, so that mistakes show at once, and there, where the file is seen at the same path.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pyvmm.errors import ConfigError
from pyvmm.machine.devices import Context
from pyvmm.machine.spec import DeviceSpec
from pyvmm.virtio import defects, features
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.negotiation import RESERVED_BITS, SUPPORTED_RESERVED_BITS
from pyvmm.virtio.queue_state import QUEUE_SIZE_LIMIT, is_valid_size

OPTION = "--device"
_HOW = "use FILE.py:CLASS[,KEY=VALUE...]; a comma is written twice"
_BOOLEANS = {
    **dict.fromkeys(("1", "yes", "true", "on"), True),
    **dict.fromkeys(("0", "no", "false", "off"), False),
}
_CO_VARKEYWORDS = 0x08  # inspect.CO_VARKEYWORDS; inspect itself is a slow import


@dataclass(frozen=True)
class Spec(DeviceSpec):
    """The class `class_name` in the Python file `path`, and its options as (name, text)."""

    kind: ClassVar[str] = "user"
    path: str
    class_name: str
    options: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        # JSON knows lists only.
        pairs = tuple((str(name), str(text)) for name, text in self.options)
        object.__setattr__(self, "options", pairs)

    def __str__(self) -> str:
        return f"{self.path}:{self.class_name}"


def parse(text: str) -> Spec:
    """The device that ``FILE.py:CLASS[,KEY=VALUE...]`` describes. Raises ConfigError."""
    first, *rest = [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
    path, _, class_name = first.rpartition(":")
    if not path or not class_name.isidentifier():
        raise _wrong(f"no file and class in {text!r}", cure=_HOW)
    options: dict[str, str] = {}
    for option in rest:
        name, equals, value = option.partition("=")
        if not equals or not name.isidentifier() or name in options:
            raise _wrong(f"cannot read the option {option!r} in {text!r}", cure=_HOW)
        options[name] = value
    return Spec(path, class_name, tuple(options.items()))


def open_device(spec: Spec, context: Context) -> VirtioDevice:
    """Run the file and make the device. Raises ConfigError for all that goes wrong in it."""
    return _make(spec, _load_class(spec))


def for_emulated_host(spec: Spec, visible: Callable[[str, str], str]) -> Spec:
    """What to ask for inside an emulated host; `visible` makes a path one that is seen there.

    Raises the ConfigError that making the device would raise, so that nobody waits for it.
    """
    device_class = _load_class(spec)
    _make(spec, device_class)
    kinds = _Signature.of(device_class).kinds
    # The current directory is another one there.
    options = tuple(
        (name, os.path.abspath(text) if kinds.get(name) == "Path" else text)
        for name, text in spec.options
    )
    return replace(spec, path=visible(spec.path, OPTION), options=options)


def _wrong(message: str, *, cure: str = "") -> ConfigError:
    return ConfigError(message, cure=cure, option=OPTION)


# --- the class -----------------------------------------------------------------------------------


def _load_class(spec: Spec) -> type[VirtioDevice]:
    names = vars(_load_module(spec.path))
    found = names.get(spec.class_name)
    if isinstance(found, type) and issubclass(found, VirtioDevice):
        return found
    devices = [
        name
        for name, value in names.items()
        if isinstance(value, type)
        and issubclass(value, VirtioDevice)
        and value.__module__ == names["__name__"]
    ]
    what = "is not a VirtioDevice" if spec.class_name in names else "is not there"
    raise _wrong(
        f"{spec.class_name} in {spec.path} {what}",
        cure=f"there is {', '.join(devices)}" if devices else "derive it from QueueDevice",
    )


def _load_module(path: str) -> Any:
    from importlib.machinery import SourceFileLoader
    from importlib.util import module_from_spec, spec_from_loader

    real = os.path.realpath(path)
    name = f"pyvmm_device:{real}"  # one module however many devices of the file there are
    if name in sys.modules:
        return sys.modules[name]
    if not os.path.isfile(real):
        raise _wrong(f"there is no file {path}")
    folder = os.path.dirname(real)
    if folder not in sys.path:
        sys.path.append(folder)  # for modules beside it, behind all others
    found = spec_from_loader(name, SourceFileLoader(name, real))
    assert found is not None and found.loader is not None
    module = sys.modules[name] = module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if isinstance(error, OSError) and error.filename == real:
            raise _wrong(f"cannot read {path}: {error.strerror}") from None
        raise _failed(f"{path} cannot be imported", error) from error
    return module


def _failed(what: str, error: BaseException) -> ConfigError:
    """One line for what the user's code raised; `error` is the cause, which --debug shows."""
    text, place = " ".join(str(error).split()), defects.users_place(error)
    if isinstance(error, SyntaxError):
        text, place = error.msg, f"{error.filename}:{error.lineno}" if error.filename else place
    line = ": ".join(filter(None, (what, type(error).__name__, text)))
    return _wrong(f"{line} ({place})" if place else line)


# --- the device ----------------------------------------------------------------------------------


def _make(spec: Spec, device_class: type[VirtioDevice]) -> VirtioDevice:
    arguments = _Signature.of(device_class).arguments(spec)
    try:
        device = device_class(**arguments)
    except (Exception, SystemExit) as error:
        if isinstance(error, ConfigError):
            raise
        raise _failed(f"{spec} cannot be made", error) from error
    _check(spec, device)
    return device


def _check(spec: Spec, device: VirtioDevice) -> None:
    """Refuse what the transport could not work with, before there is a machine."""
    name, number = getattr(device, "name", None), getattr(device, "device_type", None)
    sizes: Any = getattr(device, "queue_sizes", None)
    if not isinstance(name, str) or not name.isprintable() or not name:
        raise _wrong(f"{spec} has no printable name")
    if not isinstance(number, int) or not 0 < number < 1 << 32:
        raise _wrong(f"{spec} has no device_type", cure="virtio 1.3, 5 Device Types has them")
    if not isinstance(sizes, tuple) or not all(
        isinstance(size, int) and is_valid_size(size, QUEUE_SIZE_LIMIT) for size in sizes
    ):
        raise _wrong(
            f"{spec} has queue_sizes {sizes!r}",
            cure=f"a tuple of powers of two up to {QUEUE_SIZE_LIMIT}, one for each queue",
        )
    offered = device.features
    unknown = offered & RESERVED_BITS & ~SUPPORTED_RESERVED_BITS if isinstance(offered, int) else 0
    if unknown or not isinstance(offered, int):
        names = " ".join(features.describe(unknown)) or repr(offered)
        raise _wrong(f"{spec} offers features that there are not: {names}")


class _Signature:
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
    def of(cls, device_class: type) -> _Signature:
        init: Any = device_class.__init__  # type: ignore[misc]
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

    def arguments(self, spec: Spec) -> dict[str, Any]:
        """The options' values. Raises ConfigError for one that the class does not take."""
        given = dict(spec.options)
        for name in given:
            if name not in self.names and not self.open:
                cure = f"there is {', '.join(self.names)}" if self.names else "it takes none"
                raise _wrong(f"{spec} has no option {name!r}", cure=cure)
        missing = [name for name in self.needed if name not in given]
        if missing:
            raise _wrong(f"{spec} needs {', '.join(f'{name}=' for name in missing)}")
        return {name: self._value(spec, name, text) for name, text in given.items()}

    def _value(self, spec: Spec, name: str, text: str) -> Any:
        kind = self.kinds.get(name, "")
        try:
            if kind == "int":
                return int(text, 0)
            if kind == "float":
                return float(text)
            if kind == "bool":
                return _BOOLEANS[text.lower()]
        except (ValueError, KeyError):
            raise _wrong(f"cannot read {name}={text!r} of {spec} as {kind}") from None
        if kind == "Path":
            from pathlib import Path

            return Path(text)
        return text
