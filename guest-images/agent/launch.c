/* From a RUN request to a process with its streams. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <pwd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <termios.h>
#include <unistd.h>

#include "command.h"

static char *next_string(size_t *at)
{
    if (*at >= request_size)
        fail(EINVAL, "a request that is too short");
    char *found = (char *)request + *at;
    *at += strlen(found) + 1;
    return found;
}

static int parse_id(const char *text, unsigned *id)
{
    char *end;
    errno = 0;
    unsigned long value = strtoul(text, &end, 10);
    *id = (unsigned)value;
    return *text >= '0' && *text <= '9' && !*end && !errno && value < UINT_MAX;
}

/* A number is always a group's number, whatever groups are called. */
static int find_group(const char *text, gid_t *gid)
{
    struct group *found = NULL;
    if (parse_id(text, gid))
        return 1;
    if (*text && (found = getgrnam(text)))
        *gid = found->gr_gid;
    return found != NULL;
}

static int add_group(struct identity *who, gid_t gid)
{
    if (who->count >= MAX_GROUPS)
        return 0;
    who->groups[who->count++] = gid;
    return 1;
}

/* The group, and those that /etc/group puts the user in. */
static int add_groups_of(struct identity *who)
{
    int count = MAX_GROUPS;
    if (getgrouplist(who->name, who->gid, who->groups, &count) < 0)
        return 0;
    who->count = count;
    return 1;
}

/* As container engines do it: with a group that is named, no other group but those in `others`. */
static const char *find_groups(struct identity *who, const char *group, char *others)
{
    if (!group)
        return !who->is_known ? add_group(who, who->gid), NULL
               : add_groups_of(who) ? NULL : "too many groups";
    if (!find_group(group, &who->gid))
        return "no such group";
    add_group(who, who->gid);
    for (char *one; (one = strsep(&others, ","));) {
        gid_t gid;
        if (!find_group(one, &gid))
            return "no such group";
        if (!add_group(who, gid))
            return "too many groups";
    }
    return NULL;
}

const char *find_user(char *text, struct identity *who)
{
    *who = (struct identity){.uid = geteuid(), .gid = getegid(), .name = "root", .home = "/root"};
    char *group = strchr(text, ':'), *others = NULL;
    if (group)
        *group++ = 0;
    if (group && (others = strchr(group, ':')))
        *others++ = 0;
    unsigned id;
    int is_number = parse_id(text, &id);
    struct passwd *found = !*text ? getpwuid(who->uid) : is_number ? getpwuid(id) : getpwnam(text);
    if (found) {
        who->uid = found->pw_uid, who->gid = found->pw_gid, who->is_known = 1;
        who->name = strdup(found->pw_name), who->home = strdup(found->pw_dir);
    } else if (is_number) { /* whoever has no group of his own is in root's, as in a container */
        who->uid = id, who->gid = 0, who->name = text, who->home = "/";
    } else if (*text) {
        return "no such user";
    }
    return find_groups(who, group && *group ? group : NULL, others);
}

int become(const struct identity *who)
{
    return setgroups((size_t)who->count, who->groups) || setgid(who->gid) || setuid(who->uid);
}

static void set_environment(const struct identity *who, const struct run_request *wanted,
                            size_t *at)
{
    clearenv();
    setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
    setenv("HOME", who->home, 1);
    setenv("USER", who->name, 1);
    setenv("LOGNAME", who->name, 1);
    for (int i = 0; i < wanted->envc; i++) {
        char *variable = next_string(at), *equals = strchr(variable, '=');
        if (!equals || equals == variable)
            fail(EINVAL, "a variable without a name");
        *equals = 0;
        setenv(variable, equals + 1, 1);
    }
}

