"""What a Nova compute driver for Hyper-V needs: qcow2 and raw images of Glance, as disks that Hyper-V starts.

    VHDUtils                            drop-in for os-win's vhdutils, on Windows and Linux, without virtdisk.dll
    prepare_root, create_ephemeral,     what spawn, resize, rescue, shelve and snapshot need
    attach_config_drive, snapshot
    enable                              makes compute-hyperv take qcow2 and raw images

The names are loaded when they are first used. Nothing here imports Nova, os-win or compute-hyperv unless it is there
to be served: :func:`enable` works on the driver it is given, errors are os-win's own where os-win is installed.
What takes time runs in a process of its own (imagekit.child), so that an agent under eventlet goes on.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imagekit.nova.disks import attach_config_drive, create_ephemeral, prepare_root, snapshot
    from imagekit.nova.hooks import enable
    from imagekit.nova.vhdutils import VHDUtils

__all__ = ["VHDUtils", "attach_config_drive", "create_ephemeral", "enable", "prepare_root", "snapshot"]

_HOMES = {
    "VHDUtils": "imagekit.nova.vhdutils",
    "enable": "imagekit.nova.hooks",
    **dict.fromkeys(("attach_config_drive", "create_ephemeral", "prepare_root", "snapshot"), "imagekit.nova.disks"),
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
