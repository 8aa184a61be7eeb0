"""Every kind of image that is read, made of one content without imagekit, and every kind that is written.

A source is made from a disk's content by the generators under fixtures/, which share nothing with the readers. Blocks
of zeros are left out where the kind can; chains hold the content in halves and in single sectors.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fixtures import qcow2_images, vdi_images, vhd_images, vhdx_images, vhdx_logs, vmdk_images
from imagekit.formats import registry
from imagekit.formats.base import AS_IS, DiskImage, KiB, MiB, OpenOptions, Reference, WriterOptions
from imagekit.formats.files import MemoryFile
from imagekit.formats.raw import RawImage

IDENTIFIER = uuid.UUID("6f9c1d2e-0b1a-4c3d-8e5f-001122334455")


@dataclass(frozen=True, slots=True)
class Made:
    """An image file, its format, what it refers to (a disk below it, or files by their names), how to look at it."""

    data: bytes
    format: str
    below: DiskImage | Mapping[str, bytes] | None = None
    view: OpenOptions = AS_IS

    def open(self) -> DiskImage:
        resolver = None if self.below is None else self._resolve
        return registry.find(self.format).open(MemoryFile(self.data), resolver=resolver, options=self.view)

    def _resolve(self, reference: Reference) -> DiskImage:
        if isinstance(self.below, Mapping):
            return registry.find(reference.format or "raw").open(MemoryFile(self.below[reference.name]))
        assert self.below is not None
        return self.below


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


def padded(content: bytes, unit: int) -> bytes:
    """With zeros up to a multiple of ``unit``."""
    return content.ljust(-(-len(content) // unit) * unit, b"\0")


def below(content: bytes) -> bytes:
    """The disk before its guest wrote the second half of every 7 KiB, and wiped what was elsewhere."""
    out = bytearray(content)
    for at in range(3584, len(out), 7168):
        end = min(at + 3584, len(out))
        out[at:end] = b"\xa5" * (end - at)
    return bytes(out)


def _raw_image(content: bytes) -> RawImage:
    return RawImage(MemoryFile(content), len(content))


def _vhd_child(content: bytes, block_size: int = 2 * MiB) -> Made:
    under = below(content)
    image = vhd_images.differencing(len(content), "parent.vhd", block_size=block_size)
    for at, data in _runs(content, under):
        image = vhd_images.write(image, at, data)
    return Made(image, "vhd", _raw_image(under))


def _vhdx_child(content: bytes, sector: int = 512) -> Made:
    content = padded(content, sector)
    under, blocks = below(content), {}
    for number in range(-(-len(content) // MiB)):
        theirs = content[number * MiB : (number + 1) * MiB]
        old = under[number * MiB : (number + 1) * MiB]
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
    return Made(vhdx_images.make(recipe).bytes(), "vhdx", _raw_image(under))


def _vhdx_recipe(content: bytes, **more: Any) -> vhdx_images.Recipe:
    content = padded(content, more.get("sector", 512))
    size = more.get("block_size", MiB)
    fixed = more.get("fixed", False)
    found = _blocks(content, size)
    if fixed:
        found = {
            number: content[number * size : (number + 1) * size].ljust(size, b"\0")
            for number in range(-(-len(content) // size))
        }
    blocks = {number: vhdx_images.Block(data=data) for number, data in found.items()}
    return vhdx_images.Recipe(size=len(content), blocks=blocks, **more)


def _vhdx(content: bytes, **more: Any) -> Made:
    return Made(vhdx_images.make(_vhdx_recipe(content, **more)).bytes(), "vhdx")


def _vhdx_dirty(content: bytes) -> Made:
    """The BAT waits in the log, as after a loss of power."""
    recipe = _vhdx_recipe(content)
    bat = slice(3 * MiB, 3 * MiB + 4 * KiB)
    steps = vhdx_logs.rewrite(bat.start, vhdx_images.make(recipe).bytes()[bat])
    bare = replace(recipe, patches=[(bat.start, bytes(4 * KiB))])
    entries = vhdx_logs.Run(0, [vhdx_logs.Entry(sequence=5, descriptors=steps)])
    return Made(vhdx_images.make(vhdx_logs.with_log(bare, entries)).bytes(), "vhdx")


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
    under = below(content)[: len(content) // 1024 * 512]  # shorter than the overlay
    clusters: dict[int, qcow2_images.Cluster] = {}
    for number in range(-(-len(content) // 4096)):
        data = content[number * 4096 : (number + 1) * 4096]
        if data != under[number * 4096 : (number + 1) * 4096].ljust(len(data), b"\0"):
            zero = not data.strip(b"\0")
            clusters[number] = qcow2_images.Zero(None) if zero else qcow2_images.Plain(data.ljust(4096, b"\0"))
    recipe = qcow2_images.Recipe(
        size=len(content), clusters=clusters, cluster_bits=12, backing="b.raw", backing_format="raw"
    )
    return Made(qcow2_images.make(recipe).data, "qcow2", _raw_image(under))


def _qcow2_data_file(content: bytes) -> Made:
    clusters = {number: qcow2_images.Plain(data) for number, data in _blocks(content, 64 * KiB).items()}
    made = qcow2_images.make(qcow2_images.Recipe(size=len(content), clusters=clusters, data_file="d.raw"))
    return Made(made.data, "qcow2", _raw_image(made.external))


def _qcow2_snapshot(content: bytes) -> Made:
    """The disk is in a snapshot; since then its guest wrote something else everywhere."""
    clusters = {number: qcow2_images.Plain(data) for number, data in _blocks(content, 64 * KiB).items()}
    now = {number: qcow2_images.Plain(b"\x5a" * 64 * KiB) for number in range(-(-len(content) // (64 * KiB)))}
    before = qcow2_images.Snapshot("1", "before", clusters)
    recipe = qcow2_images.Recipe(size=len(content), clusters=now, snapshots=(before,))
    return Made(qcow2_images.make(recipe).data, "qcow2", view=OpenOptions(snapshot="before"))


def _vhd_azure(content: bytes) -> Made:
    """As Azure exports disks: fixed, creator ``wa``; the geometry is not the size."""
    footer = vhd_images.Footer(
        size=len(content),
        disk_type=vhd_images.FIXED,
        creator=b"wa\0\0",
        creator_version=0x00070000,
        geometry=(9, 4, 17),
    )
    return Made(vhd_images.fixed(content, footer), "vhd")


Vmdk = Callable[[vmdk_images.Recipe], vmdk_images.Vmdk]


def _vmdk_data(content: bytes, make: Vmdk, grain: int = 8 * KiB, **more: Any) -> bytes:
    grains: dict[int, bytes | None] = dict(sorted(_blocks(content, grain).items()))
    return make(vmdk_images.Recipe(size=len(content), grains=grains, grain_sectors=grain // 512, **more)).data


def _vmdk(content: bytes, make: Vmdk) -> Made:
    return Made(_vmdk_data(content, make), "vmdk")


def _vmdk_parts(content: bytes, create_type: str, kind: str, make: Callable[[bytes], bytes]) -> Made:
    """The disk in two files, the first of them somewhat longer."""
    cut = (len(content) // 2 + 511) // 512 * 512
    parts = {name: part for name, part in (("a", content[:cut]), ("b", content[cut:])) if part}
    after = " 0" if kind == "FLAT" else ""
    lines = [f'RW {len(part) // 512} {kind} "{name}"{after}' for name, part in parts.items()]
    files = {name: make(part) for name, part in parts.items()}
    return Made(vmdk_images.descriptor(create_type, *lines), "vmdk", files)


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
    "vhd fixed of Azure": _vhd_azure,
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
    "vhdx dynamic, 4096": lambda content: _vhdx(content, sector=4096),
    "vhdx with a dirty log": _vhdx_dirty,
    "vhdx child": _vhdx_child,
    "vhdx child, 4096": lambda content: _vhdx_child(content, 4096),
    "qcow2 v2": lambda content: _qcow2(content, qcow2_images.Plain, version=2),
    "qcow2 v3, 4K clusters": lambda content: _qcow2(content, qcow2_images.Plain, bits=12),
    "qcow2 zlib": lambda content: _qcow2(content, qcow2_images.Compressed),
    "qcow2 zstd": lambda content: _qcow2(content, qcow2_images.Compressed, zstd=True),
    "qcow2 mixed": _qcow2_mixed,
    "qcow2 extended L2": lambda content: _qcow2(content, qcow2_images.Plain, extended_l2=True),
    "qcow2 overlay": _qcow2_overlay,
    "qcow2 data file": _qcow2_data_file,
    "qcow2 snapshot": _qcow2_snapshot,
    "vmdk sparse": lambda content: _vmdk(content, vmdk_images.hosted),
    "vmdk stream": lambda content: _vmdk(content, vmdk_images.stream),
    "vmdk stream as qemu": lambda content: _vmdk(content, vmdk_images.qemu_stream),
    "vmdk flat": lambda content: _vmdk_parts(content, "twoGbMaxExtentFlat", "FLAT", bytes),
    "vmdk split sparse": lambda content: _vmdk_parts(
        content, "twoGbMaxExtentSparse", "SPARSE", lambda part: _vmdk_data(part, vmdk_images.hosted, text=b"")
    ),
    "vmdk of ESX": lambda content: _vmdk_parts(
        content, "vmfsSparse", "VMFSSPARSE", lambda part: _vmdk_data(part, vmdk_images.cowd)
    ),
    "vmdk of ESX, SESparse": lambda content: _vmdk_parts(
        content, "seSparse", "SESPARSE", lambda part: _vmdk_data(part, vmdk_images.sesparse, 4 * KiB)
    ),
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
"""Every writable kind that stands alone."""

CHILDREN: Mapping[str, tuple[str, WriterOptions]] = {
    "vhd child": ("vhd", replace(_OPTIONS, subformat="differencing")),
    "vhdx child": ("vhdx", replace(_OPTIONS, subformat="differencing")),
    "vhdx child, 4096": ("vhdx", replace(_OPTIONS, subformat="differencing", sector_size=4096)),
}
"""Those that lie on a parent."""
