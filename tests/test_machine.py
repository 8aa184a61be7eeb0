"""machine.json: what loads is a machine Hyper-V can build, and what does not is told apart in words."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagekit.errors import CorruptImage, InvalidSpec, SourceError
from imagekit.machine import MAX_FILE_SIZE, Machine, Medium, Nic

MIB = 1 << 20

DISK = {"path": "web1.vhd", "format": "vhd", "kind": "disk", "controller": "ide", "size": 512}
DVD = {"path": "web1-config.iso", "format": "iso", "kind": "dvd", "controller": "ide", "number": 1, "size": 2048}
FIELDS: dict[str, Any] = {
    "schema": 1,
    "uuid": "8f2a6d5c-9d3e-4a54-8d4e-0f9b8d1f1c11",
    "name": "web1",
    "generation": 1,
    "cpus": 2,
    "memory": 2048 * MIB,
    "secure_boot": "off",
    "firmware": "bios",
    "smbios": {"serial": "S1", "chassis_asset_tag": None},
    "nics": [{"mac": "02:15:5d:00:00:01", "switch": "LAN", "vlan": 100}],
    "media": [DISK, DVD],
    "kvp": {"role": "web"},
    "source": {"path": "debian.qcow2", "virtual-size": 3 << 30},
}
GENERATION_2 = {
    **FIELDS,
    "generation": 2,
    "firmware": "uefi",
    "secure_boot": "linux",
    "media": [
        {"path": "web1.vhdx", "format": "vhdx", "kind": "disk", "controller": "scsi", "size": 512},
        {**DVD, "controller": "scsi", "number": 0, "slot": 1},
    ],
}


def changed(fields: dict[str, Any], *where: str | int, to: object) -> dict[str, Any]:
    """``fields`` with one value replaced, however deep."""
    result = copy.deepcopy(fields)
    place: Any = result
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = to
    return result


@pytest.mark.parametrize("fields", [FIELDS, GENERATION_2], ids=["generation 1", "generation 2"])
def test_a_machine_is_the_same_after_writing_and_reading(tmp_path: Path, fields: dict[str, Any]) -> None:
    machine = Machine.parse(fields)
    (tmp_path / "machine.json").write_bytes(machine.dumps())
    assert Machine.load(tmp_path / "machine.json") == machine


def test_a_bundle_folder_is_as_good_as_its_machine_json(tmp_path: Path) -> None:
    (tmp_path / "machine.json").write_bytes(Machine.parse(FIELDS).dumps())
    assert Machine.load(tmp_path) == Machine.parse(FIELDS)


def test_the_text_does_not_depend_on_the_order_of_the_fields() -> None:
    backwards = dict(reversed(FIELDS.items()))
    text = Machine.parse(backwards).dumps()
    assert text == Machine.parse(FIELDS).dumps()
    assert text.endswith(b"}\n")
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_the_text_names_the_schema_and_keeps_every_field() -> None:
    written = json.loads(Machine.parse(FIELDS).dumps())
    assert set(written) == set(FIELDS)
    assert written["schema"] == 1
    assert written["media"][1] == {**DVD, "slot": 0, "sha256": None}


def test_defaults_make_a_small_generation_1_machine() -> None:
    disk = Medium(path="d.vhd", format="vhd", kind="disk", controller="ide", size=512)
    machine = Machine(uuid=UUID(FIELDS["uuid"]), name="d", media=(disk,), nics=(Nic(mac="02:00:00:00:00:01"),))
    assert (machine.generation, machine.firmware, machine.secure_boot) == (1, "bios", "off")
    assert machine.nics[0].model == "synthetic"


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (changed(FIELDS, "colour", to="red"), "colour"),
        (changed(FIELDS, "media", 0, "colour", to="red"), r"media\.0\.colour"),
        (changed(FIELDS, "uuid", to="me"), "uuid"),
        (changed(FIELDS, "cpus", to="2"), "cpus"),
        (changed(FIELDS, "cpus", to=True), "cpus"),
        (changed(FIELDS, "cpus", to=0), "cpus"),
        (changed(FIELDS, "cpus", to=65), "at most 64"),
        (changed(FIELDS, "memory", to=512 * MIB + 4096), "2 MiB"),
        (changed(FIELDS, "memory", to=2 * MIB), "memory"),
        (changed(FIELDS, "memory", to=2 << 40), "1 TiB"),
        (changed(FIELDS, "generation", to=3), "generation"),
        (changed(FIELDS, "firmware", to="uefi"), "firmware bios, not uefi"),
        (changed(GENERATION_2, "firmware", to="bios"), "firmware uefi, not bios"),
        (changed(FIELDS, "secure_boot", to="linux"), "Secure Boot needs generation 2"),
        (changed(FIELDS, "name", to="a/b"), "name"),
        (changed(FIELDS, "name", to="trailing."), "name"),
        (changed(FIELDS, "name", to=""), "name"),
        (changed(FIELDS, "smbios", "serial", to="a\nb"), "serial"),
        (changed(FIELDS, "kvp", to={"a": 1}), "kvp"),
        ([FIELDS], "valid dictionary"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidSpec, match=complaint):
        Machine.parse(fields)


@pytest.mark.parametrize(
    ("nics", "complaint"),
    [
        ([{"mac": "02-15-5d-00-00-01"}], "mac"),
        ([{"mac": "02:15:5D:00:00:01"}], "mac"),
        ([{"mac": "03:15:5d:00:00:01"}], "group address"),
        ([{"mac": "00:00:00:00:00:00"}], "nor zero"),
        ([{"mac": "02:15:5d:00:00:01"}] * 2, "2 network adapters have the address 02:15:5d:00:00:01"),
        ([{"mac": f"02:15:5d:00:00:{i:02x}"} for i in range(9)], "9 synthetic network adapters: at most 8"),
        ([{"mac": "02:15:5d:00:00:01", "vlan": 4095}], "vlan"),
        ([{"mac": "02:15:5d:00:00:01", "model": "token-ring"}], "model"),
    ],
)
def test_network_adapters_that_cannot_be_are_refused(nics: object, complaint: str) -> None:
    with pytest.raises(InvalidSpec, match=complaint):
        Machine.parse(changed(FIELDS, "nics", to=nics))


def test_a_legacy_network_adapter_needs_generation_1() -> None:
    nics = [{"mac": "02:15:5d:00:00:01", "model": "legacy"}]
    assert Machine.parse(changed(FIELDS, "nics", to=nics)).nics[0].model == "legacy"
    with pytest.raises(InvalidSpec, match="legacy network adapter needs generation 1"):
        Machine.parse(changed(GENERATION_2, "nics", to=nics))


@pytest.mark.parametrize(
    "path",
    [
        "/etc/shadow",
        "../d.vhd",
        "a/../../d.vhd",
        "a//d.vhd",
        "./d.vhd",
        "a\\d.vhd",
        "C:d.vhd",
        "",
        "d\n.vhd",
        "d*.vhd",
    ],
)
def test_a_medium_never_lies_outside_the_bundle(path: str) -> None:
    with pytest.raises(InvalidSpec, match=r"media\.0\.path"):
        Machine.parse(changed(FIELDS, "media", 0, "path", to=path))


@pytest.mark.parametrize(
    ("media", "complaint"),
    [
        ([], "no disk at IDE 0:0"),
        ([DVD], "no disk at IDE 0:0"),
        ([{**DISK, "slot": 1}], "no disk at IDE 0:0"),
        ([DISK, {**DVD, "number": 0}], "2 media at IDE 0:0"),
        ([DISK, {**DISK, "path": "WEB1.vhd", "slot": 1}], "web1.vhd is named 2 times"),
        ([DISK, {**DVD, "number": 2}], "IDE 2:0 does not exist"),
        ([DISK, {**DVD, "slot": 2}], "IDE 1:2 does not exist"),
        ([{**DISK, "controller": "scsi"}], "generation 1 are on ide"),
        ([{**DISK, "kind": "dvd"}], "cannot have the format vhd"),
        ([DISK, {**DVD, "kind": "disk"}], "cannot have the format iso"),
        ([{**DISK, "path": "web1.vhdx"}], r"must end in \.vhd"),
        ([{**DISK, "size": 0}], "size"),
        ([{**DISK, "sha256": "ABC"}], "sha256"),
    ],
)
def test_media_that_cannot_be_are_refused(media: object, complaint: str) -> None:
    with pytest.raises(InvalidSpec, match=complaint):
        Machine.parse(changed(FIELDS, "media", to=media))


def test_generation_2_has_its_disk_and_its_config_drive_on_one_scsi_controller() -> None:
    assert [medium.place for medium in Machine.parse(GENERATION_2).media] == ["SCSI 0:0", "SCSI 0:1"]
    assert Machine.parse(changed(GENERATION_2, "media", 1, "slot", to=63)).media[1].place == "SCSI 0:63"
    with pytest.raises(InvalidSpec, match="SCSI 0:64 does not exist"):
        Machine.parse(changed(GENERATION_2, "media", 1, "slot", to=64))
    with pytest.raises(InvalidSpec, match="no disk at SCSI 0:0"):
        Machine.parse(changed(GENERATION_2, "media", 0, "slot", to=2))


@pytest.mark.parametrize("secure_boot", ["off", "linux", "windows"])
def test_generation_2_takes_any_template_and_none(secure_boot: str) -> None:
    assert Machine.parse(changed(GENERATION_2, "secure_boot", to=secure_boot)).secure_boot == secure_boot


def test_generation_2_takes_no_vhd_and_no_ide() -> None:
    with pytest.raises(InvalidSpec, match=r"generation 2 takes no \.vhd"):
        Machine.parse(changed(GENERATION_2, "media", to=[{**DISK, "controller": "scsi"}]))
    with pytest.raises(InvalidSpec, match="generation 2 are on scsi"):
        Machine.parse(changed(GENERATION_2, "media", 0, "controller", to="ide"))


def test_every_problem_is_named_at_once() -> None:
    fields = changed(changed(FIELDS, "cpus", to=0), "name", to="a:b")
    with pytest.raises(InvalidSpec, match=r"name: .*; cpus: ") as caught:
        Machine.parse(fields, path="machine.json")
    assert caught.value.path == "machine.json"


def test_another_schema_is_refused_with_what_to_do() -> None:
    with pytest.raises(InvalidSpec, match="machine schema 2, expected 1") as caught:
        Machine.parse({"schema": 2, "anything": True})
    assert caught.value.hint is not None


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_not_json_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "machine.json").write_bytes(data)
    with pytest.raises(InvalidSpec, match="not JSON"):
        Machine.load(tmp_path)


def test_a_huge_machine_json_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "machine.json").write_bytes(b" " * (MAX_FILE_SIZE + 1))
    with pytest.raises(InvalidSpec, match="larger than"):
        Machine.load(tmp_path)


def test_a_missing_machine_json_says_where_bundles_come_from(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        Machine.load(tmp_path)
    assert caught.value.hint is not None and "imagekit prepare" in caught.value.hint


@pytest.fixture
def bundle(tmp_path: Path) -> Machine:
    """A machine whose two media lie in ``tmp_path``, with their digests."""
    media: list[dict[str, Any]] = []
    for medium in (DISK, DVD):
        data = bytes([len(media) + 1]) * int(str(medium["size"]))
        (tmp_path / str(medium["path"])).write_bytes(data)
        media.append({**medium, "sha256": hashlib.sha256(data).hexdigest()})
    return Machine.parse(changed(FIELDS, "media", to=media))


def test_media_that_are_as_described_pass(tmp_path: Path, bundle: Machine) -> None:
    bundle.check_media(tmp_path)
    bundle.check_media(tmp_path, digests=True)


def test_a_missing_medium_is_named(tmp_path: Path, bundle: Machine) -> None:
    (tmp_path / "web1-config.iso").unlink()
    with pytest.raises(SourceError, match=r"web1-config\.iso"):
        bundle.check_media(tmp_path)


def test_a_medium_of_another_size_is_corrupt(tmp_path: Path, bundle: Machine) -> None:
    (tmp_path / "web1.vhd").write_bytes(bytes(511))
    with pytest.raises(CorruptImage, match=r"511 bytes, machine\.json says 512"):
        bundle.check_media(tmp_path)


def test_changed_content_is_found_when_digests_are_asked_for(tmp_path: Path, bundle: Machine) -> None:
    (tmp_path / "web1.vhd").write_bytes(bytes(512))
    bundle.check_media(tmp_path)
    with pytest.raises(CorruptImage, match="SHA-256"):
        bundle.check_media(tmp_path, digests=True)


def test_a_medium_that_is_a_link_is_refused(tmp_path: Path, bundle: Machine) -> None:
    """Else a bundle from elsewhere could hand any file of this computer to a guest."""
    (tmp_path / "web1.vhd").rename(tmp_path / "elsewhere")
    (tmp_path / "web1.vhd").symlink_to("elsewhere")
    with pytest.raises(SourceError, match="not a regular file"):
        bundle.check_media(tmp_path)


@given(st.dictionaries(st.text(), st.text()), st.text(), st.integers(0, 2**70))
def test_any_text_in_kvp_and_source_survives(kvp: dict[str, str], text: str, number: int) -> None:
    fields = changed(changed(FIELDS, "kvp", to=kvp), "source", to={"note": text, "size": number})
    machine = Machine.parse(fields)
    assert Machine.parse(json.loads(machine.dumps())) == machine
