/* The initramfs's own programs in one file, which is whatever it is called by, as busybox is. Most of
 * a static program is the C library; a guest with little memory has room for it once. */
#include <stdio.h>
#include <string.h>

#include "helpers.h"

static const struct {
    const char *name;
    int (*run)(int argc, char **argv);
} programs[] = {
    {"find-root", find_root},
    {"load-drivers", load_drivers},
};

int main(int argc, char **argv)
{
    const char *called = argc ? argv[0] : "";
    const char *slash = strrchr(called, '/');
    const char *name = slash ? slash + 1 : called;

    for (size_t i = 0; i < sizeof programs / sizeof *programs; i++)
        if (!strcmp(name, programs[i].name))
            return programs[i].run(argc, argv);
    fprintf(stderr, "pyvmm-initramfs: no program is called %s\n", name);
    return 2;
}
