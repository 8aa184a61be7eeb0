r"""Which firmware a disk is made for: whether it has a UEFI boot loader, and who signed that.

A generation 2 machine boots ``\EFI\BOOT\BOOTX64.EFI`` from an EFI system partition (UEFI specification, "Removable
media boot behavior"): a partition of that type in a GPT, or of type EF in a master boot record, with a FAT file
system. Each of Hyper-V's Secure Boot templates admits loaders signed by one authority: "Microsoft UEFI Certificate
Authority" what Microsoft signs for others (shim), "Microsoft Windows" only Windows. So the signature decides between
them. It is not verified here, the firmware does that: what is read is the authority's name in the certificates.

Facts of the guest's disk, read with bounds, and a decision from them. Nothing on the disk is an error here: what
cannot be read is no loader, and the reason says so.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import islice
from typing import Literal

from imagekit.contents import gpt
from imagekit.contents.fat import Entry, Fat, FatError
from imagekit.contents.partitions import partitions
from imagekit.errors import UnsupportedFeature
from imagekit.formats.base import DiskImage, KiB
from imagekit.records import dataclass

LOADER = ("EFI", "BOOT", "BOOTX64.EFI")
LOADER_NAME = "\\" + "\\".join(LOADER)
MAX_PARTITIONS = 4
"""EFI system partitions that are looked into; a disk has one, or two that mirror each other."""
MAX_SIGNATURES = 256 * KiB

SecureBoot = Literal["off", "linux", "windows"]
"""The words of machine.json: ``linux`` stands for the UEFI CA, ``windows`` for Microsoft Windows."""

_AUTHORITIES: tuple[tuple[SecureBoot, tuple[bytes, ...]], ...] = (
    ("linux", (b"Microsoft Corporation UEFI CA 2011", b"Microsoft UEFI CA 2023")),
    ("windows", (b"Microsoft Windows Production PCA 2011", b"Windows UEFI CA 2023")),
)
_WHOSE = {"linux": "the Microsoft UEFI CA", "windows": "Microsoft Windows"}

SYSTEM_PARTITIONS = (gpt.SYSTEM_PARTITION, 0xEF)
"""Their types, in a GPT and in a master boot record."""

_X86_64 = 0x8664
_PE32_PLUS = 0x20B
_CERTIFICATES = 4
"""Number of the PE data directory that holds the signatures."""


@dataclass(frozen=True, slots=True)
class Loader:
    """What a search for a UEFI boot loader came to.

    ``signer`` is the template that admits it, None when it is unsigned, signed by somebody else, or not there.
    """

    found: bool
    reason: str
    signer: SecureBoot | None = None
    signed: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """A generation and a Secure Boot template, why, and what may come of it."""

    generation: Literal[1, 2]
    secure_boot: SecureBoot
    generation_reason: str
    secure_boot_reason: str
    warnings: tuple[str, ...] = ()


def find_loader(image: DiskImage) -> Loader:
    """Look for the boot loader of a generation 2 machine. Raises only what reading the image raises."""
    reason = ""
    systems = (one for one in partitions(image) if one.type in SYSTEM_PARTITIONS)
    for partition in islice(systems, MAX_PARTITIONS):
        try:
            fat = Fat(image, partition.start, partition.length)
            entry = fat.find(LOADER)
            if entry is not None and not entry.is_directory:
                return _look_at(fat, entry)
            reason = reason or f"the EFI system partition has no {LOADER_NAME}"
        except FatError as error:
            reason = reason or f"the EFI system partition cannot be read: {error}"
    return Loader(False, reason or "the disk has no EFI system partition")


def choose(
    generation: Literal["auto", 1, 2], secure_boot: Literal["auto", "linux", "windows", "off"], loader: Loader
) -> Choice:
    """What was asked for, and for ``auto`` what the loader says.

    Raises UnsupportedFeature for Secure Boot with generation 1.
    """
    chosen: Literal[1, 2] = (2 if loader.found else 1) if generation == "auto" else generation
    why = loader.reason if generation == "auto" else "as asked"
    if chosen == 1:
        if secure_boot not in ("auto", "off"):
            raise UnsupportedFeature(
                f"generation 1 ({why}) has no Secure Boot", hint="leave out --secure-boot, or add --generation 2"
            )
        return Choice(1, "off", why, "generation 1 has none")
    warnings = () if loader.found else (f"{loader.reason}: as generation 2 it has nothing to boot",)
    if secure_boot == "auto":
        template, reason = _template(loader)
        return Choice(2, template, why, reason, warnings)
    return Choice(2, secure_boot, why, "as asked", (*warnings, *_refusals(secure_boot, loader)))


def _template(loader: Loader) -> tuple[SecureBoot, str]:
    """What Secure Boot can be, and why."""
    if loader.signer is not None:
        return loader.signer, f"the boot loader is signed by {_WHOSE[loader.signer]}"
    if not loader.found:
        return "linux", "the default"
    return "off", _unsigned(loader)


def _unsigned(loader: Loader) -> str:
    return (
        "the boot loader is signed by neither Microsoft authority" if loader.signed else "the boot loader is unsigned"
    )


def _refusals(secure_boot: SecureBoot, loader: Loader) -> Iterator[str]:
    """What Secure Boot as asked for will not let through."""
    if secure_boot == "off" or not loader.found or loader.signer == secure_boot:
        return
    signed = _unsigned(loader) if loader.signer is None else f"the boot loader is signed by {_WHOSE[loader.signer]}"
    yield f"{signed}: Secure Boot {secure_boot} will refuse it"


# --- the loader ------------------------------------------------------------------------------------------------


def _look_at(fat: Fat, entry: Entry) -> Loader:
    reason = f"the EFI system partition has {LOADER_NAME}"
    where = _signatures(fat.read(entry, 0, 4 * KiB))
    if where is None:
        return Loader(False, f"{LOADER_NAME} in the EFI system partition is no program for x86-64")
    offset, length = where
    if length == 0:
        return Loader(True, reason)
    certificates = fat.read(entry, offset, min(length, MAX_SIGNATURES))
    for template, names in _AUTHORITIES:
        if any(name in certificates for name in names):
            return Loader(True, reason, signer=template, signed=True)
    return Loader(True, reason, signed=True)


def _signatures(head: bytes) -> tuple[int, int] | None:
    """(offset, length) of the certificates in a PE file that begins with ``head``; None when it is no x86-64 one."""
    if len(head) < 64 or head[:2] != b"MZ":
        return None
    (at,) = struct.unpack_from("<I", head, 60)
    optional = at + 24
    directory = optional + 112 + _CERTIFICATES * 8
    if len(head) < directory + 8 or head[at : at + 4] != b"PE\0\0":
        return None
    machine, magic = struct.unpack_from("<H", head, at + 4)[0], struct.unpack_from("<H", head, optional)[0]
    if machine != _X86_64 or magic != _PE32_PLUS:
        return None
    (directories,) = struct.unpack_from("<I", head, optional + 108)
    if directories <= _CERTIFICATES:
        return 0, 0
    offset, length = struct.unpack_from("<II", head, directory)
    return offset, length
