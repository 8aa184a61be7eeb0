"""VMDK, for reading: VMware's disks, as VMware, VirtualBox and QEMU write them.

Follows VMware's "Virtual Disk Format 5.0" and, where that is silent (COWD, SESparse), what QEMU reads.

    vmdk_header.py      the headers of sparse files; where their tables lie
    vmdk_descriptor.py  the text that says what a disk consists of
    vmdk_tables.py      grain directories and tables
    vmdk_sparse.py      one sparse file: monolithicSparse, streamOptimized, or an extent
    vmdk_extents.py     a text and the files that it names: flat, split and ESX' disks
    vmdk_stream.py      streamOptimized in one pass, for a pipe
    vmdk_check.py       the check of a whole file

Design notes
- The content of a sparse file is in that file. What the descriptor inside names is never read: a name that leads
  elsewhere is a fact.
- A text has no content. What it names is a reference, read through the caller's resolver and in no other way.
- What the parts of an image say twice must be the same: header and footer, descriptor and header, both directories.

Not here: writing; delta disks (the parent is reported, reading refused); devices and raw partitions; encrypted disks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from imagekit.errors import InvalidImage
from imagekit.formats.base import AS_IS, DiskFormat, File, OpenOptions, Problem, Resolver

if TYPE_CHECKING:
    from imagekit.formats.vmdk_extents import DescriptorImage
    from imagekit.formats.vmdk_sparse import SparseImage

_TEXT = frozenset(b"\xef#vV \t\r\n")
"""Bytes that a descriptor may start with."""

_SPARSE = {
    b"KDMV": "VMDK sparse header at 0",
    b"COWD": "VMDK COWD header at 0",
    b"\xbe\xba\xfe\xca\0\0\0\0": "VMDK SESparse header at 0",
}


def sparse_magic(head: bytes) -> str | None:
    """Which sparse layout a file that starts like this has; needs 8 bytes."""
    return next((found for magic, found in _SPARSE.items() if head.startswith(magic)), None)


def _is_text(file: File, head: bytes) -> bool:
    if not head or head[0] not in _TEXT:
        return False
    from imagekit.formats.vmdk_descriptor import MAX_DESCRIPTOR, looks_like_descriptor

    return looks_like_descriptor(file.pread(0, MAX_DESCRIPTOR))


class VmdkFormat(DiskFormat):
    name = "vmdk"
    suffixes = (".vmdk",)

    def probe(self, file: File) -> str | None:
        head = file.pread(0, 8)
        found = sparse_magic(head)
        if found is None and _is_text(file, head):
            return "VMDK descriptor"
        return found

    def open(
        self, file: File, *, resolver: Resolver | None = None, options: OpenOptions = AS_IS
    ) -> SparseImage | DescriptorImage:
        head = file.pread(0, 8)
        if sparse_magic(head) is not None:
            from imagekit.formats.vmdk_sparse import SparseImage

            return SparseImage(file)
        if _is_text(file, head):
            from imagekit.formats.vmdk_extents import DescriptorImage

            return DescriptorImage(file, resolver)
        raise InvalidImage(
            f"no VMDK: it starts with {head[:4]!r}, expected b'KDMV' or a descriptor",
            hint="leave out -f to use the format found",
            path=file.name,
            offset=0,
        )

    def check(self, file: File) -> list[Problem]:
        from imagekit.formats.vmdk_check import check

        return check(self.open(file))


FORMAT = VmdkFormat()
