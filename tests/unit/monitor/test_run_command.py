"""`pyvmm run -- CMD` in the process that waits for the guest's agent."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pyvmm.control.client import NoAnswer
from pyvmm.monitor import run_command


class _SlowClient(run_command._Client):
    """Its console's thread looks whether somebody waits, and then goes on only when it may."""

    def __init__(self, console: int) -> None:
        self.looked, self.may_go_on = threading.Event(), threading.Event()
        super().__init__(cast("Any", SimpleNamespace(name="vm")), console, None, debug=False)  # type: ignore[arg-type]

    @property
    def _waiting(self) -> bool:
        waits = self.__dict__["waits"]
        if threading.current_thread() is self._console:
            self.looked.set()
            self.may_go_on.wait(30)
        return bool(waits)

    @_waiting.setter
    def _waiting(self, value: bool) -> None:
        self.__dict__["waits"] = value


def test_a_monitor_that_ends_just_before_the_wait_is_not_waited_for() -> None:
    console, end = os.pipe()
    os.close(end)
    client = _SlowClient(console)
    before = signal.getsignal(run_command._CONSOLE_ENDED)

    class Agent:
        def wait_ready(self, seconds: float) -> None:
            client.may_go_on.set()
            time.sleep(0.3)  # in which a signal would come

    client._console.start()
    assert client.looked.wait(30)
    try:
        with pytest.raises(NoAnswer):
            client._wait_for(cast("Any", Agent()))
    finally:
        client.may_go_on.set()
        client._console.join(30)
        signal.signal(run_command._CONSOLE_ENDED, before)
        os.close(console)
