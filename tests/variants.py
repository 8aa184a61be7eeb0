"""Every kind of image that is read, made of one content without imagekit, and every kind that is written.

A source is made from a disk's content by the generators under fixtures/, which share nothing with the readers. Blocks
of zeros are left out where the kind can; chains hold the content in halves and in single sectors.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fixtures import qcow2_images, vdi_images, vhd_images, vhdx_images, vmdk_images
from imagekit.formats import registry
from imagekit.formats.base import DiskImage, KiB, MiB, Resolver, WriterOptions
from imagekit.formats.files import MemoryFile
from imagekit.formats.raw import RawImage

IDENTIFIER = uuid.UUID("6f9c1d2e-0b1a-4c3d-8e5f-001122334455")


@dataclass(frozen=True, slots=True)
class Made:
    """An image file, its format, and the disk below it where it needs one."""

    data: bytes
    format: str
    below: DiskImage | None = None

    def open(self) -> DiskImage:
        below = self.below
        resolver: Resolver | None = None if below is None else (lambda _: below)
        return registry.find(self.format).open(MemoryFile(self.data), resolver=resolver)


def _blocks(content: bytes, size: int, *, pad: bool = True) -> dict[int, bytes]:
    """The blocks that are not all zero, in an order that is not theirs."""
    found = {}
    for number in range(-(-len(content) // size)):
        data = content[number * size : (number + 1) * size]
        if data.strip(b"\0"):
            found[number] = data.ljust(size, b"\0") if pad else data
    return dict(sorted(found.items(), key=lambda item: (item[0] * 7) % 5))


def _runs(content: bytes, below: bytes) -> list[tuple[int, bytes]]:
    """(offset, sectors) of all sectors that are not the ones below."""
    runs: list[tuple[int, bytes]] = []
    for at in range(0, len(content), 512):
        sector = content[at : at + 512]
        if sector == below[at : at + 512].ljust(512, b"\0"):
            continue
        if runs and runs[-1][0] + len(runs[-1][1]) == at:
            runs[-1] = (runs[-1][0], runs[-1][1] + sector)
        else:
            runs.append((at, sector))
    return runs


def _below(content: bytes) -> bytes:
    """The disk before its guest wrote the second half of every 7 KiB, and wiped what was elsewhere."""
    out = bytearray(content)
    for at in range(3584, len(out), 7168):
        end = min(at + 3584, len(out))
        out[at:end] = b"\xa5" * (end - at)
    return bytes(out)


def _raw_image(content: bytes) -> RawImage:
    return RawImage(MemoryFile(content), len(content))


def _vhd_child(content: bytes, block_size: int = 2 * MiB) -> Made:
    below = _below(content)
    image = vhd_images.differencing(len(content), "parent.vhd", block_size=block_size)
    for at, data in _runs(content, below):
        image = vhd_images.write(image, at, data)
    return Made(image, "vhd", _raw_image(below))


def _vhdx_child(content: bytes, sector: int = 512) -> Made:
    below, blocks = _below(content), {}
    for number in range(-(-len(content) // MiB)):
        theirs = content[number * MiB : (number + 1) * MiB]
        old = below[number * MiB : (number + 1) * MiB]
        differ = frozenset(
            at // sector for at in range(0, len(theirs), sector) if theirs[at : at + sector] != old[at : at + sector]
        )
        if differ:
            junk = bytearray(b"\x5a" * MiB)
            for at in differ:
                piece = theirs[at * sector : (at + 1) * sector]
                junk[at * sector : at * sector + len(piece)] = piece
            blocks[number] = vhdx_images.Block(state=vhdx_images.PARTIAL, data=bytes(junk), present=differ)
    recipe = vhdx_images.Recipe(
        size=len(content),
        blocks=blocks,
        sector=sector,
        parent=vhdx_images.linked_to(vhdx_images.DATA_WRITE),
    )
    return Made(vhdx_images.make(recipe).bytes(), "vhdx", _raw_image(below))


def _vhdx(content: bytes, **more: Any) -> Made:
    size = more.get("block_size", MiB)
    fixed = more.get("fixed", False)
    found = _blocks(content, size)
    if fixed:
        found = {
            number: content[number * size : (number + 1) * size].ljust(size, b"\0")
            for number in range(-(-len(content) // size))
        }
    blocks = {number: vhdx_images.Block(data=data) for number, data in found.items()}
    return Made(vhdx_images.make(vhdx_images.Recipe(size=len(content), blocks=blocks, **more)).bytes(), "vhdx")


def _qcow2(content: bytes, cluster: Callable[[bytes], qcow2_images.Cluster], *, bits: int = 16, **more: Any) -> Made:
    clusters = {number: cluster(data) for number, data in _blocks(content, 1 << bits).items()}
    recipe = qcow2_images.Recipe(size=len(content), clusters=clusters, cluster_bits=bits, **more)
    return Made(qcow2_images.make(recipe).data, "qcow2")


def _qcow2_mixed(content: bytes) -> Made:
    """Plain and compressed clusters side by side, as incompressible ones stay plain."""
    clusters: dict[int, qcow2_images.Cluster] = {}
    for number, data in _blocks(content, 64 * KiB).items():
        clusters[number] = qcow2_images.Plain(data) if number % 2 else qcow2_images.Compressed(data)
    recipe = qcow2_images.Recipe(size=len(content), clusters=clusters)
    return Made(qcow2_images.make(recipe).data, "qcow2")


def _qcow2_overlay(content: bytes) -> Made:
    below = _below(content)[: len(content) // 1024 * 512]  # shorter than the overlay
    clusters: dict[int, qcow2_images.Cluster] = {}
    for number in range(-(-len(content) // 4096)):
        data = content[number * 4096 : (number + 1) * 4096]
        if data != below[number * 4096 : (number + 1) * 4096].ljust(len(data), b"\0"):
            zero = not data.strip(b"\0")
            clusters[number] = qcow2_images.Zero(None) if zero else qcow2_images.Plain(data.ljust(4096, b"\0"))
    recipe = qcow2_images.Recipe(
        size=len(content), clusters=clusters, cluster_bits=12, backing="b.raw", backing_format="raw"
    )
    return Made(qcow2_images.make(recipe).data, "qcow2", _raw_image(below))


def _qcow2_data_file(content: bytes) -> Made:
    clusters = {number: qcow2_images.Plain(data) for number, data in _blocks(content, 64 * KiB).items()}
    made = qcow2_images.make(qcow2_images.Recipe(size=len(content), clusters=clusters, data_file="d.raw"))
    return Made(made.data, "qcow2", _raw_image(made.external))


def _vmdk(content: bytes, make: Callable[[vmdk_images.Recipe], vmdk_images.Vmdk]) -> Made:
    grains: dict[int, bytes | None] = dict(_blocks(content, 8 * KiB))
    return Made(make(vmdk_images.Recipe(size=len(content), grains=dict(sorted(grains.items())))).data, "vmdk")


def _vdi(content: bytes, **more: Any) -> Made:
    found = _blocks(content, MiB)
    if more.get("image_type") == vdi_images.STATIC:
        found = {
            number: content[number * MiB : (number + 1) * MiB].ljust(MiB, b"\0")
            for number in range(-(-len(content) // MiB))
        }
    return Made(vdi_images.make(vdi_images.Recipe(size=len(content), blocks=dict(found), **more)).data, "vdi")


SOURCES: Mapping[str, Callable[[bytes], Made]] = {
    "raw": lambda content: Made(content, "raw"),
    "vhd fixed": lambda content: Made(vhd_images.fixed(content), "vhd"),
    "vhd fixed, 511-byte footer": lambda content: Made(vhd_images.fixed(content, footer_length=511), "vhd"),
    "vhd dynamic": lambda content: Made(vhd_images.dynamic(len(content), _blocks(content, 2 * MiB)), "vhd"),
    "vhd dynamic, 512K": lambda content: Made(
        vhd_images.dynamic(len(content), _blocks(content, 512 * KiB), block_size=512 * KiB, gap=512), "vhd"
    ),
    "vhd child": _vhd_child,
    "vhdx dynamic": _vhdx,
    "vhdx dynamic, 2M": lambda content: _vhdx(content, block_size=2 * MiB),
    "vhdx fixed": lambda content: _vhdx(content, fixed=True),
    "vhdx as qemu": lambda content: _vhdx(content, layout="qemu"),
    "vhdx as disk2vhd": lambda content: _vhdx(content, layout="disk2vhd"),
    "vhdx child": _vhdx_child,
    "qcow2 v2": lambda content: _qcow2(content, qcow2_images.Plain, version=2),
    "qcow2 v3, 4K clusters": lambda content: _qcow2(content, qcow2_images.Plain, bits=12),
    "qcow2 zlib": lambda content: _qcow2(content, qcow2_images.Compressed),
    "qcow2 zstd": lambda content: _qcow2(content, qcow2_images.Compressed, zstd=True),
    "qcow2 mixed": _qcow2_mixed,
    "qcow2 extended L2": lambda content: _qcow2(content, qcow2_images.Plain, extended_l2=True),
    "qcow2 overlay": _qcow2_overlay,
    "qcow2 data file": _qcow2_data_file,
    "vmdk sparse": lambda content: _vmdk(content, vmdk_images.hosted),
    "vmdk stream": lambda content: _vmdk(content, vmdk_images.stream),
    "vmdk stream as qemu": lambda content: _vmdk(content, vmdk_images.qemu_stream),
    "vdi dynamic": _vdi,
    "vdi static": lambda content: _vdi(content, image_type=vdi_images.STATIC),
}
"""Every readable kind: a function from a disk's content to an image of it."""

