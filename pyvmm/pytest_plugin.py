"""A pytest plugin: microVMs as fixtures. docs/pytest.md tells how it is used.

    @pytest.mark.microvm(memory="1G")
    def test_the_kernel(microvm):
        assert microvm.run(["uname", "-s"]).stdout == b"Linux\\n"

Loaded by every pytest where pyvmm is installed, so what does the work is imported by those who use
it.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pyvmm.api.vm import VM
    from pyvmm.pytest_vms import Factory, Kept, Vms

_vms: pytest.StashKey[Vms] = pytest.StashKey()
_kept: pytest.StashKey[list[Kept]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("microvm", "microVMs by pyvmm")
    group.addoption(
        "--microvm-image",
        metavar="NAME",
        help="The image that microvm and microvm_factory boot, if a test names none.",
    )
    group.addoption(
        "--microvm-keep",
        action="store_true",
        help="Let the microVMs of tests that fail run on, to be looked at.",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "microvm(image=None, *, shared=False, ready=True, timeout=300, prepare=None, **options): "
        "the VM that the fixture microvm is; options are those of pyvmm.VM. With shared, tests "
        "with equal marks share one. microvm_restored is a copy, of when prepare(vm) was done.",
    )
    config.addinivalue_line(
        "markers",
        "microvm_kernels(*kernels): run the test on each of these kernels, as pyvmm.VM takes them: "
        "files, build trees, debian:6.12… Its microvm and microvm_factory boot it.",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    mark = metafunc.definition.get_closest_marker("microvm_kernels")
    if mark is None:
        return
    if not mark.args or mark.kwargs:
        raise pytest.UsageError(
            f"{metafunc.definition.nodeid}: the mark microvm_kernels takes one or more kernels"
        )
    if "microvm_kernel" in metafunc.fixturenames:
        kernels = [str(kernel) for kernel in mark.args]
        metafunc.parametrize("microvm_kernel", kernels, ids=kernels, indirect=True)


@pytest.fixture(scope="module")
def microvm_kernel(request: pytest.FixtureRequest) -> str | None:
    """The kernel of this run of the test, of those that @pytest.mark.microvm_kernels names; None
    without it. Tests of a module that have one in common run one after another."""
    kernel: str | None = getattr(request, "param", None)
    return kernel


@pytest.fixture
def microvm_factory(request: pytest.FixtureRequest, microvm_kernel: str | None) -> Factory:
    """Makes microVMs: `microvm_factory(image=None, *, ready=True, timeout=300, **options)` is a
    `pyvmm.VM` that runs, and with `ready` one whose agent answers. They end with the test."""
    from pyvmm.pytest_vms import Factory

    return Factory(request.node, _vms_of(request.config), microvm_kernel)


@pytest.fixture
def microvm(request: pytest.FixtureRequest, microvm_kernel: str | None) -> VM:
    """A microVM that is ready: of the default image, or what @pytest.mark.microvm says."""
    from pyvmm.pytest_vms import for_test

    return for_test(request.node, _vms_of(request.config), microvm_kernel)


@pytest.fixture
def microvm_restored(request: pytest.FixtureRequest, microvm_kernel: str | None) -> VM:
    """A microVM that was ready already: as `microvm`, but one boots for all tests with equal marks,
    and each has a copy of it."""
    from pyvmm.pytest_vms import restored_for_test

    return restored_for_test(request.node, _vms_of(request.config), microvm_kernel)


def _vms_of(config: pytest.Config) -> Vms:
    from pyvmm.pytest_vms import Vms

    found = config.stash.get(_vms, None)
    if found is None:
        found = config.stash[_vms] = Vms(
            config.getoption("--microvm-image"), keep=config.getoption("--microvm-keep")
        )
    return found


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """The end of the console of each VM of a test that fails goes into its report."""
    report: pytest.TestReport = (yield).get_result()
    vms = item.config.stash.get(_vms, None)
    if report.failed and vms is not None:
        report.sections += vms.test_failed(item.nodeid)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """A test's VMs end when all its fixtures have."""
    yield
    vms = item.config.stash.get(_vms, None)
    if vms is not None:
        vms.release(item.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    vms = session.config.stash.get(_vms, None)
    if vms is not None:
        session.config.stash[_kept] = vms.close()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for kept in config.stash.get(_kept, []):
        terminalreporter.write_line(
            f"microvm {kept.name} of {kept.test} runs on: `pyvmm exec -t {kept.name} -- sh`, "
            f"`pyvmm console {kept.name}`; `pyvmm stop {kept.name}` ends it"
        )
