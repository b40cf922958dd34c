// What pyvmm uses of <asm/kvm.h> on arm64: same names, same order.
// Read by build.py, never at run time. tests/unit/kvm compares it with the cross compiler's header.

// <asm/ptrace.h>, for the registers in struct kvm_regs
struct user_pt_regs {
	__u64 regs[31];
	__u64 sp;
	__u64 pc;
	__u64 pstate;
};

struct user_fpsimd_state {
	struct { __u64 low, high; } vregs[32];  // __uint128_t, which cffi does not know
	__u32 fpsr;
	__u32 fpcr;
	__u32 __reserved[2];
};

struct kvm_regs {
	struct user_pt_regs regs;
	__u64 sp_el1;
	__u64 elr_el1;
	__u64 spsr[5];  // KVM_NR_SPSR
	__u64 padding;  // to the 16 bytes of a __uint128_t
	struct user_fpsimd_state fp_regs;
};

struct kvm_vcpu_init {
	__u32 target;
	__u32 features[7];
};

struct kvm_vcpu_events {
	struct {
		__u8 serror_pending;
		__u8 serror_has_esr;
		__u8 ext_dabt_pending;
		__u8 pad[5];
		__u64 serror_esr;
	} exception;
	__u32 reserved[12];
};

// --- <linux/kvm.h>: what is used on arm64 alone -------------------------------------------------

struct kvm_reg_list {
	__u64 n;
	__u64 reg[];
};

struct kvm_one_reg {
	__u64 id;
	__u64 addr;
};

struct kvm_create_device {
	__u32 type;
	__u32 fd;
	__u32 flags;
};

struct kvm_device_attr {
	__u32 flags;
	__u32 group;
	__u64 attr;
	__u64 addr;
};
