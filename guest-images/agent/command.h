/* A command that runs for a client. */
#ifndef PYVMM_AGENT_COMMAND_H
#define PYVMM_AGENT_COMMAND_H

#include <signal.h>
#include <sys/types.h>

#include "agent.h"

struct command {
    pid_t pid;
    int pidfd, in, out, err;          /* -1: none, or closed */
    int tty;                          /* `in` and `out` are a terminal's master */
    int64_t deadline_ns;              /* 0: none */
    int stdin_ended, ended, timed_out;
    siginfo_t status;
    size_t left;                      /* bytes of output that are still passed on after its end */
};

enum { MAX_GROUPS = 1 << 10 };

struct identity {
    uid_t uid;
    gid_t gid;
    const char *name, *home;
    int is_known;                     /* /etc/passwd has it */
    int count;                        /* of `groups`, the first of which is `gid` */
    gid_t groups[MAX_GROUPS];
};

/* Who USER[:GROUP[:GROUP,...]] is, by names or numbers; whoever runs this for "". Returns NULL, or
 * what is wrong. `text` is changed and kept. */
const char *find_user(char *text, struct identity *who);

/* Be that user, in all of its groups and no other. Returns 0, or errno is set. */
int become(const struct identity *who);

/* Start what the request asks for. Fails the session if it cannot be. */
struct command begin_command(void);

#endif
