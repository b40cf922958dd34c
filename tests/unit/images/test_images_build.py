"""`pyvmm image build --from`, `list` and `rm`: what is wrong is one line, and nothing half-built
stays."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
from container_archives import Layout, layer, member

from pyvmm import images
from pyvmm.cli.main import main
from pyvmm.control import registry
from pyvmm.errors import ConfigError
from pyvmm.host.files import open_image
from pyvmm.images import bootable, builder, machines, rootfs, user_build, user_image
from pyvmm.images.container import disk
from pyvmm.images.progress import Progress

PYVMM = (sys.executable, "-m", "pyvmm")
PARTS = ("agent", "kernel-6.1", "initramfs-6.1", "programs-ext4", "programs-busybox")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which the parts of images are already there, so that no mirror is asked."""
    for name in ("CACHE", "STATE", "RUNTIME"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "CACHE"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "STATE"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "RUNTIME"))
    monkeypatch.chdir(tmp_path)
    catalogue = builder.Catalogue()
    for name in PARTS:
        os.makedirs(catalogue.path(name))
    Path(catalogue.path("agent"), "pyvmm-agent").write_bytes(b"agent")
    busybox = Path(catalogue.path("programs-busybox"), "root/bin/busybox")
    busybox.parent.mkdir(parents=True)
    busybox.write_bytes(b"static")
    return tmp_path


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that takes no time to make."""

    def make(tree, target, size, tools_image, advance) -> None:
        Path(target).write_bytes(bytes(4096))

    monkeypatch.setattr(disk, "make", make)


@pytest.fixture
def archive(tmp_path: Path) -> str:
    layout = Layout()
    layout.add([layer(member("hello", data=b"hi"))], config={"Cmd": ["/hello"], "User": "5:6"})
    return layout.archive(tmp_path / "hello.tar")


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


def entries(home: Path) -> dict[str, list[str]]:
    cache_folder = home / "CACHE/pyvmm"
    return {
        name: sorted(os.listdir(cache_folder / name)) if (cache_folder / name).exists() else []
        for name in ("user", "building")
    }


def test_an_image_of_a_container_is_built_listed_found_and_removed(
    capsys, quick_disk, archive: str, home: Path
) -> None:
    assert run(capsys, "image", "build", "--from", f"oci-archive:{archive}", "hello")[0] == 0
    found = images.machine_image("hello", make=False)
    assert (found.name, found.cmdline) == ("hello", "init=/.pyvmm/init")
    assert found.process is not None
    assert found.process.argv() == ("/hello",) and found.process.user == "5:6"
    assert os.path.dirname(found.kernel) == builder.Catalogue().path("kernel-6.1")
    code, out, _ = run(capsys, "image", "list")
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("hello "))
    assert line.endswith(f"oci-archive:{archive}") and "6.1" in line
    rows = json.loads(run(capsys, "image", "list", "--json")[1])
    row = next(row for row in rows if row["name"] == "hello")
    assert row["details"]["layers"] == "1" and row["size"] > 0
    assert next(row for row in rows if row["name"] == "debian")["made_at"] is None
    kernels = {row["name"]: row["kernel"] for row in rows}
    assert (kernels["debian"], kernels["debian-arm64"]) == ("6.1", "6.1 arm64")
    assert run(capsys, "image", "rm", "hello")[0] == 0
    assert entries(home) == {"user": [], "building": []}
    with pytest.raises(ConfigError, match="there is no image called 'hello'"):
        images.machine_image("hello", make=False)


def test_a_name_that_is_taken_is_refused_unless_forced(capsys, quick_disk, archive: str) -> None:
    command = ("image", "build", "--from", f"oci-archive:{archive}", "hello")
    assert run(capsys, *command)[0] == 0
    first = user_image.find("hello")
    code, _, err = run(capsys, *command)
    assert code == 2 and "there is an image called hello" in err and err.count("\n") == 1
    assert run(capsys, *command, "--force", "--kernel", "6.1")[0] == 0
    assert first is not None and user_image.find("hello") is not None


WRONG = [
    (["debian"], "is an image of pyvmm's own"),
    (["debian-systemd"], "is an image of pyvmm's own"),
    (["kernel-6.1"], "is an image of pyvmm's own"),
    (["../x"], "cannot be called '../x'"),
    (["UPPER"], "cannot be called"),
    ([""], "cannot be called"),
    (["x" * 64], "cannot be called"),
    (["a", "b"], "one image is made at a time"),
    ([], "one image is made at a time"),
    (["a", "--kernel", "2.4"], "there is no kernel '2.4'; choose from 6.1, 6.12"),
    (["a", "--size", "1M"], "use 64M to 16384G"),
    (["a", "--size", "big"], "--size: cannot read 'big'"),
    (["a", "--include", "fio"], "--include: is for Debian"),
    (["a", "--script", "s"], "--script: is for Debian"),
    (["a", "--copy", "/etc/hosts:/x"], "--copy: is for Debian"),
]
WRONG_SOURCES = [
    ("debian:woody", "there is no Debian 'woody'"),
    ("debian", "there is no Debian ''"),
    ("alpine", "cannot build from 'alpine'; use debian:bookworm"),
    ("docker://alpine", "cannot build from"),
    ("oci-archive:missing.tar", "missing.tar: No such file"),
    ("oci-archive:", "write oci-archive:FILE"),
    ("oci:hello.tar", "is not a directory"),
    ("docker-archive:.", "is not a file"),
]


@pytest.mark.parametrize(("args", "why"), WRONG, ids=[why for _, why in WRONG])
def test_what_is_wrong_is_one_line(capsys, archive: str, home: Path, args, why: str) -> None:
    code, _, err = run(capsys, "image", "build", "--from", f"oci-archive:{archive}", *args)
    assert code == 2 and why in err and err.count("\n") == 1, err
    assert entries(home) == {"user": [], "building": []}


@pytest.mark.parametrize(("source", "why"), WRONG_SOURCES, ids=[row[0] for row in WRONG_SOURCES])
def test_a_source_that_is_wrong_is_one_line(capsys, archive: str, source: str, why: str) -> None:
    code, _, err = run(capsys, "image", "build", "--from", source, "x")
    assert code == 2 and why in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--include", "fio"], "--include: is for an image of your own; add --from"),
        (["--force"], "--force: is for an image of your own; add --from"),
        (["--from", "debian:sid", "--include", "-oDebug=1", "x"], "no package is called '-oDebug"),
        (["--from", "debian:sid", "--include", "a;b", "x"], "no package is called 'a;b'"),
        (["--from", "debian:sid", "--copy", "x", "x"], "write FILE:/PATH/IN/THE/IMAGE"),
        (["--from", "debian:sid", "--copy", "/none:/x", "x"], "--copy: there is no /none"),
        (["--from", "debian:sid", "--script", "/none", "x"], "--script: there is no file /none"),
        (["--from", "debian:sid", "--copy", "x:etc", "x"], "write FILE:/PATH/IN/THE/IMAGE"),
        (["--from", "debian:sid", "--copy", "x:/../etc", "x"], "write FILE:/PATH/IN/THE/IMAGE"),
    ],
)
def test_options_that_make_no_sense_are_one_line(capsys, args, why: str) -> None:
    code, _, err = run(capsys, "image", "build", *args)
    assert code == 2 and why in err and err.count("\n") == 1, err


# --- builds that do not come to their end ---------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "code", "why"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "No space left on device; free"),
        (KeyboardInterrupt(), 130, "interrupted; what was being built is gone"),
        (ConfigError("mke2fs: broken"), 2, "mke2fs: broken"),
    ],
    ids=["full disk", "Ctrl-C", "failure"],
)
def test_a_build_that_fails_leaves_nothing(
    capsys, monkeypatch, archive: str, home: Path, failure, code: int, why: str
) -> None:
    def fail(*args: object) -> None:
        raise failure

    monkeypatch.setattr(disk, "make", fail)
    found, _, err = run(capsys, "image", "build", "--from", f"oci-archive:{archive}", "hello")
    assert found == code and why in err.splitlines()[-1], err
    assert entries(home) == {"user": [], "building": []}


def test_a_replacement_that_fails_leaves_the_old_image(
    capsys, monkeypatch, quick_disk, archive: str
) -> None:
    command = ("image", "build", "--from", f"oci-archive:{archive}", "hello")
    run(capsys, *command)
    before = user_image.find("hello")

    def fail(*args: object) -> None:
        raise ConfigError("no")

    monkeypatch.setattr(disk, "make", fail)
    assert run(capsys, *command, "--force")[0] == 2
    assert user_image.find("hello") == before != None  # noqa: E711


SLOW = """
import sys, time
from pathlib import Path
from pyvmm.images.container import disk
def make(tree, target, *rest):
    Path(target).write_bytes(b"half")
    print("building", flush=True)
    time.sleep(600)
