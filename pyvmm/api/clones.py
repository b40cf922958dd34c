"""Copies of a VM that are strangers to each other: `VM.clone`, `pyvmm clone` and pools.

Each goes on from one moment, in a process of its own, with disks, sockets and a network of its own.
What its guest would have in common with the others, its agent changes.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from threading import Event, Lock, Thread

from pyvmm.agent import PORT, Agent, AgentGone, NoAgent
from pyvmm.agent.session import PATIENCE
from pyvmm.api.cancellation import Cancelled, check, woken_by
from pyvmm.api.errors import VMError, VMTimeout
from pyvmm.api.monitor import START_SECONDS
from pyvmm.api.template import ForkedMonitor, Template
from pyvmm.control import registry, snapshot_store
from pyvmm.control.client import connect_vsock
from pyvmm.control.protocol import ControlError
from pyvmm.errors import ConfigError, HostError, PyvmmError, how_many
from pyvmm.host import processors
from pyvmm.host.syscalls import Closable
from pyvmm.monitor import snapshots
from pyvmm.spec.names import check_name
from pyvmm.spec.record import replace
from pyvmm.spec.surroundings import USUAL, Surroundings
from pyvmm.spec.vm import VmSpec

MOST = 256  # clones
# That begin at the same time, for each processor. With more of them each guest is slower than its
# agent has time to answer.
_AT_A_TIME = 8
_SECONDS = 60.0  # that an agent has for each answer
_PAUSE = 0.05  # seconds between two tries
_REFUSALS = 3  # after which there is no agent
_MOST_LINES = 8
_MOST_SAID = 1 << 16  # bytes of a guest's answer: there may be many that say much at once


def clone(
    source: str,
    count: int = 1,
    *,
    name: str = "",
    kvm: str = "auto",
    surroundings: Surroundings = USUAL,
    detached: bool = False,
) -> list[ForkedMonitor]:
    """The monitors of `count` VMs that go on from the VM called `source`, as it is now, or else
    from the snapshot of that name. All of them run, or none does.

    With `name` they are called that, or NAME-1, NAME-2…; without, as is free of SOURCE-1, SOURCE-2…
    With `detached` they go on when this process ends. Raises ConfigError for what cannot be, with
    nothing started; VMError, which names them, if some of them do not start.
    """
    if not 1 <= count <= MOST:
        raise ConfigError(f"{count} clones cannot be had", cure=f"ask for 1 to {MOST}")
    names = _names(name, count)
    with _moment_of(source) as original:
        usual = [chosen or f"{source}-{number}" for number, chosen in enumerate(names, 1)]
        specs = [
            replace(snapshots.copy_of(original, called), name=chosen)
            for chosen, called in zip(names, usual, strict=True)
        ]
        # A monitor that outlives us can be ended by us as long as its template is there.
        with (
            Template(original, kvm, surroundings, outlives_us=detached) as template,
            ExitStack() as undoing,
        ):
            begun: list[ForkedMonitor] = []
            over = Event()
            forking = Lock()

            def begin(number: int) -> ForkedMonitor:
                with forking:
                    if over.is_set():
                        raise Cancelled
                    monitor = template.fork(specs[number], usual[number])
                    undoing.callback(monitor.end)
                    begun.append(monitor)
                if over.is_set():
                    monitor.signal(signal.SIGKILL)
                    raise Cancelled
                _begin(monitor, original)
                return monitor

            def call_off() -> None:
                over.set()
                for monitor in list(begun):
                    monitor.signal(signal.SIGKILL)

            try:
                with woken_by(call_off):
                    monitors = _some_at_a_time(usual, begin, over)
                    check()
            except BaseException:
                over.set()
                with forking:  # Ctrl-C: whichever is being forked has to be undone as well
                    raise
            undoing.pop_all()
    return monitors


class Moment(Closable):
    """A moment of the VM called `source`, which may end; copies go on from there until `close`."""

    def __init__(
        self,
        source: str,
        *,
        kvm: str = "auto",
        surroundings: Surroundings = USUAL,
        outlive_us: bool = False,
    ) -> None:
        """With `outlive_us` the copies go on when this process ends. Raises as `clone` does."""
        self._source, self._made = source, 0
        with ExitStack() as closing:
            self._original = closing.enter_context(_moment_of(source))
            self._template = Template(self._original, kvm, surroundings, outlives_us=outlive_us)
            closing.callback(self._template.close)
            self._closing = closing.pop_all()

    def copy(self) -> ForkedMonitor:
        """The monitor of one more copy, which runs. Raises VMError, HostError."""
        self._made += 1
        name = f"{self._source}-{self._made}"
        monitor = self._template.fork(snapshots.copy_of(self._original, name), name)
        try:
            _begin(monitor, self._original)
        except BaseException:
            monitor.end()
            raise
        return monitor

    def close(self) -> None:
        self._closing.close()


def _begin(monitor: ForkedMonitor, original: VmSpec) -> None:
    monitor.await_start(START_SECONDS)
    introduce(monitor, original)


def _names(name: str, count: int) -> list[str]:
    """The names of clones; "" for those that are to be chosen. Raises ConfigError."""
    if not name:
        return [""] * count
    names = [name] if count == 1 else [f"{name}-{number}" for number in range(1, count + 1)]
    running = set(registry.running())
    for one in names:
        check_name(one)
        if one in running:
            raise ConfigError(
                f"a VM called {one!r} is running",
                cure=f"choose another name, or end it: pyvmm stop {one}",
                option="--name",
            )
    return names


def _moment_of(source: str) -> AbstractContextManager[VmSpec]:
    check_name(source, option="")
    if source in registry.running():
        return snapshots.taken_once(source)
    if source not in snapshot_store.names():
        raise ConfigError(
            f"there is no snapshot {source!r}, and no VM of that name runs",
            cure="pyvmm snapshot list and pyvmm ps show all",
        )
    return snapshots.kept(source)


def _some_at_a_time(
    names: Sequence[str], begin: Callable[[int], ForkedMonitor], over: Event
) -> list[ForkedMonitor]:
    """Begin each of them by its number, until one fails or it is `over`: `begin` may then raise
    Cancelled. Raises what the only one raises, VMError that names those that failed."""
    if len(names) == 1:
        return [begin(0)]
    numbers = deque(range(len(names)))
    monitors: dict[int, ForkedMonitor] = {}
    failures: list[tuple[str, BaseException]] = []

    def work() -> None:
        while not over.is_set():
            try:
                number = numbers.popleft()
            except IndexError:
                return
            try:
                monitors[number] = begin(number)
            except Cancelled:  # as it is over
                return
            except BaseException as error:
                failures.append((names[number], error))
                over.set()

    most = _AT_A_TIME * max(1, round(processors.usable()))
    threads = [
        Thread(target=work, name="pyvmm clone", daemon=True) for _ in range(min(most, len(names)))
    ]
    started: list[Thread] = []
    try:
        with suppress(RuntimeError):  # all that Python says of pthread_create's EAGAIN
            for thread in threads:
                thread.start()
                started.append(thread)
        if not started:
            raise HostError(errno.EAGAIN, "thread for a clone")
        for thread in started:
            thread.join()
    finally:
        over.set()  # Ctrl-C: those that have not begun do not
    if failures:
        which = "; ".join(f"{called}: {error}" for called, error in sorted(failures, key=_first))
        raise VMError(
            f"{len(failures)} of {how_many(len(names), 'clone')} did not start, and none runs: "
            f"{which}"
        )
    return [monitor for _, monitor in sorted(monitors.items())]


def _first(failure: tuple[str, BaseException]) -> str:
    return failure[0]


# --- strangers ------------------------------------------------------------------------------------

# Arguments: the host name, the machine-id, and for each network card its address and its new one.
# It says what cannot be changed. Nothing in it but what a shell has itself, and ip or busybox.
_SCRIPT = r"""
name=$1 id=$2
shift 2
{ echo "$name" > /proc/sys/kernel/hostname; } 2>/dev/null || echo "the host name"
if [ -s /etc/hostname ]; then
    { echo "$name" > /etc/hostname; } 2>/dev/null || echo "/etc/hostname"
