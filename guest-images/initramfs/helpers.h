/* The programs that helpers.c is, each by its own name; they take and return what main does. */
#ifndef PYVMM_HELPERS_H
#define PYVMM_HELPERS_H

int find_root(int argc, char **argv);
int load_drivers(int argc, char **argv);

#endif
