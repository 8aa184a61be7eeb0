"""A real Linux kernel that mounts media: its own isofs and vfat say what is on them.

Debian's cloud kernel and a static busybox are downloaded with apt-get and unpacked into the tests' cache, nothing is
installed; with this machine's blkid they make an initial RAM disk that boots in QEMU within seconds, mounts what it
finds on every block device, and prints on the serial port what is there. A medium is known by a file ``which`` on
it.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cache import cache_dir, locked
from tests.oracles import missing, need_tool

MODULES = (
    *("sr_mod", "sd_mod", "virtio_pci", "virtio_scsi", "ata_piix"),
    *("isofs", "vfat", "nls_cp437", "nls_ascii", "nls_utf8"),
)
TIMEOUT = 300
"""Seconds; it takes ten on an idle machine."""

# Every file system is mounted as cloud-init does it, and ISO 9660 also with fewer of its names.
INIT = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /mnt /run
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod /modules/$module; done
for second in 1 2 3 4 5 6 7 8 9 10; do
    [ $(ls /sys/class/block | grep -c -E '^(sr|sd)') -ge COUNT ] && break; sleep 1
done
sleep 1
exec > /dev/ttyS0 2>&1
stty raw
look() {
    mount -t $TYPE -o $1 /dev/$device /mnt || { echo "FAILED mount -t $TYPE -o $1 $device"; return; }
    echo "MEDIUM $(cat /mnt/which) $device $TYPE $1 $LABEL"
    cd /mnt
    find . -mindepth 1 -type d -exec stat -c 'FOLDER %a %u:%g %n' {} +
    find . -type f -exec stat -c 'FILE %a %u:%g %s %n' {} +
    find . -type f -exec sha256sum {} + | sed 's/^/SUM /'
    cd /; umount /mnt
}
for device in $(ls /sys/class/block); do
    TYPE= LABEL=
    eval "$(/bin/blkid -p -o export /dev/$device | grep -E '^(TYPE|LABEL)=')"
    case $TYPE in
        iso9660) look ro; look ro,nojoliet; look ro,norock ;;
        vfat) look ro ;;
    esac
done
echo THE END
poweroff -f
"""


@dataclass(frozen=True)
class Mounted:
    """What one mount showed: sizes and SHA-256 of the files, modes and owners of everything."""

    device: str
    file_system: str
    options: str
    label: str
    digests: dict[str, str] = field(default_factory=dict)
    modes: set[tuple[str, str, str]] = field(default_factory=set)
    """(kind, mode, owner)"""


def mount_all(media: Mapping[str, tuple[Path, str, str]], folder: Path) -> dict[str, list[Mounted]]:
    """Boot and mount. ``media``: what is in the file ``which`` of each to path, QEMU's format and bus.

    A bus is ``ide-cd``, ``scsi-cd`` or ``scsi-hd``.
    """
    qemu = need_tool("qemu-system-x86_64")
    kernel, ram_disk = _kernel()
    ram = folder / "initrd.gz"
    ram.write_bytes(ram_disk.read_bytes() + gzip.compress(_cpio({"count": b"%d" % len(media)}), mtime=0))
    command = [qemu, "-accel", "tcg", "-m", "256", "-nodefaults", "-display", "none", "-no-reboot"]
    command += ["-kernel", str(kernel), "-initrd", str(ram), "-append", "console=ttyS0 quiet panic=-1"]
    command += ["-serial", "stdio", "-device", "virtio-scsi-pci,id=scsi"]
    for number, (path, driver, bus) in enumerate(media.values()):
        node = {"driver": driver, "node-name": f"m{number}", "read-only": True}
        command += ["-blockdev", json.dumps({**node, "file": {"driver": "file", "filename": str(path)}})]
        where = "" if bus.startswith("ide") else ",bus=scsi.0"
        command += ["-device", f"{bus},drive=m{number}{where}"]
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL)
    text = done.stdout.decode("utf-8", "replace").replace("\r\n", "\n")
    if "THE END" not in text:
        pytest.fail(f"the kernel did not get to the end: {text[-3000:]}{done.stderr.decode(errors='replace')}")
    assert "FAILED" not in text, text
    return _mounts(text)


