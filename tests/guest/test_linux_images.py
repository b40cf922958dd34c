"""Images of one's own, booted: a container image of two layers, a Debian with Python."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import guest
import pytest
from container_archives import Layout, directory, hardlink, layer, member, symlink

BUSYBOX = Path("/bin/busybox")  # static: the package busybox-static
# CAP_DAC_READ_SEARCH, permitted and effective (vfs_cap_data, revision 2).
MAY_READ_ALL = bytes.fromhex("0100000204000000000000000000000000000000")
SECRET = "only root reads this"


class Place:
    """A state and a runtime directory of its own, so that names are free; the cache is shared."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = f"{name}-{os.getpid()}"
        self.runtime = tempfile.TemporaryDirectory(prefix="pyvmm-")

    def pyvmm(self, *args: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "XDG_STATE_HOME": str(self.folder / "state")}
        env["XDG_RUNTIME_DIR"] = self.runtime.name
        done = subprocess.run(
            [sys.executable, "-m", "pyvmm", *args],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=2 * guest.HANG_SECONDS,
        )
        done.stdout = done.stdout.replace("\r\n", "\n")
        return done

    def build(self, *args: str) -> None:
        done = self.pyvmm("image", "build", *args, self.name)
        assert done.returncode == 0, done.stderr

    def remove(self) -> None:
        self.pyvmm("image", "rm", "--force", self.name)
        self.runtime.cleanup()


# --- a container ----------------------------------------------------------------------------------

