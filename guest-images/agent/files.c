/* GET and PUT: trees of files. Names, never paths: each is opened relative to its directory. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent.h"

static int64_t mtime_of(const struct stat *found)
{
    int64_t ns;
    /* Before the year 1678 or after 2262, which some file systems can say: as near as it goes. */
    if (__builtin_mul_overflow((int64_t)found->st_mtim.tv_sec, 1000000000, &ns) ||
        __builtin_add_overflow(ns, (int64_t)found->st_mtim.tv_nsec, &ns))
        return found->st_mtim.tv_sec < 0 ? INT64_MIN : INT64_MAX;
    return ns;
}

static void send_entry(enum frame_type type, const struct stat *found, const char *name,
                       const char *target)
{
    unsigned char tail[NAME_MAX + 1 + PATH_MAX];
    struct entry entry = {found->st_mode & 07777, 0, mtime_of(found), (uint64_t)found->st_size};
    size_t size = strnlen(name, NAME_MAX), more = target ? strnlen(target, PATH_MAX - 1) : 0;
    memcpy(tail, name, size);
    if (target) {
        tail[size++] = 0;
        memcpy(tail + size, target, more);
    }
    send_frame(type, &entry, sizeof entry, tail, size + more);
}

/* What was asked for may be a link; what is below it is what it was when it was looked at. */
static int open_found(int folder, const char *name, int flags)
{
    int no_link = folder == AT_FDCWD ? 0 : O_NOFOLLOW;
    return openat(folder, name, O_RDONLY | O_CLOEXEC | no_link | flags);
}

static void send_regular(int folder, const char *name, const struct stat *found, const char *as)
{
    static char data[MAX_DATA];
    int fd = open_found(folder, name, O_NONBLOCK | O_NOCTTY);
    if (fd < 0)
        fail(errno, as);
    send_entry(REGULAR, found, as, NULL);
    for (;;) {
        ssize_t got = read(fd, data, sizeof data);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            fail(errno, as);
        if (!got)
            break;
        send_frame(DATA, data, (size_t)got, NULL, 0);
    }
    close(fd);
    send_frame(UP, NULL, 0, NULL, 0);
}

static void send_tree(int folder, const char *name, const struct stat *found, const char *as,
                      int depth);

static void send_directory(int parent, const char *name, const struct stat *found, const char *as,
                           int depth)
{
    int fd = open_found(parent, name, O_DIRECTORY);
    DIR *folder = fd < 0 ? NULL : fdopendir(fd);
    if (!folder)
        fail(errno, as);
    if (depth >= MAX_DEPTH)
        fail(ELOOP, "directories nested too deeply");
    send_entry(DIRECTORY, found, as, NULL);
    for (struct dirent *entry; (errno = 0, entry = readdir(folder));) {
        struct stat below;
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        if (fstatat(fd, entry->d_name, &below, AT_SYMLINK_NOFOLLOW))
            continue; /* it has just gone */
        if (below.st_dev != found->st_dev)
            send_entry(SKIPPED, &below, entry->d_name, NULL); /* another file system: /proc, say */
        else
            send_tree(fd, entry->d_name, &below, entry->d_name, depth + 1);
    }
    if (errno)
        fail(errno, as);
    closedir(folder);
    send_frame(UP, NULL, 0, NULL, 0);
}

static void send_tree(int folder, const char *name, const struct stat *found, const char *as,
                      int depth)
{
    char target[PATH_MAX];
    if (S_ISDIR(found->st_mode)) {
        send_directory(folder, name, found, as, depth);
    } else if (S_ISREG(found->st_mode)) {
        send_regular(folder, name, found, as);
    } else if (S_ISLNK(found->st_mode)) {
        ssize_t size = readlinkat(folder, name, target, sizeof target - 1);
        if (size < 0)
            fail(errno, as);
        target[size] = 0;
        send_entry(LINK, found, as, target);
    } else {
        send_entry(SKIPPED, found, as, NULL);
    }
}

/* The last part of `path`, from which slashes at the end are removed. */
static char *base_name(char *path)
{
    size_t size = strlen(path);
    while (size > 1 && path[size - 1] == '/')
        path[--size] = 0;
    char *slash = strrchr(path, '/');
    return slash && slash[1] ? slash + 1 : path;
}

void get(void)
{
    char *path = (char *)request;
    struct stat found;
    if (!*path || strlen(path) != request_size || request_size >= PATH_MAX)
        fail(EINVAL, "not a path");
    if (stat(path, &found))
        fail(errno, path);
    static char resolved[PATH_MAX];
    const char *base = base_name(path);
    if (!strcmp(base, ".") || !strcmp(base, ".."))
        base = realpath(path, resolved) ? base_name(resolved) : "/";
    send_tree(AT_FDCWD, path, &found, strcmp(base, "/") ? base : "root", 0);
    send_frame(END, NULL, 0, NULL, 0);
}

/* What is being put: open directories, the innermost last, and perhaps a file in it. A file has a
 * name of its own until it is whole. A directory that was there keeps its mode and time. */
static struct level { int fd, is_new; uint32_t mode; struct timespec mtime; } levels[MAX_DEPTH + 1];
static int depth, file = -1;
static char file_name[NAME_MAX + 1], part_name[48];

static void clean_up(void)
{
    if (file >= 0)
        unlinkat(levels[depth].fd, part_name, 0);
}

/* The entry in `request`; its name, which is one, and the target behind it if there has to be. */
static char *read_entry(struct entry *entry, char **target)
{
    char *name = (char *)request + sizeof *entry;
    errno = EINVAL;
    if (request_size < sizeof *entry)
        fail(errno, "an entry that is too short");
    memcpy(entry, request, sizeof *entry);
    size_t size = strlen(name), rest = request_size - sizeof *entry;
    if (!size || size > NAME_MAX || strchr(name, '/') || !strcmp(name, ".") || !strcmp(name, ".."))
        fail(errno, "not a name");
    *target = size < rest ? name + size + 1 : NULL;
    if (*target && strlen(*target) != rest - size - 1)
        fail(errno, "not a link's target");
    return name;
}

