/* Loads the drivers of virtio devices that come while the guest runs:
 *   load-drivers [-m MODULES] [-s SYSFS] [-n] TYPE…      goes on in the background
 *
 * MODULES/virtio-TYPE names the modules that devices of that type need, one a line, in the order in
 * which they can be loaded; MODULES/NAME.ko are these. Files that are not there, and modules that the
 * kernel has already, are left out; if nothing is left, the program ends.
 *
 * The root file system has no modules, and the initramfs ends before a device can come. So the files
 * stay open, and with them their content, until they are loaded. The kernel tells of each device by a
 * uevent on a netlink socket (Linux lib/kobject_uevent.c), with MODALIAS=virtio:dTYPEvVENDOR (Linux
 * drivers/virtio/virtio.c), both in 8 hexadecimal digits.
 *
 * With -n, for tests, it stays in the foreground, takes the messages from the socket that is its
 * standard input, and writes the names of the modules that it would load. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "helpers.h"

enum {
    MOST_TYPES = 16,
    MOST_MODULES = 64, /* for one type */
    NAME_SIZE = 64,    /* MODULE_NAME_LEN of <linux/moduleparam.h> and less */
    PATH_SIZE = 256,
    MOST_MESSAGE = 8192, /* the kernel's own have 2 KiB of variables and a path at most */
    UEVENTS = 1,         /* the multicast group of the kernel's */
};

struct driver { /* of one type of devices */
    unsigned long type;
    size_t count;
    struct module {
        char name[NAME_SIZE];
        int file;
    } modules[MOST_MODULES];
};

static const char *folder = "/modules", *sysfs = "/sys";
static struct driver drivers[MOST_TYPES];
static size_t driver_count;
static int is_dry, messages = -1, kernel_log = -1;

static int is_loaded(const char *module)
{
    char path[PATH_SIZE];

    snprintf(path, sizeof path, "%s/module/%s", sysfs, module);
    return access(path, F_OK) == 0;
}

static void keep(unsigned long type)
{
    struct driver *driver = &drivers[driver_count];
    char path[PATH_SIZE], line[NAME_SIZE];
    FILE *list;

    snprintf(path, sizeof path, "%s/virtio-%lu", folder, type);
    list = driver_count < MOST_TYPES ? fopen(path, "re") : NULL;
    if (!list)
        return;
    driver->type = type;
    while (driver->count < MOST_MODULES && fgets(line, sizeof line, list)) {
        struct module *module = &driver->modules[driver->count];

        line[strcspn(line, "\n")] = '\0';
        if (!*line || is_loaded(line))
            continue;
        snprintf(path, sizeof path, "%s/%s.ko", folder, line);
        memcpy(module->name, line, sizeof line);
        module->file = open(path, O_RDONLY | O_CLOEXEC);
        if (module->file >= 0)
            driver->count++;
    }
    fclose(list);
    if (driver->count)
        driver_count++;
}

static void load(struct driver *driver)
{
    for (size_t i = 0; i < driver->count; i++) {
        struct module *module = &driver->modules[i];

        if (is_dry)
            printf("%s\n", module->name);
        else if (syscall(SYS_finit_module, module->file, "", 0) && errno != EEXIST &&
                 kernel_log >= 0)
            dprintf(kernel_log, "<4>pyvmm-initramfs: cannot load the module %s: %s\n",
                    module->name, strerror(errno));
        close(module->file);
    }
    fflush(stdout);
    *driver = drivers[--driver_count];
}

/* `alias` is a device's, of any bus. */
static void found(const char *alias)
{
    static const char virtio[] = "virtio:d";
    char digits[9], *end;
    unsigned long type;

    if (strncmp(alias, virtio, sizeof virtio - 1))
        return;
    snprintf(digits, sizeof digits, "%s", alias + sizeof virtio - 1);
    type = strtoul(digits, &end, 16);
    if (end != digits + 8)
        return;
    for (size_t i = 0; i < driver_count; i++) {
        if (drivers[i].type == type) {
            load(&drivers[i]);
            return;
        }
    }
}

/* Those that came before the socket was there. */
static void find_present(void)
{
    char path[PATH_SIZE];
    struct dirent *entry;
    DIR *devices;

    snprintf(path, sizeof path, "%s/bus/virtio/devices", sysfs);
    devices = opendir(path);
    while (devices && (entry = readdir(devices))) {
        char alias[NAME_SIZE];
        FILE *file;

        if (entry->d_name[0] == '.' || strlen(entry->d_name) >= NAME_SIZE)
            continue;
        snprintf(path, sizeof path, "%s/bus/virtio/devices/%.63s/modalias", sysfs, entry->d_name);
        file = fopen(path, "re");
        if (file && fgets(alias, sizeof alias, file))
            found(alias);
        if (file)
            fclose(file);
    }
    if (devices)
        closedir(devices);
}

/* "add@/devices/…", and then NAME=VALUE texts, each with a NUL at its end. */
static void read_message(char *text, size_t size)
{
    static const char added[] = "add@", alias[] = "MODALIAS=";
    const char *end = text + size;

    text[size] = '\0';
    if (strncmp(text, added, sizeof added - 1))
        return;
    while ((text += strlen(text) + 1) < end) {
        if (!strncmp(text, alias, sizeof alias - 1))
            found(text + sizeof alias - 1);
    }
}

static void serve(void)
{
    static char text[MOST_MESSAGE + 1];

    while (driver_count) {
        struct sockaddr_nl from = {0};
        struct iovec room = {text, MOST_MESSAGE};
        struct msghdr header = {
            .msg_name = &from, .msg_namelen = sizeof from, .msg_iov = &room, .msg_iovlen = 1};
        ssize_t size = recvmsg(messages, &header, 0);

        if (size < 0 && errno == ENOBUFS)
            find_present(); /* messages are lost */
        else if (size < 0 && errno != EINTR)
            return;
        else if (size == 0 && is_dry)
            return;
        else if (size > 0 && !(header.msg_flags & MSG_TRUNC) && (is_dry || from.nl_pid == 0))
            read_message(text, (size_t)size); /* 0 is the kernel: programs may send some as well */
    }
}

static int listen_to_kernel(void)
{
    struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = UEVENTS};

    messages = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC, NETLINK_KOBJECT_UEVENT);
    return messages < 0 ? -1 : bind(messages, (struct sockaddr *)&address, sizeof address);
}

static void go_to_background(void)
{
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);

    switch (fork()) {
    case 0:
        setsid();
        for (int fd = 0; fd < 3; fd++)
            dup2(null, fd);
        close(null);
        if (chdir("/") == 0)
            return;
        _exit(1);
    case -1:
        perror("pyvmm-initramfs: load-drivers");
        _exit(1);
    default:
        _exit(0);
    }
}

int load_drivers(int argc, char **argv)
{
    int option;

    while ((option = getopt(argc, argv, "m:s:n")) != -1) {
        switch (option) {
        case 'm': folder = optarg; break;
        case 's': sysfs = optarg; break;
        case 'n': is_dry = 1; break;
        default: return 2;
        }
    }
    for (; optind < argc; optind++)
        keep(strtoul(argv[optind], NULL, 10));
    if (!driver_count)
        return 0;
    if (is_dry) {
        messages = STDIN_FILENO;
    } else {
        kernel_log = open("/dev/kmsg", O_WRONLY | O_CLOEXEC);
        if (listen_to_kernel()) {
            perror("pyvmm-initramfs: load-drivers");
            return 1;
        }
    }
    find_present();
    if (driver_count && !is_dry)
        go_to_background();
    serve();
    return 0;
}
