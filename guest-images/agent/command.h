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

/* Start what the request asks for. Fails the session if it cannot be. */
struct command begin_command(void);

#endif
