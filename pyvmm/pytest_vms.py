"""The microVMs of a test run: which test has which, which are shared, and what is left of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from pyvmm.api.errors import VMError
from pyvmm.api.vm import VM

if TYPE_CHECKING:
    from pyvmm.api.clones import Moment

READY_SECONDS = 300.0
MOST_SHARED = 2  # that run at a time
_TAIL_LINES = 40
_MESSAGES = 20

Section = tuple[str, str]


class Kept(NamedTuple):
    """A VM that runs on, and the test that has failed with it."""

    name: str
    test: str


class Vms:
    """All of one test run (of one process of it, with pytest-xdist)."""

    def __init__(self, image: str | None, *, keep: bool) -> None:
        self._image = image
        self._keep = keep
        self._of_test: dict[str, list[VM]] = {}
        self._shared: dict[str, VM] = {}  # the most recently used is the last
        self._kept: dict[VM, str] = {}
        self._moments: dict[str, Moment] = {}  # by what the VM was that they are of

    def start(
        self, test: str, image: str | None, *, ready: bool, timeout: float, **options: Any
    ) -> VM:
        """A VM for the test with that id, which runs."""
        if image is None and "kernel" not in options:
            image = self._image
        vm = VM(image, **options)
        self._of_test.setdefault(test, []).append(vm)
        vm.start(timeout, detached=self._keep)
        if ready:
            vm.wait_ready(timeout)
        return vm

    def share(self, test: str, options: dict[str, Any]) -> VM:
        """The VM of all tests that want one with these `options`."""
        key = repr(sorted(options.items()))
        vm = self._shared.pop(key, None)
        if vm is not None and vm.outcome is None:
            self._of_test.setdefault(test, []).append(vm)
        else:
            while len(self._shared) >= MOST_SHARED:
                self._shared.pop(next(iter(self._shared))).close()
            vm = self.start(test, **options)
        self._shared[key] = vm
        return vm

    def restore(self, test: str, options: dict[str, Any]) -> VM:
        """A copy, for the test with that id, of the one VM with these `options`: it goes on from
        when that was ready, and `prepare` had been called with it."""
        key = repr(sorted(options.items()))
        if key not in self._moments:
            self._moments[key] = self._moment(test, **options)
        vm = VM._copy(self._moments[key].copy())
        self._of_test.setdefault(test, []).append(vm)
        return vm

    def _moment(
        self, test: str, *, prepare: Callable[[VM], object] = lambda vm: None, **options: Any
    ) -> Moment:
        from pyvmm.api.clones import Moment

        vm = self.start(test, **options)
        prepare(vm)
        made = Moment(vm.name, kvm=options.get("kvm", "auto"), outlive_us=self._keep)
        self._of_test[test].remove(vm)
        vm.close()
        return made

    def release(self, test: str) -> None:
        """The test with that id has ended: so do its VMs, other than those it shares."""
        for vm in self._of_test.pop(test, ()):
            if vm not in self._shared.values() and vm not in self._kept:
                vm.close()

    def test_failed(self, test: str) -> list[Section]:
        """The sections of its report on its VMs. They are given to no other test."""
        sections = []
        vms = self._of_test.get(test, ())
        for vm in vms:
            sections += _sections(vm)
            if self._keep and vm.outcome is None:
                self._kept[vm] = test
        self._shared = {key: vm for key, vm in self._shared.items() if vm not in vms}
        return sections

    def close(self) -> list[Kept]:
        """End all that are left; those that run on."""
        while self._moments:
            self._moments.popitem()[1].close()
        for vm in [*self._shared.values(), *(vm for vms in self._of_test.values() for vm in vms)]:
            if vm not in self._kept:
                vm.close()
        return [Kept(vm.name, test) for vm, test in self._kept.items()]


def _sections(vm: VM) -> list[Section]:
    try:
        messages, console = vm.messages[-_MESSAGES:], vm.console.tail(_TAIL_LINES)
    except VMError:
        return []  # It was never started.
    found = [(f"console of the microVM {vm.name}", console)] if console else []
    if messages:
        found.append((f"monitor of the microVM {vm.name}", "\n".join(messages)))
    return found


class Factory:
    """The type of the fixture microvm_factory."""

    def __init__(self, item: pytest.Item, vms: Vms, kernel: str | None = None) -> None:
        """`kernel` is what its VMs boot, unless a test says otherwise."""
        self._test = item.nodeid
        self._vms = vms
        self._kernel = kernel

    def __call__(
        self,
        image: str | None = None,
        *,
        ready: bool = True,
        timeout: float = READY_SECONDS,
        **options: Any,
    ) -> VM:
        """A VM that runs; with `ready` its agent answers, within `timeout` seconds. `options` are
        those of `pyvmm.VM`."""
        if self._kernel is not None:
            options.setdefault("kernel", self._kernel)
        return self._vms.start(self._test, image, ready=ready, timeout=timeout, **options)


def for_test(item: pytest.Item, vms: Vms, kernel: str | None = None) -> VM:
    """The VM that the marks of `item` ask for, with `kernel` if that is given."""
    options = _marked(item, kernel)
    if "prepare" in options:
        raise pytest.UsageError(f"{item.nodeid}: prepare is for microvm_restored")
    if options.pop("shared", False):
        return vms.share(item.nodeid, options)
    return vms.start(item.nodeid, **options)


def restored_for_test(item: pytest.Item, vms: Vms, kernel: str | None = None) -> VM:
    """A copy, for `item` alone, of the VM that its marks ask for."""
    options = _marked(item, kernel)
    options.pop("shared", None)
    return vms.restore(item.nodeid, options)


def _marked(item: pytest.Item, kernel: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {"image": None, "ready": True, "timeout": READY_SECONDS}
    # The nearest mark comes first and wins; those of its class and module fill in.
    for mark in reversed(list(item.iter_markers("microvm"))):
        if len(mark.args) > 1:
            raise pytest.UsageError(f"{item.nodeid}: the mark microvm takes one image")
        options |= {**({"image": mark.args[0]} if mark.args else {}), **mark.kwargs}
    if kernel is not None:
        options["kernel"] = kernel
    return options
