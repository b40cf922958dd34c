/*
 * The plain C loop that pyvmm's loop is measured against: native_kvm.py compiles and runs it.
 *
 *   native_kvm port|mmio ROUNDS EXITS    prints microseconds per exit, one line per round
 *
 * The guest is the same as in native_kvm.py, and so is the work per exit: look at the reason, find
 * the device among eight ranges, call it.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

#define RAM_SIZE 0x10000
#define CODE 0x1000
#define RANGES 8
#define RANGE_STRIDE 0x1000
#define RANGE_SIZE 8

static volatile uint64_t written;

static void device_write(uint64_t offset, unsigned size, uint64_t value)
{
	written += offset + size + value;
}

struct range {
	uint64_t start, end;
	void (*write)(uint64_t, unsigned, uint64_t);
};

static void bus_write(const struct range *bus, uint64_t address, unsigned size, uint64_t value)
{
	for (int i = 0; i < RANGES; i++)
		if (address >= bus[i].start && address + size <= bus[i].end) {
			bus[i].write(address - bus[i].start, size, value);
			return;
		}
}

static void check(int result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
}

/* CPU time of this thread, in microseconds */
static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

/* 32-bit protected mode, flat segments, no paging */
static void set_up(int vcpu)
{
	struct kvm_sregs sregs;
	struct kvm_regs regs = { .rip = CODE, .rflags = 2 };

	check(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs = (struct kvm_segment){ .limit = ~0u, .selector = 0x10, .type = 0xb,
					 .present = 1, .db = 1, .s = 1, .g = 1 };
	sregs.ds = sregs.cs;
	sregs.ds.selector = 0x18;
	sregs.ds.type = 3;
	sregs.es = sregs.fs = sregs.gs = sregs.ss = sregs.ds;
	sregs.cr0 = 0x11;
	check(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	check(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static void serve(struct kvm_run *run, const struct range *bus)
{
	uint64_t value = 0;

	switch (run->exit_reason) {
	case KVM_EXIT_IO:
		memcpy(&value, (char *)run + run->io.data_offset, run->io.size);
		bus_write(bus, run->io.port, run->io.size, value);
		break;
	case KVM_EXIT_MMIO:
		memcpy(&value, run->mmio.data, run->mmio.len);
		bus_write(bus, run->mmio.phys_addr, run->mmio.len, value);
		break;
	default:
		fprintf(stderr, "unexpected exit %u\n", run->exit_reason);
		exit(1);
	}
}

int main(int argc, char **argv)
{
	/* mov dx, 0x3f8; again: out dx, al; jmp again */
	static const unsigned char port[] = "\x66\xba\xf8\x03\xee\xeb\xfd";
	/* mov edi, 0xd0000000; again: mov [edi], eax; jmp again */
	static const unsigned char mmio[] = "\xbf\x00\x00\x00\xd0\x89\x07\xeb\xfc";
	struct range bus[RANGES];

	if (argc != 4)
		return 2;
	int is_port = !strcmp(argv[1], "port");
	int rounds = atoi(argv[2]), exits = atoi(argv[3]);

	for (int i = 0; i < RANGES; i++) {
		bus[i].start = (is_port ? 0x3f8u : 0xd0000000u) + i * RANGE_STRIDE;
		bus[i].end = bus[i].start + RANGE_SIZE;
		bus[i].write = device_write;
	}

	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	check(kvm, "/dev/kvm");
	int vm = ioctl(kvm, KVM_CREATE_VM, 0);
	check(vm, "KVM_CREATE_VM");
	check(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000), "KVM_SET_TSS_ADDR");
	check(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
	char *ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (ram == MAP_FAILED)
		return 1;
	memcpy(ram + CODE, is_port ? port : mmio, is_port ? sizeof(port) : sizeof(mmio));
	struct kvm_userspace_memory_region region = { .memory_size = RAM_SIZE,
						      .userspace_addr = (uintptr_t)ram };
	check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
	int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	check(vcpu, "KVM_CREATE_VCPU");
	int size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		return 1;
	set_up(vcpu);

	/* Each round waits for a line, so that native_kvm.py can take turns. */
	for (int round = 0; round < rounds; round++) {
		char line[16];

		if (!fgets(line, sizeof(line), stdin))
			return 0;
		double start = now();
		for (int i = 0; i < exits; i++) {
			check(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
			serve(run, bus);
		}
		printf("%f\n", (now() - start) / exits);
		fflush(stdout);
	}
	return 0;
}
