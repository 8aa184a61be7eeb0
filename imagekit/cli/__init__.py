"""The command line: prints, parses, exits; decides nothing."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Entry point of ``imagekit``."""
    if sys.argv[1:] in (["--version"], ["-V"]):
        # Answered before anything heavy is imported: scripts ask this often.
        import imagekit

        print(f"imagekit {imagekit.__version__}")
        raise SystemExit(0)
    from imagekit.cli.app import run

    raise SystemExit(run(sys.argv[1:]))
