"""The registers of virtio-mmio, version 2, one row each (virtio 1.3, 4.2.2 Table 4.1).

Dispatch, traces and docs/registers.md come from this table. To write the latter:
``python -m pyvmm.transport.mmio_registers > docs/registers.md``.
"""

from __future__ import annotations

from typing import NamedTuple

from pyvmm.virtio.status import (
    ALWAYS,
    CONFIG_GATE,
    FEATURES_GATE,
    NOTIFY_GATE,
    QUEUE_CHANGE_GATE,
    QUEUE_RESET_GATE,
    Gate,
)

CONFIG = 0x100
QUEUE_NOTIFY = 0x050  # an ioeventfd is registered there


class Register(NamedTuple):
    """One register.

    `offset` is from the base of the device's range, `access` ``"R"``, ``"W"`` or ``"RW"``, `gate`
    when a write is taken. `handler` names the methods ``read_…`` and ``write_…`` of MmioTransport,
    `argument` is passed to them. `linux` is the name in <linux/virtio_mmio.h> after
    ``VIRTIO_MMIO_``, empty where it has none. `decode` says how a trace shows the value. `width` is
    in bytes, 0 for any. Writes to a `locked` register happen one after the other; those that a
    driver makes for each request or interrupt are not, so that they never wait for a reset.
    """

    offset: int
    name: str
    access: str
    gate: Gate
    handler: str
    linux: str
    purpose: str
    decode: str = ""
    argument: tuple[str, int] | None = None
    width: int = 4
    locked: bool = True


