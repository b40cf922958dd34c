"""The device tree of an arm64 guest: what Linux is told of the machine.

Bindings: Linux Documentation/devicetree/bindings, by the `compatible` of each node; the properties
that every node may have: Devicetree Specification v0.4, chapters 2 and 3.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from pyvmm.boot.arm64.fdt import Node, cells, flatten, places, words

# The first cell of an interrupt: whether it is shared or a vCPU's own (arm,gic-v3.yaml).
_SPI, _PPI = 0, 1
_EDGE, _HIGH, _LOW = 1, 4, 8
_GIC, _CLOCK, _MESSAGES, _GPIO = 1, 2, 3, 4  # phandles
# The first cell of a PCI address: a 32-bit one, or a 64-bit one of memory that may be prefetched
# (IEEE Std 1275 PCI Bus Binding, 2.2.1.1).
_PCI_32, _PCI_64_PREFETCH = 0x0200_0000, 0x4300_0000
_REQUESTERS = 0x1_0000
_SEED_SIZE = 64
_CLOCK_HZ = 24_000_000  # of the real-time clock's bus, which nobody measures
_KEY_POWER = 116  # <linux/input-event-codes.h>
_ACTIVE_HIGH = 0  # gpio.txt
_UART_HZ = 1_843_200  # a PC's: the divisor for 115,200 baud is 1


class Gic(NamedTuple):
    """The interrupt controller: of `version` 3 or 2; `reg` are (address, size) of the distributor,
    then of the redistributors or of the CPU interfaces. `messages` is that of what takes the
    messages of PCI devices: of a GICv3's translation service (ITS), or of a GICv2's frame
    (GICv2m)."""

    version: int
    reg: tuple[tuple[int, int], tuple[int, int]]
    messages: tuple[int, int]


class Device(NamedTuple):
    """A device: its registers' address and size, and its interrupt, counted from the first shared
    one on."""

    base: int
    size: int
    spi: int


class PciHost(NamedTuple):
    """A PCI host bridge with one bus: (address, size) of the configuration spaces (ECAM) and of the
    window for BARs, and the addresses of the one for BARs that are memory, which may be empty."""

    ecam: tuple[int, int]
    window: tuple[int, int]
    memory_window: range = range(0)


class Machine(NamedTuple):
    """All that the tree tells but the interrupt controller. `affinities` are the vCPUs' (MPIDR_EL1
    without its flags); `timers` and `pmu` are their own interrupts, counted from 16 on; `clock` is
    the real-time clock's address and size: it interrupts nobody. `button` is the number of the
    line of the `gpio` controller that the power button is on. `generation` is memory with a number
    that is another one in each copy of the guest (VMGenID)."""

    ram: Sequence[tuple[int, int]]
    affinities: Sequence[int]
    serial: Device
    clock: tuple[int, int]
    gpio: Device
    button: int
    generation: Device
    virtio: Sequence[Device]
    timers: tuple[int, int, int, int]
    pmu: int
    cmdline: str
    initrd: tuple[int, int]  # address and size; (0, 0) without one
    pci: PciHost | None = None


def build(machine: Machine, gic: Gic) -> bytes:
    """The flattened tree of `machine` with that interrupt controller."""
    two_and_two = {"#address-cells": cells(2), "#size-cells": cells(2)}
    root = Node(
        "",
        {
            "compatible": words("linux,dummy-virt"),
            "model": words("pyvmm"),
            **two_and_two,
            "interrupt-parent": cells(_GIC),
            "dma-coherent": b"",
        },
    )
    _chosen(root, machine)
    _generation(root, machine.generation)
    for start, size in machine.ram:
        root.child(
            f"memory@{start:x}",
            {"device_type": words("memory"), "reg": places((start, size))},
        )
    _cpus(root, machine)
    root.child(
        "psci",
        {"compatible": words("arm,psci-1.0", "arm,psci-0.2"), "method": words("hvc")},
    )
    _interrupts(root, machine, gic)
    root.child(
        "apb-pclk",
        {
            "compatible": words("fixed-clock"),
            "#clock-cells": cells(0),
            "clock-frequency": cells(_CLOCK_HZ),
            "clock-output-names": words("clk24mhz"),
            "phandle": cells(_CLOCK),
        },
    )
    _devices(root, machine)
    if machine.pci is not None:
        _pci(root, machine.pci)
    return flatten(root)


def _chosen(root: Node, machine: Machine) -> None:
    chosen = {
        "bootargs": words(machine.cmdline),
        "stdout-path": words(f"/serial@{machine.serial.base:x}"),
        "kaslr-seed": os.urandom(8),
        "rng-seed": os.urandom(_SEED_SIZE),
    }
    start, size = machine.initrd
    if size:
        chosen["linux,initrd-start"] = start.to_bytes(8, "big")
        chosen["linux,initrd-end"] = (start + size).to_bytes(8, "big")
    root.child("chosen", chosen)


def _generation(root: Node, place: Device) -> None:
    here = places((place.base, place.size))
    two_and_two = {"#address-cells": cells(2), "#size-cells": cells(2), "ranges": b""}
    # Linux maps as a device's only what is not its RAM.
    reserved = root.child("reserved-memory", two_and_two)
    reserved.child(f"generation@{place.base:x}", {"reg": here, "no-map": b""})
    root.child(
        f"rng@{place.base:x}",
        {
            "compatible": words("microsoft,vmgenid"),
            "reg": here,
            "interrupts": cells(_SPI, place.spi, _EDGE),
        },
    )


def _cpus(root: Node, machine: Machine) -> None:
    cpus = root.child("cpus", {"#address-cells": cells(1), "#size-cells": cells(0)})
    for affinity in machine.affinities:
        cpus.child(
            f"cpu@{affinity:x}",
            {
                "device_type": words("cpu"),
                "compatible": words("arm,armv8"),
                "enable-method": words("psci"),
                "reg": cells(affinity),
            },
        )


def _interrupts(root: Node, machine: Machine, gic: Gic) -> None:
    distributor = gic.reg[0][0]
    controller = root.child(
        f"interrupt-controller@{distributor:x}",
        {
            "compatible": words("arm,gic-v3" if gic.version == 3 else "arm,cortex-a15-gic"),
            **{"#address-cells": cells(2), "#size-cells": cells(2), "ranges": b""},
            "#interrupt-cells": cells(3),
            "interrupt-controller": b"",
            "reg": places(*gic.reg),
            "phandle": cells(_GIC),
        },
    )
    controller.child(
        f"msi-controller@{gic.messages[0]:x}",
        {
            "compatible": words("arm,gic-v3-its" if gic.version == 3 else "arm,gic-v2m-frame"),
            "msi-controller": b"",
            **({"#msi-cells": cells(1)} if gic.version == 3 else {}),
            "reg": places(gic.messages),
            "phandle": cells(_MESSAGES),
        },
    )
    # A GICv2's private interrupts have a bit for each CPU in the last cell; a GICv3's have none.
    everybody = 0 if gic.version == 3 else (1 << min(len(machine.affinities), 8)) - 1 << 8
    root.child(
        "timer",
        {
            "compatible": words("arm,armv8-timer"),
            "always-on": b"",
            "interrupts": b"".join(cells(_PPI, n, everybody | _LOW) for n in machine.timers),
        },
    )
    root.child(
        "pmu",
        {
            "compatible": words("arm,armv8-pmuv3"),
            "interrupts": cells(_PPI, machine.pmu, everybody | _HIGH),
        },
    )


def _devices(root: Node, machine: Machine) -> None:
    serial, (clock, clock_size) = machine.serial, machine.clock
    root.child(
        f"serial@{serial.base:x}",
        {
            "compatible": words("ns16550a"),
            "reg": places((serial.base, serial.size)),
            "clock-frequency": cells(_UART_HZ),
            "interrupts": cells(_SPI, serial.spi, _HIGH),
        },
    )
    root.child(
        f"rtc@{clock:x}",
        {
            "compatible": words("arm,pl031", "arm,primecell"),
            "reg": places((clock, clock_size)),
            "clocks": cells(_CLOCK),
            "clock-names": words("apb_pclk"),
        },
    )
    gpio = machine.gpio
    root.child(
        f"gpio@{gpio.base:x}",
        {
            "compatible": words("arm,pl061", "arm,primecell"),
            "reg": places((gpio.base, gpio.size)),
            "clocks": cells(_CLOCK),
            "clock-names": words("apb_pclk"),
            "interrupts": cells(_SPI, gpio.spi, _HIGH),
            "gpio-controller": b"",
            "#gpio-cells": cells(2),
            "interrupt-controller": b"",
            "#interrupt-cells": cells(2),
            "#address-cells": cells(0),
            "phandle": cells(_GPIO),
        },
    )
    keys = root.child("gpio-keys", {"compatible": words("gpio-keys")})
    keys.child(
        "power-button",
        {
            "label": words("power button"),
            "linux,code": cells(_KEY_POWER),
            "gpios": cells(_GPIO, machine.button, _ACTIVE_HIGH),
        },
    )
    for device in machine.virtio:
        root.child(
            f"virtio_mmio@{device.base:x}",
            {
                "compatible": words("virtio,mmio"),
                "reg": places((device.base, device.size)),
                "interrupts": cells(_SPI, device.spi, _EDGE),
                "dma-coherent": b"",
            },
        )


def _pci(root: Node, host: PciHost) -> None:
    windows = [(_PCI_32, *host.window)]
    if host.memory_window:
        windows.append((_PCI_64_PREFETCH, host.memory_window.start, len(host.memory_window)))
    root.child(
        f"pcie@{host.ecam[0]:x}",
        {
            "compatible": words("pci-host-ecam-generic"),
            "device_type": words("pci"),
            "#address-cells": cells(3),
            "#size-cells": cells(2),
            "bus-range": cells(0, 0),
            "linux,pci-domain": cells(0),
            "reg": places(host.ecam),
            # The same addresses on the bus as on this side of the bridge.
            "ranges": b"".join(
                cells(kind) + start.to_bytes(8, "big") + places((start, size))
                for kind, start, size in windows
            ),
            # Each function is told by its requester id.
            "msi-map": cells(0, _MESSAGES, 0, _REQUESTERS),
            "dma-coherent": b"",
        },
    )
