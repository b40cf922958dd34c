"""`python -m pyvmm` is `pyvmm`."""

import os
import sys
from contextlib import suppress

# Python would look there first for what is imported later, when it may be a guest's (--share).
with suppress(OSError):
    if sys.path[:1] == [os.getcwd()]:
        del sys.path[0]

from pyvmm.cli import main

main()
