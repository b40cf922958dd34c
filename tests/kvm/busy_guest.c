/* A guest without an operating system that is always busy, and knows when something was lost.
 *
 * It writes sectors of a disk, over virtio-mmio at DISK or over PCI (virtio 1.3, 4.1 and 4.2), reads them
 * back and compares; writes pages of RAM and compares; looks whether its time stamp counter and KVM's clock
 * go on; and counts the interrupts of its local APIC's timer. Other vCPUs count and look at their time stamp
 * counters, in real mode. Told "s" on its serial port it says how it is, "O" powers off; what it is told
 * between it says as well. */
#include <stdint.h>

enum { SIZE = 4, SECTORS = 64, PAGES = 256, SERIAL = 0x3f8, SLEEP = 0x600, TIMER = 0x40, CPUS = 8 };
enum { START_OTHERS = 0x10000, OTHERS = 0x11000 };
static const uint64_t ECAM = 0xe0000000, WINDOW = 0xc0000000, APIC = 0xfee00000;

struct descriptor { uint64_t address; uint32_t length; uint16_t flags, next; };
static struct queue {
    struct descriptor table[SIZE];
    volatile struct { uint16_t flags, index, ring[SIZE], event; } available;
    volatile struct { uint16_t flags, index; struct { uint32_t id, length; } ring[SIZE]; } used;
} __attribute__((aligned(16))) queue;
static struct { uint32_t type, reserved; uint64_t sector; } header;
static uint64_t written[64], expected[SECTORS];
static uint64_t *const data = (uint64_t *)0x2000000; /* which the device alone writes */
static volatile uint8_t status;
static uint64_t (*const pages)[512] = (void *)0x1000000; /* which no device touches */
static uint64_t page_values[PAGES];
static uint64_t doorbell;
static int is_pci;
static volatile uint64_t ticks;
static uint64_t rounds, lost, backwards, failed, last_tsc, last_clock;
static volatile struct { uint32_t version, pad; uint64_t tsc, system; uint32_t mul; int8_t shift; uint8_t flags, more[2]; }
    clock __attribute__((aligned(64)));
static int has_clock;
static struct { uint16_t low, selector, flags, middle; uint32_t high, reserved; } gates[TIMER + 1];

struct other { volatile uint32_t count, backwards, low, high; };

static void out(uint16_t port, uint8_t value) { asm volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }

