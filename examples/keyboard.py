"""A keyboard that types a text, over and over (virtio 1.3, 5.8 Input Device).

    pyvmm run … --device "examples/keyboard.py:Keyboard,text=all work and no play"

In the guest: `head -n 2 /dev/tty1`. Linux needs its module virtio_input.
"""

import struct
import time

from pyvmm.virtio.device import Activation
from pyvmm.virtio.queue import Queue
from pyvmm.virtio.queue.chain import DescriptorChain
from pyvmm.virtio.worker import QueueDevice, Rest

EVENTQ, STATUSQ = 0, 1  # 5.8.2 Virtqueues
ID_NAME, EV_BITS = 0x01, 0x11  # 5.8.4: what the driver selects
EV_SYN, EV_KEY = 0, 1  # <linux/input-event-codes.h>, as are the codes of the keys
KEYS = {
    character: first + place
    for first, row in ((2, "1234567890-="), (16, "qwertyuiop"), (28, "\n"), (30, "asdfghjkl;'"),
                       (44, "zxcvbnm,./"), (57, " "))
    for place, character in enumerate(row)
}  # fmt: skip


class Keyboard(QueueDevice):
    """Presses a key every `pause` seconds: those of `text`, and Enter at the end."""

    name = "keyboard"
    device_type = 18  # 5.8.1 Device ID
    queue_sizes = (64, 8)

    def __init__(self, text: str = "hello from pyvmm", pause: float = 0.02) -> None:
        self.codes = [KEYS[character] for character in text.lower() + "\n"]
        self.pause = pause
        bits = sum(1 << code for code in set(KEYS.values()))
        self.answers = {
            (ID_NAME, 0): b"pyvmm keyboard",
            (EV_BITS, EV_KEY): bits.to_bytes(8, "little"),
        }
        self.config = bytearray(136)  # 5.8.4: select, subsel, size, 5 reserved, 128 for the answer

    def read_config(self, offset: int, length: int) -> bytes:
        return bytes(self.config[offset : offset + length]).ljust(length, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        selected = self.config[:2]
        selected[offset : offset + len(data)] = data
        select, subsel = selected[:2]
        answer = self.answers.get((select, subsel), b"")  # 5.8.5.2: a size of zero means no
        self.config[:] = bytes([select, subsel, len(answer)]).ljust(8, b"\0") + answer.ljust(
            128, b"\0"
        )

    def activate(self, activation: Activation) -> None:
        self.typed = 0
        self.next_at = time.monotonic()
        super().activate(activation)

    def serve(self, queue: Queue) -> Rest | None:
        if queue.index == STATUSQ:  # 5.8.6: LEDs, of which there are none
            for chain in queue:
                queue.add_used(chain, 0)
            return None
        now = time.monotonic()
        if now >= self.next_at and self.press(queue, self.codes[self.typed % len(self.codes)]):
            self.typed += 1
            self.next_at = now + self.pause
        return Rest(seconds=max(self.next_at - now, self.pause / 10))

    def press(self, queue: Queue, code: int) -> bool:
        """Press and release a key; False if there are too few buffers for the whole sequence."""
        events = [(EV_KEY, code, 1), (EV_SYN, 0, 0), (EV_KEY, code, 0), (EV_SYN, 0, 0)]
        taken: list[DescriptorChain] = []
        for _ in events:
            chain = queue.pop()
            if chain is None:
                for late in reversed(taken):
                    queue.step_back(late)
                return False
            taken.append(chain)
        for chain, event in zip(taken, events, strict=True):
            writer = chain.writer()
            writer.write(struct.pack("<HHL", *event))
            queue.add_used(chain, writer.written)
        return True
