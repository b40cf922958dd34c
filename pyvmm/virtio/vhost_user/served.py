"""What the front end has to know of the device that a back end serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyvmm.virtio.worker import Serve


def _as_given(config: bytes, connected: bool) -> bytes:
    return config


@dataclass(frozen=True)
class Served:
    """The kind of device that a back end serves: `number` in chapter 5 of the specification, with
    so many `queues`.

    `features` are the bits of its own that a back end's are passed on of, `own_features` those that
    we offer whatever it does. Its configuration space has `config_size` bytes; with `needs_config`
    they have to come from the back end, else they are zero where it has none. `config` makes of
    them what the driver sees, while there is a back end or not. With `resumes` another back end can
    go on where one has died. `refuse` answers requests when there is none for good; without it the
    device needs a reset then. With one that `is_stateless` all that another back end in a restored
    VM must have in common with the one before is the `identity`, the first so many bytes of the
    configuration space, and what drivers write there; others have to give their state.
    """

    number: int
    queues: int
    features: int = 0
    own_features: int = 0
    config_size: int = 0
    needs_config: bool = False
    config: Callable[[bytes, bool], bytes] = _as_given
    resumes: bool = True
    refuse: Serve | None = None
    is_stateless: bool = False
    identity: int = 0
