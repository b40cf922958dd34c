"""The configuration of SYSLINUX and EXTLINUX, and of what reads the same (U-Boot).

Source: the SYSLINUX wiki, "Config" (DEFAULT, LABEL, LINUX, KERNEL, INITRD, APPEND) and "Menu" (MENU
DEFAULT). Other files that it names (INCLUDE) are not read.
"""

from __future__ import annotations

from typing import NamedTuple

_MOST_LABELS = 256
_PROGRAMS = (".c32", ".com", ".cbt", ".bin", ".bss", ".0", ".32")  # of its own, and no kernels


class Label(NamedTuple):
    """A kernel, its initrds, and its command line."""

    kernel: str
    initrds: tuple[str, ...]
    append: str


def chosen(text: str) -> Label | None:
    """The label that is booted by default, or the first that has a kernel; None if none has."""
    labels: dict[str, dict[str, str]] = {}
    everywhere: dict[str, str] = {}  # before the first label: for those that do not say it
    within, name, default, marked = everywhere, "", "", ""
    for line in text.splitlines():
        key, _, value = line.strip().replace("\t", " ").partition(" ")
        key, value = key.lower(), value.strip()
        if key == "label":
            name, within = value, {}
            if len(labels) < _MOST_LABELS:
                labels.setdefault(name, within)
        elif key == "default":
            default = value
        elif key == "menu" and value.lower() == "default":
            marked = name
        elif key in ("linux", "kernel", "initrd", "append"):
            within["kernel" if key == "linux" else key] = value
    usable = {
        name: one
        for name, one in labels.items()
        if one.get("kernel") and not one["kernel"].lower().endswith(_PROGRAMS)
    }
    # A program in DEFAULT shows a menu.
    wanted = [one for one in (default, marked) if one in usable] or list(usable)
    return _label({**everywhere, **usable[wanted[0]]}) if wanted else None


def _label(said: dict[str, str]) -> Label:
    append = said.get("append", "")
    words = [] if append == "-" else append.split()
    initrds = [said["initrd"]] if said.get("initrd") else []
    initrds += [word.partition("=")[2] for word in words if word.startswith("initrd=")]
    names = tuple(name for one in initrds[:1] for name in one.split(",") if name)
    return Label(said["kernel"], names, " ".join(w for w in words if not w.startswith("initrd=")))
