"""The QEMU command line says what machine.json says, and nothing else."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from imagekit.errors import UnsupportedFeature
from imagekit.launch.ovmf import Flash, UefiFirmware
from imagekit.launch.qemu_command import Accelerator, NicChoice, qemu_args, stand_ins, with_adapters
from imagekit.machine import Machine

MIB = 1 << 20
FILES = [Path("/tmp/a,b/overlay.qcow2"), Path("/b/config.iso")]
FIRMWARE = UefiFirmware(Flash(Path("/f/code,1.fd")), Flash(Path("/tmp/variables.fd")))


def machine(**changes: object) -> Machine:
    """A generation 1 machine with a disk and a config drive."""
    fields: dict[str, object] = {
        "uuid": "8f2a6d5c-9d3e-4a54-8d4e-0f9b8d1f1c11",
        "name": "web1",
        "cpus": 2,
        "memory": 1024 * MIB,
        "nics": [{"mac": "02:15:5d:00:00:01"}],
        "media": [
            {"path": "d.vhd", "format": "vhd", "kind": "disk", "controller": "ide", "size": 1},
            {"path": "c.iso", "format": "iso", "kind": "dvd", "controller": "ide", "number": 1, "size": 1},
        ],
    }
    return Machine.parse({**fields, **changes})


def generation_2(**changes: object) -> Machine:
    """The same as generation 2, on SCSI."""
    scsi = {"controller": "scsi", "size": 1}
    media = [
        {"path": "d.vhdx", "format": "vhdx", "kind": "disk", **scsi},
        {"path": "c.iso", "format": "iso", "kind": "dvd", "slot": 1, **scsi},
    ]
    return machine(**{"generation": 2, "firmware": "uefi", "media": media, **changes})


def arguments(
    of: Machine,
    *,
    accelerator: Accelerator = "tcg",
    firmware: UefiFirmware | None = None,
    allow_network: bool = False,
    sandbox: bool = True,
) -> list[str]:
    return qemu_args(
        of,
        program="/bin/qemu",
        files=FILES,
        control="socket,fd=3",
        accelerator=accelerator,
        firmware=firmware or (FIRMWARE if of.generation == 2 else None),
        allow_network=allow_network,
        sandbox=sandbox,
    )


def values(command: list[str], option: str) -> list[str]:
    """The values of every ``option`` in the command."""
    return [value for name, value in itertools.pairwise(command) if name == option]


def blockdevs(command: list[str]) -> list[dict[str, Any]]:
    return [json.loads(value) for value in values(command, "-blockdev")]


def test_the_disk_is_on_ide_0_0_and_the_config_drive_on_ide_1_0() -> None:
    command = arguments(machine())
    assert values(command, "-machine") == ["pc"]
    assert "ide-hd,drive=medium0,bus=ide.0,unit=0,bootindex=1" in values(command, "-device")
    assert "ide-cd,drive=medium1,bus=ide.1,unit=0" in values(command, "-device")


def test_a_config_drive_that_is_a_disk_is_one_and_not_booted_from() -> None:
    disk = {"path": "c.vhdx", "format": "vhdx", "kind": "disk", "size": 1}
    for of, device in (
        (machine(), "ide-hd,drive=medium1,bus=ide.1,unit=0"),
        (generation_2(), "scsi-hd,drive=medium1,"),
    ):
        first, dvd = (medium.model_dump() for medium in of.media)
        command = arguments(Machine.parse({**of.model_dump(by_alias=True), "media": [first, {**dvd, **disk}]}))
        (found,) = (value for value in values(command, "-device") if value.startswith(device))
        assert "bootindex" not in found
        assert [node["driver"] for node in blockdevs(command) if node["node-name"].startswith("medium")] == [
            "qcow2"
        ] * 2


def test_only_the_overlay_is_written_to() -> None:
    disk, dvd = blockdevs(arguments(machine()))
    assert (disk["driver"], disk["read-only"]) == ("qcow2", False)
    assert (dvd["driver"], dvd["read-only"]) == ("raw", True)


def test_a_comma_in_a_path_is_part_of_it() -> None:
    assert blockdevs(arguments(machine()))[0]["file"]["filename"] == str(FILES[0])


def test_processor_memory_and_identity_are_the_machines() -> None:
    command = arguments(machine(smbios={"serial": "a,b", "chassis_asset_tag": "tag"}))
    assert values(command, "-m") == ["1024M"]
    assert values(command, "-uuid") == ["8f2a6d5c-9d3e-4a54-8d4e-0f9b8d1f1c11"]
    assert values(command, "-smbios") == ["type=1,serial=a,,b", "type=3,asset=tag"]
    assert values(command, "-rtc") == ["base=utc"]


def test_what_is_emulated_has_one_processor_and_says_so() -> None:
    assert values(arguments(machine(), accelerator="kvm"), "-smp") == ["2"]
    assert values(arguments(machine(), accelerator="tcg"), "-smp") == ["1"]
    (said,) = set(stand_ins(machine(), "tcg")) - set(stand_ins(machine(), "kvm"))
    assert said.startswith("2 processors: one")
    assert stand_ins(machine(cpus=1), "tcg") == stand_ins(machine(cpus=1), "kvm")


def test_the_firmware_never_claims_another_maker() -> None:
    """As "Microsoft Corporation", Linux would wait for Hyper-V's storage and ignore the IDE disk."""
    command = arguments(machine(smbios={"serial": "s", "chassis_asset_tag": "t"}))
    assert not any("manufacturer" in value or "product" in value for value in values(command, "-smbios"))


