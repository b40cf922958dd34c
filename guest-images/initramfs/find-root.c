/* Finds a root device by what its partition table says of it, which busybox's findfs does not read:
 *   find-root [-s SYSFS] [-d DEV] PARTUUID=…[/PARTNROFF=N] | PARTLABEL=…   prints /dev/NAME, or ends with 1
 *   find-root [-s SYSFS] [-d DEV]                                        lists what there is to choose from
 *
 * The kernel has read the tables and made the devices; of an entry it does not tell the UUID, so the
 * table is read again. What is on a disk is data: every size is bounded, and only printable characters
 * are shown. Sources: UEFI 2.10, chapter 5 "GUID Partition Table (GPT) Disk Layout"; Linux
 * block/partitions/msdos.c for the UUIDs of DOS partitions (disk signature, number); the layouts of
 * superblocks as in Linux fs/ext4/ext4.h, fs/xfs/libxfs/xfs_format.h, include/uapi/linux/btrfs_tree.h,
 * include/linux/swap.h, include/uapi/linux/msdos_fs.h. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#include "helpers.h"

enum {
    MOST_DEVICES = 1024,
    SHOWN_DEVICES = 24,
    NAME_SIZE = 64,
    TEXT_SIZE = 256,
    UUID_SIZE = 40,
    MOST_ENTRY_BYTES = 4 << 20, /* as the kernel: it allocates them in one piece */
};

struct device {
    char name[NAME_SIZE]; /* in sysfs */
    char disk[NAME_SIZE]; /* the whole disk's name */
    unsigned long number; /* of the partition; 0 for a whole disk */
    unsigned long long bytes;
    char uuid[UUID_SIZE];   /* of the partition, by its table */
    char label[TEXT_SIZE];  /* likewise; UTF-8 */
};

struct table { /* of the disk at hand; `entries` only of a GPT */
    unsigned char *entries;
    uint32_t count, entry_size;
    uint32_t dos_signature;
};

static const char *sysfs = "/sys", *dev = "/dev";
static struct device devices[MOST_DEVICES];
static size_t device_count;

static uint32_t get32(const unsigned char *at)
{
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

static uint64_t get64(const unsigned char *at)
{
    return get32(at) | (uint64_t)get32(at + 4) << 32;
}

static uint32_t crc32(const unsigned char *data, size_t size)
{
    uint32_t crc = ~0U;
    while (size--) {
        crc ^= *data++;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320U : 0);
    }
    return ~crc;
}

static unsigned long long read_number(const char *name, const char *file, unsigned long long otherwise)
{
    char path[TEXT_SIZE], text[32] = "", *end;
    snprintf(path, sizeof path, "%s/class/block/%s/%s", sysfs, name, file);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    unsigned long long value = strtoull(text, &end, 10);
    return got > 0 && end != text ? value : otherwise;
}

static void print_name(const struct device *device)
{
    printf("%s/", dev);
    for (const char *at = device->name; *at; at++)
        putchar(*at == '!' ? '/' : *at); /* as sysfs writes a slash */
}

static int open_device(const char *name)
{
    char path[TEXT_SIZE];
    size_t start = (size_t)snprintf(path, sizeof path, "%s/", dev);
    snprintf(path + start, sizeof path - start, "%s", name);
    for (char *at = path + start; *at; at++)
        if (*at == '!')
            *at = '/';
    return open(path, O_RDONLY | O_CLOEXEC);
}

static int read_at(int fd, void *into, size_t size, uint64_t offset)
{
    size_t done = 0;
    while (done < size) {
        ssize_t got = pread(fd, (char *)into + done, size - done, (off_t)(offset + done));
        if (got <= 0)
            return 0;
        done += (size_t)got;
    }
    return 1;
}

/* Take the GPT whose header is in block `lba`; whether it is one. */
static int take_gpt(struct table *table, int fd, uint64_t lba, uint64_t block)
{
    unsigned char header[512], copy[512];
    if (block < sizeof header || lba > INT64_MAX / block || !read_at(fd, header, sizeof header, lba * block))
        return 0;
    uint32_t header_size = get32(header + 12), count = get32(header + 80), size = get32(header + 84);
    uint64_t first = get64(header + 72);
    if (memcmp(header, "EFI PART", 8) || header_size < 92 || header_size > sizeof header ||
        get64(header + 24) != lba)
        return 0;
    memcpy(copy, header, sizeof copy);
    memset(copy + 16, 0, 4);
    if (crc32(copy, header_size) != get32(header + 16))
        return 0;
    if (size < 128 || size % 128 || !count || count > MOST_ENTRY_BYTES / size || first > INT64_MAX / block)
        return 0;
    size_t bytes = (size_t)count * size;
    unsigned char *entries = malloc(bytes);
    if (!entries || !read_at(fd, entries, bytes, first * block) || crc32(entries, bytes) != get32(header + 88)) {
        free(entries);
        return 0;
    }
    *table = (struct table){.entries = entries, .count = count, .entry_size = size};
    return 1;
}

