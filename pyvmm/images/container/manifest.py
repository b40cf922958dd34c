"""The image that is meant, and its parts: OCI image layouts and Docker's archives.

OCI image specification 1.1 ("Image Layout", "Image Index", "Image Manifest", "Image
Configuration"); the media types of Docker's registry are the same thing under other names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from pyvmm.errors import how_many
from pyvmm.images.bootable import FOREIGN
from pyvmm.images.container.layers import check_digest, check_size, verifier
from pyvmm.images.container.refusal import Refused, shown
from pyvmm.images.container.store import DirStore, Store

NATIVE = "amd64"
_KNOWN = (NATIVE, *FOREIGN)
_OS = "linux"
_MOST_LAYERS = 500
_MOST_MANIFESTS = 1000
_DEEPEST_INDEX = 4
# The first one is the whole name; the second may be no more than its tag.
_NAMES = ("io.containerd.image.name", "org.opencontainers.image.ref.name")
_MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_SAVE = "save the image (docker save, podman save, skopeo copy); docker export writes none"


@dataclass(frozen=True)
class Layer:
    """`file` is its name in the store; the digests are of the stored and the unpacked bytes."""

    file: str
    digest: str | None
    diff_id: str
    size: int | None


@dataclass(frozen=True)
class Image:
    """`config` is the image's "config" object, unchecked; `digest` tells this image from others."""

    layers: tuple[Layer, ...]
    config: dict[str, Any]
    digest: str


def from_layout(store: Store, wanted: str | None, architecture: str = NATIVE) -> Image:
    """The image for that `architecture` in an OCI image layout; `wanted` is its name there.

    Raises Refused.
    """
    _check_is_layout(store)
    layout = _table(store.json("oci-layout"), "oci-layout")
    if not str(layout.get("imageLayoutVersion", "")).startswith("1."):
        raise Refused(f"{store.where} has a layout of another version than 1")
    index = _table(store.json("index.json"), "index.json")
    rows = _manifests(store, index, wanted is None, wanted, "", _DEEPEST_INDEX)
    found, others = [], set[str]()
    for row in rows:
        its = _architecture(row[1])
        if its in (None, architecture):
            found.append(row)
        others |= {one for one in _KNOWN if one == its}
        if len(found) > _MOST_MANIFESTS:
            raise _too_many(store)
    found = _plainest(found)
    if len(found) > 1:
        raise _several(store, wanted, len(found), {name for name, _ in found if name})
    if not found:
        what = f"no image called {shown(wanted)}" if wanted else "no image"
        raise Refused(
            f"{store.where} has {what} for {_OS}/{architecture}",
            cure=_cure(architecture, others) if others else "",
        )
    return _image(store, found[0][1], architecture)


def _check_is_layout(store: Store) -> None:
    """Raise Refused with what is to be done for one that is something else."""
    if store.has("oci-layout"):
        return
    cure = _SAVE
    if store.has("manifest.json"):
        cure = "as it is what docker save writes, use docker-archive:"
        if isinstance(store, DirStore):
            cure = f"as it may be skopeo's: skopeo copy dir:{store.where} oci:ANOTHER"
    raise Refused(f"{store.where} has no 'oci-layout'", cure=cure)


