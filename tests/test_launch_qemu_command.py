"""The QEMU command line says what machine.json says, and nothing else."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from imagekit.errors import UnsupportedFeature
from imagekit.launch.qemu_command import Accelerator, qemu_args, stand_ins
from imagekit.machine import Machine

MIB = 1 << 20
FILES = [Path("/tmp/a,b/overlay.qcow2"), Path("/b/config.iso")]


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


def arguments(
    of: Machine, *, accelerator: Accelerator = "tcg", allow_network: bool = False, sandbox: bool = True
) -> list[str]:
    return qemu_args(
        of,
        program="/bin/qemu",
        files=FILES,
        control="socket,fd=3",
        accelerator=accelerator,
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


def test_only_the_overlay_is_written_to() -> None:
    disk, dvd = blockdevs(arguments(machine()))
    assert (disk["driver"], disk["read-only"]) == ("qcow2", False)
    assert (dvd["driver"], dvd["read-only"]) == ("raw", True)


def test_a_comma_in_a_path_is_part_of_it() -> None:
    assert blockdevs(arguments(machine()))[0]["file"]["filename"] == str(FILES[0])


def test_processor_memory_and_identity_are_the_machines() -> None:
    command = arguments(machine(smbios={"serial": "a,b", "chassis_asset_tag": "tag"}))
    assert values(command, "-smp") == ["2"]
    assert values(command, "-m") == ["1024M"]
    assert values(command, "-uuid") == ["8f2a6d5c-9d3e-4a54-8d4e-0f9b8d1f1c11"]
    assert values(command, "-smbios") == ["type=1,serial=a,,b", "type=3,asset=tag"]
    assert values(command, "-rtc") == ["base=utc"]


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
    assert values(arguments(machine()), "-accel") == ["tcg,thread=multi"]


def test_qemu_is_confined_where_it_can_be() -> None:
    assert values(arguments(machine()), "-sandbox")[0].startswith("on,")
    assert values(arguments(machine(), sandbox=False), "-sandbox") == []


def test_generation_2_is_not_supported_yet() -> None:
    disk = {"path": "d.vhdx", "format": "vhdx", "kind": "disk", "controller": "scsi", "size": 1}
    with pytest.raises(UnsupportedFeature, match="generation 2") as caught:
        arguments(machine(generation=2, firmware="uefi", media=[disk]))
    assert caught.value.hint is not None


def test_a_file_is_needed_for_every_medium() -> None:
    with pytest.raises(ValueError, match="zip"):
        qemu_args(machine(), program="q", files=FILES[:1], control="socket,fd=3", accelerator="tcg")
