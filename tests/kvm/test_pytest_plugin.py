"""The pytest plugin as a project that uses it meets it: its own tests are run, with a guest that
echoes, on real KVM."""

from __future__ import annotations

from pathlib import Path

import pytest
from echo_guest import echo_kernel

from pyvmm.api.vm import VM
from pyvmm.control import registry
from pyvmm.kvm.system import Kvm

pytest_plugins = ["pytester"]


@pytest.fixture
def project(kvm: Kvm, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """Makes a test file in which OPTIONS boot the echo guest, and runs it."""
    runtime = pytester.path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    kernel = echo_kernel(pytester.path)

    def run(tests: str, *args: str) -> pytest.RunResult:
        options = f"OPTIONS = dict(kernel={kernel!r}, kvm='host', ready=False, memory='64M')\n"
        pytester.makepyfile(f"import pytest, pyvmm\n{options}{tests}")
        return pytester.runpytest_subprocess("-p", "no:randomly", "-p", "no:cacheprovider", *args)

    return run


def test_a_test_gets_the_vm_that_its_mark_describes(project):
    done = project("""
@pytest.mark.microvm(cpus=2, **OPTIONS)
class TestIt:
    def test_class(self, microvm):
        assert microvm.status()["cpus"] == 2
        microvm.console.expect("ready", timeout=60)
    @pytest.mark.microvm(cpus=3)
    def test_nearest(self, microvm):
        assert microvm.status()["cpus"] == 3
        assert microvm.spec.memory == 64 << 20
    def test_another_vm(self, microvm):
        assert pyvmm.control.registry.running() == [microvm.name]
""")
    done.assert_outcomes(passed=3)
    assert registry.running() == []


def test_marks_that_are_equal_share_a_vm(project):
    done = project("""
pytestmark = pytest.mark.microvm(shared=True, **OPTIONS)
pids = []
def test_first(microvm):
    pids.append(microvm.pid)
def test_second(microvm):
    pids.append(microvm.pid)
    assert pids[0] == pids[1]
@pytest.mark.microvm(cpus=2)
def test_other_options(microvm):
    assert microvm.pid not in pids
def test_fails(microvm):
    assert microvm.pid == pids[0]
    assert False
def test_after_a_failure_it_is_another(microvm):
    assert microvm.pid not in pids
    microvm.kill()
def test_after_a_death_too(microvm):
    assert microvm.status()["state"] == "running"
""")
    done.assert_outcomes(passed=5, failed=1)
    assert registry.running() == []


def test_the_factory(project):
    done = project("""
def test_two(microvm_factory):
    one, two = microvm_factory(**OPTIONS), microvm_factory(**OPTIONS, name="other")
    assert {one.name, two.name} == {"vm", "other"}
def test_they_have_ended():
    from pyvmm.control import registry
    assert registry.running() == []
""")
    done.assert_outcomes(passed=2)


def test_each_test_has_a_copy_of_one_that_has_booted_once(project):
    done = project("""
def prepare(vm):
    vm.console.expect("ready", timeout=60)
    vm.console.send("prepared")
    vm.console.expect("prepared", timeout=60)
    with open("prepared", "a") as file:
        file.write(vm.name)
pytestmark = pytest.mark.microvm(prepare=prepare, **OPTIONS)
pids = []
@pytest.mark.parametrize("number", range(4))
def test_it(microvm_restored, number):
    pids.append(microvm_restored.pid)
    assert len(set(pids)) == number + 1
    microvm_restored.console.send(f"test{number}")
    microvm_restored.console.expect(f"test{number}", timeout=60)
    assert microvm_restored.console.text == f"test{number}", "it has booted, or is another test's"
    assert pyvmm.control.registry.running() == [microvm_restored.name]
    if number == 2:
        microvm_restored.kill()
def test_one_that_fails(microvm_restored):
    microvm_restored.console.send("so far")
    microvm_restored.console.expect("so far", timeout=60)
    assert False
@pytest.mark.microvm(cpus=2)
def test_of_another(microvm_restored):
    assert microvm_restored.status()["cpus"] == 2
def test_once():
    assert open("prepared").read() == "vmvm"
def test_it_is_for_copies_only(microvm):
    pass
""")
    done.assert_outcomes(passed=6, failed=1, errors=1)
    done.stdout.fnmatch_lines(["*- console of the microVM vm-* -*", "so far"])
    assert registry.running() == []


def test_a_failure_shows_the_console_and_what_the_monitor_said(project):
    done = project("""
@pytest.mark.microvm(**OPTIONS)
def test_fails(microvm):
    microvm.console.expect("ready", timeout=60)
    microvm.console.send("P")
    microvm.wait(60)
    assert False, "of the test"
""")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        [
            "*of the test*",
            "*- console of the microVM vm -*",
            "ready",
            "Kernel panic - not syncing: asked for",
            "*- monitor of the microVM vm -*",
            "vm: *panicked*",
        ]
    )