static void new_part_name(void)
{
    static unsigned number;
    snprintf(part_name, sizeof part_name, ".pyvmm-agent.%d.%u", getpid(), number++);
}

/* Files, directories and links are replaced; a device of that name is nothing to lose. */
static void check_free(const char *name)
{
    struct stat found;
    if (!fstatat(levels[depth].fd, name, &found, AT_SYMLINK_NOFOLLOW) &&
        !S_ISREG(found.st_mode) && !S_ISDIR(found.st_mode) && !S_ISLNK(found.st_mode))
        fail(EEXIST, name);
}

static void put_directory(const char *name, const struct entry *entry)
{
    if (depth >= MAX_DEPTH) {
        errno = ELOOP;
        fail(errno, "directories nested too deeply");
    }
    int parent = levels[depth].fd;
    int is_new = !mkdirat(parent, name, 0700);
    if (!is_new && errno != EEXIST)
        fail(errno, name);
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        fail(errno, name);
    levels[++depth] =
        (struct level){fd, is_new, entry->mode & 07777, timespec_of(entry->mtime_ns)};
}

static void put_regular(const char *name)
{
    new_part_name();
    int fd = openat(levels[depth].fd, part_name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        fail(errno, name);
    file = fd;
    memcpy(file_name, name, strnlen(name, NAME_MAX) + 1); /* read_entry saw to its length */
}

static void put_link(const char *name, const char *target, const struct entry *entry)
{
    int parent = levels[depth].fd;
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, timespec_of(entry->mtime_ns)};
    errno = EINVAL;
    if (!target || !*target)
        fail(errno, "a link without a target");
    new_part_name();
    if (symlinkat(target, parent, part_name))
        fail(errno, name);
    utimensat(parent, part_name, times, AT_SYMLINK_NOFOLLOW);
    if (renameat(parent, part_name, parent, name)) {
        int number = errno;
        unlinkat(parent, part_name, 0);
        errno = number;
        fail(errno, name);
    }
}

static void put_data(void)
{
    if (request_size && !request[0] && !memcmp(request, request + 1, request_size - 1)) {
        if (lseek(file, (off_t)request_size, SEEK_CUR) < 0) /* what was a hole becomes one again */
            fail(errno, file_name);
        return;
    }
    for (size_t at = 0; at < request_size;) {
        ssize_t done = write(file, request + at, request_size - at);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            fail(errno, file_name);
        at += (size_t)done;
    }
}

static void finish(int fd, uint32_t mode, struct timespec mtime)
{
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, mtime};
    if (fchmod(fd, mode & 07777) || futimens(fd, times))
        fail(errno, file_name);
}

static void put_up(const struct entry *current)
{
    if (file >= 0) {
        if (ftruncate(file, lseek(file, 0, SEEK_CUR)))
            fail(errno, file_name);
        finish(file, current->mode, timespec_of(current->mtime_ns));
        if (renameat(levels[depth].fd, part_name, levels[depth].fd, file_name))
            fail(errno, file_name);
        close(file);
        file = -1;
        return;
    }
    struct level level = levels[depth--];
    snprintf(file_name, sizeof file_name, "a directory");
    if (level.is_new)
        finish(level.fd, level.mode, level.mtime);
    close(level.fd);
}

/* Where it goes: into `path` if that is a directory, else to that name. Returns the name, or NULL
 * for the client's. */
static char *open_target(char *path)
{
    struct stat found;
    int is_there = !stat(path, &found), is_directory = is_there && S_ISDIR(found.st_mode);
    if (is_there && !is_directory && !S_ISREG(found.st_mode))
        fail(EEXIST, path);
    size_t size = strlen(path);
    if (!is_directory && path[size - 1] == '/')
        fail(ENOTDIR, path);
    char *base = base_name(path);
    const char *folder = is_directory ? path : base == path ? "." : path;
    char *name = NULL;
    if (!is_directory) {
        name = strdup(base);
        if (!name || strlen(name) > NAME_MAX)
            fail(ENAMETOOLONG, path);
        if (base != path)
            *base = 0; /* the folder, with a slash behind it */
    }
    undo = clean_up;
    levels[0].fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (levels[0].fd < 0)
        fail(errno, folder);
    return name;
}

void put(void)
{
    struct entry entry, current = {0};
    enum frame_type type;
    int tops = 0;
    char *path = strdup((char *)request);
    if (!path || !*path || strlen(path) != request_size || request_size >= PATH_MAX)
        fail(EINVAL, "not a path");
    const char *top_name = open_target(path);
    while ((type = read_frame(MAX_DATA)) != END || depth || file >= 0) {
        char *name, *target;
        errno = EINVAL;
        if (file >= 0 ? type != DATA && type != UP : type == UP ? !depth : !depth && tops++)
            fail(errno, "a frame out of turn");
        if (type == DATA && file >= 0) {
            put_data();
            continue;
        }
        if (type == UP) {
            put_up(&current);
            continue;
        }
        name = read_entry(&entry, &target);
        if (!depth && top_name)
            name = (char *)top_name;
        check_free(name);
        if (type == DIRECTORY)
            put_directory(name, &entry);
        else if (type == REGULAR)
            put_regular(name), current = entry;
        else if (type == LINK)
            put_link(name, target, &entry);
        else
            fail(errno, "a frame of an unknown kind");
    }
    send_frame(DONE, NULL, 0, NULL, 0);
}
