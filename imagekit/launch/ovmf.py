"""Finding UEFI firmware for QEMU: OVMF, as the distribution or QEMU itself installed it.

Distributions describe what they ship in JSON files (QEMU, docs/interop/firmware.json); their names give the order of
preference, and a file in /etc or in the user's folder hides one of the same name in /usr/share. Where there are none,
QEMU's own build of the firmware is looked for beside it, which has no keys for Secure Boot.

Nothing is started here, and of the firmware nothing is read but the descriptions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imagekit.errors import ToolError
from imagekit.records import dataclass

MAX_DESCRIPTION = 1 << 20

INSTALL_HINT = (
    "install UEFI firmware for QEMU: apt install ovmf (Debian, Ubuntu); dnf install edk2-ovmf (Fedora); "
    "zypper install qemu-ovmf-x86_64 (openSUSE); pacman -S edk2-ovmf (Arch)"
)

_MACHINE = "pc-q35-"
_FORMATS = ("raw", "qcow2")
# QEMU's own names; the variables are the same for 32 and 64 bits.
_OWN_CODE, _OWN_VARIABLES = "edk2-x86_64-code.fd", "edk2-i386-vars.fd"


@dataclass(frozen=True, slots=True)
class Flash:
    """The content of a flash chip: a file and QEMU's name of its format."""

    path: Path
    format: str = "raw"


@dataclass(frozen=True, slots=True)
class UefiFirmware:
    """Firmware for a q35 machine. ``variables`` is a template: a machine writes to a copy of its own."""

    code: Flash
    variables: Flash
    needs_smm: bool = False
    """Its variables are only safe from the guest in system management mode."""

    def with_variables(self, path: Path) -> UefiFirmware:
        """The same with another file, in the same format, for the variables."""
        return UefiFirmware(self.code, Flash(path, self.variables.format), self.needs_smm)


def find_firmware(program: str, *, secure_boot: bool) -> UefiFirmware:
    """The firmware to use with the QEMU at ``program``; with ``secure_boot`` one that has Microsoft's keys.

    Raises ToolError that says what to install.
    """
    described = (_usable(one, secure_boot=secure_boot) for one in _descriptions(Path(program)))
    # Without Secure Boot there is nothing to guard: firmware that does without SMM starts in more places.
    found = sorted(filter(None, described), key=lambda firmware: firmware.needs_smm and not secure_boot)
    if found:
        return found[0]
    if not secure_boot:
        for folder in _share_folders(Path(program)):
            code, variables = folder / _OWN_CODE, folder / _OWN_VARIABLES
            if code.is_file() and variables.is_file():
                return UefiFirmware(Flash(code), Flash(variables))
        raise ToolError("no UEFI firmware for QEMU was found, which generation 2 needs", hint=INSTALL_HINT)
    raise ToolError(
        "no UEFI firmware with Microsoft's keys was found, which Secure Boot needs",
        hint=f"{INSTALL_HINT}; or prepare the machine with --secure-boot off",
    )


def _share_folders(program: Path) -> Iterator[Path]:
    """Where a QEMU keeps its data: on Windows beside the program, elsewhere below its prefix."""
    yield program.parent / "share"
    yield program.parent.parent / "share" / "qemu"


def _description_folders(program: Path) -> Iterator[Path]:
    """The folders of descriptions, those that hide others first."""
    own = os.environ.get("XDG_CONFIG_HOME")
    yield (Path(own) if own else Path.home() / ".config") / "qemu" / "firmware"
    yield Path("/etc/qemu/firmware")
    yield Path("/usr/share/qemu/firmware")
    for folder in _share_folders(program):
        yield folder / "firmware"


def _descriptions(program: Path) -> Iterator[dict[str, Any]]:
    """What the descriptions say, in the order of preference; files that say nothing are left out."""
    files: dict[str, Path] = {}
    for folder in _description_folders(program):
        try:
            names = [path for path in folder.iterdir() if path.suffix == ".json"]
        except OSError:
            continue
        for path in names:
            files.setdefault(path.name, path)
    for _, path in sorted(files.items()):
        try:
            with path.open("rb") as file:
                # An empty file, or a link to /dev/null, hides one of the same name.
                description = json.loads(file.read(MAX_DESCRIPTION))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(description, dict):
            yield description


def _usable(description: dict[str, Any], *, secure_boot: bool) -> UefiFirmware | None:
    """The firmware that is described, if it is for us and its files are there."""
    try:
        features = set(description["features"])
        mapping = description["mapping"]
        machines = [
            machine
            for target in description["targets"]
            if target["architecture"] == "x86_64"
            for machine in target["machines"]
        ]
        flashes = [
            Flash(Path(mapping[key]["filename"]), mapping[key]["format"])
            for key in ("executable", "nvram-template")
            if mapping["device"] == "flash" and mapping.get("mode", "split") == "split"
        ]
        is_uefi = "uefi" in description["interface-types"]
        fits = any(machine.startswith(_MACHINE) for machine in machines)
    except (KeyError, TypeError, AttributeError):  # not what the schema says: another version, or no description
        return None
    # With keys enrolled Secure Boot is on, and refuses what is not signed; without them it is off.
    enrolled = {"secure-boot", "enrolled-keys"} <= features
    if not (is_uefi and fits and flashes) or enrolled != secure_boot:
        return None
    if any(flash.format not in _FORMATS or not flash.path.is_file() for flash in flashes):
        return None
    code, variables = flashes
    return UefiFirmware(code, variables, needs_smm="requires-smm" in features)
