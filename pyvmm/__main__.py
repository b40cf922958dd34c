"""`python -m pyvmm` is `pyvmm`."""

import signal

# What a command has of a Ctrl-C before there is anything to clean up, as early as can be: see
# pyvmm.cli.interrupts.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from pyvmm.host import own_python

own_python.leave_current_directory(as_module=True)

from pyvmm.cli import main  # noqa: E402

main()
