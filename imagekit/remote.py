"""Which sources are elsewhere, and how they become a file: http:// and https://.

An address is text that begins with a scheme; a path never does, and ``file:`` is no address. What a remote image
refers to is never followed: its names would be looked for on this machine.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from imagekit.errors import SourceError, UnsupportedFeature, UsageError
from imagekit.formats.files import FileIdentity, LocalFile
from imagekit.policy import Finding, finding
from imagekit.progress import SILENT, Control

if TYPE_CHECKING:
    from imagekit.checksums import Checksum
    from imagekit.glance import Glance
    from imagekit.remote_file import RemoteFile
    from imagekit.remote_http import HttpOptions

SCHEMES = ("http", "https")
GLANCE = "glance:"
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


@dataclass(frozen=True, slots=True)
class Access:
    """How remote sources may be reached. Picklable."""

    redirect_hosts: tuple[str, ...] = ()
    timeout: float = 30.0
    checksum: str | None = None
    """What the whole file must hash to, also a local one: ``ALGO:HEX``, or where a list with it is."""

    glance_url: str | None = None
    """Address of a Glance without Keystone; None: openstacksdk finds the one of ``os_cloud``."""

    os_cloud: str | None = None

    def http(self) -> HttpOptions:
        """The same, for one fetch."""
        from imagekit.remote_http import HttpOptions

        return HttpOptions(self.redirect_hosts, self.timeout)

    def glance(self) -> Glance:
        """The image service that is meant."""
        from imagekit.glance import Glance

        if self.glance_url is not None:
            return Glance.at(self.glance_url, timeout=self.timeout)
        return Glance.of_cloud(self.os_cloud, timeout=self.timeout)


NO_ACCESS = Access()


def is_remote(source: str | os.PathLike[str]) -> bool:
    """Whether it is an address. A path that exists is a path, whatever it looks like."""
    if not isinstance(source, str):
        return False
    found = _ADDRESS.match(source)
    if found is None or Path(source).exists():
        return False
    if found[1].lower() not in SCHEMES:
        raise UsageError(f"{found[1]}:// is not read", hint="give a path, or http:// or https://")
    return True


def is_glance(source: str | os.PathLike[str]) -> bool:
    """Whether it names an image in Glance."""
    return isinstance(source, str) and source.startswith(GLANCE) and not Path(source).exists()


def file_name(source: str | os.PathLike[str]) -> str:
    """The last part of an address' path, or of a path: what a file made of it is named after."""
    if is_glance(source):
        return os.fspath(source)[len(GLANCE) :].replace("/", "_") or "image"
    if isinstance(source, str) and _ADDRESS.match(source):
        from urllib.parse import unquote, urlsplit

        return PurePosixPath(unquote(urlsplit(source).path)).name.replace("\0", "") or "image"
    return Path(source).name


@dataclass(frozen=True, slots=True)
class Opened:
    """A file, what to say about where it came from, and what it was when a checksum was taken of it."""

    file: LocalFile
    findings: tuple[Finding, ...]
    identity: FileIdentity
    format: str | None = None
    """What a service states its format to be."""


def open_named(
    source: str | os.PathLike[str],
    access: Access,
    *,
    folder: Path | None = None,
    following: bool = False,
    control: Control = SILENT,
) -> Opened:
    """Open a path or an address. With a checksum all of it is read, and is the file that is meant."""
    if is_glance(source):
        return _open_glance(os.fspath(source), access, folder=folder, following=following, control=control)
    if is_remote(source):
        name = os.fspath(source)
        file: LocalFile = open_remote(name, access, folder=folder, following=following, control=control)
    else:
        file = LocalFile.open_source(source)
    try:
        identity, found = file.identity, _findings(file)
        if access.checksum is not None:
            found += _check(file, source, access, control)
    except BaseException:
        file.close()
        raise
    return Opened(file, tuple(found), identity)


def _open_glance(source: str, access: Access, *, folder: Path | None, following: bool, control: Control) -> Opened:
    """An image of Glance: all of it is fetched and hashed before anything is parsed."""
    _refuse_following(following)
    from imagekit.remote_file import RemoteFile

    service = access.glance()
    image = service.find(source[len(GLANCE) :])
    image.check_readable()
    options = replace(access.http(), headers=service.headers, context=service.context)
    file = RemoteFile.open(
        service.address(image), options, folder=folder, expected=image.size, label=image.label, control=control
    )
    try:
        if access.checksum is not None:
            found = _check(file, source, access, control)
        elif image.checksum is not None:
            found = _agrees(file, image.checksum, control)
        else:
            file.complete()
            found = [finding("no-checksum", "Glance states no checksum of the image that we can compute")]
    except BaseException:
        file.close()
        raise
    return Opened(file, tuple(found), file.identity, image.format)


def _refuse_following(following: bool) -> None:
    if following:
        raise UnsupportedFeature(
            "what a remote image refers to is not followed", hint="fetch the images first, and leave out the address"
        )


def _check(file: LocalFile, source: str | os.PathLike[str], access: Access, control: Control) -> list[Finding]:
    from imagekit.checksums import MAX_LIST, find_checksum

    def read(place: str) -> bytes:
        listed = replace(access, checksum=None)
        with open_named(place, listed, control=control).file as found:
            if found.size > MAX_LIST:
                raise SourceError(f"has {found.size} bytes, too much for a list of checksums", path=found.name)
            return found.pread(0, found.size)

    checksum = find_checksum(access.checksum or "", file_name(source), read)
    return _agrees(file, checksum, control)


def _agrees(file: LocalFile, checksum: Checksum, control: Control) -> list[Finding]:
    checksum.check(file, control=control)
    said = [finding("checksum", f"the {checksum.algorithm} of all {file.size} bytes is the one stated")]
    if checksum.weak:
        said.append(finding("weak-checksum", f"{checksum.algorithm} proves little: another file can have the same"))
    return said


def open_remote(
    source: str, access: Access, *, folder: Path | None = None, following: bool = False, control: Control = SILENT
) -> RemoteFile:
    """The file at an address; nothing but its first bytes, or all of it, was fetched then."""
    _refuse_following(following)
    from imagekit.remote_file import RemoteFile

    return RemoteFile.open(source, access.http(), folder=folder, control=control)


def _findings(file: LocalFile) -> list[Finding]:
    remote = _remote(file)
    if remote is None:
        return []
    if remote.ranges:
        return [finding("downloaded", "read over HTTP while it was fetched")]
    return [finding("staged", "the server has no ranges: all of it was fetched to a temporary file first")]


def is_fetched(file: LocalFile) -> bool:
    """Whether its name is an address, which only imagekit can open."""
    return _remote(file) is not None


def complete(file: LocalFile) -> None:
    """Fetch what is missing of a file that others are to read by its descriptor."""
    if (remote := _remote(file)) is not None:
        remote.complete()


def _remote(file: LocalFile) -> RemoteFile | None:
    if type(file) is LocalFile:  # most are; the modules for HTTP are loaded only when used
        return None
    from imagekit.remote_file import RemoteFile

    return file if isinstance(file, RemoteFile) else None
