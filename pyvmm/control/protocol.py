"""The protocol of a control socket: a JSON object a line, a request and its answer.

{"version": 1, "id": 7, "method": "disk.resize", "params": {"disk": "disk0", "size": 4294967296}}
{"version": 1, "id": 7, "result": {"size": 4294967296}}
{"version": 1, "id": 7, "error": {"code": "refused", "message": "…"}}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pyvmm.errors import PyvmmError
from pyvmm.host.unix_sockets import Socket
from pyvmm.spec.surroundings import CONTROL, EXEC, WATCH

VERSION = 1
MAX_LINE = 64 << 10  # bytes of a request
_LARGEST = (1 << 63) - 1  # of a number, either way

BAD_REQUEST = "bad_request"  # not JSON, not an object, a wrong parameter
UNKNOWN_METHOD = "unknown_method"
UNSUPPORTED_VERSION = "unsupported_version"
FORBIDDEN = "forbidden"  # it needs more rights than the socket gives
REFUSED = "refused"  # understood, but it cannot be had
NOT_READY = "not_ready"  # it can be had once the guest is further
PAUSED = "paused"  # it can be had once the VM goes on
NEEDS_FILES = "needs_files"  # it can be had with descriptors of what it names
FAILED = "failed"  # the host or the monitor failed
BUSY = "busy"  # too many clients


class ControlError(PyvmmError):
    """An answer that is an error; `code` is one of those above."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


Right = Callable[[Mapping[str, Any]], str]
"""The rights (pyvmm.spec.surroundings.RIGHTS) that a request with such parameters needs."""


def watches(params: Mapping[str, Any]) -> str:
    """For methods that only tell something."""
    return WATCH


def controls(params: Mapping[str, Any]) -> str:
    """For methods that change the VM."""
    return CONTROL


def executes(params: Mapping[str, Any]) -> str:
    """For methods by which a client can run something in the guest, or read its memory."""
    return EXEC


class Method(NamedTuple):
    """A method that a request can ask for: `run` is called with the parameters by name.

    `needs` and `takes` are their types, of those that must be there and of those that may. What
    `run` returns is the result, plain data fit for JSON, or an `Upgrade` or `Later`; a PyvmmError
    that it raises is the answer's error. It is called in the server's thread and holds up other
    requests while it runs, but never the guest. `right` says which rights a request needs. With
    `takes_descriptors` what came with it is the parameter `descriptors`, of the type
    pyvmm.host.handed.Descriptors, which is closed when the result is there.
    """

    run: Callable[..., Any]
    needs: Mapping[str, type] = {}
    takes: Mapping[str, type] = {}
    right: Right = controls
    takes_descriptors: bool = False


class Later(NamedTuple):
    """A result that takes its time: `run`, called in a thread of its own, returns or raises what a
    method would. The client waits, and others are served meanwhile. If it hangs up, `cancel` is
    called, in the server's thread; `run` is to return soon then."""

    run: Callable[[], Any]
    cancel: Callable[[], None] = lambda: None


class Upgrade(NamedTuple):
    """A result after which the connection is no longer the server's: `hand_over` gets it, with what
    was received behind the request. Called in the server's thread, so it starts one of its own."""

    result: Any
    hand_over: Callable[[Socket, bytes], None]


class Request(NamedTuple):
    """A request that is well formed."""

    id: int | str | None
    method: str
    params: dict[str, Any]


def parse_request(line: bytes) -> Request:
    """The request in `line`. Raises ControlError; the id is unknown then."""
    import json  # only once somebody asks

    try:
        data = json.loads(line.decode())  # of bytes it would guess the encoding
        # JSON can say half of a character, which no name and no text has.
        json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise ControlError(BAD_REQUEST, "not a line of JSON") from None
    if not isinstance(data, dict):
        raise ControlError(BAD_REQUEST, "not an object")
    if data.get("version") != VERSION:
        raise ControlError(UNSUPPORTED_VERSION, f"the version spoken here is {VERSION}")
    id, method, params = data.get("id"), data.get("method"), data.get("params", {})
    if not (id is None or type(id) is int or isinstance(id, str)):
        raise ControlError(BAD_REQUEST, "the id is neither a number nor a string")
    if not isinstance(method, str) or not isinstance(params, dict):
        raise ControlError(BAD_REQUEST, "the method is not a string or params is not an object")
    return Request(id, method, params)


def check_params(method: Method, params: Mapping[str, Any]) -> None:
    """Raise ControlError for a parameter that is missing, unknown or of the wrong type."""
    known = {**method.needs, **method.takes}
    for name, value in params.items():
        if name not in known:
            raise ControlError(BAD_REQUEST, f"unknown parameter {name!r:.100}")
        # An exact match, as a bool is an int to Python.
        if type(value) is not known[name]:
            raise ControlError(BAD_REQUEST, f"{name!r} must be of type {known[name].__name__}")
        if type(value) is int and abs(value) > _LARGEST:
            raise ControlError(BAD_REQUEST, f"{name!r} must be within {-_LARGEST} and {_LARGEST}")
    for name in method.needs:
        if name not in params:
            raise ControlError(BAD_REQUEST, f"the parameter {name!r} is missing")


def request_line(id: int, method: str, params: Mapping[str, Any]) -> bytes:
    """A request as a line."""
    return _line({"version": VERSION, "id": id, "method": method, "params": dict(params)})


def result_line(id: int | str | None, result: object) -> bytes:
    """An answer that is a result."""
    return _line({"version": VERSION, "id": id, "result": result})


def error_line(id: int | str | None, code: str, message: str) -> bytes:
    """An answer that is an error."""
    return _line({"version": VERSION, "id": id, "error": {"code": code, "message": message}})


def _line(data: object) -> bytes:
    import json

    return json.dumps(data).encode() + b"\n"
