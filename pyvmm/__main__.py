"""`python -m pyvmm` is `pyvmm`."""

from pyvmm.host import own_python

own_python.leave_current_directory(as_module=True)

from pyvmm.cli import main  # noqa: E402

main()
