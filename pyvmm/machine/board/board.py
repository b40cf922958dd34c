"""The machine of one architecture: the interface between that and the rest of a machine.

The rest puts together memory, buses, virtio devices and threads, and asks the board for all that
differs. An implementation for each architecture is in a folder beside this module; the registry
chooses (docs/decisions/0350-boards.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

from pyvmm.bus import Bus
from pyvmm.errors import ConfigError
from pyvmm.host.saved import Saved
from pyvmm.kvm.capabilities import Requirement
from pyvmm.kvm.system import Kvm
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.vm import Vm
from pyvmm.memory import GuestMemory

if TYPE_CHECKING:  # also because a Protocol costs a start 0.1 ms
    from typing import Protocol

    from pyvmm.kvm.probe import ProbeGuest
    from pyvmm.machine.messages import Messages
    from pyvmm.platform.console_pump import InputPort

    class Entry(Protocol):
        """The start of the first vCPU. Only the board that made it knows more of it than this:
        `cmdline` is what the kernel was given."""

        @property
        def cmdline(self) -> str: ...

    class SerialPort(InputPort, Protocol):
        """The console that every machine has: keys go in as with any InputPort."""

        def close(self) -> None:
            """End what works for it; the guest must be stopped."""

    class Component(Protocol):
        """The parts of a board, beside vCPUs and interrupt controllers, that have state."""

        def save(self) -> dict[str, Any]:
            """As plain data; the machine stands still."""

        def restore(self, saved: Saved) -> None:
            """Restore what `save` gave, before the machine runs. Raises ConfigError."""

    class PowerButton(Protocol):
        """Asks the guest's kernel to power off."""

        def is_watched(self) -> bool:
            """True if a driver of the guest would notice. Raises HostError."""

        def press(self) -> None:
            """Raises HostError."""


class VirtioSlot(NamedTuple):
    """A virtio-mmio device's place: guest-physical base, size in bytes, and its GSI."""

    base: int
    size: int
    gsi: int


class PciPlaces(NamedTuple):
    """The places of a PCI host bridge: guest-physical addresses of the configuration spaces (ECAM)
    and of the window in which BARs lie, with its size in bytes, and the first of the I/O ports for
    configuration accesses, if there are any. Where devices can come and go, `slots_port` is the
    first I/O port of pyvmm.pci.slots, and the GSI tells of changes."""

    ecam: int
    window: int
    window_size: int
    config_port: int | None
    slots_port: int | None = None
    slots_gsi: int = 0


class Core(NamedTuple):
    """The parts that a board has put together. `power_button` is None on a machine without one;
    `platform` are all its devices that are not virtio, by names that a saved state has."""

    vcpus: tuple[Vcpu, ...]
    serial: SerialPort
    power_button: PowerButton | None
    platform: Mapping[str, Component] = MappingProxyType({})


E = TypeVar("E", bound="Entry")


