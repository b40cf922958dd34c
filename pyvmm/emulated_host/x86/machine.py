"""The x86 machine: an AMD processor with nested paging, emulated by QEMU's TCG."""

from __future__ import annotations

# Loaded before the command's root is mounted, and beside that, by another CPU.
ROOT_MODULES: tuple[str, ...] = (
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "virtio_blk",
)
KVM_MODULES: tuple[str, ...] = ("kvm_amd", "tun", "vhost_net")

SAVES_STATE = True

_KERNEL_PARAMETERS = " ".join(
    (
        "console=ttyS0 quiet panic=-1",
        # TCG translates code anew at each new address: programs that start at the same one each
        # time cost half as much from the second start on.
        "nokaslr norandmaps",
        # There is no hardware whose flaws had to be worked around, and the TSC of an emulated CPU
        # is the machine's own, so the kernel need not doubt it.
        "mitigations=off tsc=reliable no_timer_check",
        # These cost 0.3 s of start-up and are of no use here: self-tests of cryptography, the
        # certificates of modules, tracing of kernel functions.
        "cryptomgr.notests apparmor=0 audit=0",
        "initcall_blacklist=load_system_certificate_list,init_encrypted,init_kprobe_trace",
    )
)

# Without la57 page tables have four levels instead of five, here and in KVM's nested paging.
# QEMU's TCG does not let KVM intercept XSETBV, so a nested kernel finds that the size of its XSAVE
# area disagrees with XCR0: 6.1 warns, 7.x dies of it. Without XSAVE, and what builds on it, all is
# well and context switches are cheaper.
#
# After CMPXCHG16B this QEMU (7.2) takes part of a pointer for the flags, now and then. In a nested
# guest #VMEXIT and VMRUN carry that into RFLAGS for good, up to its VM bit: a double fault. Linux
# 6.12 allocates memory with that instruction and mostly dies of it; without it, it uses a lock.
#
# Where string instructions are said to be fast, Linux copies and clears by `rep movsb` and `rep
# stosb`, which TCG does byte by byte: some 5 times as long as its loops of eight bytes.
_SLOW_STRINGS = "-erms,-fsrm,-fzrm,-fsrs,-fsrc"
CPU = f"max,+svm,+npt,-la57,-xsave,-avx,-avx2,-pku,-cx16,{_SLOW_STRINGS}"


def kernel_parameters(tsc_khz: int | None) -> str:
    """The kernel's command line; `tsc_khz` is the time-stamp counter's frequency, if it is known
    (see `tsc`)."""
    return _KERNEL_PARAMETERS + (f" tsc_early_khz={tsc_khz}" if tsc_khz else "")


def machine_arguments(cpus: int, memory_mib: int) -> list[str]:
    """QEMU's arguments for the machine, its CPUs and its RAM."""
    return [
        *("-machine", "q35"),
        *("-accel", "tcg,thread=multi"),
        *("-cpu", CPU),
        *("-smp", str(cpus)),
        *("-m", str(memory_mib)),
        # Another one for each run, whatever state it goes on from.
        *("-device", "vmgenid,guid=auto"),
    ]
