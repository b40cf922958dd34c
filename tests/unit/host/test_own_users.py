"""Users that are nobody else's: chosen, taken, and free again when their processes have gone."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.host import other_user
from pyvmm.host.other_user import OtherUser, unreadable

SAFETY_TIMEOUT = 60

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

HOLDS = """
import sys
from pyvmm.errors import ConfigError
from pyvmm.host import other_user
other_user._RUN = ""
try:
    print(other_user.OtherUser.wanted(sys.argv[1], sys.argv[2]).uid, flush=True)
except ConfigError as error:
    print(error.message, flush=True)
sys.stdin.read()
"""


def holds(place: Path, text: str, closing: ExitStack) -> tuple[str, subprocess.Popen[str]]:
    """A process that has one of the users `text`, and which one it is."""
    process = closing.enter_context(
        subprocess.Popen(
            [sys.executable, "-c", HOLDS, text, str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    )
    closing.callback(process.kill)
    assert process.stdout is not None
    return process.stdout.readline().strip(), process


@root_only
def test_each_process_has_one_of_its_own_until_it_is_killed(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with ExitStack() as closing:
        have = dict(holds(tmp_path, "750001-750003", closing) for _ in range(3))
        assert set(have) == {"750001", "750002", "750003"}
        none, _ = holds(tmp_path, "750001-750003", closing)
        assert none == "all users that are for this are in use"
        have["750002"].kill()
        have["750002"].wait(SAFETY_TIMEOUT)
        again, _ = holds(tmp_path, "750001-750003", closing)
        assert again == "750002"


@root_only
def test_whom_a_process_runs_as_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a VM whose keeper was killed, or a service of systemd's."""
    monkeypatch.setattr(other_user, "_RUN", "")
    with subprocess.Popen(["setpriv", "--ruid=750002", "cat"], stdin=subprocess.PIPE):
        users = {OtherUser.wanted("750001-750003", "").uid for _ in range(16)}
    assert 750002 not in users and len(users) == 2


@root_only
def test_whoever_locks_all_numbers_makes_nobody_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No monitor has the file open; where one had, or root has locked them, a guess is better."""
    tmp_path.chmod(0o700)
    monkeypatch.setattr(other_user, "_RUN", "")
    monkeypatch.setattr(other_user.locks, "take_byte", lambda fd, at: False)
    users = {OtherUser.wanted("auto", str(tmp_path)).uid for _ in range(4)}
    assert len(users) == 4 and all(uid in other_user._USUAL[0] for uid in users)


@root_only
def test_a_lock_file_that_cannot_be_opened_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / other_user._LOCK).mkdir()
    monkeypatch.setattr(other_user, "_RUN", "")
    assert OtherUser.wanted("auto", str(tmp_path)).is_own


@root_only
def test_what_lies_where_the_user_may_not_look_cannot_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(0o700)
    (folder / "k").write_text("")
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        os.chmod(place, 0o755)
        closed = Path(place) / "closed"
        folder.rename(closed)
        (Path(place) / "link").symlink_to(closed / "k")
        (Path(place) / "to nothing").symlink_to("/no such file")
        user = OtherUser(61001, 61001)
        for path in (f"{closed}/k", f"{place}/link"):
            assert user.can(lambda path=path: unreadable(path)) == path
        assert user.can(lambda: unreadable(f"{place}/to nothing")) == ""


@root_only
def test_whom_an_account_is_called_by_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other_user, "_RUN", "")
    files = {"/etc/passwd": "a:x:750001:1::/:\n", "/etc/group": "b:x:750003:\n"}
    read = other_user._read
    monkeypatch.setattr(other_user, "_read", lambda path: files.get(path) or read(path))
    for _ in range(8):
        assert OtherUser.wanted("750001-750003", "") == (750002, 750002, True, -1)


@root_only
@pytest.mark.parametrize(
    ("uids", "gids", "found"),
    [
        ("0 0 4294967295", "0 0 4294967295", other_user._USUAL),
        ("0 1000 1\n1 100000 65536", "0 0 4294967295", (range(61184, 65520),)),
        ("0 100000 62000", "0 100000 61500", (range(61184, 61500),)),
        ("0 1000 1", "0 0 4294967295", ()),
        ("", "", ()),
    ],
)
def test_only_those_are_taken_that_a_user_namespace_has(
    uids: str, gids: str, found: tuple[range, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"/proc/self/uid_map": uids, "/proc/self/gid_map": gids}
    read = other_user._read
    monkeypatch.setattr(
        other_user, "_read", lambda path: texts[path] if path in texts else read(path)
    )
    assert tuple(other_user._mapped(other_user._USUAL)) == found
    reason = "" if found else "this user namespace has no such users (/proc/self/uid_map)"
    assert other_user.why_none() == reason
    if not found:
        with pytest.raises(ConfigError, match="no such users"):
            OtherUser.wanted("auto", "")


@root_only
def test_root_without_its_rights_takes_none() -> None:
    code = "from pyvmm.host import other_user; print(other_user.why_none())"
    done = subprocess.run(
        ["setpriv", "--bounding-set=-setuid,-kill", sys.executable, "-c", code],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "root without CAP_KILL and CAP_SETUID is no other user\n", done.stderr


@pytest.mark.parametrize(
    "text", ["0-5", "9-3", "5000000000-5000000001", "1-x", "-", "4294967295:1"]
)
def test_what_names_no_users_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        OtherUser.wanted(text, "")


@root_only
def test_what_he_cannot_read_is_found_wherever_it_is() -> None:
    with tempfile.TemporaryDirectory() as place:  # in a folder that is everybody's
        os.chmod(place, 0o755)
        look_into(Path(place, "top"))


def look_into(top: Path) -> None:
    user = OtherUser(61001, 61001)
    secret = top / "in/secret"
    secret.parent.mkdir(parents=True)
    secret.write_text("x")
    look = lambda: user.can(lambda: unreadable(str(top)))  # noqa: E731
    assert look() == ""
    secret.chmod(0o600)
    assert look() == str(secret)
    secret.chmod(0o644)
    secret.parent.chmod(0o700)
    assert look() == str(secret.parent)
    top.chmod(0o700)
    assert look() == str(top)
    assert user.can(lambda: unreadable(str(top.parent / "missing"))) == ""
    assert os.geteuid() == 0 and os.getegid() == 0
