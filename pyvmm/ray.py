"""VMs and pools of them on a Ray cluster: `pip install '.[ray]'`, docs/ray.md.

    with RayPool("ready", 6) as pool:
        with pool.take() as vm:
            print(vm.node, vm.run(["hostname"]).stdout)

Each VM has an actor, which asks Ray for its vCPUs, its memory and one `kvm`; where it runs is Ray's
affair. A snapshot goes to each node once and is kept there.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from fcntl import LOCK_EX, flock
from functools import partial
from hashlib import blake2b
from queue import SimpleQueue
from threading import Condition, Event, Thread, Timer
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from pyvmm.api.errors import TAIL_LINES, Outcome, VMError, VMTimeout
from pyvmm.api.in_guest import InGuest
from pyvmm.api.monitor import START_SECONDS
from pyvmm.api.pool import Pool, check_pool
from pyvmm.api.signatures import signature_of
from pyvmm.api.vm import VM
from pyvmm.control import snapshot_store as store
from pyvmm.errors import ConfigError, PyvmmError
from pyvmm.host.syscalls import Closable
from pyvmm.monitor import snapshots
from pyvmm.spec.surroundings import STOP_SECONDS

try:
    import ray
    from ray import exceptions
except ImportError as error:
    raise ImportError(
        "pyvmm.ray needs Ray: pip install '.[ray]', in pyvmm's checkout (docs/ray.md)"
    ) from error

if TYPE_CHECKING:
    from pyvmm.agent import Completed

_log = logging.getLogger(__name__)

PIECE = 16 << 20  # bytes of a snapshot in one object of Ray's
OVERHEAD = 128 << 20  # bytes of memory that a VM takes besides its guest's
PENDING = 64  # calls that one VM's actor may have waiting
TAKERS = 256  # threads that may wait for a VM of one pool
_THREADS = 16  # that answer in an actor; what waits for a guest holds one
_FAILURES = 3  # without a VM in between, after which no more are made until somebody asks
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0  # seconds before what was lost is made again
_MOST_LOST = 1000
_CLOSE_SECONDS = 30.0
_LEAST_SECONDS = 1.0  # for a VM to go on


class VMLost(VMError):
    """The VM was lost with its node, or with its actor. What was asked of it may have been done."""


class Busy(VMError):
    """As many as may wait are waiting already: for a VM of the pool, or for answers of a VM."""


class Lost(NamedTuple):
    """A VM that was lost; `taken` is whether somebody had it."""

    name: str
    node: str
    taken: bool


# --- snapshots ------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    file: str
    offset: int
    data: Any  # a reference to bytes


class Spread:
    """A snapshot of this machine that goes to the nodes of the cluster, to each once, when its
    first VM comes there. It is kept there, as NAME-ID."""

    def __init__(self, snapshot: str) -> None:
        """Puts its files into Ray's store, where they stay as long as this process has it. Raises
        ConfigError for a snapshot that is not there, cannot be used or has no copies."""
        with store.reading(snapshot) as found:
            spec = snapshots.spec_of(found.name, found.path, found.state)
            snapshots.copy_of(spec, snapshot)  # or say why it cannot be copied
            self.snapshot, self.state = snapshot, dict(found.state)
            self.cpus, self.memory, self._spec = spec.cpus, spec.memory, spec
            self.images = {
                path: _digest(path) for row in self.state["disks"] for path in row["files"]
            }
            self.pieces = [
                _Piece(file, offset, ray.put(data))
                for file in self.state["files"]
                for offset, data in _pieces(os.path.join(found.path, file))
            ]

    def install(self) -> str:
        """Have it on this machine; its name here. Raises ConfigError for an image of its disks that
        is another one here, HostError for what cannot be written."""
        with suppress(ConfigError), store.reading(self.snapshot) as found:
            if found.state["checksum"] == self.state["checksum"]:
                return self.snapshot  # it is from here
        name = f"{self.snapshot}-{self.state['checksum'][:12]}"
        with open(os.path.join(store.folder(), ".spread"), "w") as file:
            flock(file, LOCK_EX)  # whoever comes next finds it
            if name not in store.names():
                self._write(name)
        return name

    def _write(self, name: str) -> None:
        for path, digest in self.images.items():
            if _digest(path) != digest:
                raise ConfigError(
                    f"{path} is not the same on {_node()} as where {self.snapshot} was taken",
                    cure="copy it to there",
                )
        with store.Writer(name) as writer:
            for file, size in self.state["files"].items():
                writer.make(file, size)
            for piece in self.pieces:
                writer.write(piece.file, piece.offset, ray.get(piece.data))
            writer.finish({**self.state, "disks": snapshots.marks_of(self._spec)})


def _pieces(path: str) -> Iterator[tuple[int, bytes]]:
    """The parts of a sparse file that are no holes."""
    with open(path, "rb", 0) as file:
        end = at = 0
        while True:
            if at == end:
                try:
                    at = os.lseek(file.fileno(), end, os.SEEK_DATA)
                except OSError:  # only a hole is left
                    return
                end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            data = os.pread(file.fileno(), min(PIECE, end - at), at)
            yield at, data
            at += len(data)


def _digest(path: str) -> str:
    """What a file's bytes are; "" for one that is not there."""
    digest = blake2b(digest_size=32)
    try:
        with open(path, "rb") as file:
            while data := file.read(PIECE):
                digest.update(data)
    except OSError:
        return ""
    return digest.hexdigest()