/* In the child. What fails is told through `report`: a letter for what, and an errno. */
static void __attribute__((noreturn))
start_command(char **argv, const char *cwd, const struct identity *who, const int stdio[3], int tty,
              int report)
{
    char told[1 + sizeof(int)] = {'u'};
    for (int number = 1; number < NSIG; number++)
        signal(number, SIG_DFL);
    setsid();
    if (tty)
        ioctl(stdio[0], TIOCSCTTY, 0);
    for (int fd = 0; fd < 3; fd++) /* none of stdio[] is below 3: main has taken those */
        dup2(stdio[fd], fd);
    int oom = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (oom >= 0)
        errno = write(oom, "0", 1) < 0 ? errno : 0;
    if (!who || !become(who)) {
        told[0] = 'd';
        if (!chdir(cwd)) {
            told[0] = 'x';
            execvp(argv[0], argv);
        }
    }
    int number = errno;
    memcpy(told + 1, &number, sizeof number);
    write_all(report, told, sizeof told);
    _exit(127);
}

static void make_pipe(int ends[2])
{
    if (pipe2(ends, O_CLOEXEC))
        fail(errno, "cannot make a pipe");
}

static int open_terminal(int stdio[3], const struct run_request *wanted)
{
    int master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (master < 0 || unlockpt(master))
        fail(errno, "there is no terminal to be had");
    int slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (slave < 0)
        fail(errno, "there is no terminal to be had");
    struct winsize window = {.ws_row = wanted->rows, .ws_col = wanted->columns};
    ioctl(master, TIOCSWINSZ, &window);
    stdio[0] = stdio[1] = stdio[2] = slave;
    return master;
}

static void open_streams(struct command *command, int stdio[3], const struct run_request *wanted)
{
    if (command->tty) {
        command->in = command->out = open_terminal(stdio, wanted);
        command->err = -1;
        return;
    }
    int in[2], out[2], err[2];
    make_pipe(out);
    make_pipe(err);
    if (wanted->flags & WANTS_STDIN)
        make_pipe(in);
    else
        in[1] = -1, in[0] = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (in[0] < 0)
        fail(errno, "/dev/null");
    stdio[0] = in[0], stdio[1] = out[1], stdio[2] = err[1];
    command->in = in[1], command->out = out[0], command->err = err[0];
}

struct command begin_command(void)
{
    struct run_request wanted;
    size_t at = sizeof wanted;
    if (request_size < sizeof wanted)
        fail(EINVAL, "a request that is too short");
    memcpy(&wanted, request, sizeof wanted);
    const char *cwd = next_string(&at);
    char *user = next_string(&at);
    if (!wanted.argc)
        fail(EINVAL, "no command");
    char **argv = calloc(wanted.argc + (size_t)1, sizeof *argv);
    if (!argv)
        fail(ENOMEM, "the arguments");
    for (int i = 0; i < wanted.argc; i++)
        argv[i] = next_string(&at);
    static struct identity who;
    int changes_user = *user != 0;
    const char *wrong = find_user(user, &who);
    if (wrong)
        fail(ENOENT, wrong);
    set_environment(&who, &wanted, &at);

    struct command command = {.in = -1, .out = -1, .err = -1, .tty = !!(wanted.flags & WANTS_TTY)};
    int stdio[3], report[2];
    open_streams(&command, stdio, &wanted);
    make_pipe(report);
    command.pid = fork();
    if (command.pid < 0)
        fail(errno, "fork");
    if (!command.pid)
        start_command(argv, *cwd ? cwd : "/", changes_user ? &who : NULL, stdio, command.tty,
                      report[1]);
    for (int fd = 0; fd < 3; fd++)
        if (!fd || stdio[fd] != stdio[0])
            close(stdio[fd]);
    close(report[1]);
    char told[1 + sizeof(int)];
    if (read(report[0], told, sizeof told) == sizeof told) {
        int number;
        memcpy(&number, told + 1, sizeof number);
        fail(number, told[0] == 'x' ? argv[0] : told[0] == 'd' ? cwd : "cannot change the user");
    }
    close(report[0]);
    command.pidfd = (int)syscall(SYS_pidfd_open, command.pid, 0);
    if (command.pidfd < 0)
        fail(errno, "pidfd_open");
    if (wanted.timeout_ms)
        command.deadline_ns = now_ns(CLOCK_MONOTONIC) + (int64_t)wanted.timeout_ms * 1000000;
    return command;
}
