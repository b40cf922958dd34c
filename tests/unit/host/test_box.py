"""The kernel's numbers in the box of a monitor, and the threads that stay outside of it."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from c_claims import assert_in_c, needs_headers

from pyvmm.host import box, confinement, refusals, vhost
from pyvmm.host.outside import Outside
from pyvmm.monitor import asleep


@needs_headers(["linux/capability.h"])
def test_the_kernel_s_numbers(tmp_path: Path) -> None:
    single = {"ioctl": "_IOCTL", "fcntl": "_FCNTL", "kill": "_KILL", "socket": "_SOCKET"}
    single |= {"socketpair": "_SOCKETPAIR"}
    calls = {name: getattr(box, constant) for name, constant in single.items()}
    calls |= {"prctl": confinement.PRCTL, "capget": confinement._CAPGET}
    calls |= {"capset": confinement.CAPSET}
    calls |= {**box._MORE, **box._BINDING}
    calls |= box._OPEN_CALLS
    never = {name: number for name, number in box._NEVER.items() if number < 440}
    claims = [f"__NR_{name} == {number}" for name, number in {**calls, **never}.items()]
    claims += [f"{name} == {number}" for name, number in box._IOCTLS.items()]
    claims += [
        f"TIOCSTI == {box._TIOCSTI}",
        f"AF_UNIX == {box._AF_UNIX}",
        f"AF_NETLINK == {box._AF_NETLINK}",
        f"PR_SET_NAME == {box._PR_SET_NAME}",
        f"PR_CAPBSET_DROP == {box._PR_CAPBSET_DROP}",
        f"PR_CAP_AMBIENT == {box._PR_CAP_AMBIENT}",
        f"PR_CAP_AMBIENT_CLEAR_ALL == {box._PR_CAP_AMBIENT_CLEAR_ALL}",
        f"SECCOMP_IOCTL_NOTIF_RECV == {box._OF_LISTENER[0]}",
        f"SECCOMP_IOCTL_NOTIF_SEND == {box._OF_LISTENER[1]}",
        "sizeof(struct seccomp_notif) == 80 && sizeof(struct seccomp_notif_resp) == 24",
        f"SECCOMP_FILTER_FLAG_NEW_LISTENER == {confinement.FILTER_NEW_LISTENER}",
        f"SECCOMP_FILTER_FLAG_TSYNC_ESRCH == {confinement.FILTER_TSYNC_ESRCH}",
        f"SECCOMP_RET_USER_NOTIF == {confinement._RET_USER_NOTIF}u",
        f"__NR_close_range == {refusals._CLOSE_RANGE}",
        f"CLOSE_RANGE_UNSHARE == {refusals._CLOSE_RANGE_UNSHARE}",
        f"CAP_SYS_ADMIN == {confinement.CAP_SYS_ADMIN}",
        f"_LINUX_CAPABILITY_VERSION_3 == {confinement._CAPABILITY_VERSION_3}",
        # Of a keeper that sleeps.
        f"PR_SET_NAME == {asleep._PR_SET_NAME}",
        f"SA_NODEFER == {asleep._SA_NODEFER}",
        f"MFD_ALLOW_SEALING == {asleep._MFD_ALLOW_SEALING}",
        f"F_ADD_SEALS == {asleep._ADD_SEALS}",
        "(F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE) == " + str(asleep._ALL_SEALS),
    ]
    names = (
        *("LINUX_IMMUTABLE", "SYS_MODULE", "SYS_RAWIO", "SYS_PTRACE", "SYS_PACCT", "SYS_BOOT"),
        *("SYS_TIME", "AUDIT_WRITE", "AUDIT_CONTROL", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG"),
        *("WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE"),
    )
    numbers = sorted(box._NEVER_NEEDED)
    claims += [f"CAP_{name} == {n}" for name, n in zip(names, numbers, strict=True)]
    fcntls = ("F_SETOWN", "F_SETSIG", "F_SETOWN_EX", "F_SETLEASE", "F_NOTIFY")
    claims += [f"{name} != {n}" for name in fcntls for n in box._FCNTLS]
    headers = [
        *("asm/unistd_64.h", "linux/prctl.h", "linux/capability.h", "asm/ioctls.h", "linux/fs.h"),
        *("linux/vhost.h", "linux/if_tun.h", "linux/fcntl.h", "sys/socket.h"),
        *("sys/ioctl.h", "linux/seccomp.h", "linux/close_range.h", "linux/memfd.h"),
        "signal.h",
    ]
    assert_in_c(tmp_path, headers, claims)


def test_jobs_outside_hold_each_other_up_no_more_than_they_must() -> None:
    outside = Outside()
    first = threading.Event()
    found: list[str] = []
    work = lambda: found.append(outside.run(lambda: str(first.wait(60))))  # noqa: E731
    waiting = threading.Thread(target=work)
    waiting.start()
    assert outside.run(lambda: outside.run(threading.current_thread).name) == "outside-job"
    first.set()
    waiting.join()
    assert found == ["True"]
    with pytest.raises(ZeroDivisionError):
        outside.run(lambda: 1 // 0)


# Enters the box with threads outside; prints who may open a file.
INSIDE_AND_OUTSIDE = """
import ctypes, errno
from threading import Thread
from pyvmm.host import box, confinement
from pyvmm.host.outside import Outside
outside = Outside(box.stay_outside)
box.enter(box.Needs(outside=True))
def may_open():
    try:
        open("/etc/passwd").close()
    except (FileNotFoundError, PermissionError):
        return False
    return True
def may_ask_io_uring():
    confinement.call_kernel(425, 1, 0)
    return ctypes.get_errno() != errno.EPERM
found = []
one = Thread(target=lambda: found.append(may_open()))
one.start()
one.join()
print(may_open(), *found, outside.run(may_open), may_open(), outside.run(may_ask_io_uring))
"""


@pytest.mark.skipif(not confinement.landlock_version(), reason="this kernel has no Landlock")
def test_a_job_outside_is_not_in_the_box_and_all_others_are() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INSIDE_AND_OUTSIDE], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False", "True", "False", "False"]


def test_the_box_lets_pass_what_vhost_asks_the_kernel_for() -> None:
    asked = {name: number for name, number in vars(vhost).items() if name.startswith("VHOST_")}
    requests = {name for name, number in asked.items() if isinstance(number, int) and number > 0xAF}
    assert requests and not {asked[name] for name in requests} - set(box._IOCTLS.values()), requests
