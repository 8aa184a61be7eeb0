"""What happened: the result of a conversion, as data and as the JSON that scripts rely on."""

from __future__ import annotations

from imagekit.formats.base import JSON
from imagekit.records import dataclass

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Report:
    """A finished conversion. Sizes in bytes, ``verified`` names the level that was checked."""

    source: str
    source_format: str
    source_size: int
    source_virtual_size: int
    target: str
    target_format: str
    subformat: str
    virtual_size: int
    target_size: int
    identifier: str
    data_bytes: int
    kernel_copied_bytes: int
    seconds: float
    verified: str
    notes: tuple[str, ...] = ()
    confinement: tuple[str, ...] = ()
    """What held the process that read the image; empty when it was the caller's own."""

    source_map: tuple[int, ...] = ()
    target_map: tuple[int, ...] = ()
    """How full each part of the disk is with data, in percent (imagekit.pictures); where maps were asked for."""

    def to_json(self) -> dict[str, JSON]:
        return {
            "schema": SCHEMA,
            "source": {
                "filename": self.source,
                "format": self.source_format,
                "size": self.source_size,
                "virtual-size": self.source_virtual_size,
            },
            "target": {
                "filename": self.target,
                "format": self.target_format,
                "subformat": self.subformat,
                "virtual-size": self.virtual_size,
                "size": self.target_size,
                "id": self.identifier,
            },
            "data-bytes": self.data_bytes,
            "zero-bytes": self.virtual_size - self.data_bytes,
            "kernel-copied-bytes": self.kernel_copied_bytes,
            "seconds": round(self.seconds, 3),
            "verified": self.verified,
            "confinement": list(self.confinement),
            "notes": list(self.notes),
            **({"source-map": list(self.source_map), "target-map": list(self.target_map)} if self.source_map else {}),
        }
