"""Container images as archives, made member by member: lawful ones, and whatever a test wants."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"


def member(
    name: str,
    kind: bytes = tarfile.REGTYPE,
    data: bytes = b"",
    *,
    link: str = "",
    xattrs: Mapping[str, bytes] | None = None,
    **fields: Any,
) -> tuple[tarfile.TarInfo, bytes]:
    """A member of a layer; `fields` are TarInfo's."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(data), link
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    for key, value in fields.items():
        setattr(info, key, value)
    if xattrs:
        info.pax_headers = {
            **info.pax_headers,
            **{
                f"SCHILY.xattr.{key}": value.decode("utf-8", "surrogateescape")
                for key, value in xattrs.items()
            },
        }
    return info, data


def directory(name: str, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, tarfile.DIRTYPE, **fields)


def symlink(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, tarfile.SYMTYPE, link=target)


def hardlink(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, tarfile.LNKTYPE, link=target)


def layer(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """A layer's tar archive."""
    file = io.BytesIO()
    with tarfile.open(
        fileobj=file, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape"
    ) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Layout:
    """An OCI image layout: `blobs` by digest, and an index of manifests."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}'}
        self.manifests: list[dict[str, Any]] = []

    def blob(self, data: bytes) -> str:
        name = digest(data)
        self.files["blobs/" + name.replace(":", "/")] = data
        return name

    def json_blob(self, value: object) -> tuple[str, int]:
        data = json.dumps(value).encode()
        return self.blob(data), len(data)

    def add(
        self,
        layers: Iterable[bytes],
        *,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        architecture: str = "amd64",
        platform: Mapping[str, str] | None = None,
        compress: Callable[[bytes], bytes] = gzip.compress,
        change: Callable[[dict[str, Any]], None] = lambda manifest: None,
        diff_ids: Callable[[], list[str]] | None = None,
    ) -> dict[str, Any]:
        """An image of those uncompressed layers; its descriptor. `change` sees its manifest,
        `diff_ids` are for layers that are compressed already."""
        layers = list(layers)
        configuration, size = self.json_blob(
            {
                "architecture": architecture,
                "os": "linux",
                "config": dict(config or {}),
                "rootfs": {
                    "type": "layers",
                    "diff_ids": diff_ids() if diff_ids else [digest(one) for one in layers],
                },
            }
        )
        rows = []
        for one in layers:
            stored = compress(one)
            rows.append({"mediaType": LAYER, "digest": self.blob(stored), "size": len(stored)})
        manifest: dict[str, Any] = {
            "schemaVersion": 2,
            "config": {"digest": configuration, "size": size},
            "layers": rows,
        }
        change(manifest)
        found, size = self.json_blob(manifest)
        descriptor: dict[str, Any] = {"mediaType": MANIFEST, "digest": found, "size": size}
        if platform:
            descriptor["platform"] = dict(platform)
        if name:
            descriptor["annotations"] = {"org.opencontainers.image.ref.name": name}
        self.manifests.append(descriptor)
        return descriptor

    def contents(self) -> dict[str, bytes]:
        index = {"schemaVersion": 2, "manifests": self.manifests}
        return {"index.json": json.dumps(index).encode(), **self.files}

    def archive(self, path: Path) -> str:
        """Write it as an oci-archive."""
        path.write_bytes(
            layer(*(member(name, data=data) for name, data in self.contents().items()))
        )
        return str(path)

    def folder(self, path: Path) -> str:
        for name, data in self.contents().items():
            file = path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        return str(path)


def docker_archive(
    path: Path,
    layers: Iterable[bytes],
    *,
    config: Mapping[str, Any] | None = None,
    tags: Iterable[str] = ("example:latest",),
    change: Callable[[dict[str, Any]], None] = lambda row: None,
    extra: Iterable[tuple[tarfile.TarInfo, bytes]] = (),
    architecture: str = "amd64",
) -> str:
    """An archive as `docker save` writes it."""
    layers = list(layers)
    configuration = json.dumps(
        {
            "architecture": architecture,
            "os": "linux",
            "config": dict(config or {}),
            "rootfs": {"type": "layers", "diff_ids": [digest(one) for one in layers]},
        }
    ).encode()
    name = f"{hashlib.sha256(configuration).hexdigest()}.json"
    files = [f"{number}/layer.tar" for number in range(len(layers))]
    row: dict[str, Any] = {"Config": name, "RepoTags": list(tags), "Layers": files}
    change(row)
    path.write_bytes(
        layer(
            member(name, data=configuration),
            *(member(file, data=one) for file, one in zip(files, layers, strict=True)),
            member("manifest.json", data=json.dumps([row]).encode()),
            *extra,
        )
    )
    return str(path)
