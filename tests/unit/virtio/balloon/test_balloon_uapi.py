"""The balloon device's numbers and structures against the system's own headers."""

from __future__ import annotations

from pathlib import Path

from c_claims import assert_in_c, needs_headers

from pyvmm.virtio.balloon import uapi

HEADERS = ("linux/virtio_balloon.h", "linux/virtio_ids.h")
pytestmark = needs_headers(HEADERS)


def test_every_number_is_the_headers(tmp_path: Path) -> None:
    names = [name for name in vars(uapi) if name.startswith("VIRTIO_")]
    assert len(names) >= 18
    assert_in_c(tmp_path, HEADERS, [f"{name} == {getattr(uapi, name)}" for name in names])


def test_every_feature_and_statistic_has_its_name() -> None:
    bits = {bit: name for name, bit in vars(uapi).items() if name.startswith("VIRTIO_BALLOON_F_")}
    assert bits == uapi.FEATURE_NAMES
    tags = {tag for name, tag in vars(uapi).items() if name.startswith("VIRTIO_BALLOON_S_")}
    assert tags == set(uapi.STAT_NAMES)


def test_structures_lie_as_the_kernels(tmp_path: Path) -> None:
    config, stat = "struct virtio_balloon_config", "struct virtio_balloon_stat"
    assert_in_c(
        tmp_path,
        HEADERS,
        [
            f"sizeof({config}) == {uapi.CONFIG.size}",
            f"__builtin_offsetof({config}, actual) == {uapi.ACTUAL_OFFSET}",
            f"__builtin_offsetof({config}, free_page_hint_cmd_id) == 8",
            f"__builtin_offsetof({config}, poison_val) == {uapi.POISON_VAL_OFFSET}",
            f"sizeof({stat}) == {uapi.STAT.size}",
            f"__builtin_offsetof({stat}, val) == 2",
        ],
    )
