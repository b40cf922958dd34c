"""The console device's numbers and structures against the system's own headers."""

from __future__ import annotations

from pathlib import Path

from c_claims import assert_in_c, needs_headers

from pyvmm.virtio.console import uapi

HEADERS = ("linux/virtio_console.h", "linux/virtio_ids.h")
pytestmark = needs_headers(HEADERS)


def test_every_number_is_the_headers(tmp_path: Path) -> None:
    names = {name for name in vars(uapi) if name.startswith("VIRTIO_")}
    assert len(names) >= 11
    assert_in_c(tmp_path, HEADERS, [f"{name} == {getattr(uapi, name)}" for name in sorted(names)])


def test_every_feature_has_its_name() -> None:
    names = {n: bit for n, bit in vars(uapi).items() if n.startswith("VIRTIO_CONSOLE_F_")}
    assert {bit: name for name, bit in names.items()} == uapi.FEATURE_NAMES


def test_structures_lie_as_the_kernels(tmp_path: Path) -> None:
    config, control = "struct virtio_console_config", "struct virtio_console_control"
    offset = f"__builtin_offsetof({config}, emerg_wr)"
    assert_in_c(
        tmp_path,
        HEADERS,
        [
            f"sizeof({config}) == {uapi.CONFIG.size}",
            f"{offset} == {uapi.EMERG_WR_OFFSET}",
            f"__builtin_offsetof({config}, max_nr_ports) == 4",
            f"sizeof({control}) == {uapi.CONTROL.size}",
            f"__builtin_offsetof({control}, event) == 4",
            f"__builtin_offsetof({control}, value) == 6",
        ],
    )


def test_queues_of_ports() -> None:
    assert [uapi.receive_queue(port) for port in range(4)] == [0, 4, 6, 8]
