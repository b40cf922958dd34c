"""One table of options: the command line, VmSpec and configuration files say the same by it."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm import VM, Pool
from pyvmm.agent import Agent
from pyvmm.api import config_file
from pyvmm.api.aio import AsyncVM
from pyvmm.api.async_pool import AsyncPool
from pyvmm.cli.main import main
from pyvmm.cli.quick import parse_run
from pyvmm.cli.run import run
from pyvmm.errors import ConfigError
from pyvmm.kinds import registry as devices
from pyvmm.kinds.balloon import Spec as Balloon
from pyvmm.kinds.console import Spec as Console
from pyvmm.kinds.net import Spec as Net
from pyvmm.kinds.port import PortSpec
from pyvmm.kinds.port import Spec as Ports
from pyvmm.kinds.rng import Spec as Rng
from pyvmm.kinds.user import Spec as UserDevice
from pyvmm.kinds.vm_spec import make_spec, validate
from pyvmm.kinds.vsock import Spec as Vsock
from pyvmm.spec import tables
from pyvmm.spec.sizes import parse_memory, write_memory
from pyvmm.spec.vm import TRACE_KINDS, DiskSpec, VmSpec

OPTIONS, NAMES = devices.file_options(), devices.names()
# What concerns the command, not the VM.
ONLY_COMMAND = {"agent", "allow_code", "config", "print_config", "detach", "log_format", "debug"}
ONLY_COMMAND |= {"restore", "guest_user"}
ANOTHER_FORM = {"rng_limit"}  # of rng


def test_the_command_line_has_every_option_and_no_other() -> None:
    parameters = {parameter.name: parameter for parameter in run.params}
    assert set(parameters) - ONLY_COMMAND - ANOTHER_FORM == set(NAMES)
    for option in OPTIONS:
        assert option.flag in parameters[option.name].opts


def test_the_python_api_has_every_option_and_no_other() -> None:
    assert inspect.signature(AsyncVM) == inspect.signature(VM)
    keywords = list(inspect.signature(VM).parameters.values())
    assert [keyword.name for keyword in keywords] == list(NAMES)
    # What a VM of Python's changes goes with it, and its guest has an agent.
    python = {"rm": True, "vsock": True}
    defaults = {option.name: option.default for option in OPTIONS} | python
    assert {k.name: k.default or None for k in keywords} == {
        name: default or None for name, default in defaults.items()
    }


def test_a_vm_takes_no_keyword_that_is_no_option() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'kernal'"):
        VM(kernal="vmlinuz")  # type: ignore[call-arg]


def test_a_class_of_its_own_arguments_shows_those() -> None:
    class Small(VM):
        def __init__(self, size: int) -> None:
            super().__init__(kernel="vmlinuz", memory=size)

    assert list(inspect.signature(Small).parameters) == ["size"]


@pytest.mark.parametrize(("method", "agents"), [("run", "run"), ("popen", "open")])
def test_a_command_is_run_with_the_same_options_everywhere(method: str, agents: str) -> None:
    """The agent's signature is the only one that is written out (see tests/types too)."""
    wanted = inspect.signature(getattr(Agent, agents)).parameters
    for cls in (VM, AsyncVM):
        assert inspect.signature(getattr(cls, method)).parameters == wanted, cls


def test_what_can_be_awaited_is_what_a_vm_has() -> None:
    for name, method in inspect.getmembers(AsyncVM, inspect.isfunction):
        if not name.startswith("_"):
            ours = list(inspect.signature(method).parameters.values())
            theirs = list(inspect.signature(getattr(VM, name)).parameters.values())
            assert ours == theirs, name
            assert method.__doc__, name
    missing = {name for name in dir(VM) if not name.startswith("_")} - set(dir(AsyncVM))
    assert missing == {"spec", "to_config", "is_elsewhere"} & missing


