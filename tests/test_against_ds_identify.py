"""ds-identify, which decides at boot whether cloud-init runs, finds our media; and we foresee whether it does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from imagekit.cloudinit.configdrive import config_drive_tree
from imagekit.cloudinit.model import parse_spec
from imagekit.cloudinit.vfat import PARTITION_START
from imagekit.contents.drive_check import check_drive
from imagekit.media import Packing, pack
from tests.cloudinit_specs import FULL
from tests.oracles import cloud_init, need_tool
from tests.test_media import ID

pytestmark = pytest.mark.oracle

MEDIA = {
    "ISO": Packing(),
    "ISO in a VHD": Packing("iso", "vhd"),
    "ISO in a VHDX": Packing("iso", "vhdx"),
    "VFAT": Packing("vfat"),
    "VFAT on the whole of a VHD": Packing("vfat", "vhd", partition=False),
    "VFAT in a partition of a VHDX": Packing("vfat", "vhdx"),
}
TREES = {
    "ConfigDrive": config_drive_tree(parse_spec(FULL)),
    "NoCloud": {"meta-data": b"instance-id: i-1\n", "user-data": b"#cloud-config\n"},
}
LABELS = {
    "config-2": "ConfigDrive",
    "CONFIG-2": "ConfigDrive",
    "Config-2": None,
    "cidata": "NoCloud",
    "CIDATA": "NoCloud",
    "Cidata": None,
    "data": None,
}


@pytest.mark.parametrize("packing", MEDIA.values(), ids=MEDIA)
def test_ds_identify_finds_the_medium_by_its_label(tmp_path: Path, packing: Packing) -> None:
    """What it runs is cloud-init's own script; only its blkid is pointed at the medium instead of the machine."""
    for label, source in LABELS.items():
        tree = TREES["NoCloud" if label.lower() == "cidata" else "ConfigDrive"]
        path = tmp_path / f"{label}{packing.suffix}"
        path.write_bytes(pack(tree, label=label, packing=packing, identifier=ID))
        found = cloud_init.ds_identify(disk(path, packing), PARTITION_START if packing.partitioned else 0)
        assert found == ({source} if source else set()), label
        (volume,) = check_drive(path).volumes
        foreseen = {seen.agent for seen in volume.seen if seen.found and seen.agent.startswith("cloud-init")}
        assert foreseen == {f"cloud-init ({one})" for one in found}, label


def disk(path: Path, packing: Packing) -> Path:
    """The bytes of the disk, as qemu-img reads them."""
    if packing.disk is None:
        return path
    raw = path.with_suffix(".raw")
    driver = {"vhd": "vpc", "vhdx": "vhdx"}[packing.disk]
    command = [need_tool("qemu-img"), "convert", "-f", driver, "-O", "raw", str(path), str(raw)]
    subprocess.run(command, check=True, capture_output=True)
    return raw
