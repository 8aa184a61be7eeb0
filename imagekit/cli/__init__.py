"""The command line: prints, parses, exits; decides nothing."""

from __future__ import annotations

import gc
import os
import sys
from typing import NoReturn

OBJECTS = 50_000
"""As many are made before the collector looks for cycles among them; loading the modules makes less."""


def program() -> NoReturn:
    """The command ``imagekit``: :func:`main`, without the clean-up of an interpreter whose memory is gone anyway."""
    gc.set_threshold(OBJECTS)
    try:
        main()
    except SystemExit as ending:
        from imagekit.ending import leave

        leave(ending.code)
        raise


def main() -> NoReturn:
    """Run the command line of ``sys.argv``."""
    if sys.argv[1:] in (["--version"], ["-V"]):
        # Answered before anything heavy is imported: scripts ask this often.
        import imagekit

        print(f"imagekit {imagekit.__version__}")
        raise SystemExit(0)
    arguments = sys.argv[1:]
    if not _will_confine(arguments):
        from imagekit.cli.app import run

        raise SystemExit(run(arguments))
    from contextlib import suppress

    from imagekit.confinement import start as confined_start
    from imagekit.errors import ToolError

    with suppress(ToolError):  # said, in the words of every error, when it is tried again
        confined_start.prepare()  # it loads while we do
    try:
        from imagekit.cli.app import run

        raise SystemExit(run(arguments))
    finally:
        confined_start.end()


def _will_confine(arguments: list[str]) -> bool:
    """A guess before anything is parsed: a wrong one costs a process, or the time it would have saved."""
    if arguments[:1] not in (["info"], ["convert"], ["prepare"]) or "--no-confined" in arguments:
        return False
    asked = os.environ.get("IMAGEKIT_CONFINED", "").lower() in ("1", "true", "t", "yes", "y", "on")
    return asked or any(one == "--confined" or "://" in one or one.startswith("glance:") for one in arguments)