static void read_table(struct table *table, const char *disk)
{
    unsigned char sector[512];
    uint64_t block = read_number(disk, "queue/logical_block_size", 512);
    uint64_t blocks = block ? read_number(disk, "size", 0) * 512 / block : 0;
    int fd = open_device(disk);
    *table = (struct table){0};
    if (fd < 0)
        return;
    if (blocks > 1 && !take_gpt(table, fd, 1, block) && !take_gpt(table, fd, blocks - 1, block) &&
        read_at(fd, sector, sizeof sector, 0) && sector[510] == 0x55 && sector[511] == 0xAA)
        table->dos_signature = get32(sector + 440);
    close(fd);
}

static void write_uuid(char *into, const unsigned char *raw, int mixed_endian)
{
    static const int order[2][16] = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
                                     {3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15}};
    for (int index = 0; index < 16; index++) {
        const char *dash = index == 4 || index == 6 || index == 8 || index == 10 ? "-" : "";
        into += sprintf(into, "%s%02x", dash, raw[order[mixed_endian][index]]);
    }
}

/* `units` of UTF-16LE, to the first NUL, as UTF-8; a lone surrogate becomes '?'. */
static void write_utf8(char *into, const unsigned char *from, int units)
{
    for (int index = 0; index < units; index++) {
        uint32_t unit = (uint32_t)from[2 * index] | (uint32_t)from[2 * index + 1] << 8;
        if (!unit)
            break;
        if (unit >= 0xD800 && unit < 0xDC00 && index + 1 < units) {
            uint32_t low = (uint32_t)from[2 * index + 2] | (uint32_t)from[2 * index + 3] << 8;
            if (low >= 0xDC00 && low < 0xE000) {
                unit = 0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00);
                index++;
            }
        }
        if (unit >= 0xD800 && unit < 0xE000)
            unit = '?';
        if (unit < 0x80) {
            *into++ = (char)unit;
        } else if (unit < 0x800) {
            *into++ = (char)(0xC0 | unit >> 6);
            *into++ = (char)(0x80 | (unit & 0x3F));
        } else {
            if (unit < 0x10000) {
                *into++ = (char)(0xE0 | unit >> 12);
            } else {
                *into++ = (char)(0xF0 | unit >> 18);
                *into++ = (char)(0x80 | (unit >> 12 & 0x3F));
            }
            *into++ = (char)(0x80 | (unit >> 6 & 0x3F));
            *into++ = (char)(0x80 | (unit & 0x3F));
        }
    }
    *into = 0;
}

static void describe(struct device *device, const struct table *table)
{
    if (table->entries && device->number <= table->count) {
        const unsigned char *entry = table->entries + (device->number - 1) * table->entry_size;
        write_uuid(device->uuid, entry + 16, 1);
        write_utf8(device->label, entry + 56, 36);
    } else if (table->dos_signature) {
        snprintf(device->uuid, UUID_SIZE, "%08x-%02lx", table->dos_signature, device->number & 0xFF);
    }
}

static int compare(const void *a, const void *b)
{
    const struct device *one = a, *other = b;
    int order = strcmp(one->disk, other->disk);
    return order ? order : (one->number > other->number) - (one->number < other->number);
}

static void find_devices(void)
{
    char path[TEXT_SIZE], target[TEXT_SIZE];
    snprintf(path, sizeof path, "%s/class/block", sysfs);
    DIR *folder = opendir(path);
    struct dirent *entry;
    while (folder && device_count < MOST_DEVICES && (entry = readdir(folder))) {
        struct device *device = &devices[device_count];
        if (entry->d_name[0] == '.' || strlen(entry->d_name) >= NAME_SIZE)
            continue;
        strcpy(device->name, entry->d_name);
        device->number = (unsigned long)read_number(device->name, "partition", 0);
        device->bytes = read_number(device->name, "size", 0) * 512;
        strcpy(device->disk, device->name);
        if (device->number) { /* …/DISK/PARTITION */
            snprintf(path, sizeof path, "%s/class/block/%s", sysfs, device->name);
            ssize_t size = readlink(path, target, sizeof target - 1);
            if (size <= 0)
                continue;
            target[size] = 0;
            char *end = strrchr(target, '/');
            if (!end)
                continue;
            *end = 0;
            const char *disk = strrchr(target, '/') ? strrchr(target, '/') + 1 : target;
            if (strlen(disk) >= NAME_SIZE)
                continue;
            strcpy(device->disk, disk);
        }
        if (device->bytes)
            device_count++;
    }
    if (folder)
        closedir(folder);
    qsort(devices, device_count, sizeof *devices, compare);
    struct table table = {0};
    for (size_t index = 0; index < device_count; index++) {
        if (!index || strcmp(devices[index].disk, devices[index - 1].disk)) {
            free(table.entries);
            read_table(&table, devices[index].disk);
        }
        if (devices[index].number)
            describe(&devices[index], &table);
    }
}

