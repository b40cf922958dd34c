"""Which image is meant, and what it is made of: OCI image layouts and Docker's archives.

OCI image specification 1.1 ("Image Layout", "Image Index", "Image Manifest", "Image
Configuration"); the media types of Docker's registry are the same thing under other names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pyvmm.images.container.layers import check_digest, verifier
from pyvmm.images.container.refusal import Refused, shown
from pyvmm.images.container.store import Store

ARCHITECTURE = "amd64"
_OS = "linux"
_MOST_LAYERS = 500
_MOST_MANIFESTS = 1000
_DEEPEST_INDEX = 4
_NAMES = ("org.opencontainers.image.ref.name", "io.containerd.image.name")
_MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)


@dataclass(frozen=True)
class Layer:
    """`file` is its name in the store; the digests are of the stored and the unpacked bytes."""

    file: str
    digest: str | None
    diff_id: str
    size: int


@dataclass(frozen=True)
class Image:
    """`config` is the image's "config" object, unchecked; `digest` tells this image from others."""

    layers: tuple[Layer, ...]
    config: dict[str, Any]
    digest: str


def from_layout(store: Store, wanted: str | None) -> Image:
    """The image for this architecture in an OCI image layout; `wanted` is its name there.

    Raises Refused.
    """
    layout = _table(store.json("oci-layout"), "oci-layout")
    if not str(layout.get("imageLayoutVersion", "")).startswith("1."):
        raise Refused(f"{store.where} has a layout of another version than 1")
    index = _table(store.json("index.json"), "index.json")
    found = [*_manifests(store, index, wanted is None, wanted, _DEEPEST_INDEX)]
    if len(found) > 1:
        names = sorted({name for name, _ in found if name})
        raise Refused(
            f"{store.where} has {len(found)} images",
            cure=_name_one(store, names),
        )
    if not found:
        what = f"no image called {shown(wanted)}" if wanted else "no image"
        raise Refused(f"{store.where} has {what} for {_OS}/{ARCHITECTURE}")
    return _image(store, check_digest(found[0][1].get("digest")))


def _manifests(
    store: Store, index: dict[str, Any], chosen: bool, wanted: str | None, deep: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, descriptor) of the images that could be meant."""
    if not deep:
        raise Refused(f"{store.where} has indexes within indexes")
    rows = _list(index.get("manifests"), "manifests")
    if len(rows) > _MOST_MANIFESTS:
        raise Refused(f"{store.where} has more than {_MOST_MANIFESTS} manifests")
    for row in rows:
        descriptor = _table(row, "a manifest's descriptor")
        notes = _table(descriptor.get("annotations") or {}, "annotations")
        names = [str(notes[key]) for key in _NAMES if key in notes]
        meant = chosen or wanted in names
        kind = descriptor.get("mediaType")
        if kind in _INDEXES:
            digest = check_digest(descriptor.get("digest"))
            inner = _table(store.json(_blob(digest), verifier(digest)), "an index")
            yield from _manifests(store, inner, meant, wanted, deep - 1)
        elif kind in _MANIFESTS and meant and _is_for_us(descriptor.get("platform")):
            yield (names[0] if names else ""), descriptor


def _is_for_us(platform: object) -> bool:
    """A descriptor without a platform may be; the configuration then says."""
    if platform is None:
        return True
    table = _table(platform, "platform")
    return (table.get("os"), table.get("architecture")) == (_OS, ARCHITECTURE)


def _image(store: Store, digest: str) -> Image:
    manifest = _table(store.json(_blob(digest), verifier(digest)), "the manifest")
    descriptor = _table(manifest.get("config"), "the manifest's config")
    config_digest = check_digest(descriptor.get("digest"))
    config = _table(store.json(_blob(config_digest), verifier(config_digest)), "the configuration")
    layers = []
    rows = _list(manifest.get("layers"), "layers")
    for row, diff_id in zip(rows, _diff_ids(store, config, len(rows)), strict=True):
        layer = _table(row, "a layer")
        stored = check_digest(layer.get("digest"))
        size = layer.get("size")
        if type(size) is not int or size < 0:
            raise Refused(f"{store.where}: a layer's size is {shown(str(size)[:100])}")
        if "encrypted" in str(layer.get("mediaType")):
            raise Refused(f"{store.where} is encrypted", cure="save it without encryption")
        layers.append(Layer(_blob(stored), stored, diff_id, size))
    return Image(tuple(layers), _config(config), digest)


def from_docker(store: Store, wanted: str | None) -> Image:
    """The image called `wanted` in what `docker save` writes, or the only one. Raises Refused."""
    rows = [
        _table(row, "manifest.json") for row in _list(store.json("manifest.json"), "manifest.json")
    ]
    tags = [
        [str(tag) for tag in _list(row.get("RepoTags") or [], "RepoTags")]
        for row in rows[:_MOST_MANIFESTS]
    ]
    found = [
        row
        for row, names in zip(rows, tags, strict=False)
        if wanted is None or _familiar(wanted) in map(_familiar, names)
    ]
    if len(found) != 1:
        names = sorted(name for row in tags for name in row)
        what = f"{len(found)} images" if wanted is None else f"no image called {shown(wanted)}"
        raise Refused(
            f"{store.where} has {what}",
            cure=_name_one(store, names),
        )
    [row] = found
    name = _text(row.get("Config"), "Config")
    config = _table(store.json(name), "the configuration")
    files = [_text(file, "a layer's name") for file in _list(row.get("Layers"), "Layers")]
    diff_ids = _diff_ids(store, config, len(files))
    layers = [Layer(file, None, diff_id, 0) for file, diff_id in zip(files, diff_ids, strict=True)]
    return Image(tuple(layers), _config(config), name)


def _familiar(name: str) -> str:
    """An image's name as people say it, with its tag: docker.io/library/a is a:latest."""
    for prefix in ("docker.io/", "library/"):
        name = name.removeprefix(prefix)
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def _name_one(store: Store, names: list[str]) -> str:
    there = ", ".join(map(shown, names[:20])) or "but none of them has a name"
    return f"name one, as in {store.where}:NAME; there are {there}"


def _diff_ids(store: Store, config: dict[str, Any], count: int) -> list[str]:
    """Of the layers. Raises Refused if the configuration is not for this machine, or has others."""
    platform = (config.get("os"), config.get("architecture"))
    if platform != (_OS, ARCHITECTURE):
        shown_platform = "/".join(str(part) for part in platform)
        raise Refused(
            f"{store.where} has an image for {shown(shown_platform)}",
            cure=f"save one for {_OS}/{ARCHITECTURE}",
        )
    rootfs = _table(config.get("rootfs"), "rootfs")
    diff_ids = [check_digest(one) for one in _list(rootfs.get("diff_ids"), "diff_ids")]
    if len(diff_ids) != count:
        raise Refused(
            f"{store.where} has {count} layers, and its configuration says {len(diff_ids)}"
        )
    if not 0 < count <= _MOST_LAYERS:
        raise Refused(f"{store.where} has {count} layers", cure=f"use 1 to {_MOST_LAYERS}")
    return diff_ids


def _config(config: dict[str, Any]) -> dict[str, Any]:
    return _table(config.get("config") or {}, "config")


def _blob(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def _table(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused(f"{what} is not what it has to be, an object")
    return value


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise Refused(f"{what} is not what it has to be, a list")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise Refused(f"{what} is not what it has to be, a text")
    return value
