"""A record is what `@dataclass(frozen=True)` would have made of its class."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from pyvmm.spec import record
from pyvmm.spec.record import Record, field


class Named(Record):
    kind: ClassVar[str] = "named"

    packed: bool = field(default=False, kw_only=True)


class Disk(Named):
    kind: ClassVar[str] = "disk"

    path: str
    queues: int = 1
    saved: str | None = field(default=None, metadata={"internal": True})

    @property
    def is_image(self) -> bool:
        return self.path.endswith(".img")


@dataclass(frozen=True)
class NamedAsDataclass:
    kind: ClassVar[str] = "named"

    packed: bool = dataclasses.field(default=False, kw_only=True)


@dataclass(frozen=True)
class AsDataclass(NamedAsDataclass):
    kind: ClassVar[str] = "disk"

    path: str
    queues: int = 1
    saved: str | None = dataclasses.field(default=None, metadata={"internal": True})


class Pairs(Record):
    pairs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", tuple(self.pairs))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (("a.img",), {}),
        (("a.img", 4), {"packed": True}),
        ((), {"path": "b", "saved": "c"}),
        ((), {}),
        (("a.img", 1, None, True), {}),
        (("a.img",), {"path": "b"}),
        (("a.img",), {"nonsense": 1}),
        (("a.img",), {"kind": "other"}),
    ],
)
def test_it_takes_the_values_that_a_dataclass_takes(
    values: tuple[Any, ...], named: dict[str, Any]
) -> None:
    try:
        expected = AsDataclass(*values, **named)
    except TypeError:
        with pytest.raises(TypeError, match="Disk"):
            Disk(*values, **named)
        return
    made = Disk(*values, **named)
    assert dataclasses.asdict(made) == dataclasses.asdict(expected)
    assert repr(made) == repr(expected).replace("AsDataclass", "Disk")
    assert made.kind == "disk"


def test_dataclasses_know_its_fields() -> None:
    of_record, of_dataclass = dataclasses.fields(Disk), dataclasses.fields(AsDataclass)
    known = ("name", "type", "default", "default_factory", "kw_only", "metadata")
    assert [[getattr(one, name) for name in known] for one in of_record] == [
        [getattr(one, name) for name in known] for one in of_dataclass
    ]
    assert dataclasses.is_dataclass(Disk)
    ours, theirs = (inspect.signature(cls).parameters for cls in (Disk, AsDataclass))
    assert ours.keys() == theirs.keys()


@pytest.mark.parametrize("replace", [record.replace, dataclasses.replace, None])
def test_a_copy_has_other_values(replace: Any) -> None:
    first = Disk("a.img", 2, packed=True)
    if replace is None:
        assert copy.copy(first) == copy.deepcopy(first) == first
        assert pickle.loads(pickle.dumps(first)) == first
        return
    second = replace(first, path="b")
    assert second == Disk("b", 2, packed=True) != first
    assert first.is_image and not second.is_image
    with pytest.raises(TypeError):
        replace(first, nonsense=1)


def test_equal_ones_are_of_one_class_and_have_one_hash() -> None:
    assert Disk("a") == Disk("a") != Disk("b")
    assert hash(Disk("a")) == hash(Disk("a"))
    assert Disk("a") != AsDataclass("a")

    class Other(Disk):
        pass

    assert Other("a") != Disk("a")


def test_it_is_frozen() -> None:
    disk = Disk("a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        disk.path = "b"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        del disk.path
    with pytest.raises(dataclasses.FrozenInstanceError):
        disk.nonsense = 1  # type: ignore[attr-defined]
    assert disk == Disk("a")


def test_a_class_may_look_at_its_values_once_they_stand() -> None:
    assert Pairs(["a", "b"]) == Pairs(("a", "b"))  # type: ignore[arg-type]


def test_a_dataclass_may_be_made_of_one() -> None:
    @dataclass(frozen=True)
    class More(Named):
        path: str

    assert More("a", packed=True) == More("a", packed=True) != More("a")
    assert [one.name for one in dataclasses.fields(More)] == ["packed", "path"]


def test_a_specification_is_made_without_the_library() -> None:
    made = "from pyvmm.spec.vm import DiskSpec, VmSpec; VmSpec('k', disks=(DiskSpec('a'),))"
    done = subprocess.run(
        [sys.executable, "-c", f"{made}; import sys; print('dataclasses' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"
