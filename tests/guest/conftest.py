"""Shared by the tests of Linux guests: a machine that can run them, boots in the background.

Many tests look at what one boot left behind. Such a boot is a function, and a test names it and its
arguments: `@pytest.mark.boot.with_args(function, ...)`; the fixture `boot` is what it returned. All
boots that the selected tests name run in the background, two at a time, in the order of the tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import guest
import pytest

from pyvmm.emulated_host.find import find_image
from pyvmm.errors import PyvmmError
from pyvmm.machine.host_kvm import why_unusable

Key = tuple[Any, ...]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "boot(function, *args): looks at what that boot returned")


@pytest.fixture(scope="session")
def linux_guests() -> None:
    """Skips where no Linux guest can be run, and says why."""
    no_kvm = why_unusable()
    if no_kvm is None:
        return
    try:
        find_image(make=True)
    except PyvmmError as error:
        pytest.skip(f"{no_kvm}, and the emulated KVM host lacks something: {error}")


@pytest.fixture(scope="session")
def boots(
    linux_guests: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Key, Future[Any]]]:
    """All boots that the selected tests named, running or done."""
    # More at a time than there are processors for would only take turns.
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        try:
            keys = dict.fromkeys(key for item in request.session.items if (key := _key(item)))
            yield {
                key: pool.submit(guest.boot, key[0], tmp_path_factory.mktemp("boot"), *key[1:])
                for key in keys
            }
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            guest.kill_all()


@pytest.fixture
def boot(
    request: pytest.FixtureRequest,
    boots: dict[Key, Future[Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """The result of the boot that the test names."""
    key = _key(request.node)
    assert key is not None, "mark the test with @pytest.mark.boot.with_args(function, ...)"
    if getattr(request.node, "execution_count", 1) > 1:
        # A second chance is one for the guest: what it left behind would be the same.
        boots[key] = Future()
        boots[key].set_result(guest.boot(key[0], tmp_path_factory.mktemp("boot"), *key[1:]))
    return boots[key].result()


def _key(item: pytest.Item) -> Key | None:
    marker = item.get_closest_marker("boot")
    return None if marker is None else marker.args
