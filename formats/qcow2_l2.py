"""L2 tables of qcow2, decoded: what each cluster or subcluster is and where it lies.

Follows QEMU's docs/interop/qcow2.txt, "Cluster mapping" and "Extended L2 Entries". A table is decoded as a whole by
numpy into arrays of kind and offset; entries that no sound image has are CorruptImage.

With an external data file the offsets are those of that file, and an offset of 0 with the copied flag is a place.
That they must be the guest's own offsets is for the reader to see: a table does not know where in the disk it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from imagekit.errors import CorruptImage
from imagekit.formats.base import File
from imagekit.formats.qcow2_header import Qcow2Header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Table = NDArray[np.uint64]

OFFSET_MASK = 0x00FFFFFFFFFFFE00
COPIED_FLAG = 1 << 63
COMPRESSED_FLAG = 1 << 62
ZERO_FLAG = 1

UNALLOCATED, ZERO, PLAIN, COMPRESSED = range(4)
SUBCLUSTERS = 32


def compressed_offset_mask(header: Qcow2Header) -> int:
    """The bits of a compressed cluster's descriptor that say where its stream starts; above them is its length."""
    return (1 << (62 - (header.cluster_bits - 8))) - 1


class L2(NamedTuple):
    """One decoded L2 table: an item a cluster, or a subcluster with extended L2 entries."""

    kinds: NDArray[np.uint8]
    offsets: Table
    descriptors: Table  # one a cluster


def decode_l2(raw: bytes, header: Qcow2Header, file: File, at: int) -> L2:
    """``raw`` is the table, a cluster read at ``at`` of the file."""
    import numpy as np

    words = np.frombuffer(raw, ">u8").astype(np.uint64)
    if header.extended_l2:
        pairs = words.reshape(-1, 2)
        kinds, offsets = _decode_extended(pairs, header, file, at)
        return L2(kinds, offsets, pairs[:, 0])
    compressed = (words & np.uint64(COMPRESSED_FLAG)) != 0
    _check_compressed(compressed, words, header, file, at)
    offsets = np.where(compressed, np.uint64(0), words & np.uint64(OFFSET_MASK))
    kinds = np.where(_placed(words, offsets, header), PLAIN, UNALLOCATED).astype(np.uint8)
    kinds[(words & np.uint64(ZERO_FLAG)) != 0] = ZERO
    kinds[compressed] = COMPRESSED
    if header.version == 2 and (kinds == ZERO).any():
        raise CorruptImage(
            "an L2 entry has the zero flag, which version 2 does not have",
            path=file.name,
            offset=at + int((kinds == ZERO).argmax()) * 8,
        )
    _check_plain(offsets, kinds == PLAIN, header, file, at)
    return L2(kinds, offsets, words)


def _placed(descriptors: Table, offsets: Table, header: Qcow2Header) -> NDArray[np.bool_]:
    """Which entries that are not compressed have a place."""
    import numpy as np

    placed: NDArray[np.bool_] = offsets != 0
    if header.external_data:
        placed |= (descriptors & np.uint64(COPIED_FLAG)) != 0
    return placed


def _decode_extended(
    words: Table, header: Qcow2Header, file: File, at: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    """Kinds and offsets by subcluster (bit i of each half of the bitmap, low half: allocated)."""
    import numpy as np

    descriptors, bitmaps = words[:, 0], words[:, 1]
    # Little-endian bytes with little bit order: column i is bit i.
    bits = np.unpackbits(bitmaps.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
    allocated, zero = bits[:, :SUBCLUSTERS] != 0, bits[:, SUBCLUSTERS:] != 0
    compressed = (descriptors & np.uint64(COMPRESSED_FLAG)) != 0
    _check_compressed(compressed, descriptors, header, file, at)
    offsets = np.where(compressed, np.uint64(0), descriptors & np.uint64(OFFSET_MASK))
    placed = _placed(descriptors, offsets, header)
    lost = (allocated & zero).any(axis=1) | (allocated.any(axis=1) & ~placed)
    wrong = np.flatnonzero((lost | ((descriptors & np.uint64(1)) != 0)) & ~compressed)
    if len(wrong):
        raise CorruptImage(
            "an extended L2 entry contradicts its bitmap",
            path=file.name,
            offset=at + int(wrong[0]) * 16,
        )
    kinds = np.where(allocated, PLAIN, UNALLOCATED).astype(np.uint8)
    kinds[zero] = ZERO
    kinds[compressed] = COMPRESSED
    steps = np.arange(SUBCLUSTERS, dtype=np.uint64) * np.uint64(header.cluster_size // SUBCLUSTERS)
    spread = np.where(placed[:, None], offsets[:, None] + steps, np.uint64(0))
    _check_plain(offsets, (kinds == PLAIN).any(axis=1), header, file, at)
    return kinds.reshape(-1), spread.reshape(-1)


def _check_plain(offsets: Table, plain: NDArray[Any], header: Qcow2Header, file: File, at: int) -> None:
    import numpy as np

    wrong = (offsets & np.uint64(header.cluster_size - 1)) != 0
    if not header.external_data:
        # A file may end inside its last cluster, where the guest's disk ends too: checked when that is read.
        wrong |= offsets >= np.uint64(file.size)
    entries = np.flatnonzero(plain & wrong)
    if len(entries):
        entry = int(entries[0])
        raise CorruptImage(
            f"an L2 entry points to {int(offsets[entry]):#x}: not on a cluster or behind the file's end "
            f"{file.size:#x}",
            hint="the file looks damaged or truncated; fetch it again and compare its checksum",
            path=file.name,
            offset=at + entry * header.l2_entry_size,
        )


def _check_compressed(compressed: NDArray[Any], descriptors: Table, header: Qcow2Header, file: File, at: int) -> None:
    import numpy as np

    if header.external_data and compressed.any():
        raise CorruptImage(
            "a compressed cluster in an image whose data lies in another file",
            path=file.name,
            offset=at + int(compressed.argmax()) * header.l2_entry_size,
        )
    # A stream may end before its last sector does, so only where it starts can be judged here.
    starts = descriptors & np.uint64(compressed_offset_mask(header))
    entries = np.flatnonzero(compressed & (starts >= np.uint64(file.size)))
    if len(entries):
        entry = int(entries[0])
        raise CorruptImage(
            f"a compressed cluster starts at {int(starts[entry]):#x}, behind the file's end {file.size:#x}",
            hint="the file looks damaged or truncated; fetch it again and compare its checksum",
            path=file.name,
            offset=at + entry * header.l2_entry_size,
        )
