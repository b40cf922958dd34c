"""What the tests of Linux guests share: a machine that can run them, and boots in the background.

Many tests look at what one boot left behind. Such a boot is a function, and a test names it and its
arguments: `@pytest.mark.boot.with_args(function, ...)`; the fixture `boot` is what it returned. All
boots that the selected tests name run in the background, two at a time, in the order of the tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import guest
import pytest

from pyvmm.cli.choose import why_not_host
from pyvmm.emulated_host.find import find_image
from pyvmm.errors import PyvmmError
from pyvmm.pytest_plugin import FIXTURES, rerun_ruined

Key = tuple[Any, ...]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Those with the plugin's fixtures have it from the plugin.
    here = [item for item in items if item.path.parent == Path(__file__).parent]
    rerun_ruined([item for item in here if not set(FIXTURES) & set(item.fixturenames)])


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "boot(function, *args): looks at what that boot returned")


@pytest.fixture(scope="session")
def linux_guests() -> None:
    """Skips where no Linux guest can be run, and says why."""
    no_kvm = why_not_host()
    if no_kvm is None:
        return
    try:
        find_image(make=True)
    except PyvmmError as error:
        pytest.skip(f"{no_kvm}, and the emulated KVM host lacks something: {error}")


class Boots:
    """The boots that the selected tests named, running or done."""

    def __init__(self, pool: ThreadPoolExecutor, folders: pytest.TempPathFactory) -> None:
        self._pool, self._folders = pool, folders
        self._running: dict[Key, Future[Any]] = {}

    def start(self, key: Key) -> None:
        folder = self._folders.mktemp("boot")
        self._running[key] = self._pool.submit(key[0], folder, *key[1:])

    def get(self, key: Key, *, other_than: Future[Any] | None) -> Future[Any]:
        """The boot of `key`; a new one if it would be `other_than`."""
        if self._running[key] is other_than:
            self.start(key)
        return self._running[key]


_seen = pytest.StashKey[Future[Any]]()


@pytest.fixture(scope="session")
def boots(
    linux_guests: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Boots]:
    """All that the selected tests named are started here."""
    # More at a time than there are processors for would only take turns.
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        try:
            boots = Boots(pool, tmp_path_factory)
            for key in dict.fromkeys(key for item in request.session.items if (key := _key(item))):
                boots.start(key)
            yield boots
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            guest.kill_all()


@pytest.fixture
def boot(request: pytest.FixtureRequest, boots: Boots) -> Any:
    """What the boot returned that the test names; another boot if the test is run again."""
    key = _key(request.node)
    assert key is not None, "mark the test with @pytest.mark.boot.with_args(function, ...)"
    future = boots.get(key, other_than=request.node.stash.get(_seen, None))
    request.node.stash[_seen] = future
    return future.result()


def _key(item: pytest.Item) -> Key | None:
    marker = item.get_closest_marker("boot")
    return None if marker is None else marker.args
