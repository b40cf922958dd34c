"""Finds what the emulated host boots where nobody says it."""

from __future__ import annotations

import glob
import os
import subprocess

from pyvmm.emulated_host.programs import find_program
from pyvmm.emulated_host.python import python_argv
from pyvmm.emulated_host.spec import HostImage
from pyvmm.errors import ConfigError

IMAGE_NAME = "kernel-host"
IMAGE_CURE = f"run: pyvmm image build {IMAGE_NAME}"
BUSYBOX_CURE = "apt-get install busybox-static"


def find_busybox() -> str:
    """The machine's own busybox. Raises ConfigError."""
    path = find_program("busybox")
    if path is None:
        raise ConfigError(
            "the emulated KVM host needs busybox, statically linked", cure=BUSYBOX_CURE
        )
    return path


def find_image() -> HostImage:
    """The image in the cache of pyvmm.images. Raises ConfigError if it has not been built."""
    # Asked as another program: the two packages stand side by side and do not import each other.
    command = python_argv("pyvmm.cli:main", "image", "path", IMAGE_NAME)
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        raise ConfigError("there is no kernel for the emulated KVM host", cure=IMAGE_CURE)
    folder = answer.stdout.strip()
    [modules] = glob.glob(os.path.join(glob.escape(folder), "lib/modules/*"))
    return HostImage(os.path.join(folder, "vmlinux"), modules, find_busybox())
