"""Is a disk ready to boot on Hyper-V? What can be told by looking, without a boot and without mounting anything.

A guest that lacks hv_storvsc in its initramfs finds no disk on Hyper-V, whatever it does under QEMU; that is the
commonest dead boot. Looked at: the partition table (which generation can boot it), the boot loader, and in an ext
file system the kernel's configuration, its modules and initramfs, cloud-init's list of data sources, root= and fstab.

Each check is ok, failed, a warning, or unknown: what cannot be read (xfs, btrfs, LVM, lz4, Windows) is said to be
unknown and never guessed. The rules are Linux' and Hyper-V's: Documentation/virt/hyperv, Microsoft Learn, "Supported
Linux and FreeBSD virtual machines".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal
from uuid import UUID

from imagekit.contents import gpt
from imagekit.contents.ext import Ext, ExtError
from imagekit.contents.firmware import find_loader
from imagekit.contents.initramfs import InitramfsError, names
from imagekit.contents.partitions import Partition, partitions
from imagekit.formats.base import SECTOR, DiskImage, KiB, MiB
from imagekit.records import dataclass

Status = Literal["ok", "warning", "failed", "unknown"]

BIOS_BOOT = UUID("21686148-6449-6e6f-744e-656564454649")
MAX_PARTITIONS = 32
MAX_TEXT = 1 * MiB
MAX_INITRAMFS = 256 * MiB
MAX_KERNELS = 4
NEEDED_TO_BOOT = ("hv_vmbus", "hv_storvsc")
NEEDED_LATER = ("hv_netvsc",)
OPTIONS = {"hv_vmbus": "CONFIG_HYPERV", "hv_storvsc": "CONFIG_HYPERV_STORAGE", "hv_netvsc": "CONFIG_HYPERV_NET"}
OUR_SOURCES = ("ConfigDrive", "NoCloud")

_DEVICE = re.compile(r"^/dev/(vd|xvd)[a-z]")
_NAMED_DEVICE = re.compile(r"^/dev/(sd|hd|nvme)")


@dataclass(frozen=True, slots=True)
class Check:
    """One answer."""

    name: str
    status: Status
    detail: str


@dataclass(frozen=True, slots=True)
class Readiness:
    """All answers; ``generations`` are those that can boot the disk as far as its boot loaders tell."""

    generations: tuple[int, ...]
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status == "failed")

    def to_json(self) -> dict[str, object]:
        return {
            "generations": list(self.generations),
            "checks": [{"name": check.name, "status": check.status, "detail": check.detail} for check in self.checks],
        }


@dataclass(frozen=True, slots=True)
class _System:
    """The file systems that were found: the root, where /boot is, and what others are known by."""

    root: Ext | None
    boot: Ext | None
    boot_folder: str
    known: frozenset[str]
    """UUID=… and LABEL=… of every file system that could be read."""
    unread: tuple[str, ...]


def check_readiness(image: DiskImage) -> Readiness:
    """Look into the disk. Raises only what reading the image raises."""
    table = tuple(partitions(image))[:MAX_PARTITIONS]
    generations, checks = _boot_checks(image, table)
    system = _file_systems(image, table)
    checks += _guarded("root-file-system", _root_check, system)
    if system.root is not None:
        checks += _guarded("kernel", _kernel_checks, system)
        checks += _guarded("cloud-init", _cloud_init_check, system)
        checks += _guarded("fstab", _fstab_check, system)
        checks += _guarded("kernel-command-line", _command_line_check, system)
    return Readiness(generations, tuple(checks))


def _guarded(name: str, check: object, system: _System) -> list[Check]:
    """A check's answers; what it cannot read is unknown."""
    assert callable(check)
    found: list[Check] = []
    try:
        found.extend(check(system))
    except (ExtError, InitramfsError) as error:
        found.append(Check(name, "unknown", str(error)))
    return found


# --- the partition table and the boot loaders -------------------------------------------------------------------


