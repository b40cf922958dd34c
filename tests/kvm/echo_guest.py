"""A guest of 126 bytes: says "ready" on its serial port, and then what it is told.

Told "O" it powers off, "R" resets, "P" says what a kernel that panics says, and resets.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from boot_images import Elf, Load

CODE = bytes.fromhex(
    # start: xor ebx,ebx; lea rsi,[hello]
    "31db 488d3547000000"
    # print: lodsb; mov dx,0x3f8; test al,al; jz done; out dx,al; jmp print
    "ac 66baf803 84c0 7403 ee ebf4"
    # done: test ebx,ebx; jnz reset
    "85db 7528"
    # again: mov dx,0x3fd; in al,dx; test al,1 (LSR: data ready); jz again
    "66bafd03 ec a801 74f7"
    # mov dx,0x3f8; in al,dx; cmp al,'R'; je reset; cmp al,'P'; je panic; cmp al,'O'; je off
    "66baf803 ec 3c52 7416 3c50 7407 3c4f 7414"
    # out dx,al; jmp again
    "ee ebe3"
    # panic: inc ebx; lea rsi,[panicked]; jmp print
    "ffc3 488d3519000000 ebc8"
    # reset: mov al,0xfe; out 0x64,al; jmp reset
    "b0fe e664 ebfa"
    # off: mov dx,0x600; mov al,5 << 2 | 0x20; out dx,al; jmp off
    "66ba0006 b034 ee ebf7"
)
HELLO = b"ready\r\n\0"
PANICKED = b"Kernel panic - not syncing: asked for\r\n\0"

# lidt [of no length]; ud2
TRIPLE_FAULT = bytes.fromhex("0f011d02000000 0f0b") + bytes(10)


def echo_kernel(folder: Path) -> str:
    """The path of its kernel, which is written into `folder`."""
    return _kernel(folder / "echo", CODE + HELLO + PANICKED)


def faulting_kernel(folder: Path) -> str:
    """The path of a kernel that triple-faults, which is written into `folder`."""
    return _kernel(folder / "faulting", TRIPLE_FAULT)


def _kernel(path: Path, code: bytes) -> str:
    path.write_bytes(Elf(loads=[Load(data=code.ljust(256, b"\x90"))], note=None).build())
    return str(path)


def stop_process(pid: int) -> None:
    """Have the process stand still; on return all of its threads do."""
    os.kill(pid, signal.SIGSTOP)
    for task in Path(f"/proc/{pid}/task").iterdir():
        while (task / "stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.01)
