from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from bare_guest import BareGuest

from pyvmm.errors import PyvmmError
from pyvmm.kvm.system import Kvm
from pyvmm.machine.board.registry import board_of_host


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    """This machine's KVM; skips, saying why, where there is none to use."""
    try:
        system = Kvm.open()
        system.check_required(board_of_host().requirements)
    except PyvmmError as error:
        pytest.skip(f"needs /dev/kvm: {error}")
    with system:
        yield system


@pytest.fixture
def bare_guest(kvm: Kvm) -> Iterator[Callable[..., BareGuest]]:
    """Makes guests from machine code, as `BareGuest` does, and closes them at the end."""
    with ExitStack() as stack:

        def make(code: bytes, **options: Any) -> BareGuest:
            return stack.enter_context(BareGuest(kvm, code, **options))

        yield make
