"""imagekit: any cloud image to a running Hyper-V guest."""

from __future__ import annotations

__version__ = "0.1.0"