def test_what_can_be_awaited_is_what_a_pool_has() -> None:
    assert inspect.signature(AsyncPool) == inspect.signature(Pool)
    for name, method in inspect.getmembers(AsyncPool, inspect.isfunction):
        if not name.startswith("_") and name != "open":
            ours = list(inspect.signature(method).parameters.values())
            theirs = list(inspect.signature(getattr(Pool, name)).parameters.values())
            assert ours == theirs and method.__doc__, name
    assert not {name for name in dir(Pool) if not name.startswith("_")} - set(dir(AsyncPool))


def test_the_page_on_python_has_every_keyword() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs/python-api.md").read_text()
    table = text.partition("| keyword | what |")[2].partition("\n\n")[0]
    first_cells = [row.split("|")[1] for row in table.splitlines() if row.count("|") > 2]
    named = [name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(inspect.signature(VM).parameters)


def test_the_quick_reader_has_the_same_names_and_defaults() -> None:
    read = parse_run(["run"])
    assert read is not None
    known = [option for option in OPTIONS if option.name in read]
    assert {option.name for option in devices.usual_options()} <= {*read, *ONLY_COMMAND}
    for option in known:
        assert read[option.name] == option.default or not option.default, option.name
    assert len(known) >= 13


def test_every_field_of_a_specification_can_be_said() -> None:
    fields = {field.name for field in dataclasses.fields(VmSpec)}
    assert {option.field for option in OPTIONS if option.field} == fields - {
        "devices",
        "restored_from",
        "waits",
        "saved_on",
    }


def test_every_kind_of_device_can_be_asked_for() -> None:
    assert {option.device for option in OPTIONS if option.device} == set(devices.KINDS)


def test_no_option_is_a_specification_of_defaults() -> None:
    assert make_spec({"kernel": "k"}) == VmSpec(kernel="k")
    defaults = {option.name: option.default for option in OPTIONS}
    assert make_spec({**defaults, "kernel": "k"}) == VmSpec(kernel="k")


# --- the three forms of a value -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "table", "spec"),
    [
        (
            "disks",
            "a.img,readonly,block-size=4096,bps=20M",
            {"path": "a.img", "read_only": True, "block_size": 4096, "bps": "20M"},
            DiskSpec("a.img", read_only=True, block_size=4096, bps=20 << 20),
        ),
        (
            "disks",
            "d.py:D,count=3",
            {"path": "d.py:D", "arguments": {"count": 3}},
            DiskSpec("d.py:D", arguments=(("count", "3"),)),
        ),
        (
            "net",
            "user,forward=8080:80,mtu=1400",
            {"forwards": ["tcp:127.0.0.1:8080:80"], "mtu": 1400},
            Net(forwards=("tcp:127.0.0.1:8080:80",), mtu=1400),
        ),
        (
            "net",
            "tap=tap0,address=10.0.0.1/24",
            {"tap": "tap0", "create": True, "address": "10.0.0.1/24"},
            Net(tap="tap0", create=True, address="10.0.0.1/24"),
        ),
        (
            "net",
            "tap=tap0,vhost=off",
            {"tap": "tap0", "vhost": False},
            Net(tap="tap0", vhost=False),
        ),
        ("net", "tap=tap0,vhost", {"tap": "tap0", "vhost": True}, Net(tap="tap0", vhost=True)),
        ("rng", "bps=4K", {"bps": "4K"}, Rng(bps=4096)),
        ("rng", True, {}, Rng()),
        (
            "balloon",
            "size=128M,deflate-on-oom",
            {"size": "128M", "deflate_on_oom": True},
            Balloon(128 << 20, deflate_on_oom=True),
        ),
        ("vsock", "cid=7,path=v", {"cid": 7, "path": "v"}, Vsock("v", 7)),
        (
            "devices",
            "x.py:Rng,fast=true",
            {"path": "x.py", "class_name": "Rng", "options": {"fast": True}},
            UserDevice("x.py", "Rng", (("fast", "true"),)),
        ),
        ("ports", "name=a,path=p", {"name": "a", "path": "p"}, PortSpec("a", "p")),
    ],
)
def test_text_table_and_specification_say_the_same(name, text, table, spec) -> None:
    read = [make_spec({"kernel": "k", name: value}) for value in (text, table, spec)]
    assert read[0] == read[1] == read[2]
    assert [*read[0].disks, *read[0].devices] != []


def test_what_is_not_wanted_is_not_there() -> None:
    off = {"rng": False, "balloon": None, "net": [], "ports": (), "console": "serial"}
    assert make_spec({"kernel": "k", **off}) == VmSpec(kernel="k")


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"kernel": 3}, "kernel is to be a text, not 3"),
        ({"kernel": ""}, "no kernel"),
        ({"cpus": "two"}, "cpus is to be a number"),
        ({"cpus": True}, "cpus is to be a number, not True"),
        ({"memory": [1]}, "memory is to be a number"),
        ({"memory": "1.5G"}, "write 512M or 2G"),
        ({"disks": [7]}, "disks is to be a text"),
        ({"disks": {"readonly": True, "path": "x"}}, "unknown key 'readonly'.*read_only?"),
        ({"disks": {"read_only": True}}, "disks without path"),
        ({"disks": {"path": "x", "queues": "2"}}, "disks.queues is to be a number"),
        ({"disks": {"path": "x", "read_only": 1}}, "disks.read_only is to be true or false"),
        ({"disks": {"path": "x", "bps": "fast"}}, "cannot be 'fast'"),
        ({"disks": {"path": "x", "scratch": "y"}}, "unknown key 'scratch'"),
        ({"net": {"forwards": "8080:80"}}, "a list of texts"),
        ({"net": 3}, "net is to be a text, a table or a specification"),
        ({"net": Rng()}, "net is to be"),
        ({"devices": {"path": "a.py", "class_name": "A", "options": []}}, "is to be a table"),
        ({"rng": ["bps=1", "bps=2"]}, "rng is to be one only"),
        ({"trace": ["everything"]}, "nothing called 'everything'"),
        ({"trace": [3]}, "trace is to be a text"),
        ({"discovery": "magic"}, "choose from auto, acpi"),
        ({"kvm": "sometimes"}, "choose from auto, host, emulated"),
        ({"console": "hvc"}, "unknown console"),
        ({"image": 5}, "image is to be a text, not 5"),
        ({"net": {"tap": "t", "vhost": "on"}}, "net.vhost is to be true or false, not 'on'"),
        ({"rm": "no"}, "rm is to be true or false, not 'no'"),
        ({"disks": "a\0b"}, "disks has a NUL in it"),
        ({"disks": {"path": "a\0b"}}, r"disks.path has a NUL in it"),
        ({"disks": {"path": ""}}, "a disk without a path"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(values, why) -> None:
    with pytest.raises(ConfigError, match=why) as error:
        make_spec({"kernel": "k", **values})
    assert "\n" not in str(error.value)


# --- files ----------------------------------------------------------------------------------------

text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
word = st.from_regex(r"[a-z][a-z0-9]{0,7}", fullmatch=True)
path = word.map(lambda name: f"/nowhere/{name}")
rate = st.sampled_from([0, 1, 20 << 20])
disks = st.builds(
    DiskSpec,
    path=path,
    direct=st.booleans(),
    read_only=st.booleans(),
    block_size=st.sampled_from([0, 512, 4096]),
    on_error=st.sampled_from(["report", "stop"]),
    format=st.sampled_from(["", "raw", "qcow2"]),
    packed=st.booleans(),
    bps=rate,
    iops=rate,
) | st.builds(
    DiskSpec,
    path=path.map(lambda path: f"{path}.py:Disk"),
    arguments=st.dictionaries(word, text, max_size=2).map(lambda d: tuple(d.items())),
    snapshot=st.booleans(),
)
options = st.dictionaries(word, text, max_size=3).map(lambda d: tuple(d.items()))
forward = st.integers(1, 65535).map(lambda port: f"tcp:127.0.0.1:{port}:80")
device = st.one_of(
    st.builds(Net, forwards=st.lists(forward, max_size=2), host_access=st.booleans()),
    st.builds(
        Net,
        tap=word,
        queues=st.integers(1, 4),
        mtu=st.sampled_from([0, 1400]),
        vhost=st.sampled_from([None, True, False]),
    ),
    st.builds(UserDevice, path, word, options),
)
single = st.tuples(
    st.none() | st.builds(Console, packed=st.booleans()),
    st.none() | st.builds(Rng, bps=rate, iops=rate, packed=st.booleans()),
    st.none() | st.builds(Balloon, st.sampled_from([0, 1 << 20]), st.booleans(), st.booleans()),
    st.none() | st.builds(Vsock, path, st.integers(3, 100)),
    st.none()
    | st.lists(st.builds(PortSpec, word, path), min_size=1, max_size=3, unique_by=lambda p: p.name)
    .map(tuple)
    .flatmap(lambda ports: st.builds(Ports, st.just(ports), packed=st.booleans())),
).map(lambda found: [one for one in found if one is not None])
specs = st.builds(
    VmSpec,
    kernel=path,
    initrd=st.none() | path,
    disks=st.lists(disks, max_size=3).map(tuple),
    devices=st.tuples(st.lists(device, max_size=3), single).map(lambda two: (*two[0], *two[1])),
    cpus=st.integers(1, 4),
    memory=st.sampled_from([64 << 20, 1 << 30]),
    cmdline=text,
    name=word | st.just(""),
    trace=st.lists(st.sampled_from(TRACE_KINDS), unique=True).map(tuple),
    discovery=st.sampled_from(["auto", "acpi"]),
)


@given(specs, st.sampled_from(["auto", "host"]))
def test_a_file_that_was_printed_makes_the_same_machine(tmp_path_factory, spec, kvm) -> None:
    spec = validate(spec)
    file = tmp_path_factory.getbasetemp() / "printed.toml"
    file.write_text(config_file.dump(spec, kvm=kvm))
    values = config_file.load(str(file), allow_code=True)
    assert validate(make_spec(values)) == spec
    assert values.get("kvm", "auto") == kvm


@pytest.fixture
def load(tmp_path):
    def load(text: str, **options: bool) -> dict[str, object]:
        file = tmp_path / "vm.toml"
        file.write_text(text)
        return config_file.load(str(file), **options)

    return load


def test_relative_paths_are_relative_to_the_file(load, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir("/")
    spec = make_spec(
        load(
            """
        kernel = "vmlinuz"
        initrd = "/boot/initrd.img"
        disks = ["root.img,snapshot", "ram:64M", {path = "../base.img", overlay = "changes"}]
        devices = "my.py:Thing,source=x"
        vsock = "path=v.sock"
        ports = [{name = "a", path = "a.sock"}]
        """,
            allow_code=True,
        )
    )
    here = str(tmp_path)
    assert (spec.kernel, spec.initrd) == (f"{here}/vmlinuz", "/boot/initrd.img")
    assert [disk.path for disk in spec.disks] == [
        f"{here}/root.img",
        "ram:64M",
        f"{tmp_path.parent}/base.img",
    ]
    assert spec.disks[2].overlay == f"{here}/changes"
    paths = {device.kind: device for device in spec.devices}
    assert paths["user"].path == f"{here}/my.py"
    assert paths["vsock"].path == f"{here}/v.sock"
    assert paths["ports"].ports[0].path == f"{here}/a.sock"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('kernel = "k"\nmemry = "1G"', "vm.toml:2: unknown key 'memry'; did you mean memory?"),
        ("\n[[disks]]\npath = 'x'\nreadonly = true", "vm.toml:4: .*'readonly' in disks.*read_only"),
        ("xyzzy = 1", "vm.toml:1: unknown key 'xyzzy'; there are image, kernel, initrd"),
        ('name = ""', "an empty text is not a name"),
        ("[nett]\nmtu = 3", "vm.toml:1: unknown key 'nett'; did you mean net"),
        ("cpus = false", "vm.toml: --cpus: cpus is to be a number, not False"),
        ("cpus = \nmemory = 1", "vm.toml: Invalid value .at line 1.*; pyvmm run --print-config"),
        ('cpus = "2"', "vm.toml: --cpus: cpus is to be a number, not '2'"),
        (f"cpus = {'9' * 5000}", "vm.toml has a number of more than 64 bits"),
        (f"stop_timeout = {'9' * 400}", "vm.toml has a number of more than 64 bits"),
        (f"cpus = 0x{'f' * 5000}", "vm.toml has a number of more than 64 bits"),
        (f"disk = {'[' * 20000}", "vm.toml has .*lists within lists without end"),
        (f"{'.'.join(['a'] * 65)} = 1", "vm.toml has a key of more than 64 parts"),
        (f"x = {{'a' . {' . '.join(['#a'] * 64)} = 1}}", "vm.toml has a key of more than 64 parts"),
        (f"[{'.'.join(['a'] * 64)}]\n#{'.' * 99}", "vm.toml:1: unknown key 'a'"),
        ("".join(f"[k{i}{'.a' * 62}]\n" for i in range(270)), "64 parts, or too many dotted ones"),
        (f"{'a-' * 50}b = 1", "vm.toml: unknown key 'a-a-"),  # the search for it takes its square
        ("agent = true", "vm.toml:1: unknown key 'agent'; write vsock = true"),
        ('rng-limit = "bps=1"', "vm.toml:1: unknown key 'rng-limit'; write rng ="),
        ("detach = true", "unknown key 'detach'; it is for the command line only"),
        ("memory = 512", 'vm.toml: memory = 512 does not say its unit; write memory = "512M"'),
        ("memory = 536870912", '"536870912M" for MiB, or "512M" for bytes'),
        ("[balloon]\nsize = 64", "vm.toml: size = 64 does not say its unit"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line_with_its_place(load, text, why) -> None:
    with pytest.raises(ConfigError, match=why) as error:
        load(text)
    assert "\n" not in str(error.value)


def test_a_class_of_the_users_may_be_given_numbers_of_any_name(load) -> None:
    table = '[devices]\npath = "a.py"\nclass_name = "A"\noptions = {size = 3, memory = 4}'
    [device] = load(table, allow_code=True)["devices"]
    assert dict(device.options) == {"size": "3", "memory": "4"}


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path) -> None:
    (tmp_path / "vm.toml").write_bytes(b'\xef\xbb\xbfmemory = "1G"\n')
    assert config_file.load(str(tmp_path / "vm.toml"))["memory"] == 1 << 30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512 << 20),
        ("512B", 512),
        ("4KiB", 4 << 10),
        ("4kB", 4 << 10),
        ("3M", 3 << 20),
        ("3MiB", 3 << 20),
        ("2G", 2 << 30),
        ("2gb", 2 << 30),
    ],
)
def test_units_of_sizes(text, size) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "M", "b", "1.5G", "-1M", "1T", "0x10", "1kk", "9" * 30])
def test_what_is_no_size(text) -> None:
    with pytest.raises(ConfigError, match="write 512M or 2G"):
        parse_memory(text)


