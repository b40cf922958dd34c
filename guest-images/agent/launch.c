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

struct identity { uid_t uid; gid_t gid; const char *name, *home; };

static int parse_id(const char *text, unsigned *id)
{
    char *end;
    errno = 0;
    unsigned long value = strtoul(text, &end, 10);
    *id = (unsigned)value;
    return *text >= '0' && *text <= '9' && !*end && !errno && value < UINT_MAX;
}

/* NAME, UID, NAME:GROUP or UID:GID; "" is whoever runs this. */
static struct identity find_user(char *text)
{
    struct identity who = {geteuid(), getegid(), "root", "/root"};
    char *group = strchr(text, ':');
    if (group)
        *group++ = 0;
    struct passwd *found = *text ? getpwnam(text) : getpwuid(who.uid);
    unsigned id;
    if (!found && *text) {
        if (!parse_id(text, &id))
            fail(ENOENT, "no such user");
        found = getpwuid(id);
        who = (struct identity){id, found ? found->pw_gid : id, text, "/"};
    }
    if (found)
        who = (struct identity){found->pw_uid, found->pw_gid, strdup(found->pw_name),
                                strdup(found->pw_dir)};
    if (group) {
        struct group *other = getgrnam(group);
        if (!other && !parse_id(group, &id))
            fail(ENOENT, "no such group");
        who.gid = other ? other->gr_gid : id;
    }
    return who;
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

static int become(const struct identity *who)
{
    if (initgroups(who->name, who->gid) && setgroups(1, &who->gid))
        return -1;
    return setgid(who->gid) || setuid(who->uid) ? -1 : 0;
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
    int changes_user = *user != 0;
    struct identity who = find_user(user);
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
