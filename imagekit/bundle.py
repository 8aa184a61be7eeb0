"""Prepare a guest: a disk, a config drive and machine.json that belong together, in one folder.

The guest says who it is, the image what it runs, and unless the guest says that too, on which generation. The MAC on
the config drive is the MAC the machine gets. machine.json is written last: where it is, the rest is complete.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

from imagekit.cloudinit.lint import MachineLike, enforce, judge
from imagekit.cloudinit.passwords import encrypt_password
from imagekit.cloudinit.render import Rendering
from imagekit.cloudinit.tree import Datasource, MetadataTree
from imagekit.contents.firmware import Choice, choose
from imagekit.contents.looking import Seen, as_seen, look
from imagekit.contents.readiness import Readiness
from imagekit.conversion import at_hand, convert_image, reading
from imagekit.digests import file_digest
from imagekit.errors import TargetError, UnsupportedFeature, UsageError
from imagekit.formats.base import GiB
from imagekit.guest import Guest
from imagekit.machine import FILE_NAME, Machine
from imagekit.media import Packing, pack
from imagekit.plan import ConvertOptions
from imagekit.progress import SILENT, Control
from imagekit.publish import check_target, write_file
from imagekit.records import dataclass, replace
from imagekit.remote.addresses import Opened, is_elsewhere
from imagekit.report import SCHEMA, Report
from imagekit.sources import Source, located, open_source

SECRET_MODE = 0o600
"""Config drives hold keys and passwords."""
DISK_FORMATS: dict[int, Literal["vhd", "vhdx"]] = {1: "vhd", 2: "vhdx"}
"""By generation: 2 takes no VHD."""
CONFIG_DISK = 1
"""Which of the guest's disks a config drive is, for its id."""
SMALL_DISK = 10 * GiB
DEFAULT_PACKING = Packing()
DEFAULT_RENDERING = Rendering()


@dataclass(frozen=True, slots=True)
class Bundle:
    """A prepared machine: its folder, machine.json as data, why it is what it is, and what to tell the user."""

    path: Path
    machine: Machine
    report: Report
    choice: Choice
    warnings: tuple[str, ...] = ()
    encrypted_password: str | None = None
    readiness: Readiness | None = None

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def to_json(self) -> dict[str, object]:
        machine: dict[str, object] = self.machine.model_dump(mode="json", by_alias=True)
        return {
            "schema": SCHEMA,
            "bundle": os.fspath(self.path),
            "machine": machine,
            "conversion": self.report.to_json(),
            "reasons": {
                "generation": self.choice.generation_reason,
                "secure-boot": self.choice.secure_boot_reason,
            },
            "readiness": None if self.readiness is None else self.readiness.to_json(),
            "warnings": list(self.warnings),
            **({} if self.encrypted_password is None else {"encrypted-password": self.encrypted_password}),
        }


@dataclass(frozen=True, slots=True)
class ConfigDrive:
    """A config drive that was written. Size in bytes."""

    path: Path
    uuid: str
    size: int
    sha256: str
    label: str
    packing: Packing
    datasource: Datasource = "configdrive"
    warnings: tuple[str, ...] = ()
    encrypted_password: str | None = None
    """A password that was made, as Nova gives it: base64 of RSA, for the owner of the ssh-rsa key."""

    def to_json(self) -> dict[str, object]:
        return {
            "schema": SCHEMA,
            "filename": os.fspath(self.path),
            "uuid": self.uuid,
            "datasource": self.datasource,
            "label": self.label,
            "media": self.packing.media,
            "disk": self.packing.disk,
            "size": self.size,
            "sha256": self.sha256,
            "warnings": list(self.warnings),
            **({} if self.encrypted_password is None else {"encrypted-password": self.encrypted_password}),
        }


@dataclass(frozen=True, slots=True)
class Metadata:
    """What will be on a config drive, and what lint warns of."""

    tree: MetadataTree
    warnings: tuple[str, ...]


def make_metadata(
    guest: Guest,
    *,
    rendering: Rendering = DEFAULT_RENDERING,
    machine: MachineLike | None = None,
    strict: bool = False,
) -> Metadata:
    """Render a guest's metadata and lint it, with the adapters of its ``machine`` where that is known.

    Raises InvalidSpec for what the guest would not accept; ``strict`` makes warnings of that kind too.
    """
    tree = rendering.render(guest.spec)
    return Metadata(tree, enforce(judge(tree, guest=guest.spec.guest, machine=machine), strict=strict))


