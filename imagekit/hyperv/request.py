"""From machine.json to what is sent to a host: every value checked here, before anything is sent.

machine.json says what Hyper-V can build; this module says what this host can build, and which texts may travel at
all. Data never becomes part of a script, so the lists of allowed characters are a second fence: a name becomes a
folder, and cmdlets take some names as patterns.

Limits: Microsoft Learn, "Hyper-V scalability" and "Should I create a generation 1 or 2 virtual machine"; paths:
"Naming Files, Paths, and Namespaces". Pure: no file is opened, no host asked.
"""

from __future__ import annotations

import ntpath
import re
from collections.abc import Iterator
from typing import Literal, get_args

from imagekit.errors import InvalidSpec, UnsupportedFeature, UsageError
from imagekit.machine import Machine, Medium
from imagekit.records import dataclass

Family = Literal["2008r2", "2012", "2012r2", "2016"]
"""Kinds of hosts, each named after the first Windows Server of its kind: 2016 stands for all since."""
FAMILIES: tuple[Family, ...] = get_args(Family)

MAX_PATH = 260
HYPERV_ADDS = 70
r"""What Hyper-V puts below a machine's folder: ``\Virtual Machines\<GUID>.vmcx``, ``\Snapshots\…``."""
MAX_VHD = 2040 << 30
KVP_KEY, KVP_VALUE = 255, 1024
"""Most characters of a key, most bytes of a value (hv_kvp.h has 512 and 2048 bytes, in UTF-16)."""
IGNITION, IGNITION_PART = "ignition.config", 1024
MAX_CPUS: dict[Family, int] = {"2008r2": 4, "2012": 64, "2012r2": 64, "2016": 2048}

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9_-])?")
_RESERVED = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])(?:\..*)?", re.IGNORECASE)
_NOT_IN_SWITCH = frozenset('*?[]`$"<>|;\\/')
_NOT_IN_PATH = frozenset('"*?<>|[]/`$;')
_KVP_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a machine lives on the host: a folder of its own, and its files in it."""

    folder: str
    files: tuple[str, ...]
    """Full paths, in the order of machine.media."""


def machine_folder(machine: Machine, store: str) -> str:
    """The folder of a machine's own: its name for people, its uuid so that no other machine has it."""
    return ntpath.join(store, f"{machine.name}-{machine.uuid}")


def place(machine: Machine, store: str) -> Place:
    """The places of the machine's files below ``store``, an absolute folder on the host."""
    folder = machine_folder(machine, check_host_path(store))
    return Place(folder, tuple(ntpath.join(folder, ntpath.basename(medium.path)) for medium in machine.media))


def check(machine: Machine, store: str, family: Family) -> Place:
    """Make sure that a host of ``family`` can build ``machine`` in ``store``; where it will be.

    Raises InvalidSpec for what no host takes, UnsupportedFeature for what this one does not.
    """
    problems = [*_text_problems(machine), *_media_problems(machine)]
    if problems:
        raise InvalidSpec("; ".join(problems), hint="change machine.json's source and prepare the bundle again")
    there = place(machine, store)
    for path in (there.folder, *there.files):
        if len(path) + (HYPERV_ADDS if path == there.folder else 0) > MAX_PATH:
            raise InvalidSpec(
                f"{path} is too long: Hyper-V's own files below it would pass {MAX_PATH} characters",
                hint="use a shorter --store or a shorter name",
            )
    lacks = list(_lacking(machine, family))
    if lacks:
        what, hint = lacks[0]
        raise UnsupportedFeature(f"a host of the kind {family} cannot build this machine: {what}", hint=hint)
    return there


def check_name(name: str) -> str:
    """A machine's name: what may be a folder, and is no pattern. Raises InvalidSpec."""
    if not _NAME.fullmatch(name) or _RESERVED.fullmatch(name):
        raise InvalidSpec(
            f"{name!r} cannot be the name of a machine on a host",
            hint="use 1 to 64 of A-Z a-z 0-9 . _ - , beginning with a letter or digit and not ending in a dot",
        )
    return name


def check_host_path(path: str) -> str:
    r"""An absolute path on a host (``D:\VMs``, ``\\server\share\VMs``), normalised. Raises InvalidSpec."""
    drive, rest = ntpath.splitdrive(path)
    wrong = not path.isprintable() or bool(_NOT_IN_PATH & set(path))
    letter = re.fullmatch(r"[A-Za-z]:", drive) is not None
    share = re.fullmatch(r"\\\\[A-Za-z0-9][A-Za-z0-9._-]*\\[^\\:]+", drive) is not None
    wrong |= not (letter or share) or ":" in rest or not (rest.startswith("\\") or (share and not rest))
    parts = [part for part in rest.split("\\") if part]
    wrong |= any(part in (".", "..") or part[-1] in ". " or _RESERVED.fullmatch(part) for part in parts)
    wrong |= "\\\\" in rest
    if wrong:
        raise InvalidSpec(
            f"{path!r} cannot be a folder on a host",
            hint="write an absolute path with backslashes, such as D:\\VMs",
        )
    return drive + "\\" + "\\".join(parts) if parts else drive + "\\"