fi
for file in /etc/machine-id /var/lib/dbus/machine-id; do
    if [ -s "$file" ] && [ ! -L "$file" ]; then
        { echo "$id" > "$file"; } 2>/dev/null || echo "$file"
    fi
done
while [ $# -ge 2 ]; do
    for card in /sys/class/net/*; do
        read -r address < "$card/address" 2>/dev/null || continue
        [ "$address" = "$1" ] || continue
        for ip in ip "busybox ip" "/bin/busybox ip" "/.pyvmm/busybox ip" none; do
            if [ "$ip" = none ]; then
                echo "the address of ${card##*/}"
            else
                $ip link set dev "${card##*/}" address "$2" 2>/dev/null && break
            fi
        done
    done
    shift 2
done
"""


def introduce(monitor: ForkedMonitor, original: VmSpec, deadline: float = math.inf) -> None:
    """Have the guest of `monitor`, a copy of `original` that runs, be another machine: its clock is
    set, and it has a host name, a machine-id and network addresses of its own. A guest without an
    agent stays as it is. What cannot be changed is told in `messages`. Raises VMTimeout if it is
    not another machine by `deadline`, a time of time.monotonic()."""
    if not any(device.kind == "vsock" for device in monitor.spec.devices):
        return
    wanted = [monitor.name, os.urandom(16).hex()]
    for before, now in zip(original.devices, monitor.spec.devices, strict=True):
        if now.kind == "net":
            wanted += [getattr(before, "mac", ""), getattr(now, "mac", "")]
    try:
        unchanged = _tell(monitor, wanted, deadline)
    except PyvmmError as error:
        if time.monotonic() >= deadline:
            raise VMTimeout(f"the guest of {monitor.name} did not answer in time") from error
        monitor.note(f"{monitor.name}: its guest is as the original: {error}")
        return
    for what in unchanged:
        monitor.note(f"{monitor.name}: its guest cannot change {what}")


def _tell(monitor: ForkedMonitor, wanted: list[str], latest: float) -> list[str]:
    """Refuse what cannot be changed. Raises AgentError and what asking a monitor raises."""

    def left(seconds: float) -> float:
        return max(0.0, min(seconds, latest - time.monotonic()))

    agent = Agent(lambda seconds: connect_vsock(monitor.name, PORT, patience=left(seconds)))
    deadline, refusals = time.monotonic() + left(_SECONDS), 0
    while True:
        try:
            agent.set_clock(timeout=left(PATIENCE))
            done = agent.run(
                ["/bin/sh", "-c", _SCRIPT, "pyvmm", *wanted],
                timeout=left(_SECONDS),
                most=_MOST_SAID,
            )
        except NoAgent:
            refusals += 1
            if refusals >= _REFUSALS:
                return []
        except (AgentGone, ControlError, HostError):
            # A connection may be older than what the guest has heard: that all have gone.
            if time.monotonic() > deadline or monitor.outcome is not None:
                raise
        else:
            lines = done.stdout.decode(errors="replace").splitlines()[:_MOST_LINES]
            return ["".join(filter(str.isprintable, line[:80])) for line in lines]
        time.sleep(_PAUSE)