def hand_over(guest: Guest, password_out: str | os.PathLike[str] | None, *, sync: bool = True) -> str | None:
    """Give a password that was made to whoever asked: into a new file, else encrypted for the guest's RSA key.

    Raises UsageError when there is neither; to be called before anything is written.
    """
    if not guest.generated or guest.spec.password is None:
        if password_out is not None:
            raise UsageError("no password was made that could be written", hint="add --generate-password")
        return None
    password = guest.spec.password.get_secret_value()
    if password_out is None:
        return encrypt_password(password, guest.spec.ssh_keys)
    write_file(password_out, f"{password}\n".encode(), mode=SECRET_MODE, sync=sync)
    return None


def write_config_drive(
    guest: Guest,
    path: str | os.PathLike[str],
    *,
    packing: Packing | None = None,
    metadata: Metadata | None = None,
    overwrite: bool = False,
    sync: bool = True,
) -> ConfigDrive:
    """Build the guest's config drive and publish it, readable by its owner only.

    Without a ``packing`` it is ISO 9660, in a disk where the name's suffix is that of one.
    """
    packing = packing or Packing.by_name(path)
    packing.check_name(path)
    packing.check_generation(guest.spec.machine.generation)
    target = check_target(path, overwrite=overwrite)
    metadata = metadata or make_metadata(guest)
    tree = metadata.tree
    data = pack(tree.files, label=tree.label, packing=packing, identifier=guest.disk_identifier(CONFIG_DISK))
    write_file(target, data, mode=SECRET_MODE, overwrite=overwrite, sync=sync)
    digest = hashlib.sha256(data).hexdigest()
    return ConfigDrive(target, guest.uuid, len(data), digest, tree.label, packing, tree.datasource, metadata.warnings)


def prepare_bundle(
    image: str | os.PathLike[str],
    out: str | os.PathLike[str],
    guest: Guest,
    *,
    options: ConvertOptions,
    packing: Packing | None = DEFAULT_PACKING,
    rendering: Rendering = DEFAULT_RENDERING,
    strict: bool = False,
    control: Control = SILENT,
) -> Bundle:
    """Write disk, config drive and ``machine.json`` into ``out``: all of them or none.

    The disk is ``NAME.vhd`` for generation 1 and ``NAME.vhdx`` for generation 2, the config drive
    ``NAME-config.iso`` or what ``packing`` says (None: there is none); VFAT comes in a disk like the machine's.
    What :mod:`imagekit.contents.readiness` finds missing is a warning; ``strict`` makes it UnsupportedFeature.
    """
    if options.dry_run or options.overwrite:
        raise UsageError("a bundle is always written, and always new", hint="choose another folder")
    folder, name = Path(out), guest.spec.name
    metadata = make_metadata(guest, rendering=rendering, machine=guest, strict=strict) if packing else None
    description = folder / FILE_NAME
    with ExitStack() as undo:
        if _make_folder(folder):
            undo.callback(_remove_folder, folder)
        check_target(description, overwrite=False)
        with _looked_into(image, options, folder, control) as (source, seen):
            if strict:
                _need_ready(seen.readiness)
            wanted = guest.spec.machine
            choice = choose(wanted.generation, wanted.secure_boot, seen.loader)
            disk_format = DISK_FORMATS[choice.generation]
            packing = _for_generation(packing, choice.generation)
            disk = check_target(folder / f"{name}.{disk_format}", overwrite=False)
            drive = (
                None if packing is None else check_target(folder / f"{name}-config{packing.suffix}", overwrite=False)
            )
            conversion = replace(options, target_format=disk_format, identifier=guest.disk_identifier())
            if isinstance(source, Opened):
                conversion = replace(conversion, confined=True)
            report = convert_image(source, disk, conversion, control=control)
        # A file is only ever removed after this run made it.
        undo.callback(disk.unlink)
        written = None
        if drive is not None:
            written = write_config_drive(guest, drive, packing=packing, metadata=metadata, sync=options.sync)
            undo.callback(drive.unlink)
        machine = _machine(guest, choice, report, disk, written, sha256=file_digest(disk, control=control))
        control.check()
        write_file(description, machine.dumps(), sync=options.sync)
        undo.pop_all()
    missing = tuple(f"not ready for Hyper-V: {one.name}: {one.detail}" for one in seen.readiness.failed)
    spoken = (*(metadata.warnings if metadata else ()), *_warnings(report, options))
    return Bundle(folder, machine, report, choice, (*choice.warnings, *missing, *spoken), readiness=seen.readiness)