PASSWD = "root:x:0:0:root:/root:/bin/sh\nweb:x:1234:1234::/srv:/bin/sh\n"
GROUP = "root:x:0:\nweb:x:1234:\nextra:x:77:web\n"
CONFIG = {
    "User": "web",
    "WorkingDir": "/srv",
    "Env": ['GREETING=it\'s "me"'],
    "Entrypoint": ["/bin/sh", "-c"],
    "Cmd": ["echo entry=$(id -un):$PWD:$GREETING; exit 3"],
}
LOWER = (
    directory("bin"),
    member("bin/busybox", data=BUSYBOX.read_bytes() if BUSYBOX.exists() else b"", mode=0o755),
    *(
        symlink(f"bin/{name}", "busybox")
        for name in ("sh", "cat", "stat", "id", "test", "echo", "pwd")
    ),
    directory("etc"),
    member("etc/passwd", data=PASSWD.encode()),
    member("etc/group", data=GROUP.encode()),
    directory("srv", uid=1234, gid=1234),
    member("srv/odd", data=b"odd", uid=70000, gid=80000, mode=0o4755, mtime=1234567890),
    hardlink("srv/hard", "srv/odd"),
    directory("gone"),
    member("gone/file"),
    directory("old"),
    member("old/lower"),
    symlink("way", "srv"),
)
UPPER = (
    member(".wh.gone"),
    member("old/.wh..wh..opq"),
    member("old/upper", data=b"upper"),
    member("way/through", data=b"through"),
    directory("root", mode=0o700),
    member("root/secret", data=SECRET.encode(), mode=0o600),
    member(
        "bin/able/cat",
        data=BUSYBOX.read_bytes() if BUSYBOX.exists() else b"",
        mode=0o755,
        xattrs={"security.capability": MAY_READ_ALL, "user.note": b"kept"},
    ),
    member("null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
    member("pipe", tarfile.FIFOTYPE),
)
LOOK = r"""
echo who=$(id -u):$(id -g):$(id -G)
echo where=$(pwd)
echo "env=$GREETING:$HOME"
echo odd=$(stat -c %u:%g:%a:%Y:%h odd)
echo gone=$(test -e /gone; echo $?) lower=$(test -e /old/lower; echo $?)
echo upper=$(cat /old/upper) through=$(cat /srv/through)
echo null=$(stat -c %F:%t:%T /null)
echo pipe=$(stat -c %F /pipe)
echo plain=$(cat /root/secret 2>&1)
echo reader=$(/bin/able/cat /root/secret 2>&1)
exit 7
"""


def container(folder: Path) -> tuple[subprocess.CompletedProcess[str], ...]:
    """The output of a command in a guest made of a container image, and of its own entrypoint."""
    if not BUSYBOX.exists():
        pytest.skip("there is no /bin/busybox (busybox-static) to make a container image of")
    layout = Layout()
    layout.add([layer(*LOWER), layer(*UPPER)], config=CONFIG)
    place = Place(folder, "test-container")
    try:
        place.build("--from", f"oci-archive:{layout.archive(folder / 'image.tar')}")
        command = place.pyvmm("run", "--rm", "--memory", "256M", place.name, "--", LOOK)
        entry = place.pyvmm("run", "--rm", "--memory", "256M", place.name)
        kept = [*folder.glob("state/pyvmm/machines/*")]
        assert kept == [], kept
        return command, entry
    finally:
        place.remove()


def values(text: str) -> dict[str, str]:
    lines = (line.partition("=") for line in text.splitlines())
    return {key: value for key, equals, value in lines if equals}


@pytest.mark.boot.with_args(container)
def test_a_command_replaces_the_image_s_and_runs_as_it_wants(boot) -> None:
    done, _ = boot
    assert done.returncode == 7, f"{done.stdout}\n{done.stderr}"
    found = values(done.stdout)
    assert found["who"] == "1234:1234:1234 77"
    assert found["where"] == "/srv"
    assert found["env"] == 'it\'s "me":/srv'


@pytest.mark.boot.with_args(container)
def test_the_guest_sees_what_the_layers_say(boot) -> None:
    found = values(boot[0].stdout)
    assert found["odd"] == "70000:80000:4755:1234567890:2"
    assert found["gone"] == "1 lower=1"
    assert found["upper"] == "upper through=through"
    assert found["null"] == "character special file:1:3"
    assert found["pipe"] == "fifo"


@pytest.mark.boot.with_args(container)
def test_a_file_capability_has_its_effect_in_the_guest(boot) -> None:
    found = values(boot[0].stdout)
    assert "Permission denied" in found["plain"]
    assert found["reader"] == SECRET


@pytest.mark.boot.with_args(container)
def test_without_a_command_the_image_s_own_runs_on_the_console(boot) -> None:
    done = boot[1]
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert 'entry=web:/srv:it\'s "me"' in done.stdout
    assert "pyvmm: exit 3" in done.stdout


# --- a Debian -------------------------------------------------------------------------------------

SETUP = "test -x /opt/app/run\nid -u > /etc/script-ran\n"
WRITE = "import os; open('/root/kept', 'w').write('by python'); print(os.getuid())"


def debian(folder: Path) -> tuple[subprocess.CompletedProcess[str], ...]:
    """The output of two runs of one VM; the second finds the first one's files."""
    place = Place(folder, "test-debian")
    (folder / "app").mkdir()
    (folder / "app/run").write_text("#!/bin/sh\necho app=$(stat -c %u:%a /opt/app/run)\n")
    (folder / "app/run").chmod(0o750)
    (folder / "setup").write_text(SETUP)
    try:
        place.build(
            *("--from", "debian:bookworm", "--include", "python3-minimal", "--size", "1G"),
            *("--copy", f"{folder}/app:/opt/app", "--script", f"{folder}/setup"),
        )
        run = ("run", "--name", "test", "--memory", "256M", place.name, "--")
        first = place.pyvmm(*run, "python3", "-c", WRITE)
        second = place.pyvmm(
            *run, "sh", "-c", "cat /root/kept /etc/script-ran; /opt/app/run; df -m / | tail -n 1"
        )
        refused = place.pyvmm("image", "rm", place.name)
        removed = place.pyvmm("rm", "test")
        return first, second, refused, removed
    finally:
        place.remove()


@pytest.mark.boot.with_args(debian)
def test_a_debian_has_the_package_the_copy_and_what_the_script_did(boot) -> None:
    first, second, *_ = boot
    assert (first.returncode, first.stdout) == (0, "0\n"), f"{first.stdout}\n{first.stderr}"
    assert second.returncode == 0, f"{second.stdout}\n{second.stderr}"
    kept, app, room = second.stdout.splitlines()
    assert (kept, app) == ("by python0", "app=0:750")
    assert 800 < int(room.split()[1]) < 1024


@pytest.mark.boot.with_args(debian)
def test_an_image_is_not_removed_while_a_vm_keeps_changes_to_it(boot) -> None:
    *_, refused, removed = boot
    assert refused.returncode == 2 and "test keep changes to it" in refused.stderr
    assert removed.returncode == 0, removed.stderr
