"""The facts that a kernel file for arm64 states of itself, and the Image in it."""

from __future__ import annotations

from pyvmm.boot import kernel_config
from pyvmm.boot.arm64 import image
from pyvmm.boot.image_file import ImageFile, write_whole
from pyvmm.boot.kernel_config import release_in


def release_of(path: str) -> str:
    """The release of the kernel at `path`, "" if it does not say. Raises ConfigError for a file
    that is not a kernel."""
    with ImageFile(path, "--kernel") as file:
        return release_in(image.contents(file)[1])


def config_of(path: str) -> str:
    """The configuration in the kernel at `path`, "" if there is none. Raises ConfigError for a file
    that is not a kernel, or is damaged."""
    with ImageFile(path, "--kernel") as file:
        return kernel_config.embedded(image.contents(file)[1])


def unpack_image(path: str, output: str) -> None:
    """Write the Image in the file at `path` to the file `output`, whole or not at all. Raises
    ConfigError."""
    with ImageFile(path, "--kernel") as file:
        write_whole(output, image.contents(file)[1])
