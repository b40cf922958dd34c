/* RUN: a command with its streams, a terminal perhaps, until it or the client ends. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "command.h"

enum { DRAIN_BYTES = 1 << 20 };       /* of output, at most, that come after a command's end */

static unsigned char output[HEADER + MAX_DATA];   /* one frame on its way to the client */
static size_t output_size, output_sent;
static unsigned char input[HEADER + MAX_DATA];    /* what has come of the next frame */
static size_t input_size;
static unsigned char waiting[WINDOW];             /* for the command to read */
static size_t waiting_size;
static size_t consumed;               /* of stdin, and the client has not been told */

static void set_nonblocking(int fd)
{
    if (fd >= 0)
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

/* End the command and all it has started that did not leave its group; the client has gone. */
static void __attribute__((noreturn)) abandon(struct command *command)
{
    struct pollfd ending = {.fd = command->pidfd, .events = POLLIN};
    if (command->ended)
        _exit(1); /* its number may be somebody else's by now */
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
        size_t size = frame_size(frame);
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

static void take_back(size_t size)
{
    memmove(waiting, waiting + size, waiting_size -= size);
    consumed += size;
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
            take_back((size_t)done);
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
    int is_late = command->deadline_ns && now_ns(CLOCK_MONOTONIC) >= command->deadline_ns;
    if (is_late && !command->ended) {
        command->timed_out = 1, command->deadline_ns = 0;
        kill(-command->pid, SIGKILL);
    }
}

void run(void)
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