def test_the_guest_has_no_route_out_unless_allowed() -> None:
    assert values(arguments(machine()), "-netdev") == ["user,id=net0,restrict=on"]
    assert values(arguments(machine(), allow_network=True), "-netdev") == ["user,id=net0"]


@pytest.mark.parametrize(
    ("model", "device"),
    [("synthetic", "virtio-net-pci"), ("virtio", "virtio-net-pci"), ("e1000", "e1000"), ("legacy", "tulip")],
)
def test_the_network_adapter_can_be_chosen_and_keeps_its_address(model: str, device: str) -> None:
    command = arguments(machine(nics=[{"mac": "02:15:5d:00:00:01", "model": model}]))
    assert f"{device},netdev=net0,mac=02:15:5d:00:00:01,romfile=" in values(command, "-device")


def test_a_stand_in_is_named_and_the_adapter_hyperv_emulates_is_none() -> None:
    nics = [{"mac": "02:15:5d:00:00:01"}, {"mac": "02:15:5d:00:00:02", "model": "legacy"}]
    (said,) = stand_ins(machine(nics=nics))
    assert "02:15:5d:00:00:01" in said and "virtio-net-pci" in said


def test_a_machine_without_network_gets_none() -> None:
    command = arguments(machine(nics=[]))
    assert values(command, "-netdev") == []
    assert "-nodefaults" in command


def test_the_accelerator_brings_its_processor() -> None:
    assert values(arguments(machine(), accelerator="kvm"), "-accel") == ["kvm"]
    assert values(arguments(machine(), accelerator="kvm"), "-cpu") == ["host"]
    assert values(arguments(machine()), "-accel") == ["tcg"]


def test_qemu_is_confined_where_it_can_be() -> None:
    assert values(arguments(machine()), "-sandbox")[0].startswith("on,")
    assert values(arguments(machine(), sandbox=False), "-sandbox") == []


def test_generation_2_has_its_disk_on_scsi_0_0_and_its_config_drive_on_scsi_0_1() -> None:
    devices = values(arguments(generation_2()), "-device")
    assert "virtio-scsi-pci,id=scsi0" in devices
    assert "scsi-hd,drive=medium0,bus=scsi0.0,scsi-id=0,lun=0,bootindex=1" in devices
    assert "scsi-cd,drive=medium1,bus=scsi0.0,scsi-id=0,lun=1" in devices


