"""The requirements of 5.4 Entropy Device that bind the device."""

from __future__ import annotations

import pytest
from rings import RINGS, offering

from pyvmm.testing import attached
from pyvmm.virtio.rng.device import EntropyDevice


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("size", [1, 2, 64, 4096, 300_000])
def test_5_4_6_2_one_or_more_random_bytes_are_placed_into_the_buffer(ring, size):
    with attached(offering(ring, EntropyDevice()), ring=ring) as driver:
        answer = driver.request([], [size])
        assert 1 <= answer.written <= size
        if size >= 64:  # shorter ones may well be all zeros
            assert answer.data.strip(b"\0")
        assert not answer.buffers[answer.written :].strip(b"\0")
