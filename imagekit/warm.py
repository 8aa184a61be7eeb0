"""What the first disk would wait for, done before: the modules.

For an agent of green threads. What one of them does in the middle of its work, all others wait for, and loading the
readers of disk formats takes a tenth of a second and more.
"""

from __future__ import annotations

import importlib

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
    """Load the formats."""
    for module in MODULES:
        importlib.import_module(module)
