"""Counters: of queues by the batch, of exits by KVM; as JSON and in Prometheus' format."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
from c_claims import assert_in_c, needs_headers
from click.testing import CliRunner
from mmio_harness import STATUS as STATUS_REGISTER
from mmio_harness import Bench, RecordingDevice
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from worker_rig import asleep, wait_for

from pyvmm.bus import Action, Bus
from pyvmm.cli import exporter, top
from pyvmm.cli import stats as cli
from pyvmm.cli.stats import quantile
from pyvmm.errors import ConfigError, DriverError
from pyvmm.host.syscalls import EventFd
from pyvmm.kvm import stats as kvm_stats
from pyvmm.machine.run_loop import AccessCounts, CountedBus
from pyvmm.monitor.stats import _device, as_text, exits_by_reason
from pyvmm.testing import attached
from pyvmm.virtio.features import ring_features
from pyvmm.virtio.rng.device import EntropyDevice

HANG = 60.0


def test_an_eventfd_knows_how_often_it_was_signalled() -> None:
    with EventFd() as event:
        for _ in range(3):
            event.signal()
        assert event.total() == 3
        assert event.drain() == 3
        os.eventfd_write(event.fd, 20)  # as KVM would
        assert event.total() == 23


# ---- queues


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_device_counts_requests_interrupts_kicks_and_bytes(packed: bool) -> None:
    device = EntropyDevice()
    device.features = ring_features(packed=packed)
    began = time.perf_counter_ns()
    with attached(device, ring="packed" if packed else "split") as driver:
        for turn in range(5):
            # While it is at work it needs no kick, and a driver that looks needs no interrupt.
            wait_for(lambda: asleep(device))
            chain = driver.mmio.submit(0, [], [16])
            assert driver.irq.wait(turn + 1, HANG)
            driver.mmio.wait_used(0, chain)
        driver.mmio.reset()  # its thread has ended: all is counted
        all_of_it = time.perf_counter_ns() - began
        found = _device(driver.transport)
        [queue] = found["queues"]
        assert found["type"] == 4
        assert found["requests"] == queue["requests"] == 5
        assert queue["interrupts"] == 5
        assert queue["kicks"] == 5
        assert found["bytes_to_guest"] == 80
        assert sum(queue["latency_ns"].values()) == 5
        assert all(int(bound).bit_count() == 1 for bound in queue["latency_ns"])
        # No more than if each had taken its bucket's upper bound, no less than half of that.
        most = sum(int(bound) * count for bound, count in queue["latency_ns"].items())
        assert most / 2 <= queue["latency_sum_ns"] <= most
        assert 0 < queue["latency_sum_ns"] <= 5 * all_of_it
        assert found["failures"] == 0


def test_what_is_counted_outlives_a_reset() -> None:
    with attached(EntropyDevice()) as driver:
        driver.request([], [16])
        driver.restart()
        driver.request([], [16])
        assert _device(driver.transport)["requests"] == 2
        assert _device(driver.transport)["kicks"] == 2


def test_failures_and_changes_of_the_configuration_are_counted(
    bench: Bench, device: RecordingDevice
) -> None:
    def counted() -> tuple[int, int]:
        found = _device(bench.transport)
        return found["interrupts"], found["failures"]

    assert counted() == (0, 0)
    for failures in (1, 2):
        bench.go_live()
        device.live.interrupt.signal_config_change()
        device.live.fail(DriverError("a broken ring", section="2.7"))
        assert counted() == (2 * failures, failures)  # a failure is told as a change
        bench.write(STATUS_REGISTER, 0)


# ---- KVM's statistics


@needs_headers(["linux/kvm.h"])
def test_the_layout_is_that_of_the_headers(tmp_path: Path) -> None:
    header, desc = "struct kvm_stats_header", "struct kvm_stats_desc"
    claims = [f"sizeof({header}) == {kvm_stats._HEADER.size}"]
    for place, field in enumerate(
        ("flags", "name_size", "num_desc", "id_offset", "desc_offset", "data_offset")
    ):
        claims.append(f"__builtin_offsetof({header}, {field}) == {4 * place}")
    claims += [
        f"sizeof({desc}) == {kvm_stats._DESC.size}",
        f"__builtin_offsetof({desc}, exponent) == 4",
        f"__builtin_offsetof({desc}, size) == 6",
        f"__builtin_offsetof({desc}, offset) == 8",
        f"__builtin_offsetof({desc}, bucket_size) == 12",
        "KVM_GET_STATS_FD == 0xaece",
    ]
    assert_in_c(tmp_path, ["linux/kvm.h"], claims)


def stats_file(tmp_path: Path, values: dict[str, list[int]]) -> int:
    """A file as KVM makes them, with names of 20 bytes and a gap in front of each part."""
    name_size, desc_offset = 20, 40
    count = len(values)
    data_offset = desc_offset + count * (16 + name_size) + 8
    descriptions, data = b"", b""
    for name, numbers in values.items():
        descriptions += struct.pack("=IhHII", 0, 0, len(numbers), len(data), 0)
        descriptions += name.encode().ljust(name_size, b"\0")
        data += struct.pack(f"={len(numbers)}Q", *numbers)
    header = struct.pack("=6I", 0, name_size, count, 24, desc_offset, data_offset)
    path = tmp_path / "stats"
    path.write_bytes(header.ljust(desc_offset, b"\0") + descriptions + bytes(8) + data)
    return os.open(path, os.O_RDONLY)


def test_statistics_are_read_as_they_describe_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"exits": [1 << 40], "halt_wait_hist": [1, 2, 3], "io_exits": [7]}
    fd = stats_file(tmp_path, values)
    monkeypatch.setattr(kvm_stats.syscalls, "ioctl", lambda *args: fd)
    with kvm_stats.StatsFile(-1) as found:
        assert found.read() == {"exits": 1 << 40, "halt_wait_hist": [1, 2, 3], "io_exits": 7}


def test_exits_by_reason_add_up() -> None:
    values: kvm_stats.Values = {"exits": 100, "io_exits": 30, "mmio_exits": 20, "hypercalls": 9}
    exits = exits_by_reason(values)
    assert exits == {"total": 100, "io": 30, "mmio": 20, "other": 50}


class Register:
    """Remembers what is written to it."""

    def __init__(self) -> None:
        self.values: list[int] = []

    def read(self, offset: int, size: int) -> int:
        return 5

    def write(self, offset: int, size: int, value: int) -> Action | None:
        self.values.append(value)
        return None


def test_where_kvm_does_not_count_each_access_is_counted_once() -> None:
    bus, register, counts = Bus("I/O port"), Register(), AccessCounts()
    bus.register(0x10, 4, register)

    def count() -> None:
        counts.io += 1

    counted = CountedBus(bus, count)
    found = counted.find(0x12)
    assert found is not None and found[0] == 0x10
    found[1].write(2, 1, 7)
    assert found[1].read(2, 1) == 5
    assert counted.read(0x100, 1) == bus.read(0x100, 1)  # nobody's
    counted.write(0x10, 1, 8)
    assert register.values == [7, 8]
    assert counts.exits() == {"total": 4, "io": 4, "mmio": 0}
    assert counted.find(0x100) is None


# ---- Prometheus

STATUS = {"version": "1.0", "state": "running", "cpus": 2}


def numbers(**devices: Any) -> dict[str, Any]:
    return {
        "uptime_seconds": 1.5,
        "left_out": {"console_bytes": 5, "messages": 6},
        "memory": {"size": 1 << 30, "resident": 1 << 20},
        "exits": {"total": 10, "io": 4, "other": 6},
        "interrupts": 3,
        "vcpus": [{"id": 0, "exits": {"total": 10, "io": 4, "other": 6}, "interrupts": 3}],
        "devices": devices,
    }


def device(**more: Any) -> dict[str, Any]:
    latency = {"2048": 3, "1048576": 1, str(1 << 40): 1}
    queue = {"requests": 5, "interrupts": 2, "kicks": 4}
    queue |= {"latency_ns": latency, "latency_sum_ns": 1_100_000}  # type: ignore[dict-item]
    base = {"type": 2, "requests": 5, "interrupts": 2, "kicks": 4, "failures": 0}
    return {**base, "queues": [queue], **more}


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def test_prometheus_reads_what_was_counted() -> None:
    disk = device(bytes_to_guest=4096, bytes_from_guest=512, errors=1, flushes=2)
    net = device(dropped={"too long": 7})
    text = as_text('a"b\\c', STATUS, numbers(disk0=disk, net0=net))
    found = samples(text)
    vm = ("vm", 'a"b\\c')

    def value(metric: str, /, **labels: str) -> float:
        return found[f"pyvmm_{metric}", frozenset([vm, *labels.items()])]

    assert value("info", version="1.0") == 1
    assert value("memory_resident_bytes") == 1 << 20
    assert value("exits_total", vcpu="0", reason="io") == 4
    assert value("interrupts_total", vcpu="0") == 3
    of_disk = {"device": "disk0", "queue": "0"}
    assert value("device_requests_total", **of_disk) == 5
    assert value("device_kicks_total", **of_disk) == 4
    assert value("device_bytes_total", device="disk0", direction="to_guest") == 4096
    assert value("device_errors_total", device="disk0") == 1
    assert value("device_stat", device="disk0", name="flushes") == 2
    assert value("device_stat", device="net0", name="dropped.too long") == 7
    assert value("device_latency_seconds_count", **of_disk) == 5
    assert value("device_latency_seconds_sum", **of_disk) == pytest.approx(0.0011)
    assert value("device_latency_seconds_bucket", le="0.000001024", **of_disk) == 0
    assert value("device_latency_seconds_bucket", le="0.000002048", **of_disk) == 3
    assert value("device_latency_seconds_bucket", le="17.179869184", **of_disk) == 4
    assert value("device_latency_seconds_bucket", le="+Inf", **of_disk) == 5


def served_elsewhere(**more: Any) -> dict[str, Any]:
    """A device of which nobody counts the requests."""
    queue = {"requests": 0, "interrupts": 0, "kicks": 0, "latency_ns": {}, "latency_sum_ns": 0}
    base = {"type": 26, "requests": 0, "interrupts": 0, "kicks": 0, "failures": 0}
    return {**base, "queues": [queue], "served_by": "virtiofsd", "connected": True, **more}


def test_what_nobody_counts_is_no_metric() -> None:
    found = samples(as_text("vm", STATUS, numbers(share=served_elsewhere(), disk0=device())))
    names = {name for name, labels in found if ("device", "share") in labels}
    assert names == {"pyvmm_device_failures_total", "pyvmm_device_stat"}


def test_metrics_of_several_vms_are_one_valid_text() -> None:
    one = as_text("one", STATUS, numbers(disk0=device()))
    two = as_text("two", STATUS, numbers(disk0=device(errors=3)))
    text = cli.joined([one, two])
    assert samples(text) == samples(one) | samples(two)
    assert text.count("# TYPE pyvmm_exits_total counter") == 1
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# HELP")]
    assert len(names) == len(set(names))
    assert cli.joined([]) == ""


def test_quantiles() -> None:
    histogram = {"1024": 90, "2048": 8, "65536": 2}
    assert quantile(histogram, 0.5) == 1024
    assert quantile(histogram, 0.98) == 2048
    assert quantile(histogram, 0.99) == 65536
    assert quantile({}, 0.5) == 0


# ---- the web server


@pytest.fixture(params=["127.0.0.1", "::1", "localhost"])
def where(request: pytest.FixtureRequest) -> str:
    """The address that the server listens at."""
    if request.param == "::1" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    return str(request.param)


@pytest.fixture
def server(where: str) -> Iterator[exporter.Server]:
    """A server that serves a VM's metrics."""
    text = as_text("one", STATUS, numbers())
    names = ["Metrics.example"]
    with exporter.open_server(where, 0, lambda: text, names=names) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


