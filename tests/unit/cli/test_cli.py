"""`pyvmm` as a user meets it: what is wrong is said in one line, with exit code 2.

Option errors are found before KVM or the emulated host is needed, so nothing here starts either.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import suppress

import boot_images
import pytest

from pyvmm.cli.main import main
from pyvmm.control import registry, vm_log
from pyvmm.emulated_host.spec import HostImage
from pyvmm.kinds.vm_spec import from_json
from pyvmm.monitor import emulated

PYVMM = [sys.executable, "-m", "pyvmm"]
SAFETY_TIMEOUT = 60
STARTED = 99  # what our emulated host "returns": all the options were good


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder with a kernel and disks in it, and an emulated host that does not start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "kernel").write_bytes(boot_images.bzimage())
    for name in ("a.img", "b.img"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    (tmp_path / "empty").touch()
    (tmp_path / "small").write_text("hi")
    (tmp_path / "dir").mkdir()
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr(emulated, "_join_terminal", lambda *given: STARTED)
    image = HostImage("kernel", "modules", "busybox", ("qemu",))
    monkeypatch.setattr(emulated, "find_image", lambda make, architecture: image)
    monkeypatch.setattr(emulated, "EmulatedHostSpec", lambda **parts: None)
    return tmp_path


@pytest.fixture
def pyvmm(capsys):
    def call(*args: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(args))
        return ended.value.code, capsys.readouterr().err

    return call


@pytest.fixture
def run(pyvmm):
    return lambda *args: pyvmm("run", "--kvm", "emulated", "--kernel", "kernel", *args)


def test_good_options_start(run):
    assert run("--disk", "a.img", "--disk", "b.img,readonly,id=data", "--memory", "64M") == (
        STARTED,
        "",
    )


def test_what_the_host_is_does_not_say_why_a_vm_ended(pyvmm, place, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    monkeypatch.setattr("pyvmm.machine.host_kvm.why_unusable", lambda: "no KVM here")
    code, error = pyvmm("run", "--kernel", "kernel", "--name", "web")
    assert (code, "no KVM here" in error) == (STARTED, True)
    [end] = vm_log.ended(registry.folder())
    assert (end["name"], end["exit_code"], end["message"]) == ("web", STARTED, "")


WRONG = [
    # (arguments, what the line must name)
    (["--stop-timeout", "abc"], "is not a number of seconds"),
    (["--stop-timeout", "nan"], "is not a number of seconds"),
    (["--stop-timeout", "-1"], "cannot have -1.0 seconds"),
    (["--memory", ""], "--memory"),
    (["--memory", "-1"], "--memory"),
    (["--memory", "0"], "32M or more"),
    (["--memory", "31M"], "32M or more"),
    (["--memory", "1.5G"], "write 512M or 2G"),
    (["--memory", "½G"], "--memory"),
    (["--memory", "٣G"], "--memory"),
    (["--memory", "33000001k"], "whole number of MiB"),
    (["--memory", "999999G"], "or less"),
    (["--memory", "99999999999999999999G"], "--memory"),
    (["--memory", "9" * 5000], "--memory"),
    (["--cpus", "0"], "--cpus"),
    (["--cpus", "65"], "use 1 to 64"),
    (["--cpus", "-1"], "--cpus"),
    (["--cpus", "9" * 30], "--cpus"),
    (["--cpus", "two"], "--cpus"),
    (["--cpus", ""], "--cpus"),
    (["--kernel", ""], "--kernel"),
    (["--kernel", "missing"], "check the path"),
    (["--kernel", "kernel/x"], "check the path"),
    (["--kernel", "dir"], "a directory"),
    (["--kernel", "fifo"], "a FIFO"),
    (["--kernel", "empty"], "empty"),
    (["--kernel", "small"], "neither a bzImage"),
    (["--kernel", "/dev/null"], "a device"),
    (["--kernel", "x" * 5000], "too long"),
    (["--initrd", "missing"], "--initrd"),
    (["--initrd", "dir"], "--initrd"),
    (["--initrd", "fifo"], "--initrd"),
    (["--initrd", "empty"], "--initrd"),
    (["--disk", ""], "--disk"),
    (["--disk", ",readonly"], "no path"),
    (["--disk", "a.img,"], "unknown disk option"),
    (["--disk", "a.img,rw"], "unknown disk option"),
    (["--disk", "a.img,readonly=yes"], "unknown disk option"),
    (["--disk", "a.img,id="], "unknown disk option"),
    (["--disk", "a.img,id=\udcff"], "not printable"),
    (["--disk", "a.img,id=x\ny"], "not printable"),
    (["--disk", "a.img,id=" + "x" * 21], "longer than 20 bytes"),
    (["--disk", "a.img,id=" + "ü" * 11], "longer than 20 bytes"),
    (["--disk", "missing"], "check the path"),
    (["--disk", "dir"], "a directory"),
    (["--disk", "fifo"], "a FIFO"),
    (["--disk", "empty"], "truncate -s 1G"),
    (["--disk", "small"], "less than one sector"),
    (["--disk", "a.img", "--disk", "./a.img"], "another disk of this VM"),
    (["--disk", "a.img", "--disk", "./a.img,readonly"], "another disk of this VM"),
    (["--disk", "a.img,id=x", "--disk", "b.img,id=x"], "two disks are called 'x'"),
    ([f for n in range(17) for f in ("--disk", f"a.img,readonly,id={n}")], "at most 16"),
    (["--cmdline", "a\nb"], "a newline"),
    (["--cmdline", 'a="b'], "never closed"),
    (["--cmdline", "\x1b"], "printable characters"),
    (["--cmdline", "\udcff"], "printable characters"),
    (["--cmdline", "x" * 70000], "shorten it by"),
    (["--trace", "everything"], "choose from"),
    (["--trace", ","], "choose from"),
    (["--trace-file", "out"], "--trace all"),
    (["--trace", "all", "--trace-file", ""], "--trace-file"),
    (["--trace", "all", "--trace-file", "dir"], "--trace-file"),
    (["--trace", "all", "--trace-file", "missing/out"], "writable directory"),
    (["--kvm", "maybe"], "--kvm"),
    (["--discovery", "maybe"], "--discovery"),
    (["--name", "a\nb"], "--name"),
    (["--name", ""], "--name: an empty text is not a name"),
    (
        ["--name", "a b"],
        "--name: the name 'a b' is not printable, has a slash or a colon or a space",
    ),
    (["--name=-a"], "begins with a dot or a dash"),
    (["--no-such-option"], "--no-such-option"),
    (["leftover"], "leftover"),
    (["--kernel"], "--kernel"),
]


def shown(args):
    return " ".join(args)[:30].encode("ascii", "replace").decode()


@pytest.mark.parametrize("args, named", WRONG, ids=[shown(args) for args, _ in WRONG])
def test_what_is_wrong_is_one_line_and_code_2(run, args, named):
    code, error = run(*args)
    assert code == 2
    assert error.startswith("pyvmm: ") and error.count("\n") == 1, error
    assert named in error


def test_commands_that_do_not_exist_are_one_line(pyvmm):
    for args in (["boot"], ["run", "none"], ["image", "disk"], ["image", "path", "missing"]):
        code, error = pyvmm(*args)
        assert (code, error.count("\n")) == (2, 1), error


def test_stopping_twice_at_once_is_one_line(pyvmm):
    code, said = pyvmm("stop", "vm", "--now", "--kill")
    assert (code, said.count("\n")) == (2, 1), said
    assert "--now and --kill exclude each other" in said


def test_without_a_command_the_help_is_shown(pyvmm):
    code, error = pyvmm()
    assert code == 2
    assert "Commands:" in error


def test_memory_that_the_host_does_not_give_is_the_users_error(run, monkeypatch):
    builder = importlib.import_module("pyvmm.machine.builder")
    errors = importlib.import_module("pyvmm.errors")

    def refuse(ranges):
        raise errors.HostError(12, "mmap")

    monkeypatch.setattr(builder, "GuestMemory", refuse)
    code, error = run("--memory", "2G")
    assert code == 2
    assert error == (
        "pyvmm: --memory: this machine does not give 2048 MiB: mmap: Cannot allocate memory;"
        " ask for less\n"
    )


@pytest.mark.parametrize("victim", ["a.img", "kernel", "./a.img"])
def test_a_trace_never_overwrites_what_the_guest_uses(run, place, victim):
    before = (place / victim).read_bytes()
    code, error = run("--disk", "a.img", "--trace", "all", "--trace-file", victim)
    assert code == 2
    assert "would overwrite" in error
    assert (place / victim).read_bytes() == before


def test_why_there_is_an_emulated_host_is_said_only_if_it_starts(pyvmm, monkeypatch):
    host_kvm = importlib.import_module("pyvmm.machine.host_kvm")
    monkeypatch.setattr(host_kvm, "why_unusable", lambda: "no KVM on this machine")
    code, error = pyvmm("run", "--kernel", "missing")
    assert (code, error.count("\n")) == (2, 1)
    code, error = pyvmm("run", "--kernel", "kernel")
    assert code == STARTED
    assert error.startswith("pyvmm: no KVM on this machine; running in an emulated KVM host")


def test_the_emulated_host_gets_paths_that_mean_the_same_inside(run, place, monkeypatch):
    inside = []
    monkeypatch.setattr(
        emulated, "_join_terminal", lambda spec, argv, *more: inside.append(argv[-3]) or 0
    )
    (place / "link").symlink_to("a.img")
    with open(place / "b.img") as opened:
        by_number = f"/dev/fd/{opened.fileno()},readonly"
        assert run("--disk", "link", "--disk", by_number)[0] == 0
    [spec] = [from_json(text) for text in inside]
    assert spec.kernel == str(place / "kernel")
    assert [disk.path for disk in spec.disks] == [str(place / "a.img"), str(place / "b.img")]


@pytest.mark.parametrize(("vcpus", "cpus"), [(1, 2), (2, 1), (4, 1)])
def test_the_emulated_host_has_one_cpu_for_a_guest_of_several(run, monkeypatch, vcpus, cpus):
    made = []
    monkeypatch.setattr(emulated, "EmulatedHostSpec", lambda **parts: made.append(parts["cpus"]))
    assert run("--cpus", str(vcpus))[0] == STARTED
    assert made == [cpus]


def test_a_kernel_that_the_emulated_host_cannot_see_is_refused_here(run, place):
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as kernel:
        kernel.write(boot_images.bzimage())
        kernel.flush()
        code, error = run("--kernel", kernel.name)
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith(f"pyvmm: --kernel: {kernel.name} cannot be seen")


def test_only_a_regular_file_is_replaced_by_a_fresh_disk(pyvmm, place):
    code, error = pyvmm("image", "disk", "--force", "dir")
    assert (code, error) == (
        2,
        "pyvmm: dir is not a regular file, to be replaced; name another file\n",
    )


def test_debug_shows_the_traceback_and_keeps_the_code(run):
    code, error = run("--kernel", "missing", "--debug")
    assert code == 2
    assert "Traceback" in error
    assert error.endswith("check the path\n")


def test_a_defect_is_one_line_that_asks_for_debug(run, monkeypatch):
    def fail(spec):
        raise AttributeError("oops")

    monkeypatch.setattr(emulated, "check_boot", fail)
    code, error = run()
    assert (code, error.count("\n")) == (70, 1)
    assert "--debug" in error


def test_images_are_listed(pyvmm, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["image", "list", "--all"])
    assert ended.value.code == 0
    assert "kernel-6.1" in capsys.readouterr().out


def test_the_doctor_has_no_cross_for_an_image_that_is_not_built(monkeypatch, capsys):
    names = [f"image-number-{number}" for number in range(20)]
    listing = [("built", "/there"), *((name, None) for name in names)]
    monkeypatch.setattr("pyvmm.images.listing", lambda: listing)
    with suppress(SystemExit):  # as this machine can run a guest, or not
        main(["doctor"])
    said = capsys.readouterr().out.partition("\nImages\n")[2].splitlines()
    assert said[0] == "  ✓ built: /there"
    assert not [line for line in said[:5] if "✗" in line]
    assert max(map(len, said)) <= 100
    assert " ".join(map(str.strip, said[2:])).startswith(", ".join(names))


# --- standard streams that are closed or full, in a process of their own --------------------------


def shell(command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYVMM": " ".join(PYVMM)}
    return subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=SAFETY_TIMEOUT,
        env=environment,
    )


WRONG_RUN = "$PYVMM run --kvm emulated --kernel missing"


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", ">&- 2>&- <&-", "<&-", ">&-"])
def test_the_exit_code_survives_closed_and_full_streams(redirection):
    done = shell(f"{WRONG_RUN} {redirection}")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr + done.stdout


def test_a_path_that_is_not_utf8_is_one_line():
    done = shell("$PYVMM run --kvm emulated --kernel $'\\xff'")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "check the path" in done.stderr


def test_without_standard_error_nothing_goes_to_standard_output():
    assert shell(f"{WRONG_RUN} 2>&-").stdout == ""


def test_a_reader_that_goes_away_is_no_error_worth_a_word():
    done = shell("$PYVMM run --help | true")
    assert done.stderr == ""


@pytest.mark.parametrize(
    "command",
    ["ps", "image list", "--help", "--version", "run --cpus 2 --print-config", "run --help"],
)
def test_output_that_a_full_disk_swallows_is_no_success(command):
    done = shell(f"$PYVMM {command} >/dev/full")
    assert done.returncode == 1
    assert done.stderr == "pyvmm: writing the output: No space left on device\n"


def test_closed_streams_numbers_are_taken_so_that_no_file_gets_them():
    script = (
        "import os; from pyvmm.cli.main import _occupy_standard_fds; _occupy_standard_fds();"
        "opened = os.open('/', os.O_RDONLY); open('fds', 'w').write(str(opened))"
    )
    done = shell(f'{sys.executable} -c "{script}" <&- >&- 2>&-')
    assert done.returncode == 0
    with open("fds") as file:
        assert int(file.read()) > 2


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("option, name", [("--kernel", "kernel"), ("--disk", "a.img")])
def test_a_file_that_may_not_be_read_is_one_line(run, place, option, name):
    place.chmod(0o755)
    (place / name).chmod(0o600)
    os.seteuid(65534)
    try:
        code, error = run(option, name)
    finally:
        os.seteuid(0)
    assert (code, error.count("\n")) == (2, 1)
    assert f"cannot open {name}: Permission denied; check its permissions" in error


@pytest.mark.parametrize(
    "command",
    [["--kernel", "../k"], ["--kernel", "k", "--share", ".:/x"], ["--root", ".", "--", "true"]],
)
def test_a_removed_current_directory_is_one_line(pyvmm, place, command):
    os.chdir(place / "dir")
    (place / "dir").rmdir()
    code, error = pyvmm("run", *command)
    assert code == 2
    assert error == "pyvmm: the current directory has been removed; cd to another one\n"


def test_inside_the_emulated_host_errors_are_one_line_too_and_click_stays_out():
    script = (
        "import sys; sys.argv = ['inside', '{}', '', '30'];"
        "from pyvmm.monitor.emulated_inside import main;"
        "code = main();"
        "print(code, 'click' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=SAFETY_TIMEOUT
    )
    assert done.stdout == "2 False\n"
    assert done.stderr.startswith("pyvmm: not a VM specification: Expecting value")
    assert done.stderr.endswith("'', of 0 characters\n")
    assert done.stderr.count("\n") == 1


# --- configuration files --------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch):
    """The specifications that would have been run in an emulated host."""
    found = []
    monkeypatch.setattr(emulated, "run_emulated", lambda spec, because, **more: found.append(spec))
    return found


def test_options_come_from_a_file_and_those_of_the_command_line_win(pyvmm, place, started):
    (place / "vm.toml").write_text(
        'kernel = "kernel"\nkvm = "emulated"\ncpus = 2\nmemory = "64M"\n'
        'disks = ["a.img"]\nrng = true\nconsole = "virtio"\n'
    )
    assert pyvmm("run", "--config", "vm.toml", "--cpus", "3", "--console", "serial") == (0, "")
    [spec] = started
    assert (spec.cpus, spec.memory) == (3, 64 << 20)
    assert [disk.path for disk in spec.disks] == [str(place / "a.img")]
    assert [device.kind for device in spec.devices] == ["rng"]


def test_a_printed_configuration_starts_the_same_machine(run, place, started, capsys):
    options = ["--disk", "a.img,snapshot", "--net", "user,forward=8080:80", "--cpus=2"]
    with pytest.raises(SystemExit) as ended:
        main(["run", "--kernel", "kernel", *options, "--kvm=emulated", "--print-config"])
    assert ended.value.code == 0 and started == []
    (place / "printed.toml").write_text(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["run", "--config", "printed.toml"])
    [spec] = started
    assert spec.disks[0].snapshot and spec.cpus == 2
    assert [device.forwards for device in spec.devices] == [("tcp:127.0.0.1:8080:80",)]


def test_what_is_wrong_in_a_configuration_is_one_line(pyvmm, place):
    (place / "vm.toml").write_text('kernel = "kernel"\nmemmory = "64M"\n')
    assert pyvmm("run", "--config", "vm.toml") == (
        2,
        "pyvmm: vm.toml:2: unknown key 'memmory'; did you mean memory?\n",
    )
    assert pyvmm("run", "--config", "missing.toml")[0] == 2


@pytest.mark.parametrize("pythonpath", ["", ":/nowhere"])
@pytest.mark.parametrize("program", [PYVMM, [os.path.join(sysconfig.get_path("scripts"), "pyvmm")]])
def test_nothing_is_imported_from_the_current_directory(place, program, pythonpath):
    """It may be a guest's to change while its VM runs."""
    (place / "json.py").write_text("open('mark', 'w')")
    done = subprocess.run(
        [*program, "ps", "--json"],
        env={**os.environ, "XDG_RUNTIME_DIR": str(place), "PYTHONPATH": pythonpath},
        capture_output=True,
        text=True,
        timeout=SAFETY_TIMEOUT,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
    assert not (place / "mark").exists()
