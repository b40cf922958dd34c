"""<linux/kvm.h> as it is on x86, <asm/kvm.h> included: names unchanged, as in pyvmm.kvm.uapi.

`ffi` knows the structures of x86: ``ffi.new("struct kvm_regs *")``.
"""

from pyvmm.kvm.uapi.constants import *  # noqa: F403
from pyvmm.kvm.uapi.ioctls import *  # noqa: F403
from pyvmm.kvm.x86.uapi.constants import *  # noqa: F403
from pyvmm.kvm.x86.uapi.ioctls import *  # noqa: F403
from pyvmm.kvm.x86.uapi.structures import ffi as ffi
