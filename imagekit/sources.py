"""Where images come from: a path today. Opened once, judged, and watched for changes until the end.

A :class:`Source` holds the one open file; the format is chosen once, from that file, and never probed again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from imagekit import policy
from imagekit.errors import ImagekitError, SourceError
from imagekit.formats import registry
from imagekit.formats.base import DiskImage, File
from imagekit.formats.files import FileIdentity, LocalFile


@dataclass(frozen=True, slots=True)
class Source:
    """An open, recognised image file."""

    file: LocalFile
    format: str
    image: DiskImage
    findings: tuple[policy.Finding, ...]
    identity: FileIdentity

    def check_unchanged(self) -> None:
        """SourceError when the file changed since it was opened."""
        changed = self.identity.differences(self.file.identity)
        if changed:
            raise SourceError(
                f"changed while it was read ({', '.join(changed)})",
                path=self.file.name,
                hint="stop what writes to it, or convert a snapshot",
            )

    def close(self) -> None:
        self.image.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_source(
    path: str | os.PathLike[str],
    *,
    declared: str | None = None,
    allow: frozenset[str] | None = frozenset(),
) -> Source:
    """Open, recognise and judge. ``allow`` None reports the findings and refuses nothing (``info``)."""
    file = LocalFile.open_source(path)
    try:
        return _judged(file, declared, allow)
    except BaseException:
        file.close()
        raise


def _judged(file: LocalFile, declared: str | None, allow: frozenset[str] | None) -> Source:
    claims = registry.probe(file)
    name = file.name if file.size else ""  # that a file is empty is said below, whatever its name promises
    findings = [
        *policy.judge_use(held_for_writing=file.held_for_writing),
        *policy.judge_claims(claims, declared, name=name),
    ]
    if allow is not None:
        policy.enforce(findings, allow=allow, path=file.name)
    identity = file.identity
    chosen = registry.choose(file, claims, declared)
    with located(file):
        image = chosen.open(file)
    findings += policy.judge_info(image.info())
    if allow is not None:
        policy.enforce(findings, allow=allow, path=file.name)
    return Source(file, chosen.name, image, tuple(findings), identity)


@contextmanager
def located(file: File) -> Iterator[None]:
    """Give errors of a parser the name of the file they are about."""
    try:
        yield
    except ImagekitError as error:
        error.path = error.path or file.name
        raise
