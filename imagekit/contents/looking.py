"""A look into the guest's disk (``firmware`` and ``readiness`` beside this), here or in a confined process.

What comes back from a confined process is taken apart piece by piece: texts, numbers, and words of ours.
"""

from __future__ import annotations

from typing import Any, get_args

from imagekit.contents.firmware import Loader, SecureBoot, find_loader
from imagekit.contents.readiness import Check, Readiness, Status, check_readiness
from imagekit.formats.base import JSON, DiskImage
from imagekit.records import dataclass


@dataclass(frozen=True, slots=True)
class Seen:
    """The boot loader that was found, and what the guest is ready for."""

    loader: Loader
    readiness: Readiness


def look(image: DiskImage) -> Seen:
    """Read boot loaders, kernel modules, cloud-init and fstab."""
    return Seen(find_loader(image), check_readiness(image))


def seen_message(seen: Seen) -> dict[str, JSON]:
    """The same as JSON."""
    loader = seen.loader
    return {
        "loader": [loader.found, loader.reason, loader.signer, loader.signed],
        "generations": list(seen.readiness.generations),
        "checks": [[one.name, one.status, one.detail] for one in seen.readiness.checks],
    }


def as_seen(said: Any) -> Seen:
    """What a confined process saw; an error of Python's for what makes no sense."""
    found, reason, signer, signed = said["loader"]
    if signer is not None and signer not in get_args(SecureBoot):
        raise ValueError(f"{signer!r} signs nothing")
    generations = tuple(one for one in said["generations"] if one in (1, 2))
    checks = []
    for name, status, detail in said["checks"]:
        if status not in get_args(Status):
            raise ValueError(f"{status!r} is no answer")
        checks.append(Check(str(name), status, str(detail)))
    return Seen(Loader(bool(found), str(reason), signer, bool(signed)), Readiness(generations, tuple(checks)))