def _mounts(text: str) -> dict[str, list[Mounted]]:
    found: dict[str, list[Mounted]] = {}
    current = Mounted("", "", "", "")
    for line in text.splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "MEDIUM":
            name, device, file_system, options, label = rest.split(" ")
            current = Mounted(device, file_system, options, label)
            found.setdefault(name, []).append(current)
        elif kind in ("FOLDER", "FILE"):
            mode, owner, _ = rest.split(" ", 2)
            current.modes.add((kind, mode, owner))
        elif kind == "SUM":
            digest, path = rest.split("  ", 1)
            current.digests[path.removeprefix("./")] = digest
    return found


def digests(tree: Mapping[str, bytes]) -> dict[str, str]:
    """What `Mounted.digests` must be for ``tree``."""
    return {path: hashlib.sha256(content).hexdigest() for path, content in tree.items()}


@functools.cache
def _kernel() -> tuple[Path, Path]:
    """(kernel, initial RAM disk), made at first use."""
    for tool in ("apt-get", "dpkg-deb", "ldd"):
        need_tool(tool)
    key = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    release = platform.freedesktop_os_release()
    folder = cache_dir("linux") / f"{release['ID']}-{release.get('VERSION_ID', 'rolling')}-{key}"
    kernel, ram_disk = folder / "vmlinuz", folder / "initrd.gz"
    with locked(folder.with_suffix(".lock")):
        if not ram_disk.exists():
            try:
                _build(folder, kernel, ram_disk)
            except subprocess.CalledProcessError as error:
                missing(f"Debian's kernel cannot be downloaded: {error.stderr.strip()[-200:]}")
    return kernel, ram_disk


def _build(folder: Path, kernel: Path, ram_disk: Path) -> None:
    scratch = folder / "unpacked"
    shutil.rmtree(folder, ignore_errors=True)
    scratch.mkdir(parents=True)
    named = _run("apt-cache", "depends", "linux-image-cloud-amd64")
    image = re.search(r"Depends: (linux-image-\S+)", named)
    if image is None:
        missing("apt knows no linux-image-cloud-amd64 (run apt-get update)")
    _run("apt-get", "download", image[1], "busybox-static", cwd=folder)
    for package in folder.glob("*.deb"):
        _run("dpkg-deb", "-x", str(package), str(scratch))
        package.unlink()
    (found,) = (scratch / "boot").glob("vmlinuz-*")
    found.rename(kernel)
    files = {"init": INIT.replace("COUNT", "$(cat /count)").encode()}
    programs = (path.read_bytes() for path in scratch.rglob("busybox") if path.is_file())
    files["bin/busybox"] = next(program for program in programs if program.startswith(b"\x7fELF"))
    files["bin/blkid"] = Path(need_tool("blkid")).read_bytes()
    for library in re.findall(r"(/\S+) \(0x", _run("ldd", need_tool("blkid"))):
        files[library.lstrip("/")] = Path(library).read_bytes()
    order = []
    for module in _in_order({path.name.split(".ko")[0]: path for path in scratch.rglob("*.ko")}):
        files[f"modules/{module.name}"] = module.read_bytes()
        order.append(module.name)
    files["modules/order"] = "\n".join(order).encode()
    shutil.rmtree(scratch)
    ram_disk.write_bytes(gzip.compress(_cpio(files), mtime=0))


def _in_order(modules: Mapping[str, Path]) -> Iterator[Path]:
    """The modules and what each needs, as they say themselves (``depends=`` in .modinfo), the needed ones first."""
    done: set[str] = set()

    def load(name: str) -> Iterator[Path]:
        name = name.replace("-", "_")
        path = modules.get(name) or modules.get(name.replace("_", "-"))
        if name in done or path is None:  # what is no module is built into the kernel
            return
        done.add(name)
        needs = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for needed in filter(None, (needs[1].decode() if needs else "").split(",")):
            yield from load(needed)
        yield path

    for module in MODULES:
        yield from load(module)


def _cpio(files: Mapping[str, bytes]) -> bytes:
    """An archive in the form ``newc``, everything executable, with the folders that the files need."""
    folders = {str(parent) for path in files for parent in Path(path).parents} - {"."}
    entries = [(path, 0o040755, b"") for path in sorted(folders)]
    entries += [(path, 0o100755, content) for path, content in files.items()]
    out = bytearray()
    for number, (path, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        name = path.encode() + b"\0"
        header = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
        out += b"070701" + b"".join(b"%08X" % value for value in header) + name
        out += bytes(-len(out) % 4) + content
        out += bytes(-len(out) % 4)
    return bytes(out) + bytes(-len(out) % 512)


def _run(*command: str, cwd: Path | None = None) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout
