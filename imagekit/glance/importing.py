"""What the import plugin does with an image, in a process of its own: judge it, convert it, describe it.

A task of imagekit.child: everything goes in and comes out as plain data. The image is what strangers uploaded, so it
is converted confined, its content has to be in the format that was stated, and all guest bytes are compared.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from imagekit import api
from imagekit.formats.base import JSON
from imagekit.glance.upload import describe
from imagekit.limits import Limits
from imagekit.progress import Callback
from imagekit.sources import Reading, located, open_source


def import_image(
    source: str,
    target: str,
    *,
    stated_format: str,
    target_format: str,
    identifier: str,
    limits: Mapping[str, int],
    progress: Callback | None = None,
    cancel: threading.Event | None = None,
) -> dict[str, JSON]:
    """Write ``target`` and tell its ``size``, ``virtual-size``, and the ``properties`` that a look at it gives."""
    bounds = Limits(**limits)
    report = api.convert(
        source,
        target,
        target_format=target_format,
        stated_format=stated_format,
        identifier=identifier,
        verify="content",
        confined=True,
        limits=bounds,
        progress=progress,
        cancel=cancel,
    )
    with open_source(target, Reading(target_format, limits=bounds)) as written, located(written.file):
        described, warnings = describe(written.image, target_format)
    described.pop("min_disk")  # no plugin can set that
    return {
        "size": report.target_size,
        "virtual-size": report.virtual_size,
        "properties": described,
        "notes": [*report.notes, *warnings],
    }
