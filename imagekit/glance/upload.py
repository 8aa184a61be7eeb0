"""Disks to Glance: a file becomes an image, described by what lies on it, or nothing is left there.

The file is judged like any source, then read once from the open file: what is sent is what is hashed, and Glance has
to come to the same hash. Whatever goes wrong after the image was created, it is deleted again; it becomes protected
last.

The properties are those that Nova's Hyper-V drivers read (hw_machine_type, os_secure_boot, os_type), as far as a look
at the disk tells (imagekit.contents: readiness, firmware); what is unknown is left out, and the caller's own win.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

from imagekit.contents.firmware import find_loader
from imagekit.contents.readiness import check_readiness
from imagekit.conversion import reading
from imagekit.errors import (
    ImagekitError,
    SourceError,
    TargetError,
    UnsupportedFeature,
    UsageError,
    VerificationFailed,
)
from imagekit.formats.base import JSON, DiskImage, GiB, MiB
from imagekit.formats.files import LocalFile
from imagekit.glance.client import FORMATS, PREFIX, Glance, GlanceImage, is_id
from imagekit.plan import ConvertOptions
from imagekit.progress import SILENT, Control
from imagekit.records import dataclass, field
from imagekit.remote.addresses import Access, complete
from imagekit.remote.checksums import Checksum
from imagekit.report import SCHEMA
from imagekit.sources import Source, located, open_source

PIECE = MiB
ALGORITHM = "sha512"
"""What Glance computes unless its operator chose another one."""
MAX_NAME = 255

Visibility = Literal["private", "shared", "community", "public"]
NUMBERS = ("min_disk", "min_ram")
OURS = frozenset(
    ("id", "name", "status", "size", "virtual_size", "checksum", "disk_format", "container_format", "owner")
) | {"visibility", "protected", "tags", "os_hidden", "os_hash_algo", "os_hash_value"}
"""What Glance has besides properties, and gets in other ways."""


@dataclass(frozen=True, slots=True)
class UploadOptions:
    """What a caller can say about the image to be."""

    disk_format: str | None = None
    """What to call the file's format; None: what it is."""

    properties: Mapping[str, str] = field(default_factory=dict)
    """Win over what was found; an empty one is left out."""

    visibility: Visibility | None = None
    protected: bool = False
    same_name: bool = False
    """Also where an image has that name."""

    def __post_init__(self) -> None:
        if self.disk_format not in (None, *FORMATS):
            raise UsageError(f"disk format {self.disk_format!r}", hint=f"choose one of: {', '.join(FORMATS)}")
        if self.visibility not in (None, *get_args(Visibility)):
            raise UsageError(
                f"visibility {self.visibility!r}", hint=f"choose one of: {', '.join(get_args(Visibility))}"
            )
        for name, value in self.properties.items():
            if name in OURS or not name:
                raise UsageError(f"{name!r} is no property", hint="see imagekit upload --help for its option")
            if name in NUMBERS and value and not (value.isascii() and value.isdigit()):
                raise UsageError(f"{name} {value!r} is not a whole number")


@dataclass(frozen=True, slots=True)
class Upload:
    """An image that is active in Glance and has the bytes that were sent."""

    source: str
    id: str
    name: str
    disk_format: str
    size: int
    virtual_size: int
    checksum: Checksum
    values: Mapping[str, Any]
    """What it was created with."""

    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, JSON]:
        return {
            "schema": SCHEMA,
            "source": self.source,
            "id": self.id,
            "name": self.name,
            "disk-format": self.disk_format,
            "size": self.size,
            "virtual-size": self.virtual_size,
            "digest": {"algorithm": self.checksum.algorithm, "value": self.checksum.value},
            "properties": dict(self.values),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True, slots=True)
class Destination:
    """A name in a Glance under which there is nothing yet."""

    service: Glance
    name: str

    @classmethod
    def open(cls, target: str, access: Access, *, same_name: bool = False) -> Destination:
        """Log in and look; to be done before hours of conversion. TargetError where the name is taken."""
        name = target.removeprefix(PREFIX)
        if name == target or not name or len(name) > MAX_NAME or not name.isprintable():
            raise UsageError(f"{target!r} is no image to be", hint=f"name it {PREFIX}NAME, such as {PREFIX}debian-12")
        if is_id(name):
            raise UsageError(f"{name} looks like an id", hint="Glance makes the id: give a name")
        service = access.glance()
        taken = service.named(name)
        if taken and not same_name:
            raise TargetError(
                f"an image has that name: {taken[0].id}",
                path=target,
                hint="choose another name, or add --same-name: who asks for that name then has to give the id",
            )
        return cls(service, name)

    def fill(
        self,
        file: str | os.PathLike[str],
        reads: ConvertOptions,
        options: UploadOptions,
        *,
        control: Control = SILENT,
    ) -> Upload:
        """Judge the file, describe it, send it, and hold Glance's hash against ours."""
        with open_source(file, reading(reads, deep=True), control=control) as source:
            disk_format = _disk_format(source, options)
            with located(source.file):
                described, warnings = describe(source.image, disk_format)
            complete(source.original)
            values = {
                "name": self.name,
                "disk_format": disk_format,
                "container_format": "bare",
                **({} if options.visibility is None else {"visibility": options.visibility}),
                **_chosen(described, options.properties),
            }
            image = self.service.create(values)
            with _deleted_unless_done(self.service, image):
                checksum = self._sent(image, source, control)
                if options.protected:
                    self.service.change(image, {"protected": True})
            return Upload(
                source=source.original.name,
                id=image.id,
                name=self.name,
                disk_format=disk_format,
                size=source.original.size,
                virtual_size=source.image.virtual_size,
                checksum=checksum,
                values={key: value for key, value in values.items() if key not in OURS} | _shown(options),
                warnings=(*(finding.message for finding in source.findings), *warnings),
            )

    def _sent(self, image: GlanceImage, source: Source, control: Control) -> Checksum:
        file = source.original
        digest = hashlib.new(ALGORITHM)
        self.service.send(image, _pieces(file, digest, control), file.size)
        source.check_unchanged()
        stored = self.service.show(image.id)
        where = f"{PREFIX}{image.id}"
        if stored.status != "active":
            raise VerificationFailed(f"the image is {stored.status} after its upload, not active", path=where)
        if stored.size != file.size:
            raise VerificationFailed(f"Glance has {stored.size} bytes, {file.size} were sent", path=where)
        if stored.checksum is None:
            raise VerificationFailed("Glance states no hash that we can compute", path=where)
        if stored.checksum.algorithm == ALGORITHM:
            _same(stored.checksum, digest.hexdigest(), where)
        else:
            stored.checksum.check(file, control=control)
        return stored.checksum


