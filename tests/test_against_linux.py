"""Our media, mounted by a real Linux kernel: its isofs and vfat show the tree, its blkid the label."""

from __future__ import annotations

import pytest

from imagekit.cloudinit.configdrive import config_drive_tree
from imagekit.cloudinit.model import parse_spec
from imagekit.media import Packing, pack
from tests.cloudinit_specs import FULL
from tests.oracles import linux
from tests.test_media import ID

pytestmark = [pytest.mark.slow, pytest.mark.oracle]

TREE = {
    **config_drive_tree(parse_spec(FULL)),
    "empty": b"",
    "README.TXT": b"8.3",
    "meta-data": b"hyphen",
    "meta_data": b"underscore",
    "one-cluster": b"c" * 2048,
    "cluster-and-a-byte": b"d" * 2049,
    "a.b.c.d": b"dots",
    "n" * 64: b"long name",
    "a/b/c/d/e/f/deep": b"seven levels",
    **{f"many/file number {number}.text": b"%d" % number for number in range(100)},
}
LARGE = {"large.bin": bytes(range(256)) * 40_000}

MEDIA = {
    "ide-dvd": (Packing(), "ide-cd", TREE),
    "scsi-dvd": (Packing(), "scsi-cd", TREE),
    "iso-raw": (Packing(), "scsi-hd", TREE),
    "iso-vhd": (Packing("iso", "vhd"), "scsi-hd", TREE),
    "iso-vhdx": (Packing("iso", "vhdx"), "scsi-hd", TREE),
    "vfat-raw": (Packing("vfat"), "scsi-hd", TREE),
    "vfat-vhd": (Packing("vfat", "vhd"), "scsi-hd", TREE),
    "vfat-vhdx": (Packing("vfat", "vhdx"), "scsi-hd", TREE),
    "fat16-vhdx": (Packing("vfat", "vhdx"), "scsi-hd", TREE | LARGE),
    "fat16-whole": (Packing("vfat", "vhdx", partition=False), "scsi-hd", TREE | LARGE),
}
DRIVERS = {None: "raw", "vhd": "vpc", "vhdx": "vhdx"}


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[linux.Mounted]]:
    """What one boot of Linux makes of all of them."""
    folder = tmp_path_factory.mktemp("media")
    media = {}
    for name, (packing, bus, tree) in MEDIA.items():
        path = folder / f"{name}{packing.suffix}"
        path.write_bytes(pack(with_name(name, tree), label="config-2", packing=packing, identifier=ID))
        media[name] = (path, DRIVERS[packing.disk], bus)
    return linux.mount_all(media, folder)


def with_name(name: str, tree: dict[str, bytes]) -> dict[str, bytes]:
    return {**tree, "which": name.encode()}


@pytest.mark.parametrize("name", MEDIA)
def test_linux_mounts_every_medium_and_shows_the_tree(mounted: dict[str, list[linux.Mounted]], name: str) -> None:
    """ISO 9660 by its Rock Ridge names, by its Joliet names, and by whichever Linux prefers."""
    packing, bus, tree = MEDIA[name]
    mounts = mounted[name]
    assert [one.options for one in mounts] == (
        ["ro", "ro,nojoliet", "ro,norock"] if packing.media == "iso" else ["ro"]
    )
    for one in mounts:
        assert one.digests == linux.digests(with_name(name, tree))
        assert (one.label, one.file_system) == ("config-2", {"iso": "iso9660", "vfat": "vfat"}[packing.media])
        assert one.device.startswith("sr" if bus.endswith("cd") else "sd")
        assert one.device[-1].isdigit() == (bus.endswith("cd") or packing.partitioned)


@pytest.mark.parametrize("name", [name for name, (packing, *_) in MEDIA.items() if packing.media == "iso"])
def test_files_are_roots_and_read_only_for_linux(mounted: dict[str, list[linux.Mounted]], name: str) -> None:
    assert mounted[name][0].modes == {("FOLDER", "555", "0:0"), ("FILE", "444", "0:0")}
