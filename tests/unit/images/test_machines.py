"""A VM's state between its runs counts for the image it was begun on, and for no other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyvmm.cli.main import main
from pyvmm.control import registry
from pyvmm.errors import ConfigError
from pyvmm.host.files import open_image
from pyvmm.images import machines
from pyvmm.monitor.from_image import changes_kept
from pyvmm.spec.vm import DiskSpec, VmSpec
from pyvmm.virtio.blk.backend import FileBackend
from pyvmm.virtio.blk.overlay_file import open_overlay


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("STATE", "CACHE", "RUNTIME"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "STATE"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "CACHE"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "RUNTIME"))
    return tmp_path


@pytest.fixture
def base(home: Path) -> str:
    path = home / "base.ext4"
    path.write_bytes(bytes(4096))
    return str(path)


def test_a_vm_is_found_again_with_its_image(base: str) -> None:
    assert machines.find("web") is None
    made = machines.keep("web", "debian", base)
    assert machines.keep("web", "debian", "/another/of/the/same/name") == made
    assert machines.find("web") == made
    assert machines.names() == machines.using("debian") == ["web"]
    assert machines.bases() == {base}
    assert machines.using("other") == []


def test_a_vm_of_another_image_is_refused(base: str) -> None:
    machines.keep("web", "debian", base)
    with pytest.raises(ConfigError, match=r"made from the image debian, not fio; .* pyvmm rm web"):
        machines.keep("web", "fio", base)


@pytest.mark.parametrize("left", ["nothing", "an overlay", "changes", "an earlier one"])
def test_a_run_that_is_refused_leaves_nothing_of_a_new_vm(base: str, left: str) -> None:
    if left == "an earlier one":
        machines.keep("web", "debian", base)
    spec = VmSpec("kernel", disks=(DiskSpec(base, snapshot=True),), name="web")
    with pytest.raises(ConfigError, match="refused"), changes_kept(spec, "debian") as kept:
        overlay = kept.disks[0].overlay
        assert overlay is not None
        if left in ("an overlay", "changes"):
            disk = open_overlay(FileBackend(open_image(base)), overlay)
            if left == "changes":
                disk.writev([memoryview(b"x" * 512)], 512, 0)
                disk.flush()
            disk.close()
        raise ConfigError("refused")
    assert machines.names() == ([] if left in ("nothing", "an overlay") else ["web"])


def test_an_image_that_was_built_again_is_told(base: str) -> None:
    machines.keep("web", "fio", base)
    Path(base).write_bytes(bytes(8192))
    with pytest.raises(ConfigError, match=r"fio was built again since the VM web.* pyvmm rm web"):
        machines.keep("web", "fio", base)


def test_an_image_that_is_gone_is_told(base: str) -> None:
    machine = machines.keep("web", "fio", base)
    os.unlink(base)
    with pytest.raises(ConfigError, match=r"fio is gone since the VM web.* pyvmm rm web"):
        machines.check(machine)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"image": 1}'])
def test_a_damaged_record_is_one_line_and_can_be_removed(base: str, text: str) -> None:
    machine = machines.keep("web", "fio", base)
    Path(machine.overlay).with_name("machine.json").write_text(text)
    with pytest.raises(ConfigError, match=r"is damaged: .*; pyvmm rm web"):
        machines.find("web")
    assert machines.using("anything") == ["web"]  # it may be
    machines.remove("web")
    assert machines.names() == []


def test_a_state_folder_that_cannot_be_written_is_one_line(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/none")
    with pytest.raises(ConfigError, match=r"/proc/none/.*XDG_STATE_HOME.*or use --rm"):
        machines.keep("web", "fio", base)


def test_rm_removes_what_stopped_vms_changed(
    base: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        Path(machines.keep(name, "debian", base).overlay).write_bytes(b"changes")
    assert run("rm", "a", "b") == 0
    assert [*home.glob("STATE/pyvmm/machines/*")] == []
    assert run("rm", "a") == 2
    none = "pyvmm: there is no VM called 'a' that keeps changes; none does\n"
    assert capsys.readouterr().err == none
    machines.keep("c", "debian", base)
    assert run("rm", "a") == 2
    assert "that keeps changes; those that do: c\n" in capsys.readouterr().err


def test_rm_of_a_vm_that_runs_is_refused(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    machine = machines.keep("web", "debian", base)
    with registry.register("web"):
        assert run("rm", "web") == 2
    refused = "pyvmm: the VM web is running; end it first: pyvmm stop web\n"
    assert capsys.readouterr().err == refused
    assert machines.find("web") == machine


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a\nb"])
def test_rm_of_what_cannot_be_a_name_touches_nothing(name: str, home: Path) -> None:
    (home / "STATE/pyvmm/machines").mkdir(parents=True)
    assert run("rm", name) == 2
    assert (home / "STATE/pyvmm/machines").is_dir()


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    assert isinstance(ended.value.code, int)
    return ended.value.code
