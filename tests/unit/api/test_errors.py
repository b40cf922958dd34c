"""Errors as values: from one process to another, as multiprocessing and Ray take them."""

from __future__ import annotations

import copy
import pickle

import pytest

from pyvmm.agent import AgentError, CommandTimeout
from pyvmm.api.errors import GuestPanic, Outcome, VMTimeout
from pyvmm.control.protocol import ControlError
from pyvmm.errors import ConfigError, DriverError, GuestMemoryError, HostError, PyvmmError

ERRORS = [
    ConfigError("no such thing", cure="have it", option="--thing"),
    HostError(28, "write", cure="make room"),
    DriverError("a loop", section="2.7.5.2"),
    GuestMemoryError(0x1000, 16),
    VMTimeout("too late", console="the end"),
    GuestPanic("it panicked", console="Kernel panic", outcome=Outcome(12, "panic")),
    AgentError("no"),
    CommandTimeout("slow"),
    ControlError("refused", "it is paused"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_goes_to_another_process_whole(error: PyvmmError) -> None:
    for same in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(same) is type(error) and same.args == error.args
        assert str(same) == str(error) and vars(same) == vars(error)