def is_unc(path: str) -> bool:
    """Whether the path is on a share, so that the host itself has to reach another computer."""
    return path.startswith("\\\\")


def check_switch(name: str) -> str:
    """The name of a virtual switch: printable, and no pattern. Raises InvalidSpec."""
    if not name.isprintable() or _NOT_IN_SWITCH & set(name) or name != name.strip() or not 0 < len(name) <= 256:
        raise InvalidSpec(f"{name!r} cannot be the name of a virtual switch")
    return name


def kvp_pairs(machine: Machine) -> dict[str, str]:
    """What the guest gets through the key-value exchange; Ignition's configuration in parts of 1 KiB."""
    pairs: dict[str, str] = {}
    for key, value in sorted(machine.kvp.items()):
        if key == IGNITION:
            pairs |= {f"{IGNITION}.{index}": part for index, part in enumerate(_parts(value))}
        else:
            pairs[key] = value
    return pairs


def _parts(text: str) -> Iterator[str]:
    """``text`` in pieces of at most 1 KiB of UTF-8, never within a character."""
    data = text.encode()
    start = 0
    while start < len(data) or start == 0:
        end = min(start + IGNITION_PART, len(data))
        while end < len(data) and data[end] & 0xC0 == 0x80:
            end -= 1
        yield data[start:end].decode()
        if end == len(data):
            return
        start = end


def serial_number(machine: Machine, *, nocloud: bool) -> str | None:
    """The serial number to set: as machine.json says, else for a NoCloud drive a hint that makes cloud-init wait.

    cloud-init looks for a medium once; a DVD that shows up late is missed unless the serial number says ds=nocloud.
    """
    return machine.smbios.serial or ("ds=nocloud" if nocloud else None)


def same_machine(path: str, other: str) -> bool:
    """Whether two paths on a host are one: Windows does not tell case apart."""
    return ntpath.normcase(path) == ntpath.normcase(other)


def is_below(path: str, folder: str) -> bool:
    """Whether ``path`` is ``folder`` or lies in it."""
    inner, outer = ntpath.normcase(path).rstrip("\\"), ntpath.normcase(folder).rstrip("\\")
    return inner == outer or inner.startswith(outer + "\\")


def as_family(text: str) -> Family:
    """The family a person named. Raises UsageError."""
    for family in FAMILIES:
        if text == family:
            return family
    raise UsageError(f"{text!r} is no kind of host", hint=f"choose auto, {', '.join(FAMILIES)}")


def _text_problems(machine: Machine) -> Iterator[str]:
    try:
        check_name(machine.name)
    except InvalidSpec as error:
        yield error.message
    for nic in machine.nics:
        if nic.switch is not None:
            try:
                check_switch(nic.switch)
            except InvalidSpec as error:
                yield error.message
        elif nic.vlan is not None:
            yield f"the network adapter {nic.mac} has a VLAN but no switch"
    for key, value in kvp_pairs(machine).items():
        if not _KVP_NAME.fullmatch(key) or len(key) > KVP_KEY:
            yield f"the key {key!r} of the key-value exchange has characters other than A-Z a-z 0-9 . _ -"
        if len(value.encode()) > KVP_VALUE or "\0" in value:
            yield f"the value of {key!r} is longer than {KVP_VALUE} bytes, or has a zero in it"


def _media_problems(machine: Machine) -> Iterator[str]:
    names: set[str] = set()
    for medium in machine.media:
        name = ntpath.basename(medium.path.replace("/", "\\"))
        stem = name.rsplit(".", 1)[0]
        if not _NAME.fullmatch(stem) or _RESERVED.fullmatch(name):
            yield f"{name!r} cannot be the name of a file on a host"
        if name.casefold() in names:
            yield f"two media would be named {name} on the host"
        names.add(name.casefold())
        if medium.sha256 is None:
            yield f"{medium.path} has no sha256: what arrives on the host could not be compared"


def _lacking(machine: Machine, family: Family) -> Iterator[tuple[str, str]]:
    old, again = family == "2008r2", "prepare the bundle again with"
    if machine.generation == 2 and family in ("2008r2", "2012"):
        yield "generation 2 needs Windows Server 2012 R2", f"{again} --generation 1"
    if machine.secure_boot == "linux" and family == "2012r2":
        yield (
            "its Secure Boot knows Windows' loaders only; Linux' needs Windows Server 2016",
            f"{again} --secure-boot off",
        )
    if machine.cpus > MAX_CPUS[family]:
        yield f"{machine.cpus} processors, at most {MAX_CPUS[family]}", f"{again} --cpus {MAX_CPUS[family]}"
    for medium in machine.media:
        if old and medium.format == "vhdx":
            yield f"{medium.path}: VHDX needs Windows Server 2012", f"{again} --generation 1"
        if medium.format == "vhd" and medium.size > MAX_VHD:
            yield f"{medium.path}: a VHD has at most 2040 GiB", "use a smaller disk"


def slot_of(medium: Medium) -> dict[str, object]:
    """Controller, number and slot of a medium, as the scripts name them."""
    return {"controller": medium.controller.upper(), "number": medium.number, "slot": medium.slot}