def _plainest(found: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """Each image once, under its first name; of those that are told apart by what the processor
    has to be able to do (amd64/v2, amd64/v3) the one that wants least."""
    once = {check_digest(row.get("digest")): (name, row) for name, row in found[::-1]}
    images = [*once.values()][::-1]
    least: dict[str, str] = {}
    for name, row in images:
        least[name] = min(least.get(name, "~"), _variant(row))
    return [(name, row) for name, row in images if _variant(row) == least[name]]


def _variant(descriptor: dict[str, Any]) -> str:
    platform = descriptor.get("platform")
    return str(platform.get("variant") or "") if isinstance(platform, dict) else ""


def _manifests(
    store: Store,
    index: dict[str, Any],
    chosen: bool,
    wanted: str | None,
    outer: str,
    deep: int,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, descriptor) of the images that could be meant; `outer` is the index's own name."""
    if not deep:
        raise Refused(f"{store.where} has indexes within indexes")
    rows = _list(index.get("manifests"), "manifests")
    if len(rows) > _MOST_MANIFESTS:
        raise _too_many(store)
    for row in rows:
        descriptor = _table(row, "a manifest's descriptor")
        notes = _table(descriptor.get("annotations") or {}, "annotations")
        names = [str(notes[key]) for key in _NAMES if key in notes]
        meant = chosen or _called(wanted, names)
        name = names[0] if names else outer
        kind = descriptor.get("mediaType")
        if kind in _INDEXES:
            digest = check_digest(descriptor.get("digest"))
            inner = _table(
                store.json(_blob(digest), verifier(digest, _size(descriptor))), "an index"
            )
            yield from _manifests(store, inner, meant, wanted, name, deep - 1)
        elif kind in _MANIFESTS and meant and _is_for_linux(descriptor):
            yield name, descriptor


def _too_many(store: Store) -> Refused:
    return Refused(f"{store.where} has more than {_MOST_MANIFESTS} manifests")


def _is_for_linux(descriptor: dict[str, Any]) -> bool:
    """A descriptor without a platform may be; the configuration then says. Signatures and the like
    say that they are not images."""
    platform = descriptor.get("platform")
    if platform is None:
        return not descriptor.get("artifactType")
    return _table(platform, "platform").get("os") == _OS


def _architecture(descriptor: dict[str, Any]) -> object:
    """The one that a manifest's descriptor tells; None where the configuration says."""
    platform = descriptor.get("platform")
    return None if platform is None else platform.get("architecture", "")


def _cure(wanted: str, there: Collection[object]) -> str:
    """What to do about an archive for the architectures `there`, and not for the `wanted` one."""
    cure = f"save one for {_OS}/{wanted}"
    other = next((one for one in _KNOWN if one in there and one != wanted), None)
    if other is None:
        return cure
    return f"{'leave out --arch' if other == NATIVE else f'use --arch {other}'}, or {cure}"


def _image(store: Store, descriptor: dict[str, Any], architecture: str) -> Image:
    digest, manifest = _blob_table(store, descriptor, "the manifest")
    row = _table(manifest.get("config"), "the manifest's config")
    _, config = _blob_table(store, row, "the configuration")
    layers = []
    rows = _list(manifest.get("layers"), "layers")
    diff_ids = _diff_ids(store, config, len(rows), architecture)
    for row, diff_id in zip(rows, diff_ids, strict=True):
        layer = _table(row, "a layer")
        stored = check_digest(layer.get("digest"))
        if "encrypted" in str(layer.get("mediaType")):
            raise Refused(f"{store.where} is encrypted", cure="save it without encryption")
        layers.append(Layer(_blob(stored), stored, diff_id, _size(layer)))
    return Image(tuple(layers), _config(config), digest)


def from_docker(store: Store, wanted: str | None, architecture: str = NATIVE) -> Image:
    """The image called `wanted` in what `docker save` writes, or the only one, which has to be for
    that `architecture`. Raises Refused."""
    if not store.has("manifest.json"):
        layout = store.has("oci-layout")
        cure = "as it is an OCI layout, use oci-archive:" if layout else _SAVE
        raise Refused(f"{store.where} has no 'manifest.json'", cure=cure)
    rows = _list(store.json("manifest.json"), "manifest.json")
    if len(rows) > _MOST_MANIFESTS:
        raise _too_many(store)
    tagged = [
        (row, [str(tag) for tag in _list(row.get("RepoTags") or [], "RepoTags")])
        for row in (_table(row, "manifest.json") for row in rows)
    ]
    found = [row for row, names in tagged if wanted is None or _called(wanted, names)]
    if len({repr(row) for row in found}) != 1:
        raise _several(store, wanted, len(found), {name for _, names in tagged for name in names})
    row = found[0]
    name = _text(row.get("Config"), "Config")
    config = _table(store.json(name), "the configuration")
    files = [_text(file, "a layer's name") for file in _list(row.get("Layers"), "Layers")]
    diff_ids = _diff_ids(store, config, len(files), architecture)
    layers = [
        Layer(file, None, diff_id, None) for file, diff_id in zip(files, diff_ids, strict=True)
    ]
    return Image(tuple(layers), _config(config), name)


def _familiar(name: str) -> str:
    """An image's name as people say it, with its tag: docker.io/library/a is a:latest."""
    for prefix in ("docker.io/", "library/"):
        name = name.removeprefix(prefix)
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def _called(wanted: str | None, names: list[str]) -> bool:
    return wanted is not None and (wanted in names or _familiar(wanted) in map(_familiar, names))


def _several(store: Store, wanted: str | None, count: int, names: set[str]) -> Refused:
    """None, or more than one, is what is wanted; `names` are those to choose from."""
    called = "" if wanted is None else f" called {shown(wanted)}"
    there = ", ".join(map(shown, sorted(names)[:20]))
    if there and (wanted is None or len(names) > 1 or not count):
        cure = f"name one, as in {store.where}:NAME; there are {there}"
    else:
        cure = "save the one that you want alone"
    return Refused(f"{store.where} has {count or 'no'} image{'s' * (count > 1)}{called}", cure=cure)


def _diff_ids(store: Store, config: dict[str, Any], count: int, architecture: str) -> list[str]:
    """Of the layers. Raises Refused if the configuration is not for the `architecture`, or has
    others."""
    platform = (config.get("os"), config.get("architecture"))
    if platform != (_OS, architecture):
        shown_platform = "/".join(str(part) for part in platform)
        others = [platform[1]] if platform[0] == _OS else []
        raise Refused(
            f"{store.where} has an image for {shown(shown_platform)}",
            cure=_cure(architecture, others),
        )
    rootfs = _table(config.get("rootfs"), "rootfs")
    diff_ids = [check_digest(one) for one in _list(rootfs.get("diff_ids"), "diff_ids")]
    if len(diff_ids) != count:
        raise Refused(
            f"{store.where} has {how_many(count, 'layer')}, and its configuration says "
            f"{len(diff_ids)}"
        )
    if not 0 < count <= _MOST_LAYERS:
        raise Refused(f"{store.where} has {count} layers", cure=f"use 1 to {_MOST_LAYERS}")
    return diff_ids


def _config(config: dict[str, Any]) -> dict[str, Any]:
    return _table(config.get("config") or {}, "config")


def _blob(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def _blob_table(store: Store, descriptor: dict[str, Any], what: str) -> tuple[str, dict[str, Any]]:
    """The digest in `descriptor`, and what the JSON blob with it says."""
    digest = check_digest(descriptor.get("digest"))
    return digest, _table(store.json(_blob(digest), verifier(digest, _size(descriptor))), what)


def _size(descriptor: dict[str, Any]) -> int | None:
    return check_size(descriptor.get("size"))


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