def _boot_checks(image: DiskImage, table: Sequence[Partition]) -> tuple[tuple[int, ...], list[Check]]:
    boot = image.pread(0, SECTOR)
    kind = "GPT" if gpt.is_protective(boot) else "MBR" if boot[510:512] == b"\x55\xaa" else None
    if kind is None:
        detail = "neither GPT nor MBR: the disk is empty, or a file system without partitions"
        return (), [Check("partition-table", "failed", detail)]
    loader = find_loader(image)
    code = boot[510:512] == b"\x55\xaa" and any(boot[:440])
    bios = code and (kind == "MBR" or any(one.type == BIOS_BOOT for one in table))
    generations = tuple(number for number, can in ((1, bios), (2, loader.found)) if can)
    if bios:
        first = Check("generation-1", "ok", f"{kind} with boot code in its first sector")
    else:
        why = "no boot code in the first sector" if not code else "boot code, but no BIOS boot partition for the rest"
        first = Check("generation-1", "warning", f"not bootable by BIOS: {why}")
    second = Check("generation-2", "ok" if loader.found else "warning", loader.reason)
    checks = [Check("partition-table", "ok", f"{kind} with {len(table)} partitions"), first, second]
    if not generations:
        checks.append(Check("boot-loader", "failed", "neither BIOS nor UEFI finds anything to boot"))
    return generations, checks


# --- the file systems -------------------------------------------------------------------------------------------


def _file_systems(image: DiskImage, table: Sequence[Partition]) -> _System:
    root: Ext | None = None
    boot: Ext | None = None
    known: set[str] = set()
    unread: list[str] = []
    for partition in table:
        try:
            ext = Ext(image, partition.start, partition.length)
            known |= {f"UUID={ext.uuid}", *([f"LABEL={ext.label}"] if ext.label else [])}
            if root is None and ext.find("/etc/os-release") is not None:
                root = ext
            elif boot is None and any(name.startswith("vmlinuz") for name in ext.names("/")):
                boot = ext
        except ExtError as error:
            kind = _other_kind(image, partition)
            if kind != "vfat":
                unread.append(f"partition {partition.number}: {kind or error}")
    own = root is not None and any(name.startswith("vmlinuz") for name in _names(root, "/boot"))
    if own or boot is None:
        return _System(root, root, "/boot", frozenset(known), tuple(unread))
    return _System(root, boot, "/", frozenset(known), tuple(unread))


def _names(ext: Ext, folder: str) -> list[str]:
    try:
        return ext.names(folder)
    except ExtError:
        return []


def _other_kind(image: DiskImage, partition: Partition) -> str | None:
    """The name of a file system that is not read here, by its magic."""
    head = image.pread(partition.start, min(KiB, partition.length))
    if head[:4] == b"XFSB":
        return "xfs, which is not read here"
    if head[3:11] == b"NTFS    ":
        return "NTFS, which is not read here"
    if head[SECTOR : SECTOR + 8] == b"LABELONE":
        return "LVM, which is not read here"
    if head[:6] == b"LUKS\xba\xbe":
        return "LUKS, which is encrypted"
    if head[54:57] == b"FAT" or head[82:85] == b"FAT":
        return "vfat"
    at = 64 * KiB + 64
    if partition.length > at + 8 and image.pread(partition.start + at, 8) == b"_BHRfS_M":
        return "btrfs, which is not read here"
    return None


def _root_check(system: _System) -> Iterator[Check]:
    if system.root is None:
        found = "; ".join(system.unread) or "no ext file system with /etc/os-release"
        yield Check("root-file-system", "unknown", f"what the guest needs could not be looked for: {found}")
        return
    text = _text(system.root, "/etc/os-release") or ""
    pretty = re.search(r'^PRETTY_NAME="?([^"\n]*)', text, re.MULTILINE)
    yield Check("root-file-system", "ok", "ext, " + (pretty.group(1)[:80] if pretty else "of an unnamed system"))


# --- kernel, modules, initramfs ---------------------------------------------------------------------------------