only_ipv4 = pytest.mark.parametrize("where", ["127.0.0.1"], indirect=True)


def client(server: exporter.Server, send: bytes = b"") -> socket.socket:
    made = socket.socket(server.address_family)
    made.settimeout(HANG)
    made.connect(server.server_address)
    made.sendall(send)
    return made


def answer(made: socket.socket) -> bytes:
    """All that comes until the server ends the connection."""
    parts = []
    with made:
        while True:
            try:
                part = made.recv(1 << 20)
            except ConnectionResetError:
                part = b""
            if not part:
                return b"".join(parts)
            parts.append(part)


def code_for(server: exporter.Server, *lines: str) -> int:
    request = "".join(f"{line}\r\n" for line in ("GET /metrics HTTP/1.1", *lines, ""))
    return int(answer(client(server, request.encode())).split()[1])


def test_prometheus_can_fetch_them(server: exporter.Server, where: str) -> None:
    shown = f"[{where}]" if ":" in where else where
    url = f"http://{shown}:{server.server_address[1]}"
    with urllib.request.urlopen(f"{url}/metrics", timeout=HANG) as found:
        assert found.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert samples(found.read().decode())
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{url}/", timeout=HANG)


@only_ipv4
def test_a_name_that_may_be_a_rebound_one_is_not_answered(server: exporter.Server) -> None:
    known = ["127.0.0.1", "127.0.0.1:9345", "10.1.2.3", "[::1]", "[::1]:80", "localhost"]
    known += ["LOCALHOST:9345", socket.gethostname(), "metrics.example:1", "metrics.example."]
    assert [code_for(server, f"Host: {host}") for host in known] == [200] * len(known)
    assert code_for(server) == 200  # a browser always says one
    foreign = [
        "evil.example",
        "evil.example:9345",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
    ]
    foreign += ["127.0.0.1:9345.evil.example", "evil.example:", "", "a" * 4000, "\xb9.example"]
    assert [code_for(server, f"Host: {host}") for host in foreign] == [421] * len(foreign)
    assert code_for(server, "Host: localhost", "Host: evil.example") == 421


