"""The right that a request needs by its method, and options that name control sockets."""

from __future__ import annotations

import pytest

from pyvmm.control.protocol import Method
from pyvmm.errors import ConfigError
from pyvmm.spec.surroundings import (
    NAMES,
    USUAL,
    ControlSocket,
    Surroundings,
    read_surroundings,
)


def test_a_method_that_says_nothing_of_rights_is_for_those_who_control() -> None:
    assert Method(lambda: None).right({}) == "control"


def test_what_surrounds_a_monitor_is_made_of_its_options_and_becomes_them_again() -> None:
    values = {
        "confine": "strict",
        "allow_read": ("a", "b"),
        "user": "nobody",
        "cgroup": "/sys/fs/cgroup/mine,memory=1G",
        "stop_timeout": 300,
        "control_socket": ["one,rights=exec", {"path": "two", "group": "users"}],
    }
    found = read_surroundings(values)
    assert found.sockets == (
        ControlSocket("one", "exec"),
        ControlSocket("two", "watch", "users"),
    )
    assert read_surroundings(found.as_values()) == found
    assert tuple(found.as_values()) == NAMES
    assert read_surroundings({}) == USUAL == Surroundings()
    moved = found.with_paths(lambda path: f"/in/{path}")
    assert moved.allow_read == ("/in/a", "/in/b") and moved.sockets[0].path == "/in/one"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (",rights=exec", "cannot be a socket"),
        ("a\0b", "cannot be a socket"),
        ("a,rights=all", "no rights 'all'"),
        ("a,right=exec", "says nothing about"),
        ("a,rights", "says nothing about"),
        ("a,rights=exec,rights=watch", "says nothing about"),
        (["a", "./a"], "two control sockets have one path"),
        ([f"{n}" for n in range(9)], "9 control sockets are too many"),
        (7, "is not a control socket"),
        ({"path": "a", "rights": 7}, "is not a control socket"),
        ({"path": "a", "mode": "0666"}, "is not a control socket"),
        ({"rights": "exec"}, "is not a control socket"),
    ],
)
def test_a_control_socket_that_cannot_be_is_refused_in_one_line(value, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_surroundings({"control_socket": value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["a\0b", 7, ["a", None]])
def test_what_is_no_path_is_not_read(value) -> None:
    with pytest.raises(ConfigError, match="is not a path"):
        read_surroundings({"allow_read": value})


def test_a_path_that_is_not_there_is_told_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="/no/such/file is not there"):
        Surroundings(allow_read=("/no/such/file",)).check_files()


@pytest.mark.parametrize(
    "value",
    [-1, 86_401, pytest.param(10**400, id="huge"), float("nan"), float("inf"), "30", True, [], {}],
)
def test_a_time_to_power_off_that_cannot_be_is_refused_in_one_line(value) -> None:
    with pytest.raises(ConfigError, match=r"power off|not a time") as caught:
        read_surroundings({"stop_timeout": value})
    assert str(caught.value).startswith("--stop-timeout: ") and caught.value.cure