def _kernel_checks(system: _System) -> Iterator[Check]:
    assert system.root is not None
    assert system.boot is not None
    releases = [
        name.removeprefix("vmlinuz-")
        for name in system.boot.names(system.boot_folder)
        if name.startswith("vmlinuz-") and "rescue" not in name
    ]
    if not releases:
        yield Check("kernel", "unknown", "no vmlinuz-VERSION was found")
        return
    for release in releases[-MAX_KERNELS:]:
        try:
            yield from _one_kernel(system.root, system.boot, system.boot_folder, release)
        except (ExtError, InitramfsError) as error:
            yield Check(f"kernel {release}", "unknown", str(error))


def _one_kernel(root: Ext, boot: Ext, folder: str, release: str) -> Iterator[Check]:
    name = f"kernel {release}"
    modules = next(
        (one for one in (f"/lib/modules/{release}", f"/usr/lib/modules/{release}") if root.find(one)), None
    )
    config = _text(boot, f"{folder}/config-{release}") or (modules and _text(root, f"{modules}/config")) or ""
    builtin = _modules_in((modules and _text(root, f"{modules}/modules.builtin")) or "")
    builtin |= {one for one, option in OPTIONS.items() if f"\n{option}=y" in f"\n{config}"}
    loadable = _modules_in((modules and _text(root, f"{modules}/modules.dep")) or "")
    if not config and not builtin and not loadable:
        yield Check(name, "unknown", "neither its configuration nor a list of its modules was found")
        return
    absent = [one for one in (*NEEDED_TO_BOOT, *NEEDED_LATER) if one not in builtin | loadable]
    if absent and loadable:
        yield Check(name, "failed", f"without {', '.join(absent)}: it was made without support for Hyper-V")
        return
    late = [one for one in NEEDED_TO_BOOT if one not in builtin]
    if not late:
        yield Check(name, "ok", "the drivers for Hyper-V's disks are built in")
        return
    image = _initramfs(boot, folder, release)
    if image is None:
        yield Check(name, "failed", f"{', '.join(late)} are modules, and there is no initramfs to load them from")
        return
    data = boot.read(image, MAX_INITRAMFS) or b""
    inside = _modules_in("\n".join(names(data)))
    lacking = [one for one in late if one not in inside]
    if lacking:
        yield Check(
            name,
            "failed",
            f"{', '.join(lacking)} is not in {image.rsplit('/', 1)[1]}: on Hyper-V it finds no disk; rebuild it in "
            "the guest with these modules (Debian: /etc/initramfs-tools/modules; Fedora: dracut --add-drivers)",
        )
        return
    yield Check(name, "ok", f"{', '.join(late)} in {image.rsplit('/', 1)[1]}")


def _initramfs(boot: Ext, folder: str, release: str) -> str | None:
    for name in (f"initrd.img-{release}", f"initramfs-{release}.img", f"initrd-{release}", f"initramfs-{release}"):
        path = f"{folder.rstrip('/')}/{name}"
        found = boot.find(path)
        if found is not None and found.is_file:
            return path
    return None


def _modules_in(text: str) -> set[str]:
    """Names of modules in a list of paths, with - and _ being one."""
    found = re.findall(r"([A-Za-z0-9_-]+)\.ko(?:\.(?:xz|gz|zst))?(?=[:\s]|$)", text, re.MULTILINE)
    return {name.replace("-", "_") for name in found}


# --- cloud-init, fstab, root= -----------------------------------------------------------------------------------


def _cloud_init_check(system: _System) -> Iterator[Check]:
    root = system.root
    assert root is not None
    if root.find("/etc/cloud/cloud.cfg") is None:
        ignition = root.find("/usr/lib/dracut/modules.d/30ignition") is not None
        detail = "not found, but Ignition" if ignition else "not found: nothing would read the config drive"
        yield Check("cloud-init", "warning", detail)
        return
    chosen, where = None, ""
    folder = "/etc/cloud/cloud.cfg.d"
    paths = ["/etc/cloud/cloud.cfg", *(f"{folder}/{one}" for one in root.names(folder) if one.endswith(".cfg"))]
    for path in paths:
        found = _data_sources(_text(root, path) or "")
        if found is not None:
            chosen, where = found, path
    if root.find("/etc/cloud/cloud-init.disabled") is not None:
        yield Check("cloud-init", "failed", "disabled by /etc/cloud/cloud-init.disabled")
    elif chosen is None:
        yield Check("cloud-init", "ok", "no datasource_list: it looks for every source")
    elif any(one in chosen for one in OUR_SOURCES):
        yield Check("cloud-init", "ok", f"datasource_list in {where}: {', '.join(chosen)}"[:300])
    else:
        detail = f"datasource_list in {where} has neither {' nor '.join(OUR_SOURCES)}: {', '.join(chosen)}"
        yield Check("cloud-init", "failed", detail[:300])


