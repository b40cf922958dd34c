"""The machine's view of every transport, tried with the one over MMIO."""

from __future__ import annotations

from mmio_harness import QUEUE_NOTIFY, Bench, RecordingDevice


def test_a_doorbell_and_its_kick_are_the_same() -> None:
    """KVM may catch the write and signal the kick; a write that arrives does it too."""
    bench = Bench(RecordingDevice())
    bench.go_live()
    transport = bench.transport
    assert [bell.offset for bell in transport.doorbells] == [QUEUE_NOTIFY, QUEUE_NOTIFY]
    assert [bell.kick for bell in transport.doorbells] == transport.kicks
    for bell in transport.doorbells:
        transport.write(bell.offset, bell.size, bell.match)
        assert [kick.drain() for kick in transport.kicks] == [
            int(kick is bell.kick) for kick in transport.kicks
        ]
    transport.close()
