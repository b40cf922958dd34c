"""`--device FILE.py:CLASS`: a user's class becomes a device, a user's mistakes one line each."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import boot_images
import pytest

from pyvmm.errors import ConfigError
from pyvmm.host import log
from pyvmm.kinds import registry as devices
from pyvmm.kinds import user as device_user
from pyvmm.kinds.border import Border
from pyvmm.kinds.interface import Context
from pyvmm.kinds.user import Spec
from pyvmm.kinds.vm_spec import from_json, to_json, validate
from pyvmm.spec.vm import VmSpec
from pyvmm.testing import DriverTimeout, attached
from pyvmm.virtio import defects

GOOD = """
from __future__ import annotations
from pathlib import Path
from pyvmm.virtio.worker import QueueDevice

class Fill(QueueDevice):
    name, device_type, queue_sizes = "fill", 42, (8,)

    def __init__(self, byte: int = 7, *, twice: bool = False, scale: float = 1.0, text="",
                 path: Path | None = None):
        self.byte, self.twice, self.scale, self.text, self.path = byte, twice, scale, text, path

    def serve(self, queue):
        for chain in queue:
            writer = chain.writer()
            writer.write(bytes([self.byte]) * writer.available)
            queue.add_used(chain, writer.written)

class Needy(Fill):
    def __init__(self, first, second="x", *, third):
        pass

class Free(Fill):
    def __init__(self, **options):
        self.options = options

class Plain(QueueDevice):
    name, device_type, queue_sizes = "plain", 42, (8,)
    def serve(self, queue): pass

class Abstract(QueueDevice):
    name, device_type, queue_sizes = "abstract", 42, (8,)

class Raises(Fill):
    def __init__(self):
        import json
        json.loads("{")

not_a_device = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "good.py"
    path.write_text(GOOD)
    return path


def opened(text: str):
    with ExitStack() as closing:
        return devices.open_device(devices.parse("user", text), Context("vm", None, closing))


# --- the option ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, spec",
    [
        ("a.py:A", Spec("a.py", "A")),
        ("./x:y/a.py:A", Spec("./x:y/a.py", "A")),
        ("a,,b.py:A,x=1,y=a,,b=c", Spec("a,b.py", "A", (("x", "1"), ("y", "a,b=c")))),
        ("a.py:A,x=", Spec("a.py", "A", (("x", ""),))),
    ],
)
def test_the_option_is_read(text, spec):
    assert device_user.parse(text) == spec


@pytest.mark.parametrize(
    "text",
    ["", "a.py", ":A", "a.py:", "a.py:not a name", "a.py:A,x", "a.py:A,=1", "a.py:A,x=1,x=2"],
)
def test_what_cannot_be_read_is_explained(text):
    with pytest.raises(ConfigError, match=r"^--device: .*FILE\.py:CLASS"):
        device_user.parse(text)


def test_it_survives_the_way_into_another_process_behind_other_kinds():
    specs = (Spec("b.py", "B", (("x", "1"),)), Spec("a.py", "A"), devices.parse("rng", ""))
    vm = validate(VmSpec(kernel="vmlinuz", devices=specs))
    assert [str(spec) for spec in vm.devices[1:]] == ["b.py:B", "a.py:A"]
    assert from_json(to_json(vm)) == vm


# --- the class and its options -------------------------------------------------------------------


def test_a_users_class_is_a_device(file):
    with attached(opened(f"{file}:Fill")) as driver:
        assert driver.request([], [3]).data == b"\7\7\7"


def test_options_have_the_types_that_the_class_says(file, tmp_path):
    device = opened(f"{file}:Fill,byte=0x10,twice=yes,scale=2.5,text=007,path={tmp_path}")
    assert (device.byte, device.twice, device.scale, device.text) == (16, True, 2.5, "007")
    assert device.path == tmp_path
    assert opened(f"{file}:Free,any=thing").options == {"any": "thing"}
    assert opened(f"{file}:Plain").name == "plain"


def test_two_devices_of_a_file_share_its_module(file):
    assert type(opened(f"{file}:Fill")) is type(opened(f"{file}:Fill"))


def test_a_file_may_import_what_lies_beside_it(tmp_path):
    (tmp_path / "lies_beside.py").write_text("WHAT = 42\n")
    path = tmp_path / "uses.py"
    path.write_text(GOOD + "import lies_beside\nFill.device_type = lies_beside.WHAT + 1\n")
    assert opened(f"{path}:Fill").device_type == 43