def _data_sources(text: str) -> list[str] | None:
    inline = re.search(r"^\s*datasource_list:\s*\[([^\]]*)\]", text, re.MULTILINE)
    if inline:
        return [one.strip(" \t\n'\"") for one in inline.group(1).split(",") if one.strip()]
    block = re.search(r"^\s*datasource_list:\s*\n((?:\s*-\s*\S+\s*\n?)+)", text, re.MULTILINE)
    return re.findall(r"-\s*['\"]?([A-Za-z0-9]+)", block.group(1)) if block else None


def _fstab_check(system: _System) -> Iterator[Check]:
    root = system.root
    assert root is not None
    text = _text(root, "/etc/fstab")
    if text is None:
        yield Check("fstab", "warning", "there is no /etc/fstab")
        return
    entries = [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    problems = [problem for entry in entries if len(entry) >= 2 for problem in _device_problems(entry[0], system)]
    needed = [problem for problem in problems if problem[0] == "failed"]
    if problems:
        yield Check("fstab", (needed or problems)[0][0], "; ".join(text for _, text in problems)[:300])
    else:
        yield Check("fstab", "ok", f"{len(entries)} entries, none by the name of a device")


def _command_line_check(system: _System) -> Iterator[Check]:
    boot, found = system.boot, None
    assert boot is not None
    for path in ("grub/grub.cfg", "grub2/grub.cfg", "extlinux/extlinux.conf", "syslinux/syslinux.cfg"):
        text = _text(boot, f"{system.boot_folder}/{path}")
        # GRUB fills in ${…} itself; what stands in the menu entries is literal.
        roots = re.findall(r"^\s*(?:linux\S*|append)\s.*?\broot=([^\s$]+)", text or "", re.MULTILINE | re.IGNORECASE)
        if roots:
            found = (path, sorted(set(roots)))
            break
    if found is None:
        yield Check("kernel-command-line", "unknown", "no root= was found in a boot menu")
        return
    path, roots = found
    problems = [problem for root in roots for problem in _device_problems(root, system)]
    if problems:
        worst: Status = "failed" if any(status == "failed" for status, _ in problems) else "warning"
        yield Check("kernel-command-line", worst, "; ".join(text for _, text in problems)[:300])
    else:
        yield Check("kernel-command-line", "ok", f"root={', '.join(roots)} in {path}"[:300])


def _device_problems(device: str, system: _System) -> Iterator[tuple[Status, str]]:
    """What is wrong with how a file system is named."""
    if _DEVICE.match(device):
        yield "failed", f"{device} is the name of a disk of another hypervisor, on Hyper-V it is /dev/sd…"
    elif _NAMED_DEVICE.match(device):
        yield "warning", f"{device} is the name of a device, which may change: use UUID= or LABEL="
    elif device.startswith(("UUID=", "LABEL=")):
        name, _, value = device.partition("=")
        value = value.strip("\"'")
        wanted = f"UUID={value.lower()}" if name == "UUID" else f"LABEL={value}"
        # A vfat or swap has such names too, and they are not all read here.
        if name == "UUID" and len(value) == 36 and wanted not in system.known and not system.unread:
            yield "warning", f"{device} is none of the file systems on this disk that could be read"


def _text(ext: Ext, path: str) -> str | None:
    """A text file; its first part when it is too long to be one. None when it is not there."""
    found = ext.find(path)
    if found is None or not found.is_file:
        return None
    data = ext.read(path, 16 * MAX_TEXT)
    return None if data is None else data[: 16 * MAX_TEXT].decode("utf-8", "replace")
