/* What the agent's parts share: frames, and the session that this process serves.
 *
 * docs/guest-agent.md describes the frames. All numbers are little-endian, as every machine is that
 * this is built for. */
#ifndef PYVMM_AGENT_H
#define PYVMM_AGENT_H

#include <stddef.h>
#include <stdint.h>
#include <time.h>

enum { VERSION = 1 };
enum { HEADER = 4, MAX_DATA = 1 << 16, MAX_REQUEST = 1 << 20, WINDOW = 1 << 16, MAX_DEPTH = 64 };
enum { GRACE_MS = 2000 };             /* for what is asked to end, before it is made to */

enum frame_type {
    RUN = 1, STDIN, STDIN_END, SIGNAL, RESIZE, PUT, GET, CLOCK, POWER_OFF,
    DIRECTORY = 16, REGULAR, LINK, DATA, UP, SKIPPED, END,
    HELLO = 32, STARTED, STDOUT, STDERR, MORE_STDIN, EXIT, FAILED, CLOCK_IS, DONE,
};
enum { WANTS_STDIN = 1, WANTS_TTY = 2 }; /* struct run_request.flags */
enum { EXITED, KILLED, TIMED_OUT };      /* struct exit_status.how */

struct hello { uint32_t version, reserved; int64_t realtime_ns, boottime_ns; };
struct run_request { uint32_t flags, timeout_ms; uint16_t rows, columns, argc, envc; };
struct exit_status { uint32_t how, value; };
struct window_size { uint16_t rows, columns; };
struct entry { uint32_t mode, reserved; int64_t mtime_ns; uint64_t size; }; /* a name follows */
struct times { int64_t realtime_ns, boottime_ns; };

extern int in_guest;                  /* not at a Unix socket: may set the clock and power off */
extern int sock;                      /* the session's connection */
extern unsigned char request[MAX_REQUEST + 1]; /* the last frame's payload, and a NUL */
extern size_t request_size;
extern void (*undo)(void);            /* removes what has come of a file, if the session fails */

void write_all(int fd, const void *data, size_t size);
void put_header(unsigned char *to, enum frame_type type, size_t size);
size_t frame_size(const unsigned char *header);
void send_frame(enum frame_type type, const void *head, size_t head_size, const void *tail,
                size_t tail_size);
enum frame_type read_frame(size_t limit);
void fail(int number, const char *what) __attribute__((noreturn));

int64_t now_ns(clockid_t clock);
struct timespec timespec_of(int64_t ns);

/* The requests; each may end the process. */
void run(void);
void get(void);
void put(void);
void tell_clock(void);
void power_off(void);
/* Stop the interactive shells among `pids`, which end with NULL; all of the guest's if there are
 * none. They heed no TERM: one that still reads /etc/profile would go on without the id(1) that it
 * has called, and complain of that on the console. To hang them up would end their jobs as well. */
void stop_shells(char **pids);

#endif
