"""Frozen values with named fields, as `@dataclass(frozen=True)` makes them, at a lower price.

Every start of a VM loads the classes of what a user may ask for. `dataclasses` writes and compiles
six methods for each class, and loads a compiler's worth of modules for that: a tenth of a start
(decision 0455). Records share their methods. For whoever asks, `dataclasses.fields`, `asdict` and
`replace` among them, a record is a dataclass.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar, dataclass_transform

if TYPE_CHECKING:  # whose arguments type checkers know
    from dataclasses import replace as replace
else:

    def replace(record, /, **changes):
        """A copy of `record` with other values in the fields that `changes` names."""
        return type(record)(**{**vars(record), **changes})


R = TypeVar("R", bound="Record")


class _Field(NamedTuple):
    default: Any
    kw_only: bool
    metadata: dict[str, Any]


def field(*, default: Any, kw_only: bool = False, metadata: dict[str, Any] | None = None) -> Any:
    """A field with more to say than its default, as `dataclasses.field` has it."""
    return _Field(default, kw_only, metadata or {})


def kinds_of(record: Record) -> dict[str, str]:
    """The names of the fields, and the annotation of each as text."""
    return {name: str(kind) for name, (kind, _) in record._rows.items()}


def with_defaults(record: R, metadata: Mapping[str, Any]) -> R:
    """A copy of `record` with the defaults in all fields that have this metadata."""
    rows = record._rows.items()
    return replace(
        record, **{name: one.default for name, (_, one) in rows if one.metadata == metadata}
    )


class _Missing:
    """The default of a field that has none."""


class _OfDataclass:
    """An attribute by which a dataclass is known, made when somebody asks for it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, record: object, cls: Any) -> Any:
        return _as_dataclass(cls)[self._name]


@cache
def _as_dataclass(cls: Any) -> dict[str, Any]:
    """The attributes by which `dataclasses` and `inspect` know a dataclass like `cls`."""
    from dataclasses import MISSING, make_dataclass
    from dataclasses import field as real
    from inspect import signature

    rows = []
    for name, (kind, one) in cls._rows.items():
        default = MISSING if one.default is _Missing else one.default
        rows.append((name, kind, real(default=default, kw_only=one.kw_only, metadata=one.metadata)))
    made: Any = make_dataclass(cls.__name__, rows, frozen=True)
    return {
        "__dataclass_fields__": made.__dataclass_fields__,
        "__dataclass_params__": made.__dataclass_params__,
        "__signature__": signature(made),
    }


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Record:
    """The base of a frozen value. The fields are the annotated names of its class, behind those of
    the classes that it is made of; a ClassVar is not one. Records of one class are equal if all
    their values are. `__post_init__` is called when the values stand."""

    _rows: ClassVar[dict[str, tuple[Any, _Field]]] = {}
    _in_order: ClassVar[tuple[str, ...]] = ()
    _defaults: ClassVar[dict[str, Any]] = {}

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, Any]]
    else:
        __dataclass_fields__ = _OfDataclass()
        __dataclass_params__ = _OfDataclass()
        __signature__ = _OfDataclass()

    def __init_subclass__(cls) -> None:
        cls._rows = dict(cls._rows)
        for name, kind in cls.__annotations__.items():
            if "ClassVar" in str(kind):
                continue
            default = vars(cls).get(name, _Missing)
            one = default if isinstance(default, _Field) else _Field(default, False, {})
            cls._rows[name] = (kind, one)
            if one is default:
                setattr(cls, name, one.default)
        rows = cls._rows.items()
        cls._in_order = tuple(name for name, (_, one) in rows if not one.kw_only)
        cls._defaults = {n: one.default for n, (_, one) in rows if one.default is not _Missing}

    def __init__(self, *values: Any, **named: Any) -> None:
        cls = type(self)
        if len(values) > len(cls._in_order):
            raise TypeError(f"{cls.__name__} has no place for {values[len(cls._in_order)]!r}")
        given = dict(zip(cls._in_order, values, strict=False))
        wrong = [name for name in named if name in given or name not in cls._rows]
        if wrong:
            why = "is given twice" if wrong[0] in given else "is not a field of it"
            raise TypeError(f"{cls.__name__}: {wrong[0]!r} {why}")
        found = {**cls._defaults, **given, **named}
        missing = [name for name in cls._rows if name not in found]
        if missing:
            raise TypeError(f"{cls.__name__}: {missing[0]!r} is missing")
        vars(self).update({name: found[name] for name in cls._rows})
        self.__post_init__()

    def __post_init__(self) -> None:
        pass

    def __setattr__(self, name: str, value: object) -> None:
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self._rows)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._rows)
        return f"{type(self).__qualname__}({values})"
