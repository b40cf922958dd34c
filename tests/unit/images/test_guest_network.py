"""guest-images/rootfs/pyvmm-network as udhcpc calls it, by busybox in a network name space."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "guest-images/rootfs/pyvmm-network"
LEASE = {
    "interface": "eth0", "ip": "10.0.2.15", "mask": "24", "router": "10.0.2.2 10.0.2.9",
    "mtu": "9000", "dns": "10.0.2.3 192.0.2.53", "search": "corp.example lab.example",
}  # fmt: skip


def run(tmp_path: Path, *steps: str) -> list[str]:
    """The output of steps of shell, in a name space with a card eth0 and a /run of its own. `$S`
    is the script, and the lease is in variables."""
    if not Path("/bin/busybox").exists():
        pytest.skip("busybox is not installed")
    needed = ("unshare", "mount", "ip")
    if not all(map(shutil.which, needed)):
        pytest.skip(f"one of {', '.join(needed)} is not installed")
    if subprocess.run(["unshare", "-nm", "true"], capture_output=True).returncode:
        pytest.skip("no name spaces can be made here: that needs root")
    prepare = (
        f"mount --bind {tmp_path} /run",
        "ip link add eth0 type veth peer name other",
        "ip link set eth0 up && ip link set other up",
    )
    done = subprocess.run(
        ["unshare", "-nm", "sh", "-c", "\n".join((*prepare, *steps))],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "S": str(SCRIPT), **LEASE},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    return [line.strip() for line in done.stdout.splitlines()]


ADDRESSES = "ip -4 -o addr show eth0 | sed 's/.*inet \\([^ ]*\\).*/\\1/'"
# Not from /sys, which is the other name space's.
MTU = "ip -o link show eth0 | sed 's/.* mtu \\([^ ]*\\).*/\\1/'"


def test_a_lease_is_used(tmp_path: Path) -> None:
    lines = run(tmp_path, "$S bound", ADDRESSES, "ip route show default", MTU)
    assert lines == ["10.0.2.15/24", "default via 10.0.2.2 dev eth0", "9000"]
    assert (tmp_path / "resolv.conf").read_text().splitlines() == [
        "search corp.example lab.example",
        "nameserver 10.0.2.3",
        "nameserver 192.0.2.53",
    ]


def test_a_domain_serves_where_there_is_no_search_list(tmp_path: Path) -> None:
    run(tmp_path, "unset search", "domain=one.example $S bound")
    assert (tmp_path / "resolv.conf").read_text().startswith("search one.example\n")


@pytest.mark.parametrize("event", ["renew", "bound"])
def test_a_renewal_leaves_alone_what_the_user_has_set(tmp_path: Path, event: str) -> None:
    lines = run(
        tmp_path,
        "$S bound",
        "ip addr add 192.168.7.1/24 dev eth0",
        "ip route add 203.0.113.0/24 via 10.0.2.77",
        "ip route replace default via 192.168.7.9",
        "ip link set eth0 mtu 1234",
        "echo 'nameserver 203.0.113.1' > /run/resolv.conf",
        "$S deconfig",
        f"$S {event}",
        ADDRESSES,
        "ip route show",
        MTU,
        "cat /run/resolv.conf",
    )
    assert lines == [
        "10.0.2.15/24",
        "192.168.7.1/24",
        "default via 192.168.7.9 dev eth0",
        "10.0.2.0/24 dev eth0 proto kernel scope link src 10.0.2.15",
        "192.168.7.0/24 dev eth0 proto kernel scope link src 192.168.7.1",
        "203.0.113.0/24 via 10.0.2.77 dev eth0",
        "1234",
        "nameserver 203.0.113.1",
    ]


def test_what_a_lease_changes_is_changed_and_nothing_else(tmp_path: Path) -> None:
    lines = run(
        tmp_path,
        "$S bound",
        "ip addr add 192.168.7.1/24 dev eth0",
        "ip=10.0.2.44 mask=25 router=10.0.2.3 mtu=1500 dns=10.0.2.5 search= $S renew",
        ADDRESSES,
        "ip route show default",
        MTU,
        "cat /run/resolv.conf",
    )
    assert sorted(lines[:2]) == ["10.0.2.44/25", "192.168.7.1/24"]
    assert lines[2:] == ["default via 10.0.2.3 dev eth0", "1500", "nameserver 10.0.2.5"]


def test_a_renewal_mends_what_a_link_that_went_down_has_lost(tmp_path: Path) -> None:
    lines = run(
        tmp_path,
        "$S bound",
        "ip link set eth0 down",
        "ip -4 addr flush dev eth0",
        "ip link set eth0 up",
        "$S renew",
        ADDRESSES,
        "ip route show default",
    )
    assert lines == ["10.0.2.15/24", "default via 10.0.2.2 dev eth0"]
