"""machine.json, schema 1: the one description of a prepared machine.

The QEMU command line of a rehearsal and the plan for a Hyper-V host are both built from it alone, so
everything either needs is here and is checked here: what loads is a machine that Hyper-V can build. The
rules on generations, controllers and memory are Hyper-V's (Microsoft Learn, "Should I create a generation 1
or 2 virtual machine" and "Maximums for Hyper-V scalability").

Paths of media are relative to the folder of machine.json and never leave it. This module reads no disk
image and writes no file; a bundle's writer does.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal
from uuid import UUID

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from imagekit.errors import CorruptImage, InvalidSpec, SourceError

FILE_NAME = "machine.json"
MAX_FILE_SIZE = 1 << 20
MEMORY_STEP = 2 << 20
"""Hyper-V refuses memory that is not a multiple of 2 MiB."""

NicModel = Literal["synthetic", "legacy", "virtio", "e1000"]
"""``synthetic`` is Hyper-V's own adapter (netvsc), ``legacy`` its emulated DEC 21140 (generation 1 only).

QEMU has no netvsc, so a rehearsal puts another adapter in its place: ``synthetic`` leaves the choice to the
rehearsal, ``virtio`` and ``e1000`` name it; on Hyper-V these three are the same.
"""

_FORBIDDEN_IN_NAME = frozenset('<>:"/\\|?*[]')
_SLOTS = {"ide": (2, 2), "scsi": (4, 64)}
"""Controllers of a kind, and slots on each."""
_GENERATION_1_MAX_CPUS = 64
_GENERATION_1_MAX_MEMORY = 1 << 40
_MAX_NICS = {"legacy": 4, "synthetic": 8}

_Whole = Annotated[int, Field(strict=True)]
_SmbiosText = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[ -~]+$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Smbios(_Model):
    """What firmware tells the guest about the machine; None leaves the default of the host."""

    serial: _SmbiosText | None = None
    chassis_asset_tag: _SmbiosText | None = None


class Nic(_Model):
    """One network adapter; ``mac`` is lower case with colons and is the one the guest metadata names."""

    mac: Annotated[str, Field(pattern=r"^[0-9a-f]{2}(:[0-9a-f]{2}){5}$")]
    model: NicModel = "synthetic"
    switch: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    vlan: Annotated[_Whole, Field(ge=1, le=4094)] | None = None

    @field_validator("mac")
    @classmethod
    def _unicast(cls, mac: str) -> str:
        if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
            raise ValueError("must be the address of one adapter: neither a group address nor zero")
        return mac


class Medium(_Model):
    """A disk or DVD of the bundle; ``size`` is the size of its file in bytes, ``number`` the controller's."""

    path: str
    format: Literal["vhd", "vhdx", "iso"]
    kind: Literal["disk", "dvd"]
    controller: Literal["ide", "scsi"]
    number: Annotated[_Whole, Field(ge=0)] = 0
    slot: Annotated[_Whole, Field(ge=0)] = 0
    size: Annotated[_Whole, Field(gt=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @property
    def place(self) -> str:
        """Where it is plugged in, as people write it: ``IDE 1:0``."""
        return f"{self.controller.upper()} {self.number}:{self.slot}"

    @field_validator("path")
    @classmethod
    def _stays_in_the_bundle(cls, path: str) -> str:
        if not path.isprintable() or any(sign in path for sign in '\\:<>"|?*'):
            raise ValueError(f"{path!r} must be a plain name with forward slashes, the same on every system")
        if any(part in ("", ".", "..") for part in path.split("/")):
            raise ValueError(f"{path!r} must be relative and stay in the folder of {FILE_NAME}")
        return path

    @model_validator(mode="after")
    def _is_consistent(self) -> Medium:
        if (self.kind == "dvd") != (self.format == "iso"):
            raise ValueError(f"a {self.kind} cannot have the format {self.format}: a dvd is iso, a disk vhd or vhdx")
        # Hyper-V goes by the extension before it looks into the file.
        if PurePosixPath(self.path).suffix.lower() != f".{self.format}":
            raise ValueError(f"{self.path!r} must end in .{self.format}")
        controllers, slots = _SLOTS[self.controller]
        if self.number >= controllers or self.slot >= slots:
            raise ValueError(f"{self.place} does not exist: {controllers} controllers with {slots} slots each")
        return self


class Machine(_Model):
    """A machine and the media it is made of; ``memory`` in bytes."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    uuid: UUID
    name: Annotated[str, Field(min_length=1, max_length=64)]
    generation: Literal[1, 2] = 1
    cpus: Annotated[_Whole, Field(ge=1, le=2048)] = 1
    memory: Annotated[_Whole, Field(ge=32 << 20)] = 1 << 30
    secure_boot: Literal["off", "linux", "windows"] = "off"
    firmware: Literal["bios", "uefi"] = "bios"
    smbios: Smbios = Smbios()
    nics: tuple[Nic, ...] = ()
    media: tuple[Medium, ...]
    kvp: dict[str, str] = {}
    source: dict[str, JsonValue] = {}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Machine:
        """Read and check ``path``: machine.json itself or the bundle's folder.

        Raises SourceError when it cannot be read, InvalidSpec when it describes no machine of schema 1.
        """
        file = Path(path)
        if file.is_dir():
            file /= FILE_NAME
        try:
            with file.open("rb") as opened:
                data = opened.read(MAX_FILE_SIZE + 1)
        except OSError as error:
            raise SourceError(
                f"cannot read the machine: {error.strerror or error}",
                hint="name a bundle folder that `imagekit prepare` wrote",
                path=file,
            ) from error
        if len(data) > MAX_FILE_SIZE:
            raise InvalidSpec(f"larger than {MAX_FILE_SIZE} bytes: not a {FILE_NAME}", path=file)
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise InvalidSpec(f"not JSON: {error}", path=file) from error
        return cls.parse(fields, path=file)

    @classmethod
    def parse(cls, fields: object, *, path: str | os.PathLike[str] | None = None) -> Machine:
        """The machine that plain data (the parsed JSON, or the same as Python objects) describes.

        Raises InvalidSpec that names every wrong field; ``path`` is the file to name with it.
        """
        if isinstance(fields, dict) and fields.get("schema", 1) not in (1,):
            raise InvalidSpec(
                f"machine schema {fields['schema']!r}, expected 1",
                hint="the bundle was written by another version of imagekit: prepare it again",
                path=path,
            )
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise InvalidSpec("; ".join(_explain(error)), path=path) from error

    def dumps(self) -> bytes:
        """The text of machine.json, with sorted keys: the same machine gives the same bytes."""
        fields = self.model_dump(mode="json", by_alias=True)
        return json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=True).encode() + b"\n"

    def check_media(self, folder: str | os.PathLike[str], *, digests: bool = False) -> None:
        """Make sure that the files in ``folder`` are the ones this machine was made with.

        Sizes always; ``digests=True`` also reads every file that has a sha256 to its end. Raises
        SourceError for a file that is missing or not a regular file, CorruptImage for one that differs.
        """
        for medium in self.media:
            path = Path(folder) / medium.path
            size = _regular_file_size(path)
            if size != medium.size:
                raise CorruptImage(f"{size} bytes, {FILE_NAME} says {medium.size}", hint=_AGAIN, path=path)
            if digests and medium.sha256 is not None:
                found = _sha256(path)
                if found != medium.sha256:
                    raise CorruptImage(
                        f"SHA-256 is {found}, {FILE_NAME} says {medium.sha256}", hint=_AGAIN, path=path
                    )

    @field_validator("name")
    @classmethod
    def _is_a_file_name_everywhere(cls, name: str) -> str:
        # Hyper-V makes folders and files of it.
        if not name.isprintable() or _FORBIDDEN_IN_NAME & set(name) or name != name.strip(" ") or name[-1] == ".":
            raise ValueError(f"{name!r} must be printable, without any of {''.join(sorted(_FORBIDDEN_IN_NAME))}")
        return name

    @field_validator("memory")
    @classmethod
    def _in_steps(cls, memory: int) -> int:
        if memory % MEMORY_STEP:
            raise ValueError(f"{memory} bytes is not a multiple of 2 MiB, which Hyper-V asks for")
        return memory

    @model_validator(mode="after")
    def _is_a_machine(self) -> Machine:
        problems = [*_generation_problems(self), *_nic_problems(self.nics), *_media_problems(self)]
        if problems:
            raise ValueError("; ".join(problems))
        return self


_AGAIN = "the bundle changed since it was prepared: prepare it again"


def _generation_problems(machine: Machine) -> Iterator[str]:
    firmware = "bios" if machine.generation == 1 else "uefi"
    if machine.firmware != firmware:
        yield f"a generation {machine.generation} machine has the firmware {firmware}, not {machine.firmware}"
    if machine.generation == 2:
        if any(nic.model == "legacy" for nic in machine.nics):
            yield "a legacy network adapter needs generation 1"
        return
    if machine.secure_boot != "off":
        yield "Secure Boot needs generation 2"
    if machine.cpus > _GENERATION_1_MAX_CPUS:
        yield f"{machine.cpus} processors: a generation 1 machine has at most {_GENERATION_1_MAX_CPUS}"
    if machine.memory > _GENERATION_1_MAX_MEMORY:
        yield f"{machine.memory} bytes of memory: a generation 1 machine has at most 1 TiB"


def _nic_problems(nics: tuple[Nic, ...]) -> Iterator[str]:
    for mac, count in Counter(nic.mac for nic in nics).items():
        if count > 1:
            yield f"{count} network adapters have the address {mac}"
    for kind, count in Counter("legacy" if nic.model == "legacy" else "synthetic" for nic in nics).items():
        if count > _MAX_NICS[kind]:
            yield f"{count} {kind} network adapters: at most {_MAX_NICS[kind]}"


def _media_problems(machine: Machine) -> Iterator[str]:
    media = machine.media
    controller = "ide" if machine.generation == 1 else "scsi"
    for medium in media:
        if medium.controller != controller:
            yield f"{medium.path}: media of generation {machine.generation} are on {controller}"
        if machine.generation == 2 and medium.format == "vhd":
            yield f"{medium.path}: generation 2 takes no .vhd, only .vhdx"
    for place, count in Counter(medium.place for medium in media).items():
        if count > 1:
            yield f"{count} media at {place}"
    for path, count in Counter(medium.path.casefold() for medium in media).items():
        if count > 1:
            yield f"{path} is named {count} times"
    if not any(medium.kind == "disk" and medium.number == medium.slot == 0 for medium in media):
        yield f"no disk at {controller.upper()} 0:0, where the machine boots from"


def _explain(error: ValidationError) -> Iterator[str]:
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"])
        # pydantic prefixes what a validator raised; its own messages stand alone.
        message = problem["msg"].removeprefix("Value error, ")
        yield f"{where}: {message}" if where else message


def _regular_file_size(path: Path) -> int:
    try:
        status = path.lstat()
    except OSError as error:
        raise SourceError(
            f"a medium of the machine cannot be read: {error.strerror or error}", hint=_AGAIN, path=path
        ) from error
    if not stat.S_ISREG(status.st_mode):
        # A link would let a bundle from elsewhere put any file of this computer into a guest.
        raise SourceError(
            "a medium of the machine is not a regular file",
            hint="a bundle holds its media itself: copy the file in place of the link",
            path=path,
        )
    return status.st_size


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