def _same(stated: Checksum, value: str, where: str) -> None:
    if stated.value != value:
        raise VerificationFailed(
            f"Glance's {stated.algorithm} is {stated.value}, what was sent has {value}",
            path=where,
            hint="try again: something on the way changed the bytes",
        )


def _pieces(file: LocalFile, digest: Any, control: Control) -> Iterator[bytes]:
    """All of the file, hashed as it goes."""
    size = file.size
    for offset in range(0, size, PIECE):
        control.tell("upload", offset, size)
        piece = file.pread(offset, min(PIECE, size - offset))
        if len(piece) < min(PIECE, size - offset):
            raise SourceError("became shorter while it was read", path=file.name)
        digest.update(piece)
        yield piece


@contextmanager
def _deleted_unless_done(service: Glance, image: GlanceImage) -> Iterator[None]:
    """Whatever goes wrong inside, Ctrl-C as well: the image is deleted."""
    try:
        yield
    except BaseException as error:
        try:
            service.delete(image)
        except ImagekitError as failed:
            left = f"the image {image.id} could not be deleted ({failed.message}): delete it"
            if isinstance(error, ImagekitError):
                error.hint = f"{error.hint}; {left}" if error.hint else left
        raise


def _disk_format(source: Source, options: UploadOptions) -> str:
    """What to call the format; UnsupportedFeature for what Glance would refuse, said before it is sent."""
    name, stated = source.original.name, source.image.info()
    if source.wrappers:
        packed = ", ".join(source.wrappers)
        raise UnsupportedFeature(
            f"packed ({packed}): Glance would take it for something else", path=name, hint=_UNPACK
        )
    if source.format not in FORMATS:
        raise UnsupportedFeature(f"Glance has no name for {source.format}", path=name, hint=_UNPACK)
    asked = options.disk_format
    if asked not in (None, source.format, "raw"):
        raise UsageError(f"the file is {source.format}, not {asked}", hint="leave out --disk-format", path=name)
    if asked is not None:
        return asked
    if source.format == "vhd" and stated.subformat == "fixed":
        raise fixed_vhd(name)
    if stated.features.get("extended-l2"):
        raise UnsupportedFeature(
            "a qcow2 with extended L2 entries, which Glance answers with 415: a feature it does not know",
            path=name,
            hint="convert it; --disk-format qcow2 tries it all the same",
        )
    return source.format


def fixed_vhd(name: str) -> UnsupportedFeature:
    """Why Glance does not take one."""
    return UnsupportedFeature(
        "a fixed VHD, which Glance answers with 415: it knows a VHD by the copy of its footer at the start of the "
        "file, and a fixed one has none",
        path=name,
        hint="upload it as a dynamic VHD or a VHDX: imagekit convert … --upload glance:NAME; --disk-format raw "
        "stores it as it is, for a cloud that wants that, --disk-format vhd tries it all the same",
    )


_UNPACK = "convert it, to VHDX for example: imagekit convert … --upload glance:NAME"


def describe(image: DiskImage, disk_format: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """min_disk and the properties for Hyper-V that a look at the disk gives, and what to warn of."""
    values: dict[str, Any] = {"min_disk": -(-image.virtual_size // GiB)}
    readiness, loader = check_readiness(image), find_loader(image)
    warnings = [f"not ready for Hyper-V: {one.name}: {one.detail}" for one in readiness.failed]
    root = next((one.status for one in readiness.checks if one.name == "root-file-system"), "unknown")
    os_type = "windows" if loader.signer == "windows" else "linux" if loader.signer or root == "ok" else None
    if os_type is not None:
        values["os_type"] = os_type
    if not readiness.generations:
        return values, tuple(warnings)
    # A generation 2 machine takes no VHD; what boots as either is what its file can be.
    second = 2 in readiness.generations and (disk_format != "vhd" or 1 not in readiness.generations)
    values["hw_machine_type"] = "hyperv-gen2" if second else "hyperv-gen1"
    if second and disk_format == "vhd":
        warnings.append("the disk boots as generation 2 only, which takes no VHD: upload it as VHDX")
    if second and os_type is not None:
        values["os_secure_boot"] = "optional" if loader.signer else "disabled"
    return values, tuple(warnings)


def _chosen(described: Mapping[str, Any], properties: Mapping[str, str]) -> dict[str, Any]:
    given = {key: int(value) if key in NUMBERS and value else value for key, value in properties.items()}
    return {key: value for key, value in {**described, **given}.items() if value != ""}


def _shown(options: UploadOptions) -> dict[str, Any]:
    visibility = {} if options.visibility is None else {"visibility": options.visibility}
    return visibility | ({"protected": True} if options.protected else {})