# --- a user's mistakes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("Missing", "Missing in .*good.py is not there; there is Fill, Needy, Free, "),
        ("not_a_device", "not_a_device in .* is not a VirtioDevice; there is Fill"),
        ("Path", "Path in .* is not a VirtioDevice"),
        ("Fill,bite=1", "has no option 'bite'; there is byte, twice, scale, text, path"),
        ("Plain,x=1", "has no option 'x'; it takes none"),
        ("Fill,byte=x", "cannot read byte='x' of .*:Fill as int"),
        ("Fill,twice=maybe", "cannot read twice='maybe' of .* as bool"),
        ("Needy", "needs first=, third="),
        ("Abstract", "cannot be made: TypeError: Can't instantiate .* '?serve'?$"),
        ("Raises", r"cannot be made: JSONDecodeError: .*good.py:\d+\)$"),
        ("QueueDevice", "cannot be made: TypeError"),
    ],
)
def test_what_is_wrong_with_a_class_is_one_line(file, name, wanted):
    with pytest.raises(ConfigError, match=wanted) as caught:
        opened(f"{file}:{name}")
    assert str(caught.value).startswith("--device: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, wanted",
    [
        ("import nothing_of_that_name", r"ModuleNotFoundError: .* \(.*bad.py:1\)$"),
        ("\n1 / 0", r"cannot be imported: ZeroDivisionError: division by zero \(.*bad.py:2\)$"),
        ("\n\nthis is", r"SyntaxError: .* \(.*bad.py:3\)$"),
        ("raise ValueError('two\\nlines')", r"ValueError: two lines \(.*bad.py:1\)$"),
        ("import sys; sys.exit(3)", r"SystemExit: 3 \(.*bad.py:1\)$"),
        ("assert False", r"AssertionError \(.*bad.py:1\)$"),
        ("x = '\0'", "cannot be imported: (SyntaxError|ValueError): "),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line_and_can_be_mended(tmp_path, content, wanted):
    path = tmp_path / "bad.py"
    path.write_text(content)
    with pytest.raises(ConfigError, match=wanted) as caught:
        opened(f"{path}:A")
    assert "\n" not in str(caught.value)
    path.write_text(GOOD)
    assert opened(f"{path}:Plain").name == "plain"


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.py", tmp_path):
        with pytest.raises(ConfigError, match=f"there is no file {path}"):
            opened(f"{path}:A")


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("Plain.name = ''", "has no printable name"),
        ("del Plain.name", "has no printable name"),
        ("Plain.device_type = '4'", "has no device_type"),
        ("Plain.queue_sizes = (3,)", r"has queue_sizes \(3,\); a tuple of powers of two"),
        ("Plain.queue_sizes = 8", "has queue_sizes 8"),
        ("Plain.features = 1 << 33", "features that there are not: VIRTIO_F_ACCESS_PLATFORM"),
        ("Plain.features = None", "features that there are not: None"),
        (
            "from pyvmm.virtio.device import VirtioDevice as V\n"
            "class Plain(V):\n"
            "    name, device_type, queue_sizes, features = 'p', 42, (8,), 1 << 40\n"
            "    activate = reset = lambda *_: None",
            "offers VIRTIO_F_RING_RESET, but has no reset_queue",
        ),
    ],
)
def test_a_device_that_no_transport_could_serve_is_refused(tmp_path, line, wanted):
    path = tmp_path / "odd.py"
    path.write_text(GOOD + line + "\n")
    with pytest.raises(ConfigError, match=wanted):
        opened(f"{path}:Plain")


# --- in the emulated host ------------------------------------------------------------------------


def test_mistakes_are_found_before_an_emulated_host_is_started(file):
    def inside(text):
        border = Border(ExitStack(), lambda path, option: f"/seen{path}")
        return devices.cross(devices.parse("user", text), border).spec

    assert inside(f"{file}:Fill,byte=3,path=a,text=a") == Spec(
        f"/seen{file}", "Fill", (("byte", "3"), ("path", f"{os.getcwd()}/a"), ("text", "a"))
    )
    with pytest.raises(ConfigError, match="JSONDecodeError"):
        inside(f"{file}:Raises")


# --- the command line, and while the guest runs --------------------------------------------------


def pyvmm_run(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "kernel").write_bytes(boot_images.bzimage())
    argv = [sys.executable, "-m", "pyvmm", "run", "--kernel", str(tmp_path / "kernel"), *options]
    return subprocess.run(argv, capture_output=True, text=True)


@pytest.mark.parametrize("kvm", ["host", "emulated"])
def test_the_command_line_says_it_in_one_line_and_debug_shows_the_traceback(tmp_path, file, kvm):
    options = (f"--kvm={kvm}", "--device", f"{file}:Raises")
    done = pyvmm_run(tmp_path, *options)
    [line] = done.stderr.splitlines()
    assert done.returncode == 2
    assert line.startswith(f"pyvmm: --device: {file}:Raises cannot be made: JSONDecodeError: ")
    debugged = pyvmm_run(tmp_path, *options, "--debug")
    assert debugged.returncode == 2
    assert f'File "{file}", line' in debugged.stderr and "json.loads" in debugged.stderr
    assert debugged.stderr.splitlines()[-1] == line


@pytest.mark.parametrize(
    "statement, what",
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import json; json.loads('{')", "JSONDecodeError"),  # deep in Python's own library
        ("queue.add_used(chain, 0); queue.add_used(chain, 0)", "ValueError"),  # deep in pyvmm
    ],
)
def test_an_exception_in_serve_names_the_users_file_and_line(
    tmp_path, capfd, monkeypatch, statement, what
):
    monkeypatch.setattr(defects, "_report", log.RateLimited())
    path = tmp_path / "breaks.py"
    path.write_text(
        "from pyvmm.virtio.worker import QueueDevice\n"
        "class Breaks(QueueDevice):\n"
        "    name, device_type, queue_sizes = 'breaks', 42, (8,)\n"
        "    def serve(self, queue):\n"
        "        for chain in queue:\n"
        f"            {statement}\n"
    )
    with attached(opened(f"{path}:Breaks")) as driver:
        with pytest.raises(DriverTimeout, match="needs a reset"):
            # An element that was returned before the device failed counts.
            for _ in range(2):
                driver.request([], [4])
        assert driver.needs_reset
    [line] = capfd.readouterr().err.splitlines()
    assert what in line
    assert line.endswith(f"({os.path.realpath(path)}:6)")
    assert "queue 0" in line
