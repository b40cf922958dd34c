"""A monitor's phases: what it opens when, and the way of a specification through them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from boot_images import Elf, Load
from unit.project.test_layering import ALLOWED, layer_of

from pyvmm.host import box
from pyvmm.host.box import USER
from pyvmm.kvm.system import Kvm

SAFETY_TIMEOUT = 60
MOST_CLIMBS = 10  # one for the list of what a VM is given: decision 0790

# mov dx,0x3f8; mov al,"x"; out dx,al; mov al,0xfe; out 0x64,al; jmp back: prints and resets
RESETS = bytes.fromhex("66baf803 b078 ee b0fe e664 ebfa")

# Prints what is opened once the monitor is confined, or would be. argv[1:] is the command line.
OPENS = """
import json, sys
from pyvmm.monitor import phases
opened, listening = [], []
def hook(event, args):
    if listening and event == "open" and isinstance(args[0], (str, bytes)):
        opened.append(str(args[0]))
    elif listening and event in ("subprocess.Popen", "os.posix_spawn", "socket.connect"):
        opened.append(event)
to_the_end = phases._Run.to_the_end
def begin(*args):
    listening.append(True)
    return to_the_end(*args)
phases._Run.to_the_end = begin
sys.addaudithook(hook)
from pyvmm.cli import main
try:
    main()
finally:
    listening.clear()
    print(json.dumps(opened), file=sys.stderr)
"""

# Prints [caller or null, callee] for all functions of pyvmm that are handed the specification, or
# options or parts that hold it, in the order of the calls; properties of these are not stations.
WALK = """
import json, sys
HOLDERS = {"VmSpec", "DiskSpec", "DeviceSpec", "Spec", "PortSpec", "Prepared", "Parts"}
walk, stack = [], []
def holds(value, deep=True):
    if isinstance(value, dict):
        return "kernel" in value and "disks" in value
    if deep and isinstance(value, (tuple, list)):
        return type(value).__name__ in HOLDERS or any(holds(one, False) for one in value)
    return type(value).__name__ in HOLDERS
def station(frame):
    module, code = frame.f_globals.get("__name__", ""), frame.f_code
    if not module.startswith("pyvmm.") or code.co_name.startswith(("<", "__")):
        return None
    if code.co_qualname.split(".")[0] in HOLDERS or module == "pyvmm.spec.record":
        return None  # what a value does itself: be equal, be copied
    count = code.co_argcount + code.co_kwonlyargcount
    names = code.co_varnames[: count + bool(code.co_flags & 4) + bool(code.co_flags & 8)]
    return module if any(holds(frame.f_locals.get(name)) for name in names) else None
def note(frame, event, arg):
    if event == "call":
        caller = next((module for module in reversed(stack) if module), None)
        stack.append(station(frame))
        if stack[-1]:
            walk.append((caller, stack[-1], frame.f_code.co_qualname))
    elif event == "return" and stack:
        stack.pop()
from pyvmm.cli import main
sys.setprofile(note)
try:
    main()
finally:
    sys.setprofile(None)
    print(json.dumps(walk), file=sys.stderr)
"""


@pytest.fixture(scope="module", autouse=True)
def _needs_kvm() -> None:
    Kvm.open().close()


def run(script: str, folder: Path, *options: str) -> list[Any]:
    """The output of `script` for a run whose guest resets itself until it is given up."""
    kernel = folder / "kernel"
    kernel.write_bytes(Elf(loads=[Load(data=RESETS.ljust(256, b"\x90"))], note=None).build())
    (folder / "disk").write_bytes(bytes(1 << 20))
    argv = ("run", "--kvm=host", "--kernel", str(kernel), "--disk", str(folder / "disk"), *options)
    done = subprocess.run(
        [sys.executable, "-c", script, *argv],
        env={**os.environ, "XDG_RUNTIME_DIR": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SAFETY_TIMEOUT,
    )
    assert done.returncode == 10, done.stderr  # the guest's reset
    found: list[Any] = json.loads(done.stderr.splitlines()[-1])
    return found


DEVICES = ("--rng", "--balloon", "size=0", "--vsock", "cid=77")


@pytest.mark.parametrize("confine", ["auto", "strict"])
def test_what_is_opened_after_the_first_phases_is_known(tmp_path: Path, confine: str) -> None:
    """Decision 0353 tells why each is."""
    tmp_path.chmod(0o700)
    opened = run(OPENS, tmp_path, *DEVICES, "--confine", confine)
    files = {path for path in opened if not path.endswith((".py", ".pyc"))}
    kernel = str(tmp_path / "kernel")
    logs = tmp_path / "pyvmm" / "logs"
    known = {kernel}  # others are another process's
    assert (logs / "vm.log").exists() and (logs / "vm.end").exists()
    assert files - known <= {f"/proc/self/fd/{fd}" for fd in (1, 2)}
    # Who is another user by then has it open from before.
    times = 0 if USER in box.probe().on else 2
    assert opened.count(kernel) == times, "a restart reads it anew, and nothing else does"


def below(layer: str) -> set[str]:
    """The layers that `layer` may import, at whatever distance."""
    found: set[str] = set()
    left = [layer]
    while left:
        new = ALLOWED[left.pop()] - found
        found |= new
        left += new
    return found


@pytest.mark.parametrize("options", [(), DEVICES], ids=["a disk", "four devices"])
def test_the_specification_goes_downward(tmp_path: Path, options: tuple[str, ...]) -> None:
    """A walk through the code with the specification: nobody hands it upward, and who follows it
    climbs back to a caller in a higher layer a few times only."""
    tmp_path.chmod(0o700)
    calls: list[tuple[str | None, str]] = []
    for caller, callee, function in run(WALK, tmp_path, "--on-reboot=end", *options):
        if (caller, callee, function) not in calls:
            calls.append((caller, callee, function))  # type: ignore[arg-type]
    layers = {
        module: layer_of(module).split(":")[0] for call in calls for module in call[:2] if module
    }
    handed_up = [
        (caller, callee)
        for caller, callee, *_ in calls
        if caller and layers[caller] in below(layers[callee])
    ]
    assert handed_up == []
    climbs, here = [], calls[0][1]
    for caller, callee, *_ in calls:
        if caller and caller != here and layers[here] in below(layers[caller]):
            climbs.append((here, caller))
        here = callee
    assert 0 < len(climbs) <= MOST_CLIMBS, climbs