static uint8_t in(uint16_t port)
{
    uint8_t value;
    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static void cpuid(uint32_t leaf, uint32_t *a, uint32_t *b, uint32_t *c, uint32_t *d)
{
    asm volatile("cpuid" : "=a"(*a), "=b"(*b), "=c"(*c), "=d"(*d) : "a"(leaf), "c"(0));
}

static uint64_t tsc(void)
{
    uint32_t low, high;
    asm volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
    return (uint64_t)high << 32 | low;
}

static void say(const char *text) { while (*text) out(SERIAL, (uint8_t)*text++); }

static void number(const char *name, uint64_t value)
{
    char digits[21], *at = digits + 20;
    *at = 0;
    do
        *--at = (char)('0' + value % 10);
    while (value /= 10);
    say(name);
    say(at);
}

static void set32(uint64_t at, uint32_t value) { *(volatile uint32_t *)at = value; }
static void set16(uint64_t at, uint16_t value) { *(volatile uint16_t *)at = value; }
static void set8(uint64_t at, uint8_t value) { *(volatile uint8_t *)at = value; }
static uint32_t get32(uint64_t at) { return *(volatile uint32_t *)at; }
static uint8_t get8(uint64_t at) { return *(volatile uint8_t *)at; }

static void start_mmio(uint64_t device)
{
    set32(device + 0x70, 0);
    set32(device + 0x70, 1);
    set32(device + 0x70, 3);
    set32(device + 0x24, 1);
    set32(device + 0x20, 1); /* VIRTIO_F_VERSION_1 */
    set32(device + 0x70, 11);
    set32(device + 0x30, 0);
    set32(device + 0x38, SIZE);
    set32(device + 0x80, (uint32_t)(uint64_t)queue.table);
    set32(device + 0x90, (uint32_t)(uint64_t)&queue.available);
    set32(device + 0xa0, (uint32_t)(uint64_t)&queue.used);
    set32(device + 0x44, 1);
    set32(device + 0x70, 15);
    doorbell = device + 0x50;
}

static int start_pci(void)
{
    uint64_t common = 0, notify = 0, multiplier = 0;
    for (uint64_t slot = 0; slot < 32; slot++) {
        uint64_t space = ECAM + (slot << 15);
        if (get32(space) != 0x10421af4)
            continue;
        for (uint8_t at = get8(space + 0x34); at; at = get8(space + at + 1)) {
            if (get8(space + at) != 9)
                continue;
            uint64_t place = WINDOW + get32(space + at + 8);
            uint64_t bar = space + 0x10 + 4 * get8(space + at + 4);
            if (get8(space + at + 3) == 1 || get8(space + at + 3) == 2) {
                set32(bar, (uint32_t)WINDOW);
                set32(bar + 4, 0);
            }
            if (get8(space + at + 3) == 1)
                common = place;
            if (get8(space + at + 3) == 2) {
                notify = place;
                multiplier = get32(space + at + 16);
            }
        }
        set16(space + 4, 6); /* memory space, bus master */
        break;
    }
    if (!common)
        return 0;
    set8(common + 20, 0);
    set8(common + 20, 1);
    set8(common + 20, 3);
    set32(common + 8, 1);
    set32(common + 12, 1);
    set8(common + 20, 11);
    set16(common + 22, 0);
    set16(common + 24, SIZE);
    set32(common + 32, (uint32_t)(uint64_t)queue.table);
    set32(common + 36, 0);
    set32(common + 40, (uint32_t)(uint64_t)&queue.available);
    set32(common + 44, 0);
    set32(common + 48, (uint32_t)(uint64_t)&queue.used);
    set32(common + 52, 0);
    doorbell = notify + multiplier * *(volatile uint16_t *)(common + 30);
    set16(common + 28, 1);
    set8(common + 20, 15);
    return 1;
}

static void use_disk(uint32_t type, uint64_t sector)
{
    uint16_t before = queue.used.index;
    header.type = type;
    header.sector = sector;
    status = 0xee;
    queue.table[0] = (struct descriptor){(uint64_t)&header, sizeof header, 1, 1};
    queue.table[1] = (struct descriptor){(uint64_t)(type ? written : data), sizeof written, type ? 1 : 3, 2};
    queue.table[2] = (struct descriptor){(uint64_t)&status, 1, 2, 0};
    queue.available.ring[queue.available.index % SIZE] = 0;
    asm volatile("" ::: "memory");
    queue.available.index++;
    asm volatile("mfence" ::: "memory");
    if (is_pci)
        set16(doorbell, 0);
    else
        set32(doorbell, 0);
    while (queue.used.index == before)
        asm volatile("pause" ::: "memory");
    failed += status != 0;
}

static uint64_t word(uint64_t seed, unsigned index) { return (seed ^ index) * 0x9e3779b97f4a7c15; }

static void disk_round(void)
{
    uint64_t sector = rounds * 11 % SECTORS, other = rounds * 7 % SECTORS;
    for (unsigned index = 0; index < 64; index++)
        written[index] = word(rounds + 1, index);
    use_disk(1, sector);
    expected[sector] = rounds + 1;
    use_disk(0, other);
    for (unsigned index = 0; index < 64; index++)
        lost += data[index] != (expected[other] ? word(expected[other], index) : 0);
}

static void memory_round(void)
{
    unsigned page = rounds * 37 % PAGES, other = rounds * 91 % PAGES;
    for (unsigned index = 0; index < 512; index += 64)
        pages[page][index] = word(rounds, index);
    page_values[page] = rounds;
    if (page_values[other])
        for (unsigned index = 0; index < 512; index += 64)
            lost += pages[other][index] != word(page_values[other], index);
}

static void clock_round(void)
{
    uint64_t now = tsc();
    backwards += now < last_tsc;
    last_tsc = now;
    if (!has_clock)
        return;
    uint32_t version;
    do {
        version = clock.version;
        asm volatile("" ::: "memory");
        uint64_t since = tsc() - clock.tsc;
        since = clock.shift < 0 ? since >> -clock.shift : since << clock.shift;
        now = clock.system + (uint64_t)((unsigned __int128)since * clock.mul >> 32);
        asm volatile("" ::: "memory");
    } while (version & 1 || version != clock.version);
    backwards += now < last_clock;
    last_clock = now;
}

__attribute__((interrupt)) static void on_timer(void *frame)
{
    (void)frame;
    ticks++;
    set32(APIC + 0xb0, 0);
}

static void start_clocks(void)
{
    uint32_t a, b, c, d;
    uint16_t selector;
    cpuid(0x40000001, &a, &b, &c, &d);
    has_clock = a >> 3 & 1;
    if (has_clock)
        asm volatile("wrmsr" : : "c"(0x4b564d01), "a"((uint32_t)(uint64_t)&clock | 1), "d"(0));
    asm volatile("mov %%cs, %0" : "=r"(selector));
    uint64_t handler = (uint64_t)on_timer;
    gates[TIMER].low = (uint16_t)handler;
    gates[TIMER].selector = selector;
    gates[TIMER].flags = 0x8e00;
    gates[TIMER].middle = (uint16_t)(handler >> 16);
    struct { uint16_t size; uint64_t base; } __attribute__((packed)) table = {sizeof gates - 1, (uint64_t)gates};
    asm volatile("lidt %0" : : "m"(table));
    out(0x21, 0xff); /* the PICs' lines */
    out(0xa1, 0xff);
    set32(APIC + 0xf0, 0x1ff);
    set32(APIC + 0x3e0, 0xb); /* divided by 1 */
    set32(APIC + 0x320, 0x20000 | TIMER); /* periodic */
    set32(APIC + 0x380, 20000000);
    asm volatile("sti");
}

/* At 0x10000, in real mode: count, and look whether the time stamp counter goes on, at OTHERS + 16 * APIC id. */
asm(".code16\n"
    "others: cli\n xorw %ax, %ax\n movw $0x1100, %ax\n movw %ax, %ds\n movl $1, %eax\n cpuid\n shrl $24, %ebx\n"
    "shlw $4, %bx\n"
    "1: rdtsc\n cmpl 12(%bx), %edx\n ja 3f\n jb 2f\n cmpl 8(%bx), %eax\n jae 3f\n"
    "2: incl 4(%bx)\n"
    "3: movl %eax, 8(%bx)\n movl %edx, 12(%bx)\n incl (%bx)\n jmp 1b\n"
    "others_end:\n.code64\n");
extern const uint8_t others[], others_end[];

static void start_others(void)
{
    for (uint64_t at = 0; at < (uint64_t)(others_end - others); at++)
        set8(START_OTHERS + at, others[at]);
    for (uint64_t at = 0; at < 16 * CPUS; at++)
        set8(OTHERS + at, 0);
    set32(APIC + 0x300, 0xc4500);
    set32(APIC + 0x300, 0xc4600 | START_OTHERS >> 12);
}

static void report(void)
{
    const struct other *others = (struct other *)OTHERS;
    number("rounds=", rounds);
    number(" lost=", lost);
    number(" failed=", failed);
    number(" backwards=", backwards);
    number(" ticks=", ticks);
    for (unsigned cpu = 1; cpu < CPUS; cpu++) {
        number(" ", others[cpu].count);
        number("/", others[cpu].backwards);
    }
    say(".\n");
}

void run(void)
{
    is_pci = start_pci();
    if (!is_pci)
        start_mmio(DISK);
    start_clocks();
    start_others();
    say("ready\n");
    for (;;) {
        disk_round();
        memory_round();
        clock_round();
        rounds++;
        if (!(in(SERIAL + 5) & 1))
            continue;
        uint8_t told = in(SERIAL);
        if (told == 's')
            report();
        else if (told == 'O')
            for (;;)
                out(SLEEP, 5 << 2 | 0x20);
        else
            out(SERIAL, told);
    }
}
