"""Saved container images become root disks. Nothing of one is ever unpacked onto this machine.

    store      the archive's or directory's files, by name
    manifest   which of the images in it, and its layers
    unpack     gzip, zstd, bzip2, xz
    layers     a layer's bytes: unpacked, counted, and checked against their digests
    members    a layer's tar members, each checked
    tree       the layers put over one another, in memory; file contents lie in one spool file
    process    what the image runs, and as whom
    disk       the tree as a tar stream into mke2fs

The archive is hostile: every size, name and number in it is checked before it counts.
"""

from __future__ import annotations