@contextmanager
def _looked_into(
    image: str | os.PathLike[str], options: ConvertOptions, folder: Path, control: Control
) -> Iterator[tuple[Source | Opened, Seen]]:
    """The image, and what a look at its disk tells; in a confined process where the conversion is to be in one."""
    if options.is_confined(elsewhere=is_elsewhere(image)):
        from imagekit.confinement import jobs as confined

        if confined.POSSIBLE:
            with at_hand(image, options, scratch=folder, control=control) as here, here.blamed():
                asked = replace(options, stated_format=here.format or options.stated_format)
                yield here, confined.look(here.file, asked, as_seen, control=control)
            return
    with open_source(image, reading(options, scratch=folder, deep=True, later=True), control=control) as source:
        with located(source.file):
            seen = look(source.image)
        yield source, seen


def _need_ready(readiness: Readiness) -> None:
    if readiness.failed:
        raise UnsupportedFeature(
            "the disk is not ready for Hyper-V: "
            + "; ".join(f"{one.name}: {one.detail}" for one in readiness.failed),
            hint="mend the image, or leave out --strict; `imagekit info --hyperv` shows all that was looked at",
        )


def _for_generation(packing: Packing | None, generation: Literal[1, 2]) -> Packing | None:
    """The kind of config drive that a machine takes: a file system that is no DVD comes in a disk."""
    if packing is None:
        return None
    if packing.media == "vfat" and packing.disk is None:
        packing = replace(packing, disk=DISK_FORMATS[generation])
    packing.check_generation(generation)
    return packing


def _machine(
    guest: Guest, choice: Choice, report: Report, disk: Path, drive: ConfigDrive | None, *, sha256: str
) -> Machine:
    """The disk on 0:0, the config drive where Hyper-V's own tools put a DVD: IDE 1:0 or SCSI 0:1."""
    wanted, second = guest.spec.machine, choice.generation == 2
    controller = "scsi" if second else "ide"
    boot = {"path": disk.name, "kind": "disk", "format": report.target_format, "controller": controller}
    media = [{**boot, "size": report.target_size, "sha256": sha256}]
    if drive is not None:
        form = drive.packing.disk
        second_place = {"controller": controller, "slot" if second else "number": 1}
        medium = {"path": drive.path.name, "kind": "disk" if form else "dvd", "format": form or "iso"}
        media.append({**medium, **second_place, "size": drive.size, "sha256": drive.sha256})
    return Machine.parse(
        {
            "uuid": guest.uuid,
            "name": guest.spec.name,
            "generation": choice.generation,
            "firmware": "uefi" if second else "bios",
            "secure_boot": choice.secure_boot,
            "cpus": wanted.cpus,
            "memory": wanted.memory,
            "nics": [nic.model_dump() for nic in guest.nics],
            "media": media,
            "source": {
                "filename": Path(report.source).name,
                "format": report.source_format,
                "size": report.source_size,
                "virtual-size": report.source_virtual_size,
            },
        }
    )


def _make_folder(folder: Path) -> bool:
    """Whether the folder had to be made."""
    if folder.exists():
        return False
    try:
        folder.mkdir()
    except OSError as error:
        raise TargetError(
            f"cannot be created: {error.strerror}", path=folder, hint="make its parent folder first"
        ) from error
    return True


def _remove_folder(folder: Path) -> None:
    with suppress(OSError):  # somebody else put something in
        folder.rmdir()


def _warnings(report: Report, options: ConvertOptions) -> Iterator[str]:
    if options.size is None and report.virtual_size < SMALL_DISK:
        yield f"the disk has {report.virtual_size} bytes, little for a guest at work (add --size 20G)"
