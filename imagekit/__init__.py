"""imagekit: any cloud image to a running Hyper-V guest.

The names in ``__all__`` are the promise; everything else may move. They are loaded when they are first used, so that
``import imagekit`` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imagekit.api import (
        boot,
        build_config_drive,
        check,
        check_config_drive,
        compare,
        convert,
        create,
        identify,
        info,
        measure,
        merge,
        open_image,
        prepare,
        rebase,
        resize,
    )
    from imagekit.errors import ImagekitError
    from imagekit.limits import Limits
    from imagekit.uploads import upload

__version__ = "0.1.0"

__all__ = [
    "ImagekitError",
    "Limits",
    "boot",
    "build_config_drive",
    "check",
    "check_config_drive",
    "compare",
    "convert",
    "create",
    "identify",
    "info",
    "measure",
    "merge",
    "open_image",
    "prepare",
    "rebase",
    "resize",
    "upload",
]

_HOMES = dict.fromkeys(__all__, "imagekit.api") | {
    "ImagekitError": "imagekit.errors",
    "Limits": "imagekit.limits",
    "upload": "imagekit.uploads",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