def _node() -> str:
    return str(ray.util.get_node_ip_address())


# --- the actor of a VM ----------------------------------------------------------------------------


class _Answer(NamedTuple):
    """A value, or the error in its place: what Ray makes of one has many lines."""

    value: Any = None
    error: PyvmmError | None = None


class _Host:
    """The actor: one VM of its node."""

    def __init__(self) -> None:
        self._pool: Pool | None = None
        self._vm: VM | None = None
        self._ended = Event()

    def restore(self, spread: Spread, kvm: str, confine: str) -> _Answer:
        """Have a copy that waits; the node."""

        def begin() -> str:
            self._pool = Pool(spread.install(), 1, kvm=kvm, confine=confine, refill=False)
            self._pool.wait_ready()
            return _node()

        return _answer(begin)

    def start(self, options: Mapping[str, Any]) -> _Answer:
        """Start a VM; its name and node."""

        def begin() -> tuple[str, str]:
            self._vm = VM(**options).start()
            return self._vm.name, _node()

        return _answer(begin)

    def take(self) -> _Answer:
        """Have the copy that waits go on; its name."""

        def take() -> str:
            assert self._pool is not None
            self._vm = self._pool.take()
            self._pool.close()
            return self._vm.name

        return _answer(take)

    def call(self, path: Sequence[str], args: Sequence[Any], options: Mapping[str, Any]) -> _Answer:
        """What the VM's attribute or method at `path` says."""

        def call() -> Any:
            found: Any = self._vm
            for name in path:
                found = getattr(found, name)
            return found(*args, **options) if callable(found) else found

        return _answer(call)

    def until_the_end(self) -> None:
        """Return once it is closed. Whoever waits for that hears of the actor's own end."""
        self._ended.wait()

    def close(self) -> _Answer:
        """End what there is; how the VM has ended."""

        def close() -> Outcome | None:
            if self._pool is not None:
                self._pool.close()
            return None if self._vm is None else self._vm.close()

        try:
            return _answer(close)
        finally:
            self._ended.set()


def _answer(call: Callable[[], Any]) -> _Answer:
    try:
        return _Answer(call())
    except PyvmmError as error:
        return _Answer(error=error)


class _Wanted(NamedTuple):
    """What an actor asks Ray for."""

    num_cpus: float
    memory: int
    resources: dict[str, float]

    def actor(self) -> Any:
        """A new one, once there is room for it."""
        options = {
            "num_cpus": self.num_cpus,
            "memory": self.memory,
            "resources": self.resources,
            "max_concurrency": _THREADS,
            "max_pending_calls": PENDING,
            "max_restarts": 0,  # a VM that is lost is lost
        }
        return ray.remote(_Host).options(**options).remote()


def _wanted(
    cpus: int, memory: int, num_cpus: float | None, resources: Mapping[str, float] | None
) -> _Wanted:
    return _Wanted(
        cpus if num_cpus is None else num_cpus, memory + OVERHEAD, {"kvm": 1, **(resources or {})}
    )


