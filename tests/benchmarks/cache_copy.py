"""A copy of a cache's entry with another size, as a compute service asks for it: ``… cache_copy ENTRY SIZE LABEL``.

Prints the seconds of the call itself: the service that makes it runs already. What the call starts counts.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from imagekit.cache import ImageCache


def main(path: Path, size: int, label: str) -> None:
    cache = ImageCache(path.parent)
    entry = next(one for one in cache.entries() if one.path == path)
    started = time.monotonic()
    cache.resized(entry, size, label=label)
    print(time.monotonic() - started)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
