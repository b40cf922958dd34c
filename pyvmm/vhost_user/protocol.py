"""The vhost-user protocol's numbers and layouts, by the names of its specification.

That is QEMU's docs/interop/vhost-user.rst; all numbers are in the machine's own byte order. Rows of
`REQUESTS` say of each request what comes with it and when it is legal; both ends go by them.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from pyvmm.errors import PyvmmError

# --- Header --------------------------------------------------------------------------------------
HEADER = Struct("=III")  # request, flags, size of the payload in bytes
VERSION_MASK = 0x3
VERSION = 0x1
REPLY = 1 << 2
NEED_REPLY = 1 << 3
MAX_PAYLOAD = 1024  # several times what the largest request that we know needs
MAX_FDS = 8  # Memory regions description: as many as one message has room for

# --- Feature bits (numbers) ----------------------------------------------------------------------
VHOST_USER_F_PROTOCOL_FEATURES = 30

VHOST_USER_PROTOCOL_F_MQ = 0
VHOST_USER_PROTOCOL_F_REPLY_ACK = 3
VHOST_USER_PROTOCOL_F_BACKEND_REQ = 5
VHOST_USER_PROTOCOL_F_CONFIG = 9
VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD = 12
VHOST_USER_PROTOCOL_F_RESET_DEVICE = 13
VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS = 15
VHOST_USER_PROTOCOL_F_STATUS = 16
VHOST_USER_PROTOCOL_F_DEVICE_STATE = 19

PROTOCOL_FEATURES = (
    1 << VHOST_USER_PROTOCOL_F_MQ
    | 1 << VHOST_USER_PROTOCOL_F_REPLY_ACK
    | 1 << VHOST_USER_PROTOCOL_F_CONFIG
    | 1 << VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD
    | 1 << VHOST_USER_PROTOCOL_F_RESET_DEVICE
    | 1 << VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
)
"""The protocol features that our back end offers."""

# --- Payloads ------------------------------------------------------------------------------------
NOTHING = Struct("")
U64 = Struct("=Q")
VRING_STATE = Struct("=II")  # index, num
VRING_ADDR = Struct("=IIQQQQ")  # index, flags, descriptor, used, available, log
MEMORY_HEADER = Struct("=II")  # num regions, padding
MEMORY_REGION = Struct("=QQQQ")  # guest address, size, user address, mmap offset
SINGLE_REGION = Struct("=QQQQQ")  # padding, then as above
INFLIGHT = Struct("=QQHH")  # mmap size, mmap offset, num queues, queue size; some send padding
CONFIG_HEADER = Struct("=III")  # offset, size, flags; the contents follow
DEVICE_STATE = Struct("=II")  # transfer direction, migration phase

VRING_INDEX_MASK = 0xFF  # of the u64 that comes with a vring's eventfd
VRING_NOFD = 1 << 8
VHOST_VRING_F_LOG = 1 << 0
MAX_CONFIG = 256  # VHOST_USER_MAX_CONFIG_SIZE
MAX_MEM_SLOTS = 64
CONFIG_FLAGS = (0, 1)  # a driver's write; live migration
STATE_SAVE, STATE_LOAD = 0, 1  # transfer direction
STATE_STOPPED = 0  # migration phase: the device and all its rings are stopped
STATE_ERROR_MASK = 0xFF  # of the answer to SET_DEVICE_STATE_FD


class Request(NamedTuple):
    """A front-end message: its number and name, the payload's layout (None: the handler looks at
    it itself), how many file descriptors come with it, the protocol feature (bit number) without
    which it is illegal, and whether it has a reply of its own. `method` of our back end takes it;
    "" is for one that only our front end knows.
    """

    number: int
    name: str
    method: str
    layout: Struct | None = NOTHING
    fds: range = range(1)
    needs: int | None = None
    replies: bool = False


_NO_FD, _ONE_FD, _ANY_FD = range(1), range(1, 2), range(2)

REQUESTS = (
    Request(1, "GET_FEATURES", "get_features", replies=True),
    Request(2, "SET_FEATURES", "set_features", U64),
    Request(3, "SET_OWNER", "set_owner"),
    Request(4, "RESET_OWNER", "reset_owner"),
    Request(5, "SET_MEM_TABLE", "set_mem_table", None, range(MAX_FDS + 1)),
    Request(8, "SET_VRING_NUM", "set_vring_num", VRING_STATE),
    Request(9, "SET_VRING_ADDR", "set_vring_addr", VRING_ADDR),
    Request(10, "SET_VRING_BASE", "set_vring_base", VRING_STATE),
    Request(11, "GET_VRING_BASE", "get_vring_base", VRING_STATE, replies=True),
    Request(12, "SET_VRING_KICK", "set_vring_kick", U64, _ANY_FD),
    Request(13, "SET_VRING_CALL", "set_vring_call", U64, _ANY_FD),
    Request(14, "SET_VRING_ERR", "set_vring_err", U64, _ANY_FD),
    Request(15, "GET_PROTOCOL_FEATURES", "get_protocol_features", replies=True),
    Request(16, "SET_PROTOCOL_FEATURES", "set_protocol_features", U64),
    Request(
        17, "GET_QUEUE_NUM", "get_queue_num", needs=VHOST_USER_PROTOCOL_F_MQ, replies=True
    ),
    Request(18, "SET_VRING_ENABLE", "set_vring_enable", VRING_STATE),
    Request(
        24, "GET_CONFIG", "get_config", None, needs=VHOST_USER_PROTOCOL_F_CONFIG, replies=True
    ),
    Request(25, "SET_CONFIG", "set_config", None, needs=VHOST_USER_PROTOCOL_F_CONFIG),
    Request(
        31, "GET_INFLIGHT_FD", "get_inflight_fd", None,
        needs=VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD, replies=True,
    ),
    Request(
        32, "SET_INFLIGHT_FD", "set_inflight_fd", None, _ONE_FD,
        needs=VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
    ),
    Request(34, "RESET_DEVICE", "reset_device", needs=VHOST_USER_PROTOCOL_F_RESET_DEVICE),
    Request(
        36, "GET_MAX_MEM_SLOTS", "get_max_mem_slots",
        needs=VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS, replies=True,
    ),
    Request(
        37, "ADD_MEM_REG", "add_mem_reg", SINGLE_REGION, _ONE_FD,
        needs=VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    ),
    Request(
        38, "REM_MEM_REG", "rem_mem_reg", SINGLE_REGION, _ANY_FD,
        needs=VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    ),
    Request(
        21, "SET_BACKEND_REQ_FD", "", NOTHING, _ONE_FD, needs=VHOST_USER_PROTOCOL_F_BACKEND_REQ
    ),
    Request(39, "SET_STATUS", "", U64, needs=VHOST_USER_PROTOCOL_F_STATUS),
    Request(40, "GET_STATUS", "", needs=VHOST_USER_PROTOCOL_F_STATUS, replies=True),
    Request(
        42, "SET_DEVICE_STATE_FD", "", DEVICE_STATE, _ONE_FD,
        needs=VHOST_USER_PROTOCOL_F_DEVICE_STATE, replies=True,
    ),
    Request(
        43, "CHECK_DEVICE_STATE", "", needs=VHOST_USER_PROTOCOL_F_DEVICE_STATE, replies=True
    ),
)  # fmt: skip
BY_NUMBER = {request.number: request for request in REQUESTS if request.method}
BY_NAME = {request.name: request for request in REQUESTS}

# --- Back-end requests ---------------------------------------------------------------------------
VHOST_USER_BACKEND_CONFIG_CHANGE_MSG = 2


class PeerError(PyvmmError):
    """The other end broke the protocol."""


class FrontEndError(PeerError):
    """The front end broke the protocol, or asked for what is not offered."""


class BackEndError(PeerError):
    """The back end broke the protocol, refused a request, or did not answer."""