class Board(ABC, Generic[E]):
    """A machine of one architecture. It has no state of its own; `E` is how its vCPUs start.

    The methods stand in the order in which they are called.
    """

    console: ClassVar[str]
    """The guest's kernel's name of the serial port: "ttyS0"."""

    early_console: ClassVar[str]
    """The kernel's parameter by which it speaks on that port before it has a driver for it."""

    kernel_parameters: ClassVar[tuple[str, ...]]
    """The words that every kernel's command line needs on this machine."""

    kernel_files: ClassVar[tuple[str, ...]]
    """The paths of a kernel in the tree in which it is built, in several forms."""

    found_by: ClassVar[Mapping[str, tuple[str, ...]]]
    """The options of a kernel's configuration by which it finds the devices on "mmio" or "pci", or
    the "serial" port: one of them is enough. What all kernels have is left out."""

    # --- what needs no KVM: memory, and the kernel in it ------------------------------------------

    @abstractmethod
    def ram_ranges(self, size: int) -> list[tuple[int, int]]:
        """The places of `size` bytes of RAM, whole MiB: (guest-physical address, bytes),
        ascending."""

    @abstractmethod
    def mapped_files(self, ram: int) -> range:
        """The guest-physical addresses that files may have as memory, in a guest with `ram` bytes
        of RAM. It begins at a whole GiB."""

    @abstractmethod
    def virtio_slots(self, count: int) -> tuple[VirtioSlot, ...]:
        """The first `count` places, in the order in which Linux names the devices behind them;
        spec.MAX_DEVICES at least. Raises ValueError for more than there are."""

    @property
    def pci_places(self) -> PciPlaces | None:
        """The places of the PCI host bridge, which every machine has; None if none can."""
        return None

    @abstractmethod
    def load(
        self,
        memory: GuestMemory,
        *,
        kernel: str,
        initrd: str | None,
        cmdline: str,
        cpus: int,
        slots: Sequence[VirtioSlot],
        discovery: str,
        memory_window: range = range(0),
    ) -> E:
        """Put kernel, initrd and all tables that the guest looks for into fresh `memory`.

        `kernel` and `initrd` are paths. `discovery`, one of spec.DISCOVERY, is how the guest is
        told of the devices in `slots`. In the guest-physical addresses of `memory_window` PCI
        devices have BARs that are memory. Raises ConfigError that names the option at fault.
        """

    @abstractmethod
    def kernel_release(self, path: str) -> str:
        """The release of the kernel in the file at `path` (uname -r), whose modules have that
        in them as well; "" if it does not say. Raises ConfigError for what is not a kernel."""

    @abstractmethod
    def kernel_config(self, path: str) -> str:
        """The text of the configuration that is in the kernel at `path`; "" if it has none. Raises
        ConfigError for what is not a kernel, or is damaged; OSError."""

    @abstractmethod
    def unpack_kernel(self, path: str, target: str) -> None:
        """Write the kernel that is compressed in the file at `path`, as distributions have it, to
        `target`. Raises ConfigError."""

    # --- the machine around KVM -------------------------------------------------------------------

    @property
    @abstractmethod
    def requirements(self) -> Sequence[Requirement]:
        """The capabilities of KVM that it needs beyond those of every architecture."""

    @abstractmethod
    def probe_guest(self, kvm: Kvm) -> ProbeGuest:
        """A guest that finds out whether `kvm` runs kernels. Raises HostError."""

    @abstractmethod
    def address_bits(self, kvm: Kvm) -> int:
        """The number of bits of a guest-physical address. Raises HostError."""

    @abstractmethod
    def create_vm(self, kvm: Kvm, memory: GuestMemory) -> Vm:
        """A VM that can have `memory`, which is not its own yet. Raises HostError, and ConfigError
        for more memory than a guest can have here."""

    def messages(self, vm: Vm) -> Messages:
        """Carries the messages of PCI devices to the interrupt controllers, which `vm` has. Of a
        board with `pci_places`."""
        raise NotImplementedError

    @abstractmethod
    def build(
        self,
        kvm: Kvm,
        vm: Vm,
        *,
        entry: E | None,
        cpus: int,
        ports: Bus,
        mmio: Bus,
        sink: Callable[[bytes], None],
        closing: ExitStack,
    ) -> Core:
        """Give `vm`, which has its memory, interrupt controllers, vCPUs and the platform's devices.

        The devices answer on `ports` or `mmio`, the serial port writes to `sink`. The first vCPU
        stands at `entry`, the others wait for it; with None all wait for `restore`. Interrupts of
        `virtio_slots` can be wired up by irqfd afterwards. `closing` undoes all of it in reverse
        order. Raises ConfigError or HostError.
        """

    # --- saved and restored -----------------------------------------------------------------------

    def save(
        self, kvm: Kvm, vm: Vm, on_vcpus: Callable[[Callable[[Vcpu], Any]], list[Any]]
    ) -> dict[str, Any]:
        """The vCPUs and interrupt controllers of a machine that stands still, as plain data.
        `on_vcpus` has a function called with each vCPU, in its thread. Raises ConfigError for what
        cannot be saved, HostError."""
        raise ConfigError("machines of this architecture cannot be saved")

    def check_saved(self, kvm: Kvm, saved: Saved, cpus: int) -> None:
        """Raise ConfigError, which names them, for abilities of KVM or of the processor that the
        machine with so many vCPUs has used which `save` has saved, and which are not here. Nothing
        need be built for it. Raises HostError."""

    def restore(
        self,
        kvm: Kvm,
        vm: Vm,
        vcpus: Sequence[Vcpu],
        saved: Saved,
        warn: Callable[[str], None],
    ) -> None:
        """Restore what `save` gave, to a machine that was built with the same number of vCPUs.
        `warn` hears of what is not as it was. Raises ConfigError for what cannot be, or not here;
        HostError."""
        raise ConfigError("machines of this architecture cannot be restored")

    def start_clock(self, vm: Vm, saved: Saved) -> None:
        """The guest's vCPUs are about to run for the first time since `restore` was given `saved`:
        its clock goes on from now, where KVM has one for it. Raises ConfigError, HostError."""

    def import_restoring(self) -> None:
        """Import what `restore` does, before this process forks: it is there once then."""

    def tell_of_copy(self, vm: Vm, memory: GuestMemory) -> None:
        """The guest in `memory` goes on as a copy of another one, which its kernel is to know: its
        random numbers must not be the same. Raises HostError."""

    @abstractmethod
    def state_lines(self, vcpu: Vcpu, read: Callable[[int, int], bytes]) -> Iterator[str]:
        """The state of a vCPU that cannot go on, for its report, a line at a time. `read` reads
        guest-physical memory. A part that cannot be had says so in its line."""