@only_ipv4
@pytest.mark.parametrize(
    "request_",
    [b"GET /" + b"x" * (1 << 20), b"GET /metrics HTTP/1.1\r\n" + b"X-A: 1\r\n" * (1 << 17)],
    ids=["one long line", "many headers"],
)
def test_s13_a_request_too_large_is_not_read(server: exporter.Server, request_: bytes) -> None:
    made = client(server)
    with suppress(ConnectionError):
        made.sendall(request_)
    assert b" 431 " in (answer(made) or b" 431 ")  # it may be lost with what was not read
    assert code_for(server) == 200


@only_ipv4
def test_clients_that_say_nothing_or_little_do_not_stay(
    server: exporter.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "_REQUEST_SECONDS", 0.3)
    silent, slow = client(server), client(server, b"GET /metrics HTTP/1.1\r\n")
    ended = threading.Event()

    def dribble() -> None:
        with suppress(OSError):
            while not ended.wait(0.05):
                slow.sendall(b"x")

    thread = threading.Thread(target=dribble)
    thread.start()
    assert answer(silent) == b""
    assert b" 200 " not in answer(slow)
    ended.set()
    thread.join()


@only_ipv4
def test_those_who_do_not_read_hold_up_others_for_a_limited_time(
    server: exporter.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter.threading, "Timer", _ByHand)
    _ByHand.made.clear()
    monkeypatch.setattr(server, "_gather", lambda: "x" * (16 << 20))
    deaf = [client(server, b"GET /metrics HTTP/1.0\r\n\r\n") for _ in range(exporter.MAX_CLIENTS)]
    for one in deaf:
        assert one.recv(1)  # it is served
    assert answer(client(server)).split()[1] == b"503"
    for timer in list(_ByHand.made):
        if timer.seconds == exporter._ANSWER_SECONDS:
            timer.end()
    for one in deaf:
        assert len(answer(one)) < 16 << 20
    give_up_at = time.monotonic() + HANG
    while not answer(client(server, b"GET / HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.0 404"):
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


class _ByHand:
    """A timer that the test lets come to its end."""

    made: ClassVar[list[_ByHand]] = []
    daemon = True

    def __init__(self, seconds: float, end: Callable[[], None]) -> None:
        self.seconds, self.end = seconds, end
        self.made.append(self)

    def start(self) -> None:
        """It does not run."""

    def cancel(self) -> None:
        """Nor does it end."""


@pytest.mark.parametrize("where", ["256.0.0.1", "no-such-host.invalid", "a" * 70 + ".example"])
def test_an_address_that_is_none_is_one_line(where: str) -> None:
    with pytest.raises(ConfigError, match=r"^--listen: cannot listen at"):
        exporter.open_server(where, 0, str)


@pytest.mark.parametrize("where", ["nowhere", "127.0.0.1:", ":99999", "127.0.0.1:x"])
def test_an_address_without_a_port_is_refused(where: str) -> None:
    result = CliRunner().invoke(cli.metrics, ["--listen", where])
    assert "has no port" in str(result.exception)


def test_numbers_for_humans() -> None:
    lines = cli._lines(numbers(disk0=device(bytes_to_guest=5 << 20)))
    assert lines[0] == "up 2 s, memory 1 of 1024 MiB, 3 interrupts"
    assert lines[1] == "exits: total 10, other 6, io 4"
    assert " ".join(lines[3].split()) == "disk0 5 2 4 5.0 MiB - 2.05 µs 1.1e+03 s"


def test_one_of_a_thing_is_one_thing() -> None:
    alone = {**numbers(), "interrupts": 1}
    assert cli._lines(alone)[0].endswith(" 1 interrupt")
    look = top.Look(0.0, {**STATUS, "uptime_seconds": 1, "cpus": 1}, numbers())
    shown = io.StringIO()
    Console(width=200, file=shown).print(top._one("vm", look, look))
    assert "up 1 s, 1 vCPU, " in shown.getvalue()


def test_who_serves_a_device_is_said_where_nobody_counts() -> None:
    counted = served_elsewhere(bytes_to_guest=5 << 20)
    rows = cli._lines(numbers(share=counted, disk0=device()))[3:]
    assert " ".join(rows[0].split()) == "share - - - 5.0 MiB - - - served by virtiofsd"
    assert rows[1].split()[:4] == ["disk0", "5", "2", "4"]


def test_top_rates_nothing_that_nobody_counts() -> None:
    look = top.Look(0.0, {**STATUS, "uptime_seconds": 1}, numbers(share=served_elsewhere()))
    shown = io.StringIO()
    Console(width=200, file=shown).print(top._one("vm", look, look))
    row = next(line for line in shown.getvalue().splitlines() if "share" in line)
    assert row.split() == ["share", *"--------"]


def test_the_json_is_json() -> None:
    assert json.loads(json.dumps(numbers(disk0=device())))
