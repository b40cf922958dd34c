"""The kernel's interface as data: <linux/kvm.h> in Python, names unchanged.

What is the same on every architecture; x86 has its own beside its other modules (kvm/x86/uapi).

`constants` and `ioctls` are numbers; `ffi` knows the structures: ``ffi.new("struct kvm_run *")``.
"""

from pyvmm.kvm.uapi.constants import *  # noqa: F403
from pyvmm.kvm.uapi.ioctls import *  # noqa: F403
from pyvmm.kvm.uapi.structures import ffi as ffi