def _ask(actor: Any, what: str, method: str, *args: Any, timeout: float | None = None) -> Any:
    """The answer of an actor. Raises what that says, VMLost, Busy, VMTimeout."""
    try:
        answer = ray.get(getattr(actor, method).remote(*args), timeout=timeout)
    except exceptions.PendingCallsLimitExceeded:
        raise Busy(f"{what}: {PENDING} calls wait for it already") from None
    except exceptions.GetTimeoutError:
        raise VMTimeout(f"{what} has not answered within {timeout:g} s") from None
    except exceptions.RayActorError:
        # It may only be out of sight. Nobody shall find it later.
        _kill(actor)
        raise VMLost(f"{what} is lost: its node or its actor has died") from None
    if answer.error is not None:
        raise answer.error
    return answer.value


def _kill(actor: Any) -> None:
    with suppress(Exception):
        ray.kill(actor)


# --- what a program holds -------------------------------------------------------------------------


class RemoteVM:
    """A VM on some node. It ends with its `with` block, or by `close`; with the program at last."""

    def __init__(
        self,
        *,
        num_cpus: float | None = None,
        resources: Mapping[str, float] | None = None,
        timeout: float = START_SECONDS,
        **options: Any,
    ) -> None:
        """Starts one where there is room; `options` are those of `pyvmm.VM`. It asks Ray for
        `num_cpus` (one for each vCPU), its memory, one `kvm`, and `resources`.

        Raises ConfigError and VMError as `VM.start` does, VMTimeout if there is no room within
        `timeout` seconds.
        """
        spec = VM(**options).spec
        actor = _wanted(spec.cpus, spec.memory, num_cpus, resources).actor()
        try:
            name, node = _ask(actor, "the VM", "start", options, timeout=timeout)
        except BaseException as error:
            _kill(actor)
            if isinstance(error, VMTimeout):
                raise VMTimeout(f"the VM has not started in time; {_room()}") from None
            raise
        self._hold(actor, name, node)

    def _hold(
        self, actor: Any, name: str, node: str, on_close: Callable[[], object] | None = None
    ) -> None:
        self._actor, self.name, self.node, self._on_close = actor, name, node, on_close

    @classmethod
    def _of(cls, actor: Any, name: str, node: str, on_close: Callable[[], object]) -> Self:
        vm = cls.__new__(cls)
        vm._hold(actor, name, node, on_close)
        return vm

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(VMLost):  # there is nothing to end
            self.close()

    def _call(
        self, *path: str, args: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        if self._actor is None:
            raise VMError(f"{self.name} has been closed")
        return _ask(
            self._actor, f"{self.name} on {self.node}", "call", path, list(args), options or {}
        )

    def close(self) -> Outcome | None:
        """End it, as `VM.close` does, and its actor; how it ended, None if it has been closed
        before. Raises VMLost if nobody knows."""
        actor, self._actor = self._actor, None
        if actor is None:
            return None
        try:
            outcome: Outcome | None = _ask(
                actor, f"{self.name} on {self.node}", "close", timeout=_CLOSE_SECONDS
            )
        except VMTimeout:  # its end is that of the actor's process
            outcome = Outcome(None)
        if self._on_close is not None:
            self._on_close()
        _kill(actor)
        return outcome

    @signature_of(InGuest.run)
    def run(self, *args: Any, **options: Any) -> Completed:
        """See `VM.run`."""
        done: Completed = self._call("run", args=args, options=options)
        return done

    @signature_of(InGuest.wait_ready)
    def wait_ready(self, *args: Any, **options: Any) -> Any:
        """See `VM.wait_ready`."""
        return self._call("wait_ready", args=args, options=options)

    def stop(self, timeout: float = STOP_SECONDS, *, now: bool = False) -> Outcome:
        """See `VM.stop`."""
        outcome: Outcome = self._call("stop", args=[timeout], options={"now": now})
        return outcome

    def wait(self, timeout: float | None = None) -> Outcome:
        """See `VM.wait`."""
        outcome: Outcome = self._call("wait", args=[timeout])
        return outcome

    def pause(self) -> None:
        """See `VM.pause`."""
        self._call("pause")

    def resume(self) -> None:
        """See `VM.resume`."""
        self._call("resume")

    def status(self) -> dict[str, Any]:
        """See `VM.status`."""
        found: dict[str, Any] = self._call("status")
        return found

    def stats(self) -> dict[str, Any]:
        """See `VM.stats`."""
        found: dict[str, Any] = self._call("stats")
        return found

    @property
    def messages(self) -> list[str]:
        """See `VM.messages`."""
        found: list[str] = self._call("messages")
        return found

    @property
    def pid(self) -> int:
        """The process of its monitor, on its node."""
        return int(self._call("pid"))

    @property
    def console(self) -> RemoteConsole:
        """The guest's console."""
        return RemoteConsole(partial(self._call, "console"))


class RemoteConsole:
    """`VM.console`, from another machine."""

    def __init__(self, call: Callable[..., Any]) -> None:
        """`RemoteVM.console` is one."""
        self._call = call

    def send(self, data: str | bytes) -> None:
        """See `Console.send`."""
        self._call("send", args=[data])

    def sendline(self, line: str | bytes = "") -> None:
        """See `Console.sendline`."""
        self._call("sendline", args=[line])

    def expect(self, pattern: Any, timeout: float | None = 30.0) -> int:
        """See `Console.expect`; there is no `match` here."""
        return int(self._call("expect", args=[pattern], options={"timeout": timeout}))

    def expect_exact(self, pattern: Any, timeout: float | None = 30.0) -> int:
        """See `Console.expect_exact`."""
        return int(self._call("expect_exact", args=[pattern], options={"timeout": timeout}))

    @property
    def text(self) -> str:
        """See `Console.text`."""
        return str(self._call("text"))

    def tail(self, lines: int = TAIL_LINES) -> str:
        """See `Console.tail`."""
        return str(self._call("tail", args=[lines]))


# --- pools ----------------------------------------------------------------------------------------


class _Member:
    """A VM of a pool, and what it is called once it is taken."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.name, self.node = "", ""


class RayPool(Closable):
    """Up to `size` VMs that wait at one snapshot, on whatever nodes have room; one that is taken or
    lost is replaced. Any thread may use it. It is closed by `close`, or at the end of a `with`
    block; those that were taken go on until the program ends them, or ends."""

    def __init__(
        self,
        snapshot: str | Spread,
        size: int = 1,
        *,
        num_cpus: float | None = None,
        resources: Mapping[str, float] | None = None,
        kvm: str = "auto",
        confine: str = "auto",
        takers: int = TAKERS,
    ) -> None:
        """Begins to fill at once. Each VM asks Ray for `num_cpus` (one for each vCPU), its memory,
        one `kvm`, and `resources`; no more than `takers` threads may wait for one.

        Raises ConfigError for a snapshot, a size or other arguments that cannot be used.
        """
        name = snapshot if isinstance(snapshot, str) else snapshot.snapshot
        check_pool(name, size, kvm=kvm, confine=confine)
        self.spread = Spread(snapshot) if isinstance(snapshot, str) else snapshot
        self.size = size
        self._wanted = _wanted(self.spread.cpus, self.spread.memory, num_cpus, resources)
        self._how = (kvm, confine)
        self._most_takers, self._takers = takers, 0
        self._shared = ray.put(self.spread)
        self._changed = Condition()
        self._starting: set[_Member] = set()
        self._waiting: deque[_Member] = deque()
        self._taken: set[_Member] = set()
        self._lost: deque[Lost] = deque(maxlen=_MOST_LOST)
        self._failures = 0
        self._failure: PyvmmError | None = None
        self._delay = 0.0
        self._later: Timer | None = None
        self._closed = False
        # What Ray tells us of, done by one thread of ours: Ray's own must not wait for Ray.
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._jobs.put(self._fill)
        self._thread = Thread(target=self._work, name="pyvmm ray pool", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> int:
        """The number of VMs that wait."""
        return len(self._waiting)

    @property
    def nodes(self) -> list[str]:
        """The nodes of those that wait, one for each VM."""
        with self._changed:
            return sorted(member.node for member in self._waiting)

    @property
    def lost(self) -> list[Lost]:
        """The VMs that were lost with their nodes, the last 1000 of them."""
        with self._changed:
            return list(self._lost)

    def take(self, timeout: float = START_SECONDS) -> RemoteVM:
        """A VM that runs from now on, and is the caller's. It waits for one if there is none.

        Raises Busy at once if as many wait already as may, VMTimeout after `timeout` seconds, which
        says what there is no room for, VMError if the pool is closed, and why none can be made if
        that is so.
        """
        deadline = time.monotonic() + timeout
        while True:
            member = self._next(deadline)
            try:
                member.name = _ask(
                    *(member.actor, "a VM of the pool", "take"),
                    timeout=max(_LEAST_SECONDS, deadline - time.monotonic()),
                )
            except VMLost:  # so is told in `lost`
                continue
            except BaseException:
                self._let_go(member)
                _kill(member.actor)
                raise
            return RemoteVM._of(
                member.actor, member.name, member.node, partial(self._let_go, member)
            )

    def _next(self, deadline: float) -> _Member:
        with self._changed:
            if self._takers >= self._most_takers:
                raise Busy(f"{self._takers} wait for a VM of the pool already")
            self._takers += 1
            try:
                while True:
                    if self._closed:
                        raise VMError("the pool is closed")
                    if self._waiting:
                        member = self._waiting.popleft()
                        self._taken.add(member)
                        self._jobs.put(self._fill)
                        return member
                    if self._failures >= _FAILURES and not self._starting:
                        failure, self._failures = self._failure, 0
                        self._jobs.put(self._fill)
                        raise failure or VMError("the VMs of the pool cannot be made")
                    left = deadline - time.monotonic()
                    if left <= 0:
                        break
                    self._changed.wait(left)
            finally:
                self._takers -= 1
        raise VMTimeout(f"no VM of the pool was ready in time; {_room()}")

    def _let_go(self, member: _Member) -> None:
        with self._changed:
            self._taken.discard(member)

    def close(self) -> None:
        """End all that wait. Those that were taken go on."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            ending, starting = [*self._waiting], [*self._starting]
            self._waiting.clear()
            self._starting.clear()
            if self._later is not None:
                self._later.cancel()
            self._changed.notify_all()
        self._jobs.put(None)
        self._thread.join()
        closing = [member.actor.close.remote() for member in ending]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_SECONDS)
        for member in (*ending, *starting):
            _kill(member.actor)

    # --- the thread that fills it -----------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _tell(self, reference: Any, done: Callable[[Any], None]) -> None:
        """Have our thread do `done` with the future of `reference` once that is there."""
        reference.future().add_done_callback(lambda future: self._jobs.put(partial(done, future)))

    def _fill(self) -> None:
        with self._changed:
            if self._closed or self._failures >= _FAILURES or self._later is not None:
                return
            for _ in range(self.size - len(self._waiting) - len(self._starting)):
                member = _Member(self._wanted.actor())
                self._starting.add(member)
                begun = member.actor.restore.remote(self._shared, *self._how)
                self._tell(begun, partial(self._has_begun, member))

    def _has_begun(self, member: _Member, future: Any) -> None:
        answer = None if future.exception() is not None else future.result()
        with self._changed:
            if member not in self._starting:  # it is closed
                return
            self._starting.discard(member)
            if answer is None:
                self._make_again()
            elif answer.error is not None:
                self._failures, self._failure = self._failures + 1, answer.error
            else:
                member.node = answer.value
                self._failures, self._delay = 0, 0.0
                self._waiting.append(member)
            self._changed.notify_all()
        if answer is None or answer.error is not None:
            _kill(member.actor)
            self._fill()
        else:
            self._tell(member.actor.until_the_end.remote(), partial(self._has_ended, member))

    def _has_ended(self, member: _Member, future: Any) -> None:
        """The actor of one that waited or was taken has died, or was closed."""
        with self._changed:
            taken = member in self._taken
            if not self._closed and member in self._waiting:
                self._waiting.remove(member)
                self._make_again()
            elif not taken:
                return
            self._taken.discard(member)
            if future.exception() is not None:
                name = member.name or self.spread.snapshot
                self._lost.append(Lost(name, member.node, taken))
                _log.warning("%s is lost with %s", name, member.node)
            self._changed.notify_all()

    def _make_again(self) -> None:
        """What was lost, after a while, which gets longer as long as all is lost."""
        if self._later is None:
            self._later = Timer(self._delay, self._jobs.put, [self._now])
            self._later.daemon = True
            self._later.start()
            self._delay = min(max(_FIRST_DELAY, 2 * self._delay), _LONGEST_DELAY)

    def _now(self) -> None:
        with self._changed:
            self._later = None
        self._fill()


def _room() -> str:
    """What of the cluster is free."""
    free, all = ray.available_resources(), ray.cluster_resources()
    if not all.get("kvm"):
        return "no node of the cluster has kvm: ray start --resources='{\"kvm\": 8}'"
    rows = (("kvm", 1), ("CPU", 1), ("memory", 1 << 20))
    return "free are " + ", ".join(
        f"{free.get(name, 0) / unit:g} of {all.get(name, 0) / unit:g} {name}"
        + (" (MiB)" if unit > 1 else "")
        for name, unit in rows
    )
