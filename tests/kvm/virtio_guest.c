/* A guest without an operating system that drives a disk and a random number generator over virtio-mmio
 * (virtio 1.3, 4.2), at DISK and RNG, and polls their used rings. Told "r" on its serial port it prints the
 * text that sector 0 begins with, "w" writes sector 1, "n" says whether it got random bytes, "O" powers off.
 * Told "k" it writes 1, 2, 3… in turn to SECTORS sectors for ever, and says "k" and each once it is written. */
#include <stdint.h>

enum { SIZE = 4, SERIAL = 0x3f8, SLEEP = 0x600, SECTORS = 7 };
enum { FEATURES_SEL = 0x14, DRIVER_FEATURES = 0x20, DRIVER_FEATURES_SEL = 0x24, QUEUE_SEL = 0x30,
       QUEUE_SIZE = 0x38, QUEUE_READY = 0x44, NOTIFY = 0x50, STATUS = 0x70, DESC = 0x80, DRIVER = 0x90,
       DEVICE = 0xa0 };

struct descriptor { uint64_t address; uint32_t length; uint16_t flags, next; };
struct queue {
    struct descriptor table[SIZE];
    volatile struct { uint16_t flags, index, ring[SIZE], event; } available;
    volatile struct { uint16_t flags, index; struct { uint32_t id, length; } ring[SIZE]; } used;
} __attribute__((aligned(16)));
static struct queue queues[2];
static struct { uint32_t type, reserved; uint64_t sector; } header;
static char data[512] __attribute__((aligned(8)));
static volatile uint8_t status;

static void out(uint16_t port, uint8_t value) { asm volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }

static uint8_t in(uint16_t port)
{
    uint8_t value;
    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static void print(const char *text)
{
    while (*text)
        out(SERIAL, (uint8_t)*text++);
    out(SERIAL, '\n');
}

static void set(uint64_t device, unsigned offset, uint32_t value)
{
    *(volatile uint32_t *)(device + offset) = value;
}

static void place(uint64_t device, unsigned offset, volatile void *area)
{
    set(device, offset, (uint32_t)(uint64_t)area);
    set(device, offset + 4, 0);
}

static void start(uint64_t device, struct queue *queue)
{
    static const uint32_t steps[] = {0, 1, 3};
    for (unsigned step = 0; step < 3; step++)
        set(device, STATUS, steps[step]);
    set(device, DRIVER_FEATURES_SEL, 1);
    set(device, DRIVER_FEATURES, 1); /* VIRTIO_F_VERSION_1 */
    set(device, STATUS, 11);
    set(device, QUEUE_SEL, 0);
    set(device, QUEUE_SIZE, SIZE);
    place(device, DESC, queue->table);
    place(device, DRIVER, &queue->available);
    place(device, DEVICE, &queue->used);
    set(device, QUEUE_READY, 1);
    set(device, STATUS, 15);
}

static void describe(struct queue *queue, unsigned index, volatile void *area, uint32_t length, uint16_t flags)
{
    queue->table[index] = (struct descriptor){(uint64_t)area, length, flags, (uint16_t)(index + 1)};
}

static void request(uint64_t device, struct queue *queue)
{
    uint16_t before = queue->used.index;
    queue->available.ring[queue->available.index % SIZE] = 0;
    queue->available.index++;
    set(device, NOTIFY, 0);
    while (queue->used.index == before)
        asm volatile("pause" ::: "memory");
}

static void use_disk(uint32_t type, uint64_t sector)
{
    header.type = type;
    header.sector = sector;
    status = 0xee;
    describe(&queues[0], 0, &header, sizeof header, 1);
    describe(&queues[0], 1, data, sizeof data, type ? 1 : 3);
    describe(&queues[0], 2, &status, 1, 2);
    request(DISK, &queues[0]);
    if (status)
        print(status == 1 ? "IOERR" : "no answer");
}

static void print_number(char letter, uint64_t number)
{
    static char text[18];
    text[0] = letter;
    for (unsigned digit = 0; digit < 16; digit++)
        text[16 - digit] = "0123456789abcdef"[number >> (4 * digit) & 15];
    print(text);
}

static void write_for_ever(void)
{
    for (uint64_t number = 1;; number++) {
        for (unsigned index = 0; index < sizeof data / sizeof number; index++)
            ((volatile uint64_t *)data)[index] = number;
        use_disk(1, 1 + (number - 1) % SECTORS);
        print_number('k', number);
    }
}

void run(void)
{
    start(DISK, &queues[0]);
    start(RNG, &queues[1]);
    print("ready");
    for (;;) {
        if (!(in(SERIAL + 5) & 1))
            continue;
        switch (in(SERIAL)) {
        case 'r':
            use_disk(0, 0);
            data[32] = 0;
            print(data);
            break;
        case 'w':
            for (unsigned index = 0; index < sizeof data; index++)
                data[index] = 'g';
            use_disk(1, 1);
            print("written");
            break;
        case 'n':
            describe(&queues[1], 0, data, 64, 2);
            request(RNG, &queues[1]);
            print(queues[1].used.ring[(queues[1].used.index - 1) % SIZE].length == 64 ? "random" : "none");
            break;
        case 'k':
            write_for_ever();
            break;
        case 'O':
            out(SLEEP, 5 << 2 | 0x20);
        }
    }
}
