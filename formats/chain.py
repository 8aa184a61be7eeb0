"""The image underneath: what a differencing or overlay disk reads where it holds nothing itself.

VHD and VHDX call it the parent, qcow2 the backing file. It is opened at first need, through the resolver that the
caller passed, and never by its name.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from imagekit.errors import UnsupportedFeature
from imagekit.formats.base import DiskImage, Extent, Reference, Resolver


class Below:
    """The image that ``reference`` names; without a reference there is none, and everything below is zero."""

    def __init__(self, reference: Reference | None, resolver: Resolver | None, name: str) -> None:
        self._reference = reference
        self._resolver = resolver
        self._name = name
        self._image: DiskImage | None = None
        self._lock = threading.Lock()

    def image(self) -> DiskImage | None:
        """The image, opened at the first call; UnsupportedFeature when nobody allowed that."""
        if self._reference is None:
            return None
        with self._lock:
            if self._image is None:
                if self._resolver is None:
                    raise UnsupportedFeature(
                        f"the image needs its {self._reference.kind.replace('-', ' ')} {self._reference.name!r}, "
                        "and nobody allowed to open it",
                        hint="where the image's origin is trusted: --follow-references",
                        path=self._name,
                    )
                self._image = self._resolver(self._reference)
            return self._image

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """What lies below, one deeper; zeros behind its end. Cover exactly the range."""
        image, end = self.image(), start + length
        if image is not None:
            for extent in image.extents(start, length):
                yield extent.elsewhere(extent.start, image.container, deeper=1)
                start = extent.end
        if start < end:
            yield Extent(start, end - start, data=False, zero=True, present=False)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from below; zeros behind its end."""
        image = self.image()
        inside = 0 if image is None else max(0, min(len(buffer), image.virtual_size - offset))
        if image is not None and inside:
            image.pread_into(offset, buffer[:inside])
        buffer[inside:] = bytes(len(buffer) - inside)

    def close(self) -> None:
        if self._image is not None:
            self._image.close()