static const struct device *find(const char *wanted)
{
    if (!strncmp(wanted, "PARTLABEL=", 10)) {
        for (size_t index = 0; index < device_count; index++)
            if (devices[index].label[0] && !strcmp(devices[index].label, wanted + 10))
                return &devices[index];
        return NULL;
    }
    if (strncmp(wanted, "PARTUUID=", 9))
        return NULL;
    const char *uuid = wanted + 9, *more = strstr(uuid, "/PARTNROFF=");
    size_t length = more ? (size_t)(more - uuid) : strlen(uuid);
    long offset = more ? strtol(more + 11, NULL, 10) : 0;
    for (size_t index = 0; index < device_count; index++) {
        const struct device *device = &devices[index];
        if (!length || strlen(device->uuid) != length || strncasecmp(device->uuid, uuid, length))
            continue;
        for (size_t other = 0; other < device_count; other++)
            if (!strcmp(devices[other].disk, device->disk) && devices[other].number &&
                devices[other].number == device->number + (unsigned long)offset)
                return &devices[other];
    }
    return NULL;
}

static void print_text(const char *key, const char *text, size_t size)
{
    if (!size || !*text)
        return;
    printf(" %s=", key);
    for (; size-- && *text; text++)
        putchar(*text >= ' ' && *text <= '~' ? *text : '?');
}

/* What a device holds, as far as a root device might: file systems, and what is often mistaken for one. */
static const struct {
    const char *kind, *magic;
    int at, label, label_size, uuid; /* 0 where there is none */
} contents[] = {
    {"ext4", "\x53\xEF", 0x438, 0x478, 16, 0x468}, /* ext2 and ext3 too: the same driver */
    {"xfs", "XFSB", 0, 108, 12, 32},
    {"btrfs", "_BHRfS_M", 0x10040, 0x1012B, 256, 0x10020},
    {"squashfs", "hsqs", 0, 0, 0, 0},
    {"erofs", "\xE2\xE1\xF5\xE0", 0x400, 0x440, 16, 0x430},
    {"swap", "SWAPSPACE2", 4086, 0x41C, 16, 0x40C},
    {"LUKS", "LUKS\xBA\xBE", 0, 0, 0, 0},
    {"vfat", "FAT32   ", 82, 71, 11, 0},
    {"vfat", "FAT16   ", 54, 43, 11, 0},
    {"vfat", "FAT12   ", 54, 43, 11, 0},
};

static void print_content(const struct device *device)
{
    unsigned char piece[TEXT_SIZE];
    char uuid[UUID_SIZE];
    int fd = open_device(device->name);
    if (fd < 0)
        return;
    for (size_t index = 0; index < sizeof contents / sizeof *contents; index++) {
        const char *magic = contents[index].magic;
        if (!read_at(fd, piece, strlen(magic), (uint64_t)contents[index].at) || memcmp(piece, magic, strlen(magic)))
            continue;
        printf(" %s", contents[index].kind);
        size_t size = (size_t)contents[index].label_size;
        if (size && read_at(fd, piece, size, (uint64_t)contents[index].label))
            print_text("LABEL", (const char *)piece, size);
        if (contents[index].uuid && read_at(fd, piece, 16, (uint64_t)contents[index].uuid)) {
            write_uuid(uuid, piece, 0);
            print_text("UUID", uuid, UUID_SIZE);
        }
        break;
    }
    close(fd);
}

static void list(void)
{
    for (size_t index = 0; index < device_count; index++) {
        if (index == SHOWN_DEVICES) {
            printf("and %zu more\n", device_count - index);
            return;
        }
        print_name(&devices[index]);
        printf(" %llu MiB", devices[index].bytes >> 20);
        print_content(&devices[index]);
        print_text("PARTLABEL", devices[index].label, TEXT_SIZE);
        print_text("PARTUUID", devices[index].uuid, UUID_SIZE);
        putchar('\n');
    }
}

int find_root(int argc, char **argv)
{
    int option;
    while ((option = getopt(argc, argv, "s:d:")) != -1) {
        if (option == 's')
            sysfs = optarg;
        else if (option == 'd')
            dev = optarg;
        else
            return 2;
    }
    find_devices();
    if (optind == argc) {
        list();
        return 0;
    }
    const struct device *found = find(argv[optind]);
    if (!found)
        return 1;
    print_name(found);
    putchar('\n');
    return 0;
}
