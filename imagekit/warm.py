"""What the first disk would wait for, done before: modules and tables.

For an agent of green threads. What one of them does in the middle of its work, all others wait for, and loading the
readers of disk formats takes a tenth of a second and more.
"""

from __future__ import annotations

import importlib

from imagekit.formats.crc32c import crc32c

MODULES = (
    "imagekit.formats.raw",
    "imagekit.formats.qcow2",
    "imagekit.formats.vmdk",
    "imagekit.formats.vdi",
    "imagekit.formats.vhd",
    "imagekit.formats.vhd_header",
    "imagekit.formats.vhd_locators",
    "imagekit.formats.vhdx",
    "imagekit.formats.vhdx_image",
)


def make_ready() -> None:
    """Load the formats, and make the tables for the structures that they check."""
    for module in MODULES:
        importlib.import_module(module)
    from imagekit.formats.vhdx_header import HEADER_SIZE, REGION_TABLE_SIZE

    for structure in (HEADER_SIZE, REGION_TABLE_SIZE):
        crc32c(bytes(structure))