disk.make = make
from pyvmm.cli import main
main(sys.argv[1:])
"""


def slow_build(archive: str, name: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "image", "build", "--from", f"oci-archive:{archive}", name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_build_that_is_interrupted_for_real(
    capsys, quick_disk, archive: str, home: Path, number: int
) -> None:
    process = slow_build(archive, "hello")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert entries(home)["user"] == []
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert err.endswith("pyvmm: interrupted; what was being built is gone\n")
        assert entries(home)["building"] == []
    # Whatever is left of one that was killed, the next one removes.
    assert run(capsys, "image", "build", "--from", f"oci-archive:{archive}", "hello")[0] == 0
    assert entries(home) == {"user": ["hello"], "building": []}


def test_of_two_builds_of_one_name_the_second_is_refused(archive: str, home: Path) -> None:
    first = slow_build(archive, "hello")
    try:
        second = subprocess.Popen(
            [*PYVMM, "image", "build", "--from", f"oci-archive:{archive}", "hello"],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert second.stderr is not None
        assert second.stderr.readline() == "pyvmm: another build is running; waiting for it\n"
        # Meanwhile the first comes to its end.
        os.makedirs(home / "CACHE/pyvmm/user/hello")
    finally:
        first.kill()
        first.communicate()
    _, err = second.communicate(timeout=60)
    assert second.returncode == 2 and "there is an image called hello" in err


# --- images that VMs need -------------------------------------------------------------------------


@pytest.fixture
def used(capsys, quick_disk, archive: str) -> machines.Machine:
    run(capsys, "image", "build", "--from", f"oci-archive:{archive}", "hello")
    image = images.machine_image("hello", make=False)
    return machines.keep("web", "hello", image.disk)


def test_rm_of_an_image_that_vms_need_is_refused_unless_forced(capsys, used) -> None:
    code, _, err = run(capsys, "image", "rm", "hello")
    assert code == 2 and "web keep changes to it; first: pyvmm rm web" in err
    with registry.register("web"):
        code, _, err = run(capsys, "image", "rm", "hello")
        assert code == 2 and "web run on it" in err
    assert run(capsys, "image", "rm", "--force", "hello")[0] == 0
    code, _, err = run(capsys, "run", "--name", "web")
    assert code == 2 and "hello is gone since the VM web began" in err and "pyvmm rm web" in err


def test_rm_of_an_image_that_a_vm_runs_on_is_refused_though_it_keeps_nothing(
    capsys, quick_disk, archive: str
) -> None:
    run(capsys, "image", "build", "--from", f"oci-archive:{archive}", "hello")
    disk_path = images.machine_image("hello", make=False).disk
    held = open_image(disk_path, read_only=True)  # as `pyvmm run --rm` has it
    with contextlib.closing(held):
        code, _, err = run(capsys, "image", "rm", "hello")
        assert code == 2 and "hello is in use by" in err and f"PID {os.getpid()}" in err

    assert run(capsys, "image", "rm", "hello")[0] == 0


def test_building_again_what_vms_need_is_refused_unless_forced(capsys, used, archive: str) -> None:
    command = ("image", "build", "--from", f"oci-archive:{archive}", "hello", "--force")
    assert run(capsys, *command)[0] == 0
    time.sleep(0.01)
    os.utime(os.path.join(user_image.path("hello"), user_image.DISK))
    code, _, err = run(capsys, "run", "hello", "--name", "web")
    assert code == 2 and "hello was built again since the VM web began" in err


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("debian", "one of pyvmm's own; pyvmm image prune"),
        ("none", "is not there; see: pyvmm image list"),
        ("..", "cannot be called"),
    ],
)
def test_rm_of_what_is_no_image_of_the_user_s(capsys, name: str, why: str) -> None:
    code, _, err = run(capsys, "image", "rm", name)
    assert code == 2 and why in err


def test_prune_leaves_what_users_built_and_vms_need(capsys, used, home: Path) -> None:
    old = home / "CACHE/pyvmm/images/rootfs-minbase-0ld"
    for folder in (old, home / "CACHE/pyvmm/images/rootfs-gone-1"):
        folder.mkdir()
        (folder / "rootfs.ext4").write_bytes(b"x")
    machines.keep("debian", "debian", str(old / "rootfs.ext4"))
    _, out, _ = run(capsys, "image", "prune")
    assert "rootfs-gone-1" in out and "0ld" not in out
    assert user_image.find("hello") is not None


def test_prune_removes_headers_without_a_kernel_and_kernels_if_told(capsys, used, home: Path):
    cache = home / "CACHE/pyvmm"
    for folder in ("kernels/sid/lib/modules/7.1", "headers/7.1/usr", "headers/6.9/usr"):
        (cache / folder).mkdir(parents=True)
    _, out, _ = run(capsys, "image", "prune")
    assert "headers/6.9" in out and "7.1" not in out and "sid" not in out
    assert sorted(path.name for path in (cache / "headers").iterdir()) == ["7.1"]
    _, out, _ = run(capsys, "image", "prune", "--kernels")
    assert "kernels/sid" in out and "headers/7.1" in out
    assert not list((cache / "kernels").iterdir()) + list((cache / "headers").iterdir())


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 99}', "\xff"])
def test_a_broken_record_is_told_and_can_be_removed(capsys, quick_disk, archive, text) -> None:
    run(capsys, "image", "build", "--from", f"oci-archive:{archive}", "hello")
    Path(user_image.path("hello"), user_image.RECORD).write_bytes(text.encode("latin-1"))
    code, _, err = run(capsys, "run", "hello")
    assert code == 2 and "is damaged" in err and "pyvmm image rm hello" in err, err
    assert "unknown: " in run(capsys, "image", "list")[1]
    assert run(capsys, "image", "rm", "hello")[0] == 0


class NoMirror:
    """A builder of what nothing has to be fetched for."""

    built: ClassVar[list[str]] = []

    def __init__(self, *args: object) -> None:
        self.built.clear()

    def build(self, name: str) -> None:
        self.built.append(name)

    def agent(self, architecture: str) -> str:
        return "/agent" if architecture == "amd64" else f"/agent-{architecture}"

    def client(self, suites: tuple[str, ...], architecture: str) -> tuple[object, str]:
        return suites, architecture

    def machine(self, architecture: str) -> str | None:
        return None if architecture == "amd64" else f"a machine for {architecture}"


# --- Debian ---------------------------------------------------------------------------------------


def test_a_debian_of_one_s_own_has_what_was_asked_for(
    monkeypatch, capsys, home: Path, tmp_path: Path
) -> None:
    plans = []

    def build(plan, recipes, client, into, progress, machine) -> list[tuple[str, str]]:
        assert machine is None  # its own programs are run here
        plans.append((plan, Path(plan.script).read_bytes()))
        Path(into, "rootfs.ext4").write_bytes(b"x")
        return [("busybox-static", "1"), ("fio", "3.41")]

    monkeypatch.setattr(rootfs, "build", build)
    monkeypatch.setattr(builder, "Builder", NoMirror)
    (tmp_path / "app").mkdir()
    (tmp_path / "app/run").write_text("x")
    (tmp_path / "setup").write_text("touch /made")
    code, _, err = run(
        capsys,
        *("image", "build", "--from", "debian:trixie", "--include", "fio,python3", "--size=4G"),
        *("--copy", f"{tmp_path}/app:/opt/app", "--script", f"{tmp_path}/setup", "bench"),
    )
    assert code == 0, err
    [(plan, script)] = plans
    assert (plan.release, plan.size, plan.variant) == ("trixie", 4096, "own")
    assert plan.packages == ("busybox-static", "fio", "python3")
    assert script == b"#!/bin/sh -eu\ntouch /made"
    found = user_image.find("bench")
    assert found is not None and dict(found.details) == {"packages": "2", "fio": "3.41"}
    assert (Path(found.folder) / "packages").read_text() == "busybox-static 1\nfio 3.41\n"


def test_a_debian_for_another_architecture_has_its_kernel_and_its_agent(
    monkeypatch, capsys, home: Path
) -> None:
    plans = []

    def build(plan, recipes, client, into, progress, machine) -> list[tuple[str, str]]:
        plans.append((plan, client, machine))
        Path(into, "rootfs.ext4").write_bytes(b"x")
        return [("busybox-static", "1")]

    monkeypatch.setattr(rootfs, "build", build)
    monkeypatch.setattr(builder, "Builder", NoMirror)
    code, _, err = run(
        capsys, "image", "build", "--arch", "arm64", "--from", "debian:trixie", "bench"
    )
    assert code == 0, err
    [(plan, client, machine)] = plans
    assert (plan.architecture, plan.agent) == ("arm64", "/agent-arm64")
    assert (client[1], machine) == ("arm64", "a machine for arm64")
    found = user_image.find("bench")
    assert found is not None and found.kernel == "arm64"
    assert bootable.architecture_of("bench") == "arm64"
    needed = {"agent-arm64", "kernel-arm64", "initramfs-arm64", "programs-emulator-arm64"}
    assert needed <= set(NoMirror.built) and "agent" not in NoMirror.built


def test_a_container_for_another_architecture_has_that_one_s_programs(
    monkeypatch, capsys, tmp_path: Path, home: Path
) -> None:
    """Of an archive with one for each, that one's; nothing else of this machine's is in it."""
    layout = Layout()
    for architecture in ("amd64", "arm64"):
        platform = {"os": "linux", "architecture": architecture}
        mine = layer(member("mine", data=architecture.encode()))
        layout.add([mine], architecture=architecture, platform=platform)
    archive = f"oci-archive:{layout.archive(tmp_path / 'both.tar')}"
    programs = tmp_path / "programs-busybox-arm64/root/bin"
    programs.mkdir(parents=True)
    (programs / "busybox").write_bytes(b"a busybox for arm64")
    (tmp_path / "agent-arm64").write_bytes(b"an agent for arm64")
    found = {}

    class Mirror(NoMirror):
        def agent(self, architecture: str) -> str:
            return str(tmp_path / f"agent-{architecture}")

    def make(tree, target, size, tools_image, advance) -> None:
        names = ("mine", ".pyvmm/busybox", ".pyvmm/agent")
        found.update({name: tree.read(name, 100) for name in names})
        Path(target).write_bytes(bytes(4096))

    monkeypatch.setattr(builder, "Builder", Mirror)
    monkeypatch.setattr(builder.Catalogue, "path", lambda self, name: str(tmp_path / name))
    monkeypatch.setattr(disk, "make", make)
    code, _, err = run(capsys, "image", "build", "--arch", "arm64", "--from", archive, "both")
    assert code == 0, err
    assert found == {
        "mine": b"arm64",
        ".pyvmm/busybox": b"a busybox for arm64",
        ".pyvmm/agent": b"an agent for arm64",
    }
    assert bootable.architecture_of("both") == "arm64"
    assert {"kernel-arm64", "initramfs-arm64", "programs-ext4"} <= set(Mirror.built)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--from", "debian:sid", "--kernel", "7", "x"),
            "no kernel '7' for arm64; choose from 6.1, 6.12",
        ),
        (("rootfs-minbase",), "--arch: is for an image, or a kernel; add --from"),
        (("--all",), "--arch: is for an image, or a kernel; add --from"),
        (("debian:sid", "agent"), "--arch: is for an image, or a kernel; add --from"),
    ],
)
def test_what_there_is_not_for_another_architecture_is_told(capsys, arguments, said: str) -> None:
    code, _, err = run(capsys, "image", "build", "--arch", "arm64", *arguments)
    assert code == 2 and said in err, err
    assert err.count("\n") == 1


def test_copies_are_root_s_and_keep_their_modes(tmp_path: Path) -> None:
    import tarfile

    (tmp_path / "app").mkdir()
    (tmp_path / "app/run").write_text("x")
    (tmp_path / "app/run").chmod(0o755)
    os.symlink("/etc/shadow", tmp_path / "app/link")
    path = user_build._pack(((f"{tmp_path}/app", "/opt/app"),), str(tmp_path))
    with tarfile.open(path) as archive:
        found = {one.name: one for one in archive}
    assert set(found) == {"opt/app", "opt/app/run", "opt/app/link"}
    assert found["opt/app/run"].mode == 0o755
    assert {(one.uid, one.gid) for one in found.values()} == {(0, 0)}
    assert found["opt/app/link"].issym()


@pytest.mark.parametrize(
    ("source", "target", "name"),
    [
        ("app", "/", "."),
        ("app", "/opt/", "opt"),
        ("app/run", "/opt/", "opt/run"),
        ("app/run", "/", "run"),
        ("app/run", "/opt/start", "opt/start"),
    ],
)
def test_a_file_goes_into_the_directory_that_a_slash_names(
    tmp_path: Path, source: str, target: str, name: str
) -> None:
    import tarfile

    (tmp_path / "app").mkdir()
    (tmp_path / "app/run").write_text("x")
    path = user_build._pack(((f"{tmp_path}/{source}", target),), str(tmp_path))
    with tarfile.open(path) as archive:
        assert archive.getnames()[0] == name


# --- progress -------------------------------------------------------------------------------------


def test_without_a_terminal_there_are_lines_and_no_bars(capsys) -> None:
    progress = Progress()
    with progress.step("working"), progress.bar("unpacking", 100) as advance:
        advance(50)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 2
    assert lines[0].startswith("pyvmm: unpacking: ") and lines[1].startswith("pyvmm: working: ")
    assert "\x1b" not in err


def test_on_a_terminal_there_is_a_bar_that_makes_room_for_the_line() -> None:
    script = (
        "from pyvmm.images.progress import Progress\n"
        "import time\n"
        "with Progress().bar('unpacking', 1000) as advance:\n"
        "    advance(500); time.sleep(0.3)\n"
    )
    reader, terminal = os.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}
    done = subprocess.Popen([sys.executable, "-c", script], stderr=terminal, env=env)
    assert done.wait(60) == 0
    os.close(terminal)
    said = b""
    while True:
        try:
            chunk = os.read(reader, 4096)
        except OSError:
            break
        if not chunk:
            break
        said += chunk
    os.close(reader)
    assert b"unpacking" in said and b"500/1,000 bytes" in said
    assert said.rstrip().endswith(b" s") and b"\x1b[2K" in said
