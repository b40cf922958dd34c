/* The driver of a virtqueue in litmus tests: the device at its other end is ours, in Python
 * (litmus_device.py), on another processor. Both do, round after round, what virtio 1.3 has them do
 * at the same time, each with the accesses and barriers that it is to have:
 *
 *  offer: a buffer becomes available, then the look whether the device wants a kick (2.7.13.4)
 *  wish:  the wish for an interrupt, then the look whether the buffer was used (2.7.7.2)
 *
 * Arguments: file descriptor of the memory, its size, "split" or "packed", queue size, rounds,
 * processor, and the addresses in ADDRESSES below. Each round has two meetings, 2n - 1 and 2n. The
 * device writes the meeting's number to GO, this program does its part some time later and says in
 * ANSWER what it saw. It prints how many replies were not what the used buffer said.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>

enum { DESC, DRIVER, DEVICE, CONTROL, REQUESTS, REPLY, CLUTTER, ADDRESSES };
enum { GO = 0, DONE = 64, ANSWER = 128, SPREAD = 192 }; /* in the control area; a line each */
enum { REPLY_SIZE = 4096, LINE = 64 };
enum { NEXT = 1, WRITE = 2, AVAIL = 1 << 7, USED = 1 << 15, EVENT_DESC = 2 };

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags_or_id, next_or_flags;
};

static char *ram;
static uint64_t address[ADDRESSES], size;
static int packed;

#define AT(type, area, offset) ((_Atomic type *)(ram + address[area] + (offset)))

static uint64_t load(int field) {
    return atomic_load_explicit(AT(uint64_t, CONTROL, field), memory_order_acquire);
}

static void store(int field, uint64_t value) {
    atomic_store_explicit(AT(uint64_t, CONTROL, field), value, memory_order_release);
}

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ull + time.tv_nsec;
}

/* The device is in the middle of its part at some time between now and SPREAD nanoseconds. */
static void meet(uint64_t number) {
    static uint64_t random = 88172645463325252ull;
    for (unsigned looks = 1; load(GO) != number; looks++)
        if (looks % 10000 == 0)
            sched_yield(); /* on a busy machine the device may wait for this processor */
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    uint64_t until = now() + random % (load(SPREAD) + 1);
    while (now() < until)
        ;
}

/* Each round has two descriptors, at a place that moves on: one of the driver's, whose length is
 * the round's too, and one for the reply. */
static uint32_t length_of(uint64_t n) { return 8 + n % 8 * 8; }

static uint64_t request_of(uint64_t n) { return address[REQUESTS] + n % 8 * LINE; }

