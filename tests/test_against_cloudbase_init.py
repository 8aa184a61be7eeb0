"""Our media, read by the agent of Windows guests: as a DVD, a raw disk and a volume; and what we foresee of it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from imagekit.cloudinit.configdrive import config_drive_tree
from imagekit.cloudinit.model import parse_spec
from imagekit.cloudinit.vfat import PARTITION_START
from imagekit.contents.drive_check import check_drive
from imagekit.media import Packing, pack
from tests.cloudinit_specs import FULL, KEY, MAC, UUID
from tests.oracles import need_tool
from tests.oracles.cloudbase_init import Windows, ask
from tests.test_media import ID

pytestmark = pytest.mark.oracle

SPEC = parse_spec({**FULL, "guest": "windows"})
TREE = config_drive_tree(SPEC)
NO_CLOUD = {
    "meta-data": b"instance-id: i-0123\nlocal-hostname: web1\n",
    "user-data": b"#cloud-config\n",
}
MEDIA = {
    "ISO on a DVD": Packing(),
    "ISO in a VHD": Packing("iso", "vhd"),
    "ISO in a VHDX": Packing("iso", "vhdx"),
    "VFAT on a raw disk": Packing("vfat"),
    "VFAT on the whole of a VHDX": Packing("vfat", "vhdx", partition=False),
    "VFAT in a partition": Packing("vfat", "vhdx"),
}


LABELS = ("config-2", "CONFIG-2", "Config-2", "other")
WITHOUT_LATEST = {path: data for path, data in TREE.items() if "latest" not in path}
CASES = {
    **{(name, label): (packing, TREE, label) for name, packing in MEDIA.items() for label in LABELS},
    **{(name, "without latest"): (packing, WITHOUT_LATEST, "config-2") for name, packing in MEDIA.items()},
    **{(name, "NoCloud"): (packing, NO_CLOUD, "cidata") for name, packing in MEDIA.items()},
}

Case = tuple[str, str]


@dataclass(frozen=True)
class Asked:
    """What cloudbase-init read from a medium, and what --check says that it reads; None for nothing."""

    answer: dict[str, Any] | None
    foreseen: dict[str, Any] | None


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Asked]:
    """All media, in one run of it."""
    folders = {case: tmp_path_factory.mktemp("medium") for case in CASES}
    paths, windows = {}, []
    for case, (packing, tree, label) in CASES.items():
        paths[case] = folders[case] / f"medium{packing.suffix}"
        paths[case].write_bytes(pack(tree, label=label, packing=packing, identifier=ID))
        service = "nocloud" if label == "cidata" else "config"
        windows.append(attach(paths[case], packing, folders[case], service))
    answers = ask(windows, tmp_path_factory.mktemp("tools"))
    return {case: Asked(answer, foresee(paths[case])) for case, answer in zip(CASES, answers, strict=True)}


def attach(path: Path, packing: Packing, folder: Path, service: str) -> Windows:
    """The medium as Windows would have it, by tools of others."""
    content = folder / "content"
    content.mkdir()
    if packing == Packing():
        run(need_tool("bsdtar"), "--options", "!rockridge", "-xf", str(path), "-C", str(content))
        return Windows(dvds=((content, label_of(path)),), service=service)
    raw = folder / "disk.raw"
    driver = {None: "raw", "vhd": "vpc", "vhdx": "vhdx"}[packing.disk]
    run(need_tool("qemu-img"), "convert", "-f", driver, "-O", "raw", str(path), str(raw))
    if not packing.partitioned:
        return Windows(disks=(raw,), service=service)
    run(need_tool("mcopy"), "-s", "-n", "-i", f"{raw}@@{PARTITION_START}", "::*", str(content))
    return Windows(disks=(raw,), volumes=((content, label_of(raw, PARTITION_START)),), service=service)


def label_of(path: Path, offset: int = 0) -> str:
    return run(need_tool("blkid"), "-p", "-O", str(offset), "-s", "LABEL", "-o", "value", str(path)).strip()


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def foresee(path: Path) -> dict[str, Any] | None:
    (volume,) = check_drive(path).volumes
    wanted = "NoCloud" if "meta-data" in volume.volume.tree else "ConfigDrive"
    (seen,) = (one for one in volume.seen if one.agent == f"cloudbase-init ({wanted})")
    return seen.facts if seen.found else None


@pytest.mark.parametrize("name", MEDIA)
def test_cloudbase_init_reads_what_the_spec_says(asked: dict[Case, Asked], name: str) -> None:
    one = asked[name, "config-2"]
    assert one.answer == {
        "instance_id": UUID,
        "host_name": "web1.example",
        "keys": [KEY],
        "password": FULL["password"],
        "user_data": FULL["user_data"].encode().hex(),
        "links": [["eth0", MAC, 1400]],
        "networks": [
            [
                "eth0",
                "192.0.2.10/24",
                ["192.0.2.53"],
                [["0.0.0.0/0", "192.0.2.1"], ["198.51.100.0/24", "192.0.2.254"]],
            ],
            ["eth0", "2001:db8::10/64", ["2001:db8::53"], [["::/0", "fe80::1"]]],
        ],
    }
    assert one.foreseen is not None
    assert (one.foreseen["instance-id"], one.foreseen["hostname"]) == (UUID, "web1.example")
    assert one.foreseen["adapters-renamed-to"] == ["eth0"]


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_we_foresee_whether_it_finds_the_medium(asked: dict[Case, Asked], case: Case) -> None:
    """By every label, without its folder, as NoCloud. A raw disk it takes before it looks for files, and fails."""
    one = asked[case]
    raw_disk = case[0] not in ("ISO on a DVD", "VFAT in a partition")
    failed = one.answer is not None and "failed" in one.answer
    assert failed == (raw_disk and case[1] == "without latest")
    assert (one.answer is None or failed) == (one.foreseen is None)


@pytest.mark.parametrize("name", MEDIA)
def test_it_reads_no_cloud_too(asked: dict[Case, Asked], name: str) -> None:
    one = asked[name, "NoCloud"]
    assert one.answer is not None and one.foreseen is not None
    assert (one.answer["instance_id"], one.answer["host_name"]) == ("i-0123", "web1")
    assert (one.foreseen["instance-id"], one.foreseen["hostname"]) == ("i-0123", "web1")
