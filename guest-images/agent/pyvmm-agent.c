/* The guest's agent: runs commands, copies files, tells and sets the clock, powers off.
 *
 *   pyvmm-agent               serve the host (CID 2) on vsock port 1023
 *   pyvmm-agent --initramfs   the same, once PID 1 has switched to the root file system
 *   pyvmm-agent --unix PATH   serve a Unix socket instead, to try it without a guest
 *
 * A connection is a session of one request, served by a process of its own: what goes wrong in it
 * concerns nobody else, and a client that goes away takes its command with it. docs/guest-agent.md
 * describes the frames. Nothing is allocated after a session's request has come.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

/* A port below 1024: no program without privileges can take the agent's place. */
enum { PORT = 1023, VERSION = 1, MAX_SESSIONS = 64 };
enum { HEADER = 4, MAX_DATA = 1 << 16, MAX_REQUEST = 1 << 20, WINDOW = 1 << 16, MAX_DEPTH = 64 };
enum { REQUEST_SECONDS = 30, GRACE_MS = 2000, DRAIN_BYTES = 1 << 20 };

enum frame_type {
    RUN = 1, STDIN, STDIN_END, SIGNAL, RESIZE, PUT, GET, CLOCK, POWER_OFF,
    DIRECTORY = 16, REGULAR, LINK, DATA, UP, SKIPPED, END,
    HELLO = 32, STARTED, STDOUT, STDERR, MORE_STDIN, EXIT, FAILED, CLOCK_IS, DONE,
};
enum { WANTS_STDIN = 1, WANTS_TTY = 2 };                       /* struct run_request.flags */
enum { EXITED, KILLED, TIMED_OUT };                            /* struct exit_status.how */

/* All little-endian, as every machine is that this is built for. */
struct hello { uint32_t version, reserved; int64_t realtime_ns, boottime_ns; };
struct run_request { uint32_t flags, timeout_ms; uint16_t rows, columns, argc, envc; };
struct exit_status { uint32_t how, value; };
struct window_size { uint16_t rows, columns; };
struct entry { uint32_t mode, reserved; int64_t mtime_ns; uint64_t size; }; /* a name follows */
struct times { int64_t realtime_ns, boottime_ns; };

static int in_guest;                  /* not at a Unix socket: may set the clock and power off */
static int sock;                      /* the session's connection */
static unsigned char request[MAX_REQUEST + 1];
static size_t request_size;

/* What of a file has come and is not to stay; set by who puts one. */
static void (*undo)(void);

static void __attribute__((noreturn)) leave(void)
{
    if (undo)
        undo();
    _exit(1);
}

/* --- frames --------------------------------------------------------------------------------- */

static void write_all(int fd, const void *data, size_t size)
{
    for (const char *from = data; size;) {
        ssize_t done = write(fd, from, size);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            leave(); /* the client has gone */
        from += done, size -= (size_t)done;
    }
}

static void read_all(void *into, size_t size)
{
    for (char *to = into; size;) {
        ssize_t done = read(sock, to, size);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            leave();
        to += done, size -= (size_t)done;
    }
}

static void put_header(unsigned char *to, enum frame_type type, size_t size)
{
    to[0] = (unsigned char)type;
    to[1] = (unsigned char)size, to[2] = (unsigned char)(size >> 8), to[3] = (unsigned char)(size >> 16);
}

static void send_frame(enum frame_type type, const void *head, size_t head_size, const void *tail,
                       size_t tail_size)
{
    static unsigned char frame[HEADER + MAX_DATA];
    put_header(frame, type, head_size + tail_size);
    if (head_size)
        memcpy(frame + HEADER, head, head_size);
    if (tail_size)
        memcpy(frame + HEADER + head_size, tail, tail_size);
    write_all(sock, frame, HEADER + head_size + tail_size);
}

/* The last frame of a session that failed. What the client is still sending is thrown away: closing
 * with it unread would take the frame along. */
