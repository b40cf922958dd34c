/* CLOCK and POWER_OFF: the guest as a machine. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

/* systemd(1): SIGRTMIN+4 starts poweroff.target. As glibc counts, which systemd is built with; here
 * SIGRTMIN is another number. */
enum { SYSTEMD_POWER_OFF = 34 + 4 };

#define BIT(number) (1ULL << ((number)-1)) /* a signal's, in a mask of /proc/PID/status */

void tell_clock(void)
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

/* Whether a process ignores QUIT, TERM and TSTP, as interactive shells do (POSIX sh, "Signals"), and
 * not KILL, as the kernel's own threads. */
static int is_shell(const char *pid)
{
    unsigned long long ignored = 0, shells = BIT(SIGQUIT) | BIT(SIGTERM) | BIT(SIGTSTP);
    char path[64], line[256];
    FILE *status;

    snprintf(path, sizeof path, "/proc/%.20s/status", pid);
    status = fopen(path, "re");
    while (status && fgets(line, sizeof line, status))
        if (sscanf(line, "SigIgn: %llx", &ignored) == 1)
            break;
    if (status)
        fclose(status);
    return (ignored & (shells | BIT(SIGKILL))) == shells;
}

static void stop_shell(const char *pid)
{
    pid_t number = (pid_t)strtol(pid, NULL, 10);
    if (number > 1 && number != getpid() && is_shell(pid))
        kill(number, SIGSTOP);
}

void stop_shells(char **pids)
{
    struct dirent *entry;
    DIR *all;

    if (*pids) {
        while (*pids)
            stop_shell(*pids++);
        return;
    }
    all = opendir("/proc");
    while (all && (entry = readdir(all)))
        stop_shell(entry->d_name);
    if (all)
        closedir(all);
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

void power_off(void)
{
    char init[32] = "";
    int quick = request_size == 1 && request[0];
    if (!in_guest)
        fail(EPERM, "only a guest is powered off");
    send_frame(DONE, NULL, 0, NULL, 0);
    int comm = open("/proc/1/comm", O_RDONLY | O_CLOEXEC);
    int known = comm >= 0 && read(comm, init, sizeof init - 1) > 0;
    int has_systemd = known && !strcmp(init, "systemd\n");
    if (!quick && has_systemd && !kill(1, SYSTEMD_POWER_OFF))
        return;
    if (!quick) {
        signal(SIGTERM, SIG_IGN);
        sync();
        stop_shells((char *[]){NULL});
        if (!settle(SIGTERM, 50))
            settle(SIGKILL, 50);
        sync();
    }
    reboot(RB_POWER_OFF);
}
