"""The kernel's interface as data: <linux/kvm.h> in Python, names unchanged.

`constants` and `ioctls` are numbers; `ffi` knows the structures: ``ffi.new("struct kvm_regs *")``.
"""

from pyvmm.kvm.uapi.constants import *  # noqa: F403
from pyvmm.kvm.uapi.ioctls import *  # noqa: F403
from pyvmm.kvm.uapi.x86_structures import ffi as ffi