def test_a_guest_that_never_is_ready_fails_with_its_console(project):
    done = project("""
@pytest.mark.microvm(**{**OPTIONS, "ready": True, "timeout": 1})
def test_hangs(microvm):
    pass
""")
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(
        ["*no agent answers in the guest after 1 s*", "*- console of the microVM vm -*", "ready"]
    )
    assert registry.running() == []


def test_a_guest_that_hangs_in_a_test_fails_it_with_its_console(project):
    done = project(
        """
@pytest.mark.microvm(**OPTIONS)
def test_hangs(microvm):
    microvm.console.expect("ready", timeout=60)
    microvm.console.expect("never", timeout=None)
""",
        *("--timeout=5", "-o", "timeout_func_only=true"),
    )
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        ["*from pytest-timeout*", "*- console of the microVM vm -*", "ready"], consecutive=False
    )
    assert registry.running() == []


def test_what_is_wrong_with_a_mark(project):
    done = project("""
@pytest.mark.microvm(memry="1G", **OPTIONS)
def test_misspelt(microvm):
    pass
@pytest.mark.microvm("one", "two")
def test_two_images(microvm):
    pass
""")
    done.assert_outcomes(errors=2)
    done.stdout.fnmatch_lines(["*unexpected keyword argument 'memry'*", "*takes one image*"])


def test_vms_of_failed_tests_can_be_kept(project):
    done = project(
        """
@pytest.mark.microvm(**OPTIONS)
def test_fails(microvm):
    microvm.console.expect("ready", timeout=60)
    assert False
@pytest.mark.microvm(**OPTIONS)
def test_passes(microvm):
    pass
""",
        "--microvm-keep",
    )
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(["microvm vm of *::test_fails runs on: *pyvmm stop vm*"])
    assert registry.running() == ["vm"]
    vm = VM.attach("vm")
    vm.console.send("still there")
    vm.console.expect("still there", timeout=60)
    vm.stop()


def test_workers_of_xdist_do_not_disturb_each_other(project):
    done = project(
        """
from pathlib import Path
pytestmark = pytest.mark.microvm(**OPTIONS)
@pytest.mark.parametrize("number", range(4))
def test_one(microvm, number, worker_id):
    microvm.console.expect("ready", timeout=60)
    microvm.console.send(f"<{number}>")
    microvm.console.expect_exact(f"<{number}>", timeout=60)
    Path(worker_id).touch()
""",
        *("-n", "2"),
    )
    done.assert_outcomes(passed=4)
    assert registry.running() == []


def test_the_default_image_can_be_named(project, pytester):
    done = project("def test_it(microvm): pass", "--microvm-image", "no-such-image")
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*there is no image called 'no-such-image'*"])


def test_whoever_does_not_use_it_pays_nothing(pytester):
    pytester.makepyfile("""
        import sys
        def test_it():
            loaded = {name for name in sys.modules if name.split(".")[0] == "pyvmm"}
            assert loaded == {"pyvmm", "pyvmm.pytest_plugin"}
    """)
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)


def test_the_plugin_is_found_by_its_entry_point():
    from importlib.metadata import entry_points

    [found] = [entry for entry in entry_points(group="pytest11") if entry.name == "pyvmm"]
    assert Path(found.load().__file__).name == "pytest_plugin.py"


def test_a_test_runs_on_each_kernel_that_its_mark_names(project, pytester: pytest.Pytester):
    """Tests that share a VM come kernel by kernel: each is booted once."""
    other = pytester.path / "other-kernel"
    other.write_bytes(Path(echo_kernel(pytester.path)).read_bytes())
    done = project(
        """
FIRST = OPTIONS.pop("kernel")
pytestmark = [
    pytest.mark.microvm(shared=True, **OPTIONS),
    pytest.mark.microvm_kernels(FIRST, "./other-kernel"),
]
seen = []
def test_one(microvm, microvm_kernel):
    seen.append((microvm_kernel, microvm.spec.kernel, microvm.pid))
def test_two(microvm, microvm_kernel):
    seen.append((microvm_kernel, microvm.spec.kernel, microvm.pid))
def test_the_factory(microvm_factory):
    vm = microvm_factory(**OPTIONS)
    seen.append((None, vm.spec.kernel, vm.pid))
def test_without_a_vm():
    assert [kernel for _, kernel, _ in seen] == 3 * [FIRST] + 3 * ["./other-kernel"]
    assert len({pid for asked, _, pid in seen if asked}) == 2
""",
        "-v",
    )
    done.assert_outcomes(passed=7)
    done.stdout.fnmatch_lines(["*::test_two[[]./other-kernel[]] PASSED*"])


def test_a_mark_without_kernels(project):
    done = project("""
@pytest.mark.microvm_kernels()
def test_it(microvm):
    pass
""")
    done.stdout.fnmatch_lines(["*takes one or more kernels*"])
