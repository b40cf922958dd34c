"""Fences: that each call executes what makes it one, and why a lock that is held does not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from c_claims import ARM64

from pyvmm import images
from pyvmm.errors import ConfigError
from pyvmm.host import fences
from pyvmm.host.fences import WEAKLY_ORDERED

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
needs_x86 = pytest.mark.skipif(WEAKLY_ORDERED, reason="fences are libatomic's on this processor")

LOCKS_ARE_SEMAPHORES = sys.version_info < (3, 14) and not sysconfig.get_config_var(
    "Py_GIL_DISABLED"
)

# Takes the place of glibc's, through which Python's locks up to 3.13 go: counts for each thread how
# often the compare and exchange, which is the locked instruction, was executed.
COUNTING = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <semaphore.h>
static _Thread_local long executed;
long locked_instructions(void) { return executed; }
int sem_trywait(sem_t *semaphore) {
    static int (*real)(sem_t *);
    if (!real) real = dlsym(RTLD_NEXT, "sem_trywait");
    int result = real(semaphore);
    executed += result == 0;
    return result;
}
"""

# Argument: whether each thread has a fence of its own. Prints how many calls there were, and how
# many of them executed no locked instruction.
CALLS = """
import ctypes, sys, threading
from pyvmm.host.fences import new_fence

THREADS, CALLS = 4, 50_000
count = ctypes.CDLL(None).locked_instructions
count.restype = ctypes.c_long
shared = new_fence()
missing = []

def call(fence):
    without = 0
    for _ in range(CALLS):
        before = count()
        fence()
        without += count() == before
    missing.append(without)

own = sys.argv[1] == "own"
threads = [
    threading.Thread(target=call, args=(new_fence() if own else shared,)) for _ in range(THREADS)
]
sys.setswitchinterval(1e-6)
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(missing) == THREADS
print(THREADS * CALLS, sum(missing))
"""

# Two threads, each on a processor of its own, store to a word and then load the other's, over and
# over. What one has loaded tells which of the other's stores it came before: if the other's load
# after that store then missed an earlier store of the first, both loads went before the stores.
LITMUS = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { ROUNDS = 300000, LINE = 64 / sizeof(uint64_t) };
static _Alignas(64) volatile uint64_t words[4 * LINE];
static uint64_t loaded[2][ROUNDS + 1];
static sem_t lock;  /* held, as by a thread that lost the processor */
static int fresh;

static void fence(void) {
    if (sem_trywait(&lock) == 0) {
        sem_post(&lock);
    } else if (fresh) {
        sem_t own;
        sem_init(&own, 0, 1);
        sem_trywait(&own);
    }
}

static void *side(void *argument) {
    int me = argument != NULL;
    volatile uint64_t *mine = &words[me * LINE], *others = &words[!me * LINE];
    cpu_set_t here;
    CPU_ZERO(&here);
    CPU_SET(me ? SECOND : FIRST, &here);
    pthread_setaffinity_np(pthread_self(), sizeof here, &here);
    words[(2 + me) * LINE] = 1;
    while (!words[(2 + !me) * LINE])
        ;
    for (uint64_t n = 1; n <= ROUNDS; n++) {
        *mine = n;
        fence();
        loaded[me][n] = *others;
    }
    return NULL;
}

int main(int count, char **arguments) {
    (void)arguments;
    fresh = count > 1;
    sem_init(&lock, 0, 0);
    pthread_t threads[2];
    pthread_create(&threads[0], NULL, side, NULL);
    pthread_create(&threads[1], NULL, side, &threads);
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);
    long wrong = 0;
    for (uint64_t n = 1; n <= ROUNDS; n++) {
        uint64_t next = loaded[0][n] + 1;
        wrong += next <= ROUNDS && loaded[1][next] < n;
    }
    printf("%ld\n", wrong);
}
"""


def compiled(source: str, made: Path, *options: str) -> Path:
    made.with_suffix(".c").write_text(source)
    command = ["cc", "-O2", "-pthread", *options, "-o", made, made.with_suffix(".c")]
    subprocess.run([*command, "-ldl"], check=True)
    return made


@needs_x86
@needs_compiler
@pytest.mark.skipif(not LOCKS_ARE_SEMAPHORES, reason="this Python's locks are not semaphores")
@pytest.mark.parametrize("whose", ["own", "shared"])
def test_each_call_executes_a_locked_instruction_whatever_other_threads_do(tmp_path, whose):
    counting = compiled(COUNTING, tmp_path / "counting.so", "-shared", "-fPIC")
    environment = {**os.environ, "LD_PRELOAD": str(counting)}
    done = subprocess.run(
        [sys.executable, "-c", CALLS, whose],
        env=environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["200000", "0"], done.stderr


@needs_x86
@needs_compiler
def test_the_attempt_at_a_lock_that_is_held_is_no_fence_but_a_fresh_one_is(tmp_path):
    """Store, attempt, load on two processors: what `new_fence` relies on, in C."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs two processors")
    places = f"-DFIRST={cpus[0]}", f"-DSECOND={cpus[1]}"
    litmus = compiled(LITMUS, tmp_path / "litmus", *places)

    def wrong(*arguments: str) -> int:
        return int(subprocess.check_output([litmus, *arguments], timeout=120))

    # A processor that other programs want shows it in some runs only.
    end = time.monotonic() + 20
    rounds = 0
    while not wrong():
        rounds += 1
        if time.monotonic() > end:
            pytest.skip("the two sides did not meet: this machine is busy, or never reorders")
    assert [wrong("fresh") for _ in range(rounds + 10)] == [0] * (rounds + 10)


def test_on_arm64_the_fence_is_a_full_barrier() -> None:
    """The libatomic that pyvmm's programs for arm64 have, which `new_fence` calls there: DMB ISH
    orders all loads and stores before it with all behind it, for all processors of a machine."""
    try:
        programs = images.path("programs-arm64")
    except ConfigError:
        pytest.skip("programs-arm64 has not been built")
    disassembler = shutil.which(ARM64.replace("gcc", "objdump"))
    if disassembler is None:
        pytest.skip("needs arm64's disassembler (package binutils-aarch64-linux-gnu)")
    library = Path(programs, "root/usr/lib/aarch64-linux-gnu/libatomic.so.1").resolve()
    command = [disassembler, "-d", "--disassemble=atomic_thread_fence", library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = text.partition("<atomic_thread_fence")[2].split("ret")[0]
    assert re.search(r"\bdmb\s+ish$", code, re.MULTILINE), text


def test_the_library_is_loaded_without_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue begins in the box, which refuses to start one, and tells of it."""

    def start(*args: object, **settings: object) -> None:
        raise AssertionError(f"a program was started: {args}")

    monkeypatch.setattr(subprocess, "Popen", start)
    try:
        fences._fence_by_libatomic()()
    except OSError as error:
        pytest.skip(f"this machine has no libatomic: {error}")