@given(st.integers(0, 1 << 50))
def test_sizes_are_written_as_they_are_read(size) -> None:
    assert parse_memory(write_memory(size)) == size


CODE = """
from pathlib import Path
Path(__file__).with_name("it-ran").touch()
"""


@pytest.mark.parametrize(
    "text",
    [
        'disks = "code.py:A"',
        'disks = ["ram:64M", "code.py:A,snapshot,key=value"]',
        '[[disks]]\npath = "./code.py:A"\nread_only = true',
        'devices = "code.py:A"',
        '[[devices]]\npath = "code.py"\nclass_name = "A"',
    ],
)
def test_a_file_runs_no_code_that_nobody_has_allowed(load, tmp_path, text) -> None:
    (tmp_path / "code.py").write_text(CODE)
    path = tmp_path / "vm.toml"
    with pytest.raises(ConfigError, match=r"vm.toml: it names code.*code\.py.*--allow-code"):
        load(text)
    with pytest.raises(ConfigError, match="it names code"):
        VM.from_config(path)
    with pytest.raises(ConfigError, match="it names code"):
        asyncio.run(_from_config(path))
    done = CliRunner().invoke(run, ["--config", str(path)], standalone_mode=False)
    assert isinstance(done.exception, ConfigError)
    assert not (tmp_path / "it-ran").exists()
    spec = make_spec({"kernel": "k", **load(text, allow_code=True)})
    assert any("code.py" in str(part) for part in (*spec.disks, *spec.devices))


