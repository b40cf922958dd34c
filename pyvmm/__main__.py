"""`python -m pyvmm` is `pyvmm`."""

from pyvmm.cli import main

main()
