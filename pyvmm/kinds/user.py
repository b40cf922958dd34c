"""``--device FILE.py:CLASS``: a virtio device that the user wrote.

The file is run as a Python module, and CLASS, a `pyvmm.virtio.device.VirtioDevice`, is called with
the options as keyword arguments. Where the machine runs in an emulated host both happen twice:
here, so that mistakes show at once, and there, where the file is seen at the same path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pyvmm.errors import ConfigError
from pyvmm.kinds.interface import Context
from pyvmm.spec.options import Option
from pyvmm.spec.record import replace
from pyvmm.spec.vm import DeviceSpec

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TypedDict

    from pyvmm.kinds.border import Border, Crossing
    from pyvmm.kinds.interface import Table
    from pyvmm.kinds.user_class import UserClass
    from pyvmm.virtio.device import VirtioDevice

    class Keywords(TypedDict, total=False):
        """The keywords that `pyvmm.VM` takes."""

        devices: Spec | str | Table | Iterable[Spec | str | Table]


OPTION = "--device"
OPTIONS = (
    Option(
        "devices",
        OPTION,
        metavar="FILE.py:CLASS[,KEY=VALUE][,packed]",
        device="user",
        many=True,
        default=(),
        repeats=True,
        after="--rng-limit",
        help="Add a virtio device of your own: a class in a Python file, with its options; may be "
        "repeated.",
    ),
)
_HOW = "use FILE.py:CLASS[,KEY=VALUE...]; a comma is written twice"


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
    return _make(spec)[1]


def cross(spec: Spec, border: Border) -> Crossing:
    """The device as it is asked for inside. Raises the ConfigError that making it would raise, so
    that the user sees it at once."""
    from pyvmm.kinds.border import Crossing

    device_class, _ = _make(spec)
    inside = _user_class(spec).inside(device_class, border.visible)
    return Crossing(replace(spec, path=inside.path, options=inside.options))


def with_paths(spec: Spec, change: Callable[[str], str]) -> Spec:
    """`spec` with the file's path as `change` gives it."""
    return replace(spec, path=change(spec.path)) if spec.path else spec


def code_of(spec: Spec) -> str:
    """The file that is run."""
    return spec.path


def _user_class(spec: Spec) -> UserClass:
    from pyvmm.kinds.user_class import UserClass

    return UserClass(spec.path, spec.class_name, spec.options, OPTION)


def _make(spec: Spec) -> tuple[type[VirtioDevice], VirtioDevice]:
    from pyvmm.virtio.device import VirtioDevice

    user = _user_class(spec)
    device_class = user.load(VirtioDevice, "derive it from QueueDevice")  # type: ignore[type-abstract]
    device = user.make(device_class)
    _check(spec, device)
    return device_class, device


def _wrong(message: str, *, cure: str = "") -> ConfigError:
    return ConfigError(message, cure=cure, option=OPTION)


def _check(spec: Spec, device: VirtioDevice) -> None:
    """Refuse what the transport could not work with, before there is a machine."""
    from pyvmm.virtio import features
    from pyvmm.virtio.device import VirtioDevice
    from pyvmm.virtio.negotiation import RESERVED_BITS, SUPPORTED_RESERVED_BITS
    from pyvmm.virtio.queue.state import QUEUE_SIZE_LIMIT, is_valid_size

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
    resettable = features.has(offered, features.VIRTIO_F_RING_RESET)
    if resettable and type(device).reset_queue is VirtioDevice.reset_queue:
        raise _wrong(f"{spec} offers VIRTIO_F_RING_RESET, but has no reset_queue")
