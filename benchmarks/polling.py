"""pyvmm whose disks poll for another time than the usual one, for guest_disk.py:

python benchmarks/polling.py MICROSECONDS -m pyvmm run ...
"""

from __future__ import annotations

import runpy
import sys

from pyvmm.monitor import polling

if __name__ == "__main__":
    microseconds, _, module = sys.argv[1:4]
    polling.poll_ns = lambda cpus: int(microseconds) * 1000
    sys.argv[1:4] = []
    runpy.run_module(module, run_name="__main__", alter_sys=True)
