"""A tree becomes a medium of any kind, reads back as the tree, and is the same bytes every time."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest

from imagekit import api, media
from imagekit.cloudinit.configdrive import config_drive_tree
from imagekit.cloudinit.model import parse_spec
from imagekit.cloudinit.vfat import write_vfat
from imagekit.contents.drives import read_drive
from imagekit.copying import copy_image
from imagekit.errors import UnsupportedFeature, UsageError, VerificationFailed
from imagekit.formats.base import MiB
from imagekit.formats.files import MemoryFile
from imagekit.media import Packing, pack
from tests.cloudinit_specs import FULL

TREE = config_drive_tree(parse_spec(FULL))
ID = UUID("8f2a6d5c-9d3e-4a54-8d4e-0f9b8d1f1c11")
PACKINGS = [
    Packing("iso"),
    Packing("iso", "vhd"),
    Packing("iso", "vhdx"),
    Packing("vfat"),
    Packing("vfat", partition=True),
    Packing("vfat", "vhd"),
    Packing("vfat", "vhdx"),
    Packing("vfat", "vhdx", partition=False),
]


def name(packing: Packing) -> str:
    return f"{packing.name}{', partition' if packing.partitioned else ''}"


def packed(packing: Packing, tree: dict[str, bytes] = TREE, identifier: UUID = ID) -> bytes:
    return pack(tree, label="config-2", packing=packing, identifier=identifier)


@pytest.mark.parametrize("packing", PACKINGS, ids=name)
def test_a_medium_of_any_kind_holds_the_tree_for_linux_and_windows(packing: Packing, tmp_path: Path) -> None:
    path = tmp_path / f"drive{packing.suffix}"
    path.write_bytes(packed(packing))
    drive = read_drive(path)
    (volume,) = drive.volumes
    assert (volume.label, volume.tree, volume.windows) == ("config-2", TREE, TREE)
    assert volume.file_system == {"iso": "iso9660", "vfat": "vfat"}[packing.media]
    assert volume.partition == (1 if packing.partitioned else None)
    assert drive.format == (packing.disk or "raw")
    assert drive.findings == ()


@pytest.mark.parametrize("packing", PACKINGS, ids=name)
def test_the_same_tree_and_id_give_the_same_bytes(packing: Packing) -> None:
    once, again = packed(packing), packed(packing, dict(reversed(TREE.items())))
    assert once == again
    other = packed(packing, identifier=UUID(int=7))
    assert (other != once) == (packing.disk is not None)


@pytest.mark.parametrize("disk", ["vhd", "vhdx"])
def test_a_disk_is_one_that_windows_functions_could_have_made(disk: str, tmp_path: Path) -> None:
    """Whole MiB, 3 at least; a VHD is fixed, a VHDX dynamic."""
    packing = Packing.choose("iso", disk)
    assert packing is not None
    path = tmp_path / f"drive.{disk}"
    path.write_bytes(packed(packing))
    info = api.info(path).info
    assert (info.virtual_size, info.subformat) == (3 * MiB, {"vhd": "fixed", "vhdx": "dynamic"}[disk])
    path.write_bytes(packed(packing, {**TREE, "openstack/content/0000": bytes(4 * MiB + 1)}))
    assert api.info(path).info.virtual_size == 5 * MiB
    assert api.check(path).sound


def test_an_identical_file_takes_room_once_on_iso_9660() -> None:
    large = {"openstack/latest/user_data": b"x" * MiB}
    assert len(packed(Packing(), {**large, "openstack/2018-08-27/user_data": b"x" * MiB})) < 2 * MiB


@pytest.mark.parametrize("packing", PACKINGS, ids=name)
def test_more_than_64_mib_are_refused(packing: Packing) -> None:
    with pytest.raises(UsageError, match="67108864"):
        packed(packing, {"a": b"1" * (33 * MiB), "b": b"2" * (33 * MiB)})


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("udf",), "media 'udf'"),
        (("iso", "qcow2"), "disk 'qcow2'"),
        (("iso", "vhd", True), "whole disk"),
        (("none", "vhdx"), "no config drive"),
        (("none", None, False), "no config drive"),
    ],
)
def test_words_that_mean_no_medium_are_refused(words: tuple[str, str | None, bool | None], problem: str) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        Packing.choose(*words)
    assert caught.value.hint is not None


def test_none_is_no_medium() -> None:
    assert Packing.choose("none") is None


def test_generation_2_takes_no_vhd() -> None:
    with pytest.raises(UnsupportedFeature, match=r"generation 2 takes no \.vhd") as caught:
        Packing("iso", "vhd").check_generation(2)
    assert caught.value.hint is not None and "vhdx" in caught.value.hint
    for packing, generation in ((Packing("iso", "vhd"), 1), (Packing("iso", "vhdx"), 2), (Packing(), 2)):
        packing.check_generation(generation)


@pytest.mark.parametrize(
    ("packing", "file", "allowed"),
    [
        (Packing(), "a.iso", True),
        (Packing(), "a", True),
        (Packing(), "a.dat", True),
        (Packing(), "a.img", False),
        (Packing(), "a.VHD", False),
        (Packing("vfat"), "a.img", True),
        (Packing("vfat"), "a.iso", False),
        (Packing("iso", "vhd"), "a.VHD", True),
        (Packing("iso", "vhd"), "a.vhdx", False),
        (Packing("iso", "vhdx"), "a", False),
    ],
)
def test_a_name_must_not_promise_what_the_medium_is_not(packing: Packing, file: str, allowed: bool) -> None:
    if allowed:
        packing.check_name(file)
        return
    with pytest.raises(UsageError, match="the medium is") as caught:
        packing.check_name(file)
    assert caught.value.hint == f"name it NAME{packing.suffix}"


@pytest.mark.parametrize("packing", [Packing("vfat"), Packing("vfat", "vhdx")], ids=name)
def test_a_file_system_that_does_not_read_back_is_not_handed_out(
    packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:

    def damaged(*arguments: object, **options: object) -> bytes:
        return write_vfat(*arguments, **options).replace(b"#cloud-config", b"#cloud-confid")  # type: ignore[arg-type]

    monkeypatch.setattr(media, "write_vfat", damaged)
    with pytest.raises(VerificationFailed, match="read back"):
        packed(packing)


def test_a_disk_that_does_not_read_back_is_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:

    def damaged(plan: object, image: object, source: object, target: MemoryFile, **options: object) -> None:
        copy_image(plan, image, source, target, **options)  # type: ignore[arg-type]
        at = target.data.index(b"#cloud-config")
        target.data[at] = 0

    monkeypatch.setattr(media, "copy_image", damaged)
    with pytest.raises(VerificationFailed, match="read back"):
        packed(Packing("iso", "vhdx"))