REGISTERS = (
    Register(0x000, "MagicValue", "R", ALWAYS, "magic", "MAGIC_VALUE", '"virt"'),
    Register(0x004, "Version", "R", ALWAYS, "version", "VERSION", "2"),
    Register(0x008, "DeviceID", "R", ALWAYS, "device_id", "DEVICE_ID", "device type, chapter 5"),
    Register(0x00C, "VendorID", "R", ALWAYS, "vendor_id", "VENDOR_ID", '"PVMM"'),
    Register(
        0x010, "DeviceFeatures", "R", ALWAYS, "device_features", "DEVICE_FEATURES",
        "32 of the bits that the device offers", "device features",
    ),
    Register(
        0x014, "DeviceFeaturesSel", "W", ALWAYS, "device_features_select", "DEVICE_FEATURES_SEL",
        "which 32 of them",
    ),
    Register(
        0x020, "DriverFeatures", "W", FEATURES_GATE, "driver_features", "DRIVER_FEATURES",
        "32 of the bits that the driver accepts", "driver features",
    ),
    Register(
        0x024, "DriverFeaturesSel", "W", ALWAYS, "driver_features_select", "DRIVER_FEATURES_SEL",
        "which 32 of them",
    ),
    Register(
        0x030, "QueueSel", "W", ALWAYS, "queue_select", "QUEUE_SEL",
        "the queue that the other Queue… registers are about",
    ),
    Register(
        0x034, "QueueSizeMax", "R", ALWAYS, "queue_size_max", "QUEUE_NUM_MAX",
        "its largest size; 0: no such queue",
    ),
    Register(
        0x038, "QueueSize", "W", QUEUE_CHANGE_GATE, "queue_size", "QUEUE_NUM",
        "its size; in a split ring a power of two",
    ),
    Register(
        0x044, "QueueReady", "RW", ALWAYS, "queue_ready", "QUEUE_READY",
        "1 enables it, where QueueSize could be written; 0 stops it, at any time",
    ),
    Register(
        QUEUE_NOTIFY, "QueueNotify", "W", NOTIFY_GATE, "queue_notify", "QUEUE_NOTIFY",
        "the queue that has new buffers; KVM takes it as an ioeventfd", locked=False,
    ),
    Register(
        0x060, "InterruptStatus", "R", ALWAYS, "interrupt_status", "INTERRUPT_STATUS",
        "why the device interrupts", "interrupt",
    ),
    Register(
        0x064, "InterruptACK", "W", ALWAYS, "interrupt_ack", "INTERRUPT_ACK",
        "what of it the driver has handled", "interrupt", locked=False,
    ),
    Register(
        0x070, "Status", "RW", ALWAYS, "status", "STATUS",
        "the device status; legal steps only; 0 resets", "status",
    ),
    Register(
        0x080, "QueueDescLow", "W", QUEUE_CHANGE_GATE, "queue_address", "QUEUE_DESC_LOW",
        "descriptor table", argument=("desc_addr", 0),
    ),
    Register(
        0x084, "QueueDescHigh", "W", QUEUE_CHANGE_GATE, "queue_address", "QUEUE_DESC_HIGH",
        "descriptor table", argument=("desc_addr", 32),
    ),
    Register(
        0x090, "QueueDriverLow", "W", QUEUE_CHANGE_GATE, "queue_address", "QUEUE_AVAIL_LOW",
        "available ring", argument=("avail_addr", 0),
    ),
    Register(
        0x094, "QueueDriverHigh", "W", QUEUE_CHANGE_GATE, "queue_address", "QUEUE_AVAIL_HIGH",
        "available ring", argument=("avail_addr", 32),
    ),
    Register(
        0x0A0, "QueueDeviceLow", "W", QUEUE_CHANGE_GATE, "queue_address", "QUEUE_USED_LOW",
        "used ring", argument=("used_addr", 0),
    ),
    Register(
        0x0A4, "QueueDeviceHigh", "W", QUEUE_CHANGE_GATE, "queue_address", "QUEUE_USED_HIGH",
        "used ring", argument=("used_addr", 32),
    ),
    Register(
        0x0AC, "SHMSel", "W", ALWAYS, "shm_select", "SHM_SEL",
        "a shared memory region; no device has one",
    ),
    Register(0x0B0, "SHMLenLow", "R", ALWAYS, "shm", "SHM_LEN_LOW", "-1: no such region"),
    Register(0x0B4, "SHMLenHigh", "R", ALWAYS, "shm", "SHM_LEN_HIGH", "-1: no such region"),
    Register(0x0B8, "SHMBaseLow", "R", ALWAYS, "shm", "SHM_BASE_LOW", "-1: no such region"),
    Register(0x0BC, "SHMBaseHigh", "R", ALWAYS, "shm", "SHM_BASE_HIGH", "-1: no such region"),
    Register(
        0x0C0, "QueueReset", "RW", QUEUE_RESET_GATE, "queue_reset", "",
        "1 resets the queue, with VIRTIO_F_RING_RESET, and is read as long as that goes on",
    ),
    Register(
        0x0FC, "ConfigGeneration", "R", ALWAYS, "config_generation", "CONFIG_GENERATION",
        "changes when the configuration space may have",
    ),
    Register(
        CONFIG, "Config", "RW", CONFIG_GATE, "config", "CONFIG",
        "the device's configuration space, accessed by 1, 2, 4 or 8 bytes", width=0,
    ),
)  # fmt: skip
"""All registers in the order of their offsets."""

BY_OFFSET = {row.offset: row for row in REGISTERS}


def markdown() -> str:
    """The table as docs/registers.md has it."""
    lines = [
        "# virtio-mmio registers",
        "",
        "Written by `python -m pyvmm.transport.mmio_registers` from the table that the transport",
        "dispatches by; a test compares the two. Names as in virtio 1.3, 4.2.2 MMIO Device",
        "Register Layout. A write at another time than the one given, a write to an R register,",
        "or an access of another width changes nothing but a counter of warnings.",
        "",
        "| offset | name | access | bytes | writes are taken | meaning | `VIRTIO_MMIO_` |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in REGISTERS:
        width = str(row.width) if row.width else "1, 2, 4, 8"
        when = row.gate.when if "W" in row.access else ""
        linux = f"`{row.linux}`" if row.linux else ""
        lines.append(
            f"| {row.offset:#05x} | {row.name} | {row.access} | {width} | {when}"
            f" | {row.purpose} | {linux} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
