/* Frames on the session's connection, which blocks here. Whoever has gone ends the process. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "agent.h"

int in_guest;
int sock;
unsigned char request[MAX_REQUEST + 1];
size_t request_size;
void (*undo)(void);

static void __attribute__((noreturn)) leave(void)
{
    if (undo)
        undo();
    _exit(1);
}

void write_all(int fd, const void *data, size_t size)
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

void put_header(unsigned char *to, enum frame_type type, size_t size)
{
    to[0] = (unsigned char)type;
    for (int byte = 1; byte < HEADER; byte++, size >>= 8)
        to[byte] = (unsigned char)size;
}

void send_frame(enum frame_type type, const void *head, size_t head_size, const void *tail,
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
void fail(int number, const char *what)
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

size_t frame_size(const unsigned char *header)
{
    return header[1] | (size_t)header[2] << 8 | (size_t)header[3] << 16;
}

/* The next frame's type; its payload is in `request`, with a NUL behind it. */
enum frame_type read_frame(size_t limit)
{
    unsigned char header[HEADER];
    read_all(header, sizeof header);
    request_size = frame_size(header);
    if (request_size > limit)
        fail(EMSGSIZE, "a frame that is too long");
    read_all(request, request_size);
    request[request_size] = 0;
    return header[0];
}

int64_t now_ns(clockid_t clock)
{
    struct timespec time = {0};
    clock_gettime(clock, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

struct timespec timespec_of(int64_t ns)
{
    int64_t seconds = ns / 1000000000, rest = ns % 1000000000;
    if (rest < 0)
        seconds--, rest += 1000000000;
    return (struct timespec){.tv_sec = (time_t)seconds, .tv_nsec = (long)rest};
}
