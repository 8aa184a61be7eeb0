"""Which sources are elsewhere, and how they become a file: http(s)://, s3:// and its like, glance:, and pipes.

An address is text that begins with a scheme; a path never does, and ``file:`` is no address. What a remote image
refers to is never followed: its names would be looked for on this machine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from imagekit.errors import CorruptImage, InvalidImage, SourceError, UnknownFormat, UnsupportedFeature, UsageError
from imagekit.formats.files import FileIdentity, LocalFile
from imagekit.policy import Finding, finding
from imagekit.progress import SILENT, Control
from imagekit.records import dataclass, replace

if TYPE_CHECKING:
    from imagekit.glance.client import Glance
    from imagekit.remote.arriving import Arriving
    from imagekit.remote.checksums import Checksum, Proof
    from imagekit.remote.file import RemoteFile
    from imagekit.remote.http import HttpOptions
    from imagekit.remote.partial import Keeping

SCHEMES = ("http", "https")
GLANCE = "glance:"
STDIN = "-"
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


@dataclass(frozen=True, slots=True)
class Access:
    """How remote sources may be reached. Picklable."""

    redirect_hosts: tuple[str, ...] = ()
    timeout: float = 30.0
    checksum: str | None = None
    """What the whole file must hash to, also a local one: ``ALGO:HEX``, or where a list with it is."""

    keyring: str | None = None
    """OpenPGP keys, one of which must have signed the list that ``checksum`` names."""

    partial_dir: str | None = None
    """Where to keep what came of an interrupted download."""

    glance_url: str | None = None
    """Address of a Glance without Keystone; None: openstacksdk finds the one of ``os_cloud``."""

    os_cloud: str | None = None

    def http(self) -> HttpOptions:
        """The same, for one fetch."""
        from imagekit.remote.http import HttpOptions

        return HttpOptions(self.redirect_hosts, self.timeout)

    def glance(self) -> Glance:
        """The image service that is meant."""
        from imagekit.glance.client import Glance

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
    if found[1] not in SCHEMES and not _is_stored(found[1]):
        raise UsageError(f"{found[1]}:// is not read", hint="give a path, or http://, https:// or s3://")
    return True


def _is_stored(scheme: str) -> bool:
    """Whether fsspec has a way to such addresses that leads over a network."""
    from imagekit.remote.objects import SCHEMES as STORED

    return scheme in STORED


def is_glance(source: str | os.PathLike[str]) -> bool:
    """Whether it names an image in Glance."""
    return isinstance(source, str) and source.startswith(GLANCE) and not Path(source).exists()


def is_elsewhere(source: object) -> bool:
    """Whether its bytes come over a network."""
    return isinstance(source, str) and (is_glance(source) or is_remote(source))


def file_name(source: str | os.PathLike[str]) -> str:
    """The last part of an address' path, or of a path: what a file made of it is named after."""
    if source == STDIN:
        return "image"
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

    checksum: Checksum | None = None
    """What the caller, or else a service, states its checksum to be."""

    proof: Proof | None = None
    """A checksum that is still computed; nothing may come of the file before it is settled."""

    @property
    def name(self) -> str:
        return self.file.name

    def settle(self) -> None:
        """Wait for the proof, look whether the file is still the one that was opened; or the error."""
        if self.proof is not None:
            self.proof.settle()
        if changed := self.identity.differences(self.file.identity):
            raise SourceError(
                f"changed while it was read ({', '.join(changed)})",
                path=self.file.name,
                hint="stop what writes to it, or convert a snapshot",
            )

    def forget(self) -> None:
        """All is done: nothing need be kept for another run."""
        if (coming := arriving(self.file)) is not None:
            coming.forget()

    def close(self) -> None:
        if self.proof is not None:
            self.proof.stop()
        self.file.close()

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Where the bytes make no sense, that they are not the ones meant comes first."""
        try:
            yield
        except (UnknownFormat, InvalidImage, CorruptImage):
            if self.proof is not None:
                self.proof.settle()
            raise


def open_named(
    source: str | os.PathLike[str],
    access: Access,
    *,
    folder: Path | None = None,
    following: bool = False,
    later: bool = False,
    control: Control = SILENT,
) -> Opened:
    """Open a path, an address or standard input.

    A checksum is computed before this returns, or, for a caller who settles what is opened, ``later``: while the file
    is read.
    """
    if access.keyring is not None and access.checksum is None:
        raise UsageError("a keyring is for the list that --checksum names", hint="add --checksum FILE or URL")
    stated = None if access.checksum is None else _stated(source, access, control)
    if is_glance(source):
        _refuse_following(following)
        opening = _open_glance(os.fspath(source), access, stated, folder=folder, control=control)
    else:
        file = _open_file(source, access, stated, folder=folder, following=following, control=control)
        opening = Opened(file, tuple(_findings(file)), file.identity, checksum=stated)
    try:
        return _proven(opening, access, later=later, control=control)
    except BaseException:
        opening.file.close()
        raise


def _open_file(
    source: str | os.PathLike[str],
    access: Access,
    stated: Checksum | None,
    *,
    folder: Path | None,
    following: bool,
    control: Control,
) -> LocalFile:
    if source == STDIN:
        from imagekit.remote.stream import open_stdin

        _refuse_following(following)
        return open_stdin(folder, control=control)
    if is_remote(source):
        _refuse_following(following)
        return _open_remote(os.fspath(source), access, stated, folder=folder, control=control)
    return LocalFile.open_source(source)


def _proven(opening: Opened, access: Access, *, later: bool, control: Control) -> Opened:
    """With the checksum that the caller or a service states, computed or being computed."""
    file, checksum, found = opening.file, opening.checksum, list(opening.findings)
    found += _about_keeping(file, access, checksum)
    if checksum is None:
        return replace(opening, findings=tuple(found))
    found.append(finding("checksum", f"the {checksum.algorithm} of all its bytes is the one stated"))
    if checksum.weak:
        found.append(finding("weak-checksum", f"{checksum.algorithm} proves little: another file can have the same"))
    if later:
        from imagekit.remote.checksums import Proof

        return replace(opening, findings=tuple(found), proof=Proof(file, checksum, control))
    checksum.check(file, control=control)
    return replace(opening, findings=tuple(found))


def _about_keeping(file: LocalFile, access: Access, checksum: Checksum | None) -> Iterator[Finding]:
    coming = arriving(file)
    if access.partial_dir is None or coming is None:
        return
    if coming.resumed:
        yield finding("resumed", f"{coming.resumed} bytes were there from an interrupted run")
    elif checksum is None:
        yield finding("not-kept", "nothing is kept for another run: that needs a checksum")


def _keeping(access: Access, checksum: Checksum | None) -> Keeping | None:
    if access.partial_dir is None or checksum is None:
        return None
    from imagekit.remote.partial import Keeping

    return Keeping(Path(access.partial_dir), f"{checksum.algorithm}:{checksum.value}")


def _stated(source: str | os.PathLike[str], access: Access, control: Control) -> Checksum:
    from imagekit.remote.checksums import MAX_LIST, find_checksum

    def read(place: str) -> bytes:
        listed = replace(access, checksum=None, keyring=None)
        with open_named(place, listed, control=control).file as found:
            if found.size > MAX_LIST:
                raise SourceError(f"has {found.size} bytes, too much for a list of checksums", path=found.name)
            return found.pread(0, found.size)

    return find_checksum(access.checksum or "", file_name(source), read, keyring=access.keyring)


def _open_glance(
    source: str, access: Access, stated: Checksum | None, *, folder: Path | None, control: Control
) -> Opened:
    """An image of Glance. What it states to be the hash of it is computed unless the caller states one."""
    from imagekit.remote.file import RemoteFile

    service = access.glance()
    image = service.find(source[len(GLANCE) :])
    image.check_readable()
    checksum = stated or image.checksum
    file = RemoteFile.open(
        service.address(image),
        replace(access.http(), headers=service.headers, context=service.context),
        folder=folder,
        expected=image.size,
        label=image.label,
        keeping=_keeping(access, checksum),
        control=control,
    )
    found = []
    if checksum is None:
        found = [finding("no-checksum", "Glance states no checksum of the image that we can compute")]
    return Opened(file, tuple(found), file.identity, image.format, checksum=checksum)


def _refuse_following(following: bool) -> None:
    if following:
        raise UnsupportedFeature(
            "what a remote image refers to is not followed", hint="fetch the images first, and leave out the address"
        )


def _open_remote(
    source: str, access: Access, stated: Checksum | None, *, folder: Path | None, control: Control
) -> RemoteFile:
    """The file at an address; nothing but its first bytes, or all of it, was fetched then."""
    from imagekit.remote.file import RemoteFile

    keeping = _keeping(access, stated)
    if _is_stored(source.partition("://")[0]):
        from imagekit.remote.objects import StoredObject

        return RemoteFile.of(StoredObject(source, access.http()), folder=folder, keeping=keeping, control=control)
    return RemoteFile.open(source, access.http(), folder=folder, keeping=keeping, control=control)


def _findings(file: LocalFile) -> list[Finding]:
    if type(file) is LocalFile:
        return []
    from imagekit.remote.file import RemoteFile

    if not isinstance(file, RemoteFile):
        return [finding("staged", "what comes through the pipe is kept in a temporary file, and read as it comes")]
    if file.ranges:
        return [finding("downloaded", "read over the network while it was fetched")]
    return [finding("staged", "the server has no ranges: all of it was fetched to a temporary file first")]


def is_fetched(file: LocalFile) -> bool:
    """Whether its name is no path, but something that only imagekit can open."""
    return arriving(file) is not None or file.name.startswith("<")


def complete(file: LocalFile) -> None:
    """Wait for what is missing of a file that others are to read by its descriptor."""
    if (coming := arriving(file)) is not None:
        coming.complete()


def want(file: LocalFile, end: int) -> None:
    """What lies before ``end`` will very likely be read: it may be fetched while nobody waits for it."""
    if (coming := arriving(file)) is not None:
        coming.want(end)


def want_all(file: LocalFile) -> None:
    """All of the file will be read: what is missing may be fetched while nobody waits for it."""
    if (coming := arriving(file)) is not None:
        coming.want_all()


def arriving(file: LocalFile) -> Arriving | None:
    """The file, where its bytes may still be coming."""
    if type(file) is LocalFile:  # most are; the modules for the others are loaded only when used
        return None
    from imagekit.remote.arriving import Arriving

    return file if isinstance(file, Arriving) else None
