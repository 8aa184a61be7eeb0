"""Bundles: disk, config drive and machine.json that belong together, all of them or none."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path
from typing import Literal

import pytest

import imagekit
from fixtures.efi_disks import ESP, UEFI_CA, WINDOWS_CA, Fat, gpt_disk, loader
from imagekit import bundle as bundle_module
from imagekit.cloudinit.iso import read_iso
from imagekit.contents.drives import read_drive
from imagekit.errors import (
    Cancelled,
    ImagekitError,
    InvalidSpec,
    SourceError,
    TargetError,
    ToolError,
    UnsafeImage,
    UnsupportedFeature,
    UsageError,
)
from imagekit.formats.base import GiB, MiB
from imagekit.machine import Machine
from imagekit.progress import Progress

UUID = "8f2a6d5c-9d3e-4a54-8d4e-0f9b8d1f1c11"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "small.raw"
    with path.open("wb") as file:
        file.truncate(8 * MiB)
        file.write(b"boot" * 128)
    return path


def test_the_bundle_holds_what_machine_json_says(image: Path, tmp_path: Path) -> None:
    made = imagekit.prepare(image, tmp_path / "web1", name="web1", uuid=UUID, network="dhcp")
    machine = Machine.load(tmp_path / "web1")
    assert machine == made.machine
    machine.check_media(tmp_path / "web1", digests=True)
    assert [(medium.path, medium.place) for medium in machine.media] == [
        ("web1.vhd", "IDE 0:0"),
        ("web1-config.iso", "IDE 1:0"),
    ]
    assert str(machine.uuid) == UUID
    assert sorted(path.name for path in (tmp_path / "web1").iterdir()) == [
        "machine.json",
        "web1-config.iso",
        "web1.vhd",
    ]


@pytest.fixture
def uefi_image(tmp_path: Path) -> Path:
    """A disk with a boot loader that says it is shim."""
    return efi_image(tmp_path / "uefi.raw", UEFI_CA)


def efi_image(path: Path, *signers: str) -> Path:
    path.write_bytes(gpt_disk([(ESP, Fat({"EFI/BOOT/BOOTX64.EFI": loader(signers=signers)}, bits=12).volume())]))
    return path


def test_an_image_with_a_uefi_boot_loader_becomes_generation_2(uefi_image: Path, tmp_path: Path) -> None:
    made = imagekit.prepare(uefi_image, tmp_path / "web1", name="web1", uuid=UUID)
    machine = Machine.load(tmp_path / "web1")
    machine.check_media(tmp_path / "web1", digests=True)
    assert (machine.generation, machine.firmware, machine.secure_boot) == (2, "uefi", "linux")
    assert [(medium.path, medium.format, medium.place) for medium in machine.media] == [
        ("web1.vhdx", "vhdx", "SCSI 0:0"),
        ("web1-config.iso", "iso", "SCSI 0:1"),
    ]
    assert made.report.target_format == "vhdx" and made.report.subformat == "dynamic"
    assert imagekit.compare(uefi_image, tmp_path / "web1" / "web1.vhdx").same
    assert made.to_json()["reasons"] == {
        "generation": r"the EFI system partition has \EFI\BOOT\BOOTX64.EFI",
        "secure-boot": "the boot loader is signed by the Microsoft UEFI CA",
    }


def test_an_image_without_one_becomes_generation_1_and_the_reason_is_given(image: Path, tmp_path: Path) -> None:
    made = imagekit.prepare(image, tmp_path / "web1", name="web1")
    assert (made.machine.generation, made.machine.firmware, made.machine.secure_boot) == (1, "bios", "off")
    assert made.choice.generation_reason == "the disk has no EFI system partition"


@pytest.mark.parametrize(
    ("signers", "asked", "secure_boot", "warned"),
    [
        ((WINDOWS_CA,), "auto", "windows", False),
        ((), "auto", "off", False),
        ((), "linux", "linux", True),
        ((UEFI_CA,), "windows", "windows", True),
        ((UEFI_CA,), "off", "off", False),
    ],
    ids=["Windows", "unsigned", "unsigned, asked for", "the other template", "off"],
)
def test_secure_boot_is_what_was_asked_for_or_what_the_loader_is_signed_for(
    tmp_path: Path, signers: tuple[str, ...], asked: str, secure_boot: str, warned: bool
) -> None:
    image = efi_image(tmp_path / "uefi.raw", *signers)
    made = imagekit.prepare(image, tmp_path / "web1", name="web1", machine={"secure_boot": asked})
    assert made.machine.secure_boot == secure_boot
    assert any("will refuse it" in warning for warning in made.warnings) == warned


def test_the_generation_asked_for_wins_over_what_the_image_has(image: Path, uefi_image: Path, tmp_path: Path) -> None:
    first = imagekit.prepare(uefi_image, tmp_path / "first", name="web1", machine={"generation": 1})
    assert (first.machine.generation, first.machine.media[0].path) == (1, "web1.vhd")
    second = imagekit.prepare(image, tmp_path / "second", name="web1", machine={"generation": 2})
    assert (second.machine.generation, second.machine.media[0].path) == (2, "web1.vhdx")
    assert any("nothing to boot" in warning for warning in second.warnings)


def test_one_guest_gives_one_disk_of_generation_2_byte_for_byte(uefi_image: Path, tmp_path: Path) -> None:
    made = [imagekit.prepare(uefi_image, tmp_path / name, name="web1", uuid=UUID) for name in ("a", "b")]
    assert made[0].machine.media[0].sha256 == made[1].machine.media[0].sha256
    other = imagekit.prepare(uefi_image, tmp_path / "c", name="web1")
    assert other.report.identifier != made[0].report.identifier


def test_drive_disk_and_machine_share_one_identity(image: Path, tmp_path: Path) -> None:
    made = imagekit.prepare(image, tmp_path / "web1", name="web1", network="dhcp")
    tree = read_iso((tmp_path / "web1" / "web1-config.iso").read_bytes()).tree
    meta = json.loads(tree["openstack/latest/meta_data.json"])
    network = json.loads(tree["openstack/latest/network_data.json"])
    assert meta["uuid"] == str(made.machine.uuid)
    assert [link["ethernet_mac_address"] for link in network["links"]] == [nic.mac for nic in made.machine.nics]
    info = imagekit.info(tmp_path / "web1" / "web1.vhd").info
    assert info.features["unique-id"] == made.report.identifier


def test_one_guest_gives_one_bundle_byte_for_byte(image: Path, tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        imagekit.prepare(image, tmp_path / name, name="web1", uuid=UUID, user_data="#cloud-config\n")
        files = sorted((tmp_path / name).iterdir())
        digests.append([(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])
    assert digests[0] == digests[1]


def test_the_config_drive_is_for_its_owner_only(image: Path, tmp_path: Path) -> None:
    imagekit.prepare(image, tmp_path / "web1", name="web1", password="secret-Pa55")
    assert stat.S_IMODE((tmp_path / "web1" / "web1-config.iso").stat().st_mode) == 0o600


def test_the_content_is_verified(image: Path, tmp_path: Path) -> None:
    assert imagekit.prepare(image, tmp_path / "web1", name="web1").report.verified == "content"


def test_the_disk_grows_on_the_way(image: Path, tmp_path: Path) -> None:
    made = imagekit.prepare(image, tmp_path / "web1", name="web1", size=20 * GiB)
    assert made.report.virtual_size == 20 * GiB
    assert not any("little" in warning for warning in made.warnings)


def test_what_will_annoy_is_said(image: Path, tmp_path: Path) -> None:
    warnings = imagekit.prepare(image, tmp_path / "web1", name="web1").warnings
    assert any("log in" in warning for warning in warnings)
    assert any("little" in warning for warning in warnings)
    keyed = imagekit.prepare(image, tmp_path / "web2", name="web2", password="secret-Pa55")
    assert not any("log in" in warning for warning in keyed.warnings)


def test_a_secret_is_in_no_result(image: Path, tmp_path: Path) -> None:
    made = imagekit.prepare(image, tmp_path / "web1", name="web1", password="secret-Pa55")
    assert "secret-Pa55" not in repr(made) + json.dumps(made.to_json())
    assert b"secret-Pa55" not in (tmp_path / "web1" / "machine.json").read_bytes()


def fail_with(error: ImagekitError) -> object:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("step", ["write_config_drive", "file_digest", "_machine"])
def test_a_failure_at_any_step_leaves_nothing(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(bundle_module, step, fail_with(ToolError("broken")))
    with pytest.raises(ToolError):
        imagekit.prepare(image, tmp_path / "web1", name="web1")
    assert [path.name for path in tmp_path.iterdir()] == ["small.raw"]


def test_a_failure_leaves_what_others_put_into_the_folder(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "web1"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    monkeypatch.setattr(bundle_module, "file_digest", fail_with(ToolError("broken")))
    with pytest.raises(ToolError):
        imagekit.prepare(image, folder, name="web1")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("taken", ["web1.vhd", "web1.vhdx", "web1-config.iso", "machine.json"])
def test_an_existing_file_stops_it_before_anything_is_written(
    image: Path, uefi_image: Path, tmp_path: Path, taken: str
) -> None:
    image = uefi_image if taken.endswith(".vhdx") else image
    folder = tmp_path / "web1"
    folder.mkdir()
    (folder / taken).write_text("mine")
    with pytest.raises(TargetError):
        imagekit.prepare(image, folder, name="web1")
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(taken, "mine")]


def test_cancelling_leaves_nothing(image: Path, tmp_path: Path) -> None:
    import threading

    cancel = threading.Event()

    def stop_at_hash(progress: Progress) -> None:
        if progress.phase == "hash":
            cancel.set()

    with pytest.raises(Cancelled):
        imagekit.prepare(image, tmp_path / "web1", name="web1", progress=stop_at_hash, cancel=cancel)
    assert [path.name for path in tmp_path.iterdir()] == ["small.raw"]


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"machine": {"generation": 3}}, InvalidSpec),
        ({"machine": {"secure_boot": "linux"}}, UnsupportedFeature),
        ({"machine": {"generation": 1, "secure_boot": "windows"}}, UnsupportedFeature),
        ({"machine": {"memory": 3 * MiB}}, InvalidSpec),
        ({"machine": {"speed": "fast"}}, InvalidSpec),
        ({"name": "../evil"}, InvalidSpec),
        ({"colour": "red"}, InvalidSpec),
        ({"overwrite": True}, InvalidSpec),
        ({"spec": "none.yaml"}, SourceError),
        ({"verify": "maybe"}, UsageError),
    ],
)
def test_a_guest_that_cannot_be_is_refused(
    image: Path, tmp_path: Path, arguments: dict[str, object], kind: type[ImagekitError]
) -> None:
    with pytest.raises(kind):
        imagekit.prepare(image, tmp_path / "web1", **{"name": "web1", **arguments})  # type: ignore[arg-type]
    assert not (tmp_path / "web1").exists()


def test_an_unsafe_image_is_refused_before_the_folder_fills(tmp_path: Path) -> None:
    image = tmp_path / "two.img"
    image.write_bytes(b"QFI\xfb" + bytes(60) + b"\x7f\x10\xda\xbe" + bytes(4096))
    with pytest.raises(UnsafeImage) as caught:
        imagekit.prepare(image, tmp_path / "web1", name="web1")
    assert caught.value.rule == "ambiguous"
    assert not (tmp_path / "web1").exists()


@pytest.mark.parametrize(
    ("options", "generation", "name", "place"),
    [
        ({}, 1, "web1-config.iso", "IDE 1:0"),
        ({}, 2, "web1-config.iso", "SCSI 0:1"),
        ({"media": "vfat"}, 1, "web1-config.vhd", "IDE 1:0"),
        ({"media": "vfat"}, 2, "web1-config.vhdx", "SCSI 0:1"),
        ({"disk": "vhdx"}, 1, "web1-config.vhdx", "IDE 1:0"),
        ({"disk": "vhdx"}, 2, "web1-config.vhdx", "SCSI 0:1"),
        ({"media": "vfat", "disk": "vhd"}, 1, "web1-config.vhd", "IDE 1:0"),
    ],
)
def test_the_config_drive_can_be_a_disk_in_the_place_of_the_dvd(
    image: Path, tmp_path: Path, options: dict[str, str], generation: int, name: str, place: str
) -> None:
    made = imagekit.prepare(
        image,
        tmp_path / "web1",
        name="web1",
        uuid=UUID,
        machine={"generation": generation},
        **options,  # type: ignore[arg-type]
    )
    medium = made.machine.media[1]
    assert (medium.path, medium.place) == (name, place)
    assert medium.kind == ("dvd" if name.endswith(".iso") else "disk")
    path = tmp_path / "web1" / name
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (volume,) = read_drive(path).volumes
    assert volume.file_system == ("vfat" if "media" in options else "iso9660")
    assert json.loads(volume.tree["openstack/latest/meta_data.json"])["uuid"] == UUID
    made.machine.check_media(tmp_path / "web1", digests=True)


def test_disk_and_config_drive_have_ids_of_their_own(image: Path, tmp_path: Path) -> None:
    """Two disks of one id would be one disk with two paths to the guest."""
    imagekit.prepare(image, tmp_path / "web1", name="web1", media="vfat", machine={"generation": 1})
    ids = {
        imagekit.info(tmp_path / "web1" / name).info.features["unique-id"] for name in ("web1.vhd", "web1-config.vhd")
    }
    assert len(ids) == 2


def test_without_media_there_is_no_config_drive(image: Path, tmp_path: Path) -> None:
    made = imagekit.prepare(image, tmp_path / "web1", name="web1", media="none")
    assert [medium.path for medium in made.machine.media] == ["web1.vhd"]
    assert sorted(path.name for path in (tmp_path / "web1").iterdir()) == ["machine.json", "web1.vhd"]


def test_a_vhd_for_generation_2_is_refused_before_anything_is_converted(image: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeature, match=r"takes no \.vhd") as caught:
        imagekit.prepare(image, tmp_path / "web1", name="web1", disk="vhd", machine={"generation": 2})
    assert caught.value.hint is not None and "vhdx" in caught.value.hint
    assert not (tmp_path / "web1").exists()


@pytest.mark.parametrize("name", ["c.iso", "c.img", "c.vhd", "c.vhdx"])
def test_a_drive_alone_is_what_its_name_says_and_for_its_owner_only(tmp_path: Path, name: str) -> None:
    media: Literal["iso", "vfat"] = "vfat" if name == "c.img" else "iso"
    drive = imagekit.build_config_drive({"name": "web1", "uuid": UUID}, tmp_path / name, media=media)
    assert stat.S_IMODE(drive.path.stat().st_mode) == 0o600
    assert (drive.packing.media, drive.packing.disk) == (media, name[2:] if name.startswith("c.vhd") else None)
    assert hashlib.sha256(drive.path.read_bytes()).hexdigest() == drive.sha256
    assert read_drive(drive.path).format == (drive.packing.disk or "raw")


def test_a_drive_alone_is_refused_by_a_spec_of_generation_2_as_a_vhd(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeature, match=r"takes no \.vhd"):
        imagekit.build_config_drive({"name": "web1", "machine": {"generation": 2}}, tmp_path / "c.vhd")
    assert list(tmp_path.iterdir()) == []