_OPTIONS = WriterOptions(IDENTIFIER)

TARGETS: Mapping[str, tuple[str, WriterOptions]] = {
    "raw": ("raw", _OPTIONS),
    "vhd dynamic": ("vhd", _OPTIONS),
    "vhd dynamic, 512K": ("vhd", replace(_OPTIONS, block_size=512 * KiB)),
    "vhd fixed": ("vhd", replace(_OPTIONS, subformat="fixed")),
    "vhd of XenServer": ("vhd", replace(_OPTIONS, creator="tap")),
    "vhdx dynamic": ("vhdx", _OPTIONS),
    "vhdx dynamic, 32M": ("vhdx", replace(_OPTIONS, block_size=32 * MiB)),
    "vhdx dynamic, 4096": ("vhdx", replace(_OPTIONS, sector_size=4096)),
    "vhdx fixed": ("vhdx", replace(_OPTIONS, subformat="fixed")),
    "qcow2": ("qcow2", _OPTIONS),
    "qcow2, 4K clusters": ("qcow2", replace(_OPTIONS, block_size=4 * KiB)),
    "qcow2 zlib": ("qcow2", replace(_OPTIONS, compression="zlib")),
    "qcow2 zstd": ("qcow2", replace(_OPTIONS, compression="zstd")),
}
"""Every writable kind."""
