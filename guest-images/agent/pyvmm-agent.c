/* The guest's agent: runs commands, copies files, tells and sets the clock, powers off.
 *
 *   pyvmm-agent               serve the host (CID 2) on vsock port 1023
 *   pyvmm-agent --initramfs   the same, once PID 1 has switched to the root file system
 *   pyvmm-agent --unix PATH   serve a Unix socket instead, to try it without a guest
 *   pyvmm-agent --as USER[:GROUP[:GROUP,...]] CMD [ARG]...
 *                             be that user, in these groups only, and run CMD: a container image's
 *   pyvmm-agent --stop-shells [PID...]
 *                             stop interactive shells, before all others are told to end
 *
 * A connection is a session of one request, served by a process of its own: what goes wrong in it
 * concerns nobody else, and a client that goes away takes its command with it. docs/guest-agent.md
 * describes the frames.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

#include "command.h"

/* A port below 1024: no program without privileges can take the agent's place. */
enum { PORT = 1023, MAX_SESSIONS = 64, BACKLOG = 1024, REQUEST_SECONDS = 30 };

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

/* Where a session can be noted; -1: whoever else comes waits until one has ended. */
static int free_slot(void)
{
    for (int slot = 0; slot < MAX_SESSIONS; slot++)
        if (!sessions[slot])
            return slot;
    return -1;
}

static void note_child(int number)
{
    (void)number; /* it ends ppoll */
}

static void accept_session(int listener, int slot)
{
    struct sockaddr_vm peer = {0};
    socklen_t size = sizeof peer;
    int fd = accept4(listener, (struct sockaddr *)&peer, &size, SOCK_CLOEXEC);
    if (fd < 0)
        return;
    /* A program of the guest's must not become root through us. */
    if (in_guest && peer.svm_cid != VMADDR_CID_HOST) {
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
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, BACKLOG))
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
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, BACKLOG))
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

/* No pipe is to get the numbers 0, 1 and 2, whatever we were started with. */
static void occupy_standard_fds(void)
{
    int fd = open("/dev/null", O_RDWR);
    while (fd >= 0 && fd < 3)
        fd = open("/dev/null", O_RDWR);
    if (fd >= 0)
        close(fd);
}

static int run_as(char *user, char **argv)
{
    static struct identity who;
    const char *wrong = find_user(user, &who);
    if (wrong)
        return fprintf(stderr, "pyvmm-agent: %s\n", wrong), 126;
    if (become(&who))
        return perror("pyvmm-agent: cannot change the user"), 126;
    execvp(argv[0], argv);
    int number = errno;
    perror(argv[0]);
    return number == ENOENT ? 127 : 126;
}

int main(int argc, char **argv)
{
    sigset_t blocked, waiting_mask;
    struct sigaction action = {.sa_handler = note_child, .sa_flags = SA_NOCLDSTOP};
    int early = argc == 2 && !strcmp(argv[1], "--initramfs");
    int at_path = argc == 3 && !strcmp(argv[1], "--unix");
    if (argc > 3 && !strcmp(argv[1], "--as"))
        return run_as(argv[2], argv + 3);
    if (argc > 1 && !strcmp(argv[1], "--stop-shells"))
        return stop_shells(argv + 2), 0;
    if (argc > 1 && !early && !at_path) {
        fprintf(stderr, "usage: pyvmm-agent [--initramfs | --unix PATH | --as USER CMD... | "
                        "--stop-shells [PID...]]\n");
        return 2;
    }
    occupy_standard_fds();
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
    if (!at_path && !has_address() && getpid() != 1)
        return 0; /* there is nobody to serve */
    int listener = at_path ? listen_at(argv[2]) : listen_to_host();
    if (listener < 0)
        perror("pyvmm-agent: cannot listen");
    if (listener < 0 && getpid() != 1) /* where it is init, it has to stay */
        return 1;
    int oom = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (oom >= 0 && write(oom, "-900", 4) < 0 && in_guest)
        perror("pyvmm-agent: oom_score_adj");
    close(oom);
    for (;;) {
        int slot = free_slot();
        struct pollfd waiting_for = {.fd = slot < 0 ? -1 : listener, .events = POLLIN};
        int ready = ppoll(&waiting_for, 1, NULL, &waiting_mask);
        reap();
        if (ready > 0)
            accept_session(listener, slot);
    }
}
