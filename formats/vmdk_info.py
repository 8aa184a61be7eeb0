"""What a VMDK says of itself, in the words of ``info``; the same for a file and for a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from imagekit.errors import UnsupportedFeature
from imagekit.formats.base import JSON, Fact, ImageInfo, Reference
from imagekit.formats.vmdk_descriptor import NO_PARENT, Descriptor
from imagekit.formats.vmdk_header import (
    MARKERS,
    REDUNDANT,
    ZERO_GRAINS,
    CowdHeader,
    GrainLayout,
    HostedHeader,
    SparseHeader,
)


def sparse_info(
    header: SparseHeader, layout: GrainLayout, descriptor: Descriptor | None, facts: Iterable[Fact] = ()
) -> ImageInfo:
    """Of a sparse file: what its header and the descriptor inside say. ``facts`` are what its tables say."""
    features: dict[str, JSON] = {"extent-type": _kind(header)}
    if isinstance(header, HostedHeader):
        features["version"] = header.version
        features["compressed"] = header.compressed
        features["markers"] = bool(header.flags & MARKERS)
        features["zero-grains"] = bool(header.flags & ZERO_GRAINS)
        features["redundant-directory"] = bool(header.flags & REDUNDANT)
        features["unclean-shutdown"] = bool(header.unclean)
    features |= descriptor_features(descriptor)
    parent = None if descriptor is None else descriptor.parent()
    return ImageInfo(
        format="vmdk",
        virtual_size=layout.virtual_size,
        subformat=_kind(header) if descriptor is None else descriptor.create_type,
        block_size=layout.grain,
        features=features,
        references=() if parent is None else (parent,),
        facts=(*_header_facts(header), *_inside_facts(layout, descriptor), *facts),
    )


def descriptor_features(descriptor: Descriptor | None) -> dict[str, JSON]:
    """What is worth knowing of a descriptor's text."""
    if descriptor is None:
        return {}
    out: dict[str, JSON] = {"create-type": descriptor.create_type}
    if descriptor.cid is not None:
        out["cid"] = f"{descriptor.cid:08x}"
    if descriptor.parent_cid != NO_PARENT:
        out["parent-cid"] = f"{descriptor.parent_cid:08x}"
    if descriptor.encoding is not None:
        out["encoding"] = descriptor.encoding
    for key, name in (("ddb.adaptertype", "adapter-type"), ("ddb.virtualhwversion", "hardware-version")):
        if key in descriptor.database:
            out[name] = descriptor.database[key]
    return out


def check_readable(header: SparseHeader | None, descriptor: Descriptor | None, name: str) -> None:
    """UnsupportedFeature for what would be read wrongly: differences to a parent, and what a flag announces."""
    if isinstance(header, HostedHeader) and header.unknown_flags:
        raise UnsupportedFeature(f"unknown VMDK flags {header.unknown_flags:#x}", path=name, offset=8)
    parent: Reference | None = None if descriptor is None else descriptor.parent()
    if parent is not None:
        raise UnsupportedFeature(
            f"a delta disk: what it does not hold is in its parent {parent.name!r}, which imagekit does not read",
            hint="consolidate the snapshots, or clone the disk, where it comes from",
            path=name,
        )


def _kind(header: SparseHeader) -> str:
    if isinstance(header, HostedHeader):
        return "hosted sparse"
    return "COWD" if isinstance(header, CowdHeader) else "SESparse"


def _header_facts(header: SparseHeader) -> Iterator[Fact]:
    if not isinstance(header, HostedHeader):
        return
    if header.unknown_flags:
        yield Fact("unknown-feature", f"unknown flags {header.unknown_flags:#x}", 8)
    if header.unclean:
        yield Fact(
            "unclean-shutdown", "the last writer did not close the image: its latest writes may be missing", 72
        )


def _inside_facts(layout: GrainLayout, descriptor: Descriptor | None) -> Iterator[Fact]:
    if descriptor is None:
        yield Fact(
            "no-descriptor", "there is no descriptor: the file may be a part of a disk, or a difference to one"
        )
        return
    yield from descriptor.facts
    yield from descriptor.embedded_facts(layout.virtual_size)
