"""Two clones of one Linux guest are strangers to each other, and to the original."""

from __future__ import annotations

import os

import vms

from pyvmm import VM

# What a copy has in common with the original if nobody does anything about it.
PREPARE = """
echo 0123456789abcdef0123456789abcdef > /etc/machine-id
hostname the-original
date -s @1000000000 > /dev/null
dmesg -C
"""
# The sequence number of a SYN to a port of one's own, from a port that is the same everywhere.
SYN = r"""
use Socket;
socket(my $raw, PF_INET, SOCK_RAW, 6) or die "raw: $!";
socket(my $tcp, PF_INET, SOCK_STREAM, 6) or die "tcp: $!";
bind($tcp, sockaddr_in(4000, INADDR_LOOPBACK)) or die "bind: $!";
connect($tcp, sockaddr_in(4001, INADDR_LOOPBACK));
while (recv($raw, my $packet, 4096, 0), 1) {
    my $at = 4 * (ord($packet) & 15);
    my ($from, $to, $number) = unpack("nnN", substr($packet, $at));
    if ($from == 4000 && $to == 4001) { print "syn=$number\n"; last }
}
"""
CID = r"""
open(my $vsock, "<", "/dev/vsock") or die "vsock: $!";
my $cid = pack("L", 0);
defined(ioctl($vsock, 0x7b9, $cid)) or die "ioctl: $!"; # IOCTL_VM_SOCKETS_GET_LOCAL_CID
print "cid=", unpack("L", $cid), "\n";
"""
LOOK = f"""
echo random=$(od -An -vtx1 -N32 /dev/urandom | tr -d ' \\n')
echo uuid=$(cat /proc/sys/kernel/random/uuid)
ip=$(command -v ip || echo busybox ip)
$ip link set lo up
perl -e '{SYN}'
perl -e '{CID}'
echo host=$(hostname)
echo machine=$(cat /etc/machine-id)
echo mac=$(cat /sys/class/net/eth0/address)
echo now=$(date +%s)
echo forked=$(dmesg | grep -c 'virtual machine fork')
"""
LEFT = "echo left=$(grep -al 'left-[b]ehind' /proc/[0-9]*/cmdline 2>/dev/null | wc -l)\n"


def test_two_clones_of_a_moment_are_strangers(linux_guests: None) -> None:
    with VM(**vms.debian("6.12"), net="user", vsock=True, name=f"stranger-{os.getpid()}") as vm:
        vm.wait_ready()
        vms.script(vm, PREPARE)
        # A stream that is open at that moment is reset in the copies, and ends what it was for.
        with vm.popen(["sh", "-c", "read -r line", "left-behind"], stdin=True):
            first, second = vm.clones(2)
            with first, second:
                try:
                    check(vm, first, second)
                except BaseException:
                    for one in (first, second):
                        print(f"--- {one.name}\n{one.console.tail(100)}\n{one.messages}")
                    raise


def check(vm: VM, first: VM, second: VM) -> None:
    for one in (first, second):
        one.run(["sh", "-c", f"echo {one.name} > /root/mine; sync"], check=True)
        # Its agent ends what was connected before as soon as it hears that nobody is there.
        vms.until("left alone", lambda one=one: vms.script(one, LEFT)["left"], "0".__eq__)
    seen = [vms.script(one, LOOK + LEFT) for one in (first, second, vm)]
    print(seen)
    for what in ("random", "uuid", "syn", "cid", "host", "machine", "mac"):
        values = [of_one[what] for of_one in seen]
        assert all(values) and len(set(values)) == 3, (what, values)
    for one, of_one in zip((first, second), seen, strict=False):
        assert of_one["host"] == one.name
        [mac] = [device.mac for device in one.spec.devices if device.kind == "net"]  # type: ignore[attr-defined]
        assert of_one["mac"] == mac
        assert of_one["forked"] == "1", "the kernel has not heard that it is a copy"
        assert int(of_one["now"]) > 1_700_000_000, "its clock was not set"
        assert of_one["left"] == "0", "what was connected before goes on"
        assert one.run(["cat", "/root/mine"]).stdout.decode().strip() == one.name
        assert not [line for line in vms.messages(one) if "its guest" in line], one.messages
    assert seen[2]["forked"] == "0" and seen[2]["left"] != "0"
    assert int(seen[2]["now"]) < 1_100_000_000
    assert vm.run(["cat", "/root/mine"]).returncode != 0, "the original sees its copies' disks"
