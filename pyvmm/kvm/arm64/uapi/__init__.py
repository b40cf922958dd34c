"""<linux/kvm.h> as it is on arm64, <asm/kvm.h> included: names unchanged, as in pyvmm.kvm.uapi.

`ffi` knows the structures of arm64: ``ffi.new("struct kvm_one_reg *")``.
"""

from pyvmm.kvm.arm64.uapi import structures
from pyvmm.kvm.arm64.uapi.constants import *  # noqa: F403
from pyvmm.kvm.arm64.uapi.ioctls import *  # noqa: F403
from pyvmm.kvm.uapi.constants import *  # noqa: F403
from pyvmm.kvm.uapi.ioctls import *  # noqa: F403

ffi = structures.ffi