async def _from_config(path: Path) -> None:
    AsyncVM.from_config(path)


def test_what_is_called_py_and_no_code_needs_no_leave(load) -> None:
    assert load('disks = ["disk.py", "a.py:b.img"]\nkernel = "kernel.py:A"')


def test_a_file_that_is_not_there_or_no_text(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"No such file.*check the path"):
        config_file.load(str(tmp_path / "none.toml"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        config_file.load(str(tmp_path / "binary"))


def test_keys_that_are_ours_alone_are_not_offered() -> None:
    internal = {"scratch", "saved", "stream", "listen_at"}
    for cls, count in ((DiskSpec, 2), (Net, 1), (Vsock, 1)):
        fields = {field.name for field in dataclasses.fields(cls)}
        assert len(fields & internal) == count
        assert set(tables.keys(cls)) == fields - internal


def test_every_option_that_is_no_key_is_said_to_be_none() -> None:
    hinted = config_file.no_keys()
    assert set(hinted) == ONLY_COMMAND | ANOTHER_FORM | {"command"}


VALUES = {
    "--kernel": st.sampled_from(["vmlinuz", "k,k", "ü ='\"\\"]),
    "--initrd": st.sampled_from(["initrd.img", "a b"]),
    "--disk": st.sampled_from(
        [
            "a.img",
            "a,,b.img,readonly,id=x",
            "b.img,snapshot,bps=20M,iops=5,bps-burst=1M,iops-burst=7",
            "c.img,overlay=o,,o,block-size=4096,on-error=stop,packed",
            "d.img,direct,queues=1",
            "e.qcow2",
            "f,format=raw",
            "ram:64M",
            "squares.py:Squares,step=3,word=a=b",
        ]
    ),
    "--net": st.sampled_from(
        [
            "user",
            "user,forward=8080:80,forward=udp:53:53,mac=02:00:00:00:00:07",
            "tap=tap0,mtu=9000",
        ]
    ),
    "--console": st.sampled_from(["serial", "virtio", "virtio,packed"]),
    "--port": st.sampled_from(["name=a,path=a.sock", "name=b,path=b.sock,packed"]),
    "--rng": st.none(),
    "--rng-limit": st.sampled_from(["bps=4K", "iops=5,packed", "packed"]),
    "--device": st.sampled_from(["entropy.py:Entropy", "x.py:Y,size=3,packed"]),
    "--balloon": st.sampled_from(["", "size=64M", "free-page-reporting,deflate-on-oom,packed"]),
    "--vsock": st.sampled_from(["", "cid=7", "cid=9,path=v.sock,packed"]),
    "--agent": st.none(),
    "--cpus": st.sampled_from(["1", "4"]),
    "--memory": st.sampled_from(["512M", "64M", "2G", "33555456"]),
    "--cmdline": st.sampled_from(["quiet", 'a="b c" ü']),
    "--trace": st.sampled_from(["status", "all", "requests,exits"]),
    "--trace-file": st.sampled_from(["trace.log"]),
    "--discovery": st.sampled_from(["auto", "acpi", "cmdline", "both"]),
    "--name": st.sampled_from(["web", "a b"]),
    "--rm": st.none(),
    "--kvm": st.sampled_from(["auto", "host", "emulated"]),
}
MANY = ("--disk", "--port", "--device")


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    words = draw(st.sampled_from([[], ["debian-test"]]))
    for flag in draw(st.lists(st.sampled_from(sorted(VALUES)), unique=True)):
        for _ in range(draw(st.integers(1, 2)) if flag in MANY else 1):
            value = draw(VALUES[flag])
            words = [*words, flag if value is None else f"{flag}={value}"]
    return words


@settings(max_examples=60, deadline=None)
@given(words=command_lines())
def test_what_is_printed_for_a_command_line_says_the_same_again(words, tmp_path_factory) -> None:
    def printed(*more: str) -> str | None:
        done = CliRunner().invoke(run, [*more, "--print-config"], standalone_mode=False)
        if done.exception is not None:
            assert isinstance(done.exception, ConfigError)  # two that cannot be had together
            return None
        return done.stdout

    text = printed(*words)
    if text is not None:
        path = tmp_path_factory.mktemp("printed") / "vm.toml"
        path.write_text(text)
        assert printed("--config", str(path), "--allow-code") == text
        assert VM.from_config(path, allow_code=True).to_config() == text or "vsock" not in text


def test_only_what_somebody_said_is_printed() -> None:
    done = CliRunner().invoke(run, ["--print-config"])
    assert (done.exit_code, done.stdout) == (0, "")
    done = CliRunner().invoke(run, ["--stop-timeout", "5", "--print-config"])
    assert done.stdout == "stop_timeout = 5.0\n"


def test_what_the_agent_needs_leaves_what_the_file_says_of_it(tmp_path) -> None:
    path = tmp_path / "vm.toml"
    path.write_text('kernel = "k"\nvsock = {cid = 7}\n')
    done = CliRunner().invoke(run, ["--config", str(path), "--agent", "--print-config"])
    assert "cid = 7" in done.stdout
    path.write_text("vsock = false\n")
    done = CliRunner().invoke(run, ["--config", str(path), "--agent", "--print-config"])
    assert "vsock = true" in done.stdout


def test_the_example_is_what_the_document_shows() -> None:
    root = Path(__file__).resolve().parents[3]
    example = (root / "examples/vm.toml").read_text()
    assert (
        f"```toml\n{example.partition('.VM.')[2].strip()}\n```"
        in (root / "docs/python-api.md").read_text()
    )
    vm = VM.from_config(root / "examples/vm.toml")
    assert vm.spec.disks[0].path == "ram:256M"
    assert vm.spec.memory == 1 << 30


@pytest.mark.parametrize(
    ("kind", "text", "cure"),
    [
        ("disk", "a.img,readonli", "did you mean readonly?"),
        ("disk", "a.img,blok-size=512", "did you mean block-size?"),
        ("disk", "a.img,data_file=x", "did you mean data-file?"),
        ("disk", "a.img,readonly=yes", "use PATH"),
        ("disk", "a.img,xyzzy", "use PATH"),
        ("net", "tap=t,queue=2", "did you mean queues?"),
        ("net", "user,foward=1:2", "did you mean forward?"),
        ("net", "user,queues=2", "write user"),
        ("rng", "iop=3", "did you mean iops?"),
        ("vsock", "pth=x", "did you mean path?"),
        ("balloon", "deflate-on-omm", "did you mean deflate-on-oom?"),
        ("ports", "name=a,pat=b", "did you mean path?"),
        ("pmem", "file,readonyl", "did you mean readonly?"),
        ("pmem", f"file,{'readonly' * 1000}", "use "),
    ],
)
def test_a_misspelt_option_of_a_device(kind: str, text: str, cure: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown (disk )?option") as caught:
        devices.parse(kind, text)
    assert caught.value.cure.startswith(cure)


def test_a_file_has_a_length_and_what_it_says_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever passes it on may have made a hole of terabytes of it, or name what looks like lines
    of ours."""
    large = tmp_path / "large.toml"
    large.write_bytes(b"cpus = 1\n")
    os.truncate(large, 1 << 40)
    with pytest.raises(ConfigError, match="has more than 1 MiB"):
        config_file.load(str(large))
    told = tmp_path / "told.toml"
    told.write_text('kernel = "a\\npyvmm: all is well\\u001b[2J"\n')
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--config", str(told), "--kvm", "host"])
    [line] = capsys.readouterr().err.splitlines()
    assert "a\\npyvmm: all is well\\x1b[2J" in line