static void __attribute__((noreturn)) fail(int number, const char *what)
{
    static char nothing[MAX_DATA];
    uint32_t code = (uint32_t)number;
    size_t size = strnlen(what, 256);
    if (undo)
        undo();
    undo = NULL;
    struct timeval patience = {.tv_sec = GRACE_MS / 1000};
    if (fcntl(sock, F_SETFL, fcntl(sock, F_GETFL) & ~O_NONBLOCK))
        _exit(1);
    send_frame(FAILED, &code, sizeof code, what, size);
    shutdown(sock, SHUT_WR);
    setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    while (read(sock, nothing, sizeof nothing) > 0)
        ;
    _exit(1);
}

/* The next frame's type; its payload is in `request`, with a NUL behind it. */
static enum frame_type read_frame(size_t limit)
{
    unsigned char header[HEADER];
    read_all(header, sizeof header);
    request_size = header[1] | (size_t)header[2] << 8 | (size_t)header[3] << 16;
    if (request_size > limit)
        fail(EMSGSIZE, "a frame that is too long");
    read_all(request, request_size);
    request[request_size] = 0;
    return header[0];
}

static int64_t now_ns(clockid_t clock)
{
    struct timespec time = {0};
    clock_gettime(clock, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static struct timespec timespec_of(int64_t ns)
{
    int64_t seconds = ns / 1000000000, rest = ns % 1000000000;
    if (rest < 0)
        seconds--, rest += 1000000000;
    return (struct timespec){.tv_sec = (time_t)seconds, .tv_nsec = (long)rest};
}

/* --- running a command ---------------------------------------------------------------------- */

struct command {
    pid_t pid;
    int pidfd, in, out, err;          /* -1: none, or closed */
    int tty;                          /* `in` and `out` are a terminal's master */
    int64_t deadline_ns;              /* 0: none */
    int stdin_ended, ended, timed_out;
    siginfo_t status;
    size_t left;                      /* bytes of output that are still passed on after its end */
};

static unsigned char output[HEADER + MAX_DATA];   /* one frame on its way to the client */
static size_t output_size, output_sent;
static unsigned char input[HEADER + MAX_DATA];    /* what has come of the next frame */
static size_t input_size;
static unsigned char waiting[WINDOW];             /* for the command to read */
static size_t waiting_size;
static size_t consumed;               /* of stdin, and the client has not been told */

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

static void set_environment(const struct identity *who, const struct run_request *wanted, size_t *at)
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

static void set_nonblocking(int fd)
{
    if (fd >= 0)
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
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

static struct command begin_command(void)
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

/* End the command and all it has started that did not leave its group; the client has gone. */
static void __attribute__((noreturn)) abandon(struct command *command)
{
    struct pollfd ending = {.fd = command->pidfd, .events = POLLIN};
    kill(-command->pid, SIGTERM);
    kill(-command->pid, SIGCONT);
    poll(&ending, 1, GRACE_MS);
    kill(-command->pid, SIGKILL);
    _exit(1);
}

static void take_frame(struct command *command, enum frame_type type, const unsigned char *data,
                       size_t size)
{
    uint32_t number;
    struct window_size window;
    if (type == STDIN && size <= sizeof waiting - waiting_size && !command->stdin_ended) {
        memcpy(waiting + waiting_size, data, size);
        waiting_size += size;
    } else if (type == STDIN_END && !size) {
        command->stdin_ended = 1;
    } else if (type == SIGNAL && size == sizeof number) {
        memcpy(&number, data, sizeof number);
        if (number >= 1 && number < NSIG && !command->ended)
            kill(-command->pid, (int)number);
    } else if (type == RESIZE && size == sizeof window) {
        memcpy(&window, data, sizeof window);
        struct winsize terminal = {.ws_row = window.rows, .ws_col = window.columns};
        if (command->tty)
            ioctl(command->out, TIOCSWINSZ, &terminal);
    } else {
        abandon(command); /* what breaks the rules is no client */
    }
}

static void receive(struct command *command)
{
    ssize_t got = read(sock, input + input_size, sizeof input - input_size);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0)
        abandon(command);
    input_size += (size_t)got;
    size_t at = 0;
    while (input_size - at >= HEADER) {
        const unsigned char *frame = input + at;
        size_t size = frame[1] | (size_t)frame[2] << 8 | (size_t)frame[3] << 16;
        if (size > MAX_DATA)
            abandon(command);
        if (input_size - at < HEADER + size)
            break;
        take_frame(command, frame[0], frame + HEADER, size);
        at += HEADER + size;
    }
    memmove(input, input + at, input_size -= at);
}

static void close_stdin(struct command *command)
{
    if (!command->tty)
        close(command->in);
    command->in = -1;
}

/* Pass on what waits for the command's standard input, as far as it takes it. */
static void feed(struct command *command)
{
    if (command->in >= 0 && waiting_size) {
        ssize_t done = write(command->in, waiting, waiting_size);
        if (done < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (done < 0)
            close_stdin(command); /* it reads no more */
        else
            memmove(waiting, waiting + done, waiting_size -= (size_t)done), consumed += (size_t)done;
    }
    if (command->in < 0)
        consumed += waiting_size, waiting_size = 0;
    if (command->in >= 0 && command->stdin_ended && !waiting_size) {
        if (command->tty && write(command->in, "\4", 1) < 0) /* Ctrl-D */
            return;
        close_stdin(command);
    }
}

static void queue_frame(enum frame_type type, const void *data, size_t size)
{
    put_header(output, type, size);
    memcpy(output + HEADER, data, size);
    output_size = HEADER + size;
}

/* Take some of a stream's output for the client; whether there was any. */
static int take_output(struct command *command, int *fd, enum frame_type type)
{
    if (*fd < 0 || !command->left)
        return 0;
    size_t most = command->ended && command->left < MAX_DATA ? command->left : MAX_DATA;
    ssize_t got = read(*fd, output + HEADER, most);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (got <= 0) { /* EIO: nobody has the terminal any more */
        if (*fd == command->in)
            command->in = -1;
        close(*fd);
        *fd = -1;
        return 0;
    }
    if (command->ended)
        command->left -= (size_t)got;
    put_header(output, type, (size_t)got);
    output_size = HEADER + (size_t)got;
    return 1;
}

static void note_end(struct command *command)
{
    if (waitid(P_PID, (id_t)command->pid, &command->status, WEXITED | WNOHANG) ||
        !command->status.si_pid)
        return;
    command->ended = 1;
    command->left = DRAIN_BYTES; /* what it left behind may go on writing for ever */
}

static int flush_output(struct command *command)
{
    while (output_sent < output_size) {
        ssize_t done = write(sock, output + output_sent, output_size - output_sent);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0 && errno == EAGAIN)
            return 0;
        if (done <= 0)
            abandon(command);
        output_sent += (size_t)done;
    }
    output_size = output_sent = 0;
    return 1;
}

/* Fill `output` with the next frame, if there is one. */
static void next_output(struct command *command)
{
    uint32_t more = (uint32_t)consumed;
    if (consumed >= WINDOW / 4 || (consumed && !waiting_size)) {
        consumed = 0;
        queue_frame(MORE_STDIN, &more, sizeof more);
    } else if (!take_output(command, &command->out, STDOUT)) {
        take_output(command, &command->err, STDERR);
    }
}

static void wait_for_something(struct command *command)
{
    int blocked = output_size != 0;
    int timeout = -1;
    if (command->deadline_ns && !command->ended) {
        int64_t left = (command->deadline_ns - now_ns(CLOCK_MONOTONIC)) / 1000000 + 1;
        timeout = left < 0 ? 0 : left < 1 << 30 ? (int)left : 1 << 30;
    }
    struct pollfd fds[] = {
        {.fd = sock, .events = (short)(POLLIN | (blocked ? POLLOUT : 0))},
        {.fd = command->ended ? -1 : command->pidfd, .events = POLLIN},
        {.fd = waiting_size || command->stdin_ended ? command->in : -1, .events = POLLOUT},
        {.fd = blocked ? -1 : command->out, .events = POLLIN},
        {.fd = blocked ? -1 : command->err, .events = POLLIN},
    };
    if (poll(fds, sizeof fds / sizeof *fds, timeout) < 0 && errno != EINTR)
        abandon(command);
    if (fds[0].revents & (POLLIN | POLLHUP | POLLERR))
        receive(command);
    if (fds[1].revents)
        note_end(command);
    if (!command->ended && command->deadline_ns && now_ns(CLOCK_MONOTONIC) >= command->deadline_ns) {
        command->timed_out = 1, command->deadline_ns = 0;
        kill(-command->pid, SIGKILL);
    }
}

static void run(void)
{
    struct command command = begin_command();
    uint32_t pid = (uint32_t)command.pid;
    command.left = DRAIN_BYTES;
    set_nonblocking(sock);
    set_nonblocking(command.in);
    set_nonblocking(command.out);
    set_nonblocking(command.err);
    queue_frame(STARTED, &pid, sizeof pid);
    for (;;) {
        feed(&command);
        int was_over = command.ended;
        if (flush_output(&command)) {
            next_output(&command);
            if (was_over && !output_size)
                break; /* its end was seen, and after that nothing more to read */
            if (output_size)
                continue;
        }
        wait_for_something(&command);
    }
    struct exit_status status = {
        command.timed_out ? TIMED_OUT : command.status.si_code == CLD_EXITED ? EXITED : KILLED,
        (uint32_t)command.status.si_status,
    };
    fcntl(sock, F_SETFL, fcntl(sock, F_GETFL) & ~O_NONBLOCK);
    send_frame(EXIT, &status, sizeof status, NULL, 0);
}

/* --- files ---------------------------------------------------------------------------------- */

static int64_t mtime_of(const struct stat *found)
{
    return (int64_t)found->st_mtim.tv_sec * 1000000000 + found->st_mtim.tv_nsec;
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

static void send_regular(int folder, const char *name, const struct stat *found, const char *as)
{
    static char data[MAX_DATA];
    int fd = openat(folder, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
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
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
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

static void get(void)
{
    char *path = (char *)request;
    struct stat found;
    if (!*path || strlen(path) != request_size || request_size >= PATH_MAX)
        fail(EINVAL, "not a path");
    if (stat(path, &found))
        fail(errno, path);
    const char *base = base_name(path);
    send_tree(AT_FDCWD, path, &found, strcmp(base, "/") ? base : "root", 0);
    send_frame(END, NULL, 0, NULL, 0);
}

/* What is being put: open directories, the innermost last, and perhaps a file in it. A file has a
 * name of its own until it is whole. */
static struct level { int fd; uint32_t mode; struct timespec mtime; } levels[MAX_DEPTH + 1];
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
    *target = name + size + 1;
    if (target && size < rest && strlen(*target) != rest - size - 1)
        fail(errno, "not a link's target");
    return name;
}

static void new_part_name(void)
{
    static unsigned number;
    snprintf(part_name, sizeof part_name, ".pyvmm-agent.%d.%u", getpid(), number++);
}

static void put_directory(const char *name, const struct entry *entry)
{
    if (depth >= MAX_DEPTH) {
        errno = ELOOP;
        fail(errno, "directories nested too deeply");
    }
    int parent = levels[depth].fd;
    if (mkdirat(parent, name, 0700) && errno != EEXIST)
        fail(errno, name);
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        fail(errno, name);
    levels[++depth] = (struct level){fd, entry->mode & 07777, timespec_of(entry->mtime_ns)};
}

static void put_regular(const char *name)
{
    new_part_name();
    int fd = openat(levels[depth].fd, part_name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        fail(errno, name);
    file = fd;
    memcpy(file_name, name, strnlen(name, NAME_MAX) + 1); /* no longer than that, as its reader saw */
}

static void put_link(const char *name, const char *target, const struct entry *entry)
{
    int parent = levels[depth].fd;
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, timespec_of(entry->mtime_ns)};
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
        finish(file, current->mode, timespec_of(current->mtime_ns));
        if (renameat(levels[depth].fd, part_name, levels[depth].fd, file_name))
            fail(errno, file_name);
        close(file);
        file = -1;
        return;
    }
    struct level level = levels[depth--];
    snprintf(file_name, sizeof file_name, "a directory");
    finish(level.fd, level.mode, level.mtime);
    close(level.fd);
}

/* Where it goes: into `path` if that is a directory, else to that name. Returns the name, or NULL
 * for the client's. */
static char *open_target(char *path)
{
    struct stat found;
    int is_directory = !stat(path, &found) && S_ISDIR(found.st_mode);
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

static void put(void)
{
    struct entry entry, current = {0};
    enum frame_type type;
    int tops = 0;
    char *path = strdup((char *)request);
    if (!path || !*path || strlen(path) != request_size || request_size >= PATH_MAX)
        fail(EINVAL, "not a path");
    const char *top_name = open_target(path);
    for (type = read_frame(MAX_DATA); type != END || depth || file >= 0; type = read_frame(MAX_DATA)) {
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

/* --- the machine ---------------------------------------------------------------------------- */

static void tell_clock(void)
{
    int64_t wanted;
    if (request_size == sizeof wanted) {
        memcpy(&wanted, request, sizeof wanted);
        struct timespec time = timespec_of(wanted);
        if (!in_guest)
            fail(EPERM, "only a guest's clock is set");
        if (clock_settime(CLOCK_REALTIME, &time))
            fail(errno, "the clock");
    } else if (request_size) {
        fail(EINVAL, "not a time");
    }
    struct times now = {now_ns(CLOCK_REALTIME), now_ns(CLOCK_BOOTTIME)};
    send_frame(CLOCK_IS, &now, sizeof now, NULL, 0);
}

/* Whether all file systems on block devices are read-only now. */
static int make_read_only(void)
{
    char line[2 * PATH_MAX], source[PATH_MAX], target[PATH_MAX];
    int failed = 0;
    FILE *mounts = fopen("/proc/self/mounts", "re");
    while (mounts && fgets(line, sizeof line, mounts))
        if (sscanf(line, "%4095s %4095s", source, target) == 2 && !strncmp(source, "/dev/", 5))
            failed |= mount(NULL, target, NULL, MS_REMOUNT | MS_RDONLY, NULL);
    if (mounts)
        fclose(mounts);
    return !failed;
}

static int settle(int signal_number, int steps)
{
    struct timespec step = {.tv_nsec = 20000000};
    kill(-1, signal_number);
    while (!make_read_only()) {
        if (!steps--)
            return 0;
        nanosleep(&step, NULL);
    }
    return 1;
}

static void power_off(void)
{
    char init[32] = "";
    int quick = request_size == 1 && request[0];
    if (!in_guest)
        fail(EPERM, "only a guest is powered off");
    send_frame(DONE, NULL, 0, NULL, 0);
    int comm = open("/proc/1/comm", O_RDONLY | O_CLOEXEC);
    if (!quick && comm >= 0 && read(comm, init, sizeof init - 1) > 0 && !strcmp(init, "systemd\n") &&
        !kill(1, SIGRTMIN + 4)) /* systemd(1): starts poweroff.target */
        return;
    if (!quick) {
        signal(SIGTERM, SIG_IGN);
        sync();
        if (!settle(SIGTERM, 50))
            settle(SIGKILL, 50);
        sync();
    }
    reboot(RB_POWER_OFF);
}

/* --- sessions ------------------------------------------------------------------------------- */

static void serve(void)
{
    struct timeval patience = {.tv_sec = REQUEST_SECONDS}, none = {0};
    struct hello hello = {VERSION, 0, now_ns(CLOCK_REALTIME), now_ns(CLOCK_BOOTTIME)};
    send_frame(HELLO, &hello, sizeof hello, NULL, 0);
    setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    enum frame_type type = read_frame(MAX_REQUEST);
    setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &none, sizeof none);
    switch (type) {
    case RUN: run(); break;
    case GET: get(); break;
    case PUT: put(); break;
    case CLOCK: tell_clock(); break;
    case POWER_OFF: power_off(); break;
    default: fail(ENOSYS, "no such request");
    }
}

static pid_t sessions[MAX_SESSIONS];

/* Reap whoever has ended: sessions, and what their commands left behind. */
static void reap(void)
{
    pid_t pid;
    while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
        for (int i = 0; i < MAX_SESSIONS; i++)
            if (sessions[i] == pid)
                sessions[i] = 0;
}

static void note_child(int number)
{
    (void)number; /* it ends ppoll */
}

static void accept_session(int listener)
{
    struct sockaddr_vm peer = {0};
    socklen_t size = sizeof peer;
    int slot = 0, fd = accept4(listener, (struct sockaddr *)&peer, &size, SOCK_CLOEXEC);
    if (fd < 0)
        return;
    while (slot < MAX_SESSIONS && sessions[slot])
        slot++;
    /* A program of the guest's must not become root through us. */
    if ((in_guest && peer.svm_cid != VMADDR_CID_HOST) || slot == MAX_SESSIONS) {
        close(fd);
        return;
    }
    pid_t pid = fork();
    if (!pid) {
        sigset_t none;
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        signal(SIGCHLD, SIG_DFL);
        close(listener);
        sock = fd;
        serve();
        exit(0);
    }
    sessions[slot] = pid > 0 ? pid : 0;
    close(fd);
}

static int listen_to_host(void)
{
    struct sockaddr_vm address = {
        .svm_family = AF_VSOCK, .svm_port = PORT, .svm_cid = VMADDR_CID_ANY};
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    in_guest = 1;
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, MAX_SESSIONS))
        return -1;
    return fd;
}

/* Whether the guest has a socket device: then it has an address. */
static int has_address(void)
{
    unsigned cid = VMADDR_CID_ANY;
    int fd = open("/dev/vsock", O_RDONLY | O_CLOEXEC);
    if (fd < 0 || ioctl(fd, IOCTL_VM_SOCKETS_GET_LOCAL_CID, &cid))
        return 0;
    close(fd);
    return cid != VMADDR_CID_ANY;
}

static int listen_at(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, MAX_SESSIONS))
        return -1;
    return fd;
}

/* Wait until PID 1 has another root directory than now, and move there. */
static int follow_switch_root(void)
{
    struct timespec step = {.tv_nsec = 10000000};
    struct stat first, now;
    int proc = open("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC); /* it will be moved */
    if (proc < 0 || fstatat(proc, "1/root", &first, 0))
        return -1;
    for (now = first; now.st_dev == first.st_dev; nanosleep(&step, NULL))
        if (fstatat(proc, "1/root", &now, 0))
            return -1;
    return fchdir(proc) || chroot("1/root") || chdir("/") ? -1 : close(proc);
}

int main(int argc, char **argv)
{
    sigset_t blocked, waiting_mask;
    struct sigaction action = {.sa_handler = note_child, .sa_flags = SA_NOCLDSTOP};
    int early = argc == 2 && !strcmp(argv[1], "--initramfs");
    int at_path = argc == 3 && !strcmp(argv[1], "--unix");
    if (argc > 1 && !early && !at_path) {
        fprintf(stderr, "usage: pyvmm-agent [--initramfs | --unix PATH]\n");
        return 2;
    }
    for (int fd = open("/dev/null", O_RDWR); fd >= 0 && fd < 3; fd = open("/dev/null", O_RDWR))
        if (fd == 2)
            break; /* 0, 1 and 2 are taken: no pipe gets those numbers */
    signal(SIGPIPE, SIG_IGN);
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGCHLD);
    sigprocmask(SIG_BLOCK, &blocked, &waiting_mask);
    sigaction(SIGCHLD, &action, NULL);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    if (early && follow_switch_root()) {
        perror("pyvmm-agent: the root file system");
        return 1;
    }
    if (!at_path && !has_address())
        return 0; /* there is nobody to serve */
    int listener = at_path ? listen_at(argv[2]) : listen_to_host();
    if (listener < 0) {
        perror("pyvmm-agent: cannot listen");
        return 1;
    }
    int oom = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (oom >= 0 && write(oom, "-900", 4) < 0 && in_guest)
        perror("pyvmm-agent: oom_score_adj");
    close(oom);
    for (;;) {
        struct pollfd waiting_for = {.fd = listener, .events = POLLIN};
        int ready = ppoll(&waiting_for, 1, NULL, &waiting_mask);
        reap();
        if (ready > 0)
            accept_session(listener);
    }
}