static int offer_split(uint64_t n) {
    struct descriptor *table = (struct descriptor *)(ram + address[DESC]);
    unsigned head = 2 * n % size;
    table[head] = (struct descriptor){request_of(n), length_of(n), NEXT, head + 1};
    table[head + 1] = (struct descriptor){address[REPLY], REPLY_SIZE, WRITE, 0};
    *AT(uint16_t, DRIVER, 4 + 2 * ((n - 1) % size)) = head;
    atomic_thread_fence(memory_order_release);
    atomic_store_explicit(AT(uint16_t, DRIVER, 2), n, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    /* avail_event */
    return atomic_load_explicit(AT(uint16_t, DEVICE, 4 + 8 * size), memory_order_relaxed) ==
           (uint16_t)(n - 1);
}

static int is_used_split(uint64_t n) {
    return atomic_load_explicit(AT(uint16_t, DEVICE, 2), memory_order_relaxed) == (uint16_t)n;
}

static int wish_split(uint64_t n) {
    atomic_store_explicit(AT(uint16_t, DRIVER, 4 + 2 * size), n - 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    return is_used_split(n);
}

static int is_right_split(uint64_t n) {
    unsigned place = 4 + 8 * ((n - 1) % size);
    return *AT(uint32_t, DEVICE, place) == 2 * n % size &&
           *AT(uint32_t, DEVICE, place + 4) == REPLY_SIZE;
}

/* Of a packed ring, the first slot of the round's two, and its round's wrap counter. */
static unsigned slot_of(uint64_t n) { return 2 * (n - 1) % size; }

static int wrap_of(uint64_t n) { return !(2 * (n - 1) / size % 2); }

static _Atomic uint16_t *flags_of(uint64_t n) {
    return AT(uint16_t, DESC, 16 * slot_of(n) + 14);
}

static int offer_packed(uint64_t n) {
    struct descriptor *ring = (struct descriptor *)(ram + address[DESC]);
    unsigned slot = slot_of(n), id = n % size;
    uint16_t available = wrap_of(n) ? AVAIL : USED;
    ring[slot + 1] = (struct descriptor){address[REPLY], REPLY_SIZE, id, available | WRITE};
    ring[slot].address = request_of(n);
    ring[slot].length = length_of(n);
    ring[slot].flags_or_id = id;
    atomic_thread_fence(memory_order_release);
    atomic_store_explicit(flags_of(n), available | NEXT, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    uint32_t event = atomic_load_explicit(AT(uint32_t, DEVICE, 0), memory_order_relaxed);
    return event == ((uint32_t)EVENT_DESC << 16 | (uint32_t)wrap_of(n) << 15 | slot);
}

static int is_used_packed(uint64_t n) {
    uint16_t flags = atomic_load_explicit(flags_of(n), memory_order_relaxed);
    return (flags & (AVAIL | USED)) == (wrap_of(n) ? AVAIL | USED : 0);
}

static int wish_packed(uint64_t n) {
    uint32_t event = (uint32_t)EVENT_DESC << 16 | (uint32_t)wrap_of(n) << 15 | slot_of(n);
    atomic_store_explicit(AT(uint32_t, DRIVER, 0), event, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    return is_used_packed(n);
}

static int is_right_packed(uint64_t n) {
    struct descriptor *ring = (struct descriptor *)(ram + address[DESC]);
    return ring[slot_of(n)].flags_or_id == n % size && ring[slot_of(n)].length == REPLY_SIZE;
}

int main(int count, char **arguments) {
    if (count != 7 + ADDRESSES)
        return 2;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    size_t bytes = strtoull(arguments[2], NULL, 0);
    ram = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(arguments[1]), 0);
    if (ram == MAP_FAILED)
        return 3;
    packed = strcmp(arguments[3], "packed") == 0;
    size = strtoull(arguments[4], NULL, 0);
    uint64_t rounds = strtoull(arguments[5], NULL, 0);
    cpu_set_t here;
    CPU_ZERO(&here);
    CPU_SET(atoi(arguments[6]), &here);
    if (sched_setaffinity(0, sizeof here, &here))
        return 4;
    for (int n = 0; n < ADDRESSES; n++)
        address[n] = strtoull(arguments[7 + n], NULL, 0);
    uint64_t *reply = (uint64_t *)(ram + address[REPLY]);
    long wrong = 0;
    for (uint64_t n = 1; n <= rounds; n++) {
        /* Lines that this processor has: the device's stores to them take their time. */
        memset(ram + address[CLUTTER], n & 0xFF, REPLY_SIZE);
        memset(reply, 0xEE, REPLY_SIZE);
        meet(2 * n - 1);
        *(uint64_t *)(ram + request_of(n)) = n;
        store(ANSWER, packed ? offer_packed(n) : offer_split(n));
        store(DONE, 2 * n - 1);
        meet(2 * n);
        store(ANSWER, packed ? wish_packed(n) : wish_split(n));
        while (!(packed ? is_used_packed(n) : is_used_split(n)))
            ;
        atomic_thread_fence(memory_order_acquire);
        wrong += !(packed ? is_right_packed(n) : is_right_split(n)) || reply[0] != n ||
                 reply[REPLY_SIZE / 8 - 1] != n;
        store(DONE, 2 * n);
    }
    printf("%ld\n", wrong);
    return 0;
}