def test_every_scsi_controller_that_is_named_is_there() -> None:
    one, other = (medium.model_dump() for medium in generation_2().media)
    devices = values(arguments(generation_2(media=[one, {**other, "number": 3, "slot": 63}])), "-device")
    assert [device for device in devices if device.startswith("virtio-scsi")] == [
        "virtio-scsi-pci,id=scsi0",
        "virtio-scsi-pci,id=scsi3",
    ]
    assert "scsi-cd,drive=medium1,bus=scsi3.0,scsi-id=0,lun=63" in devices


def test_a_machine_for_windows_has_a_controller_that_windows_knows() -> None:
    devices = values(arguments(generation_2(secure_boot="windows")), "-device")
    assert "ide-hd,drive=medium0,bus=ide.0,bootindex=1" in devices
    assert "ide-cd,drive=medium1,bus=ide.1" in devices
    assert not any("virtio-scsi" in device for device in devices)


@pytest.mark.parametrize("place", [{"number": 1, "slot": 0}, {"slot": 6}], ids=["SCSI 1:0", "SCSI 0:6"])
def test_a_place_that_controller_does_not_have_is_not_supported(place: dict[str, int]) -> None:
    one, other = (medium.model_dump() for medium in generation_2().media)
    with pytest.raises(UnsupportedFeature, match=r"c\.iso on SCSI") as caught:
        arguments(generation_2(secure_boot="windows", media=[one, {**other, **place}]))
    assert caught.value.hint is not None


def test_the_firmware_is_read_only_and_its_variables_are_not() -> None:
    command = arguments(generation_2())
    assert values(command, "-machine") == ["q35,pflash0=firmware,pflash1=variables"]
    nodes = {node["node-name"]: node for node in blockdevs(command)}
    assert (nodes["firmware"]["read-only"], nodes["variables"]["read-only"]) == (True, False)
    assert nodes["firmware"]["file"]["filename"] == str(FIRMWARE.code.path)
    assert nodes["variables"]["file"]["filename"] == str(FIRMWARE.variables.path)


def test_firmware_that_needs_smm_has_it_and_its_variables_to_itself() -> None:
    firmware = UefiFirmware(Flash(Path("/c"), "qcow2"), Flash(Path("/v"), "qcow2"), needs_smm=True)
    command = arguments(generation_2(secure_boot="linux"), firmware=firmware)
    assert values(command, "-machine") == ["q35,pflash0=firmware,pflash1=variables,smm=on"]
    assert values(command, "-global") == ["driver=cfi.pflash01,property=secure,value=on"]
    assert {node["driver"] for node in blockdevs(command)} == {"qcow2", "raw"}


def test_the_debug_port_is_for_seabios_alone() -> None:
    """OVMF prints megabytes there."""
    assert any("debugcon" in device for device in values(arguments(machine()), "-device"))
    assert not any("debugcon" in device for device in values(arguments(generation_2()), "-device"))


def test_what_stands_in_for_generation_2_is_named() -> None:
    said = "\n".join(stand_ins(generation_2(secure_boot="linux")))
    assert "virtio-scsi-pci stands in" in said and "template 'linux'" in said
    assert "ich9-ahci stands in" in "\n".join(stand_ins(generation_2(secure_boot="windows")))
    assert "Secure Boot" not in "\n".join(stand_ins(generation_2()))


def test_a_file_is_needed_for_every_medium() -> None:
    with pytest.raises(ValueError, match="zip"):
        qemu_args(machine(), program="q", files=FILES[:1], control="socket,fd=3", accelerator="tcg")


@pytest.mark.parametrize(("nic", "device"), [("tulip", "tulip"), ("virtio", "virtio-net-pci"), ("e1000", "e1000")])
def test_a_rehearsal_can_have_the_adapter_it_is_asked_for(nic: NicChoice, device: str) -> None:
    asked = with_adapters(machine(nics=[{"mac": "00:15:5d:00:00:01"}]), nic)
    assert any(one.startswith(f"{device},netdev=net0,mac=00:15:5d:00:00:01") for one in arguments(asked))
    assert with_adapters(asked, "auto") == asked


def test_generation_2_has_no_legacy_adapter() -> None:
    with pytest.raises(UnsupportedFeature, match="no legacy"):
        with_adapters(generation_2(), "tulip")
