"""The QEMU command line of a rehearsal, built from machine.json alone.

A generation 1 machine becomes an i440FX PC: BIOS, disk on IDE 0:0, config drive (a DVD or a disk) on IDE 1:0, as
Hyper-V lays it out. Generation 2 becomes a q35 with OVMF, Secure Boot where the machine has it, disk and
config drive on SCSI 0:0 and 0:1. What QEMU cannot offer is replaced and said so (``stand_ins``): it has neither
Hyper-V's network adapter nor its SCSI controller. The firmware tables never claim Microsoft as the maker:
Linux then expects Hyper-V's storage and ignores the IDE disk.

Pure: nothing is started or looked at here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from imagekit.errors import UnsupportedFeature, UsageError
from imagekit.launch.ovmf import UefiFirmware
from imagekit.machine import Machine, Medium, NicModel

Accelerator = Literal["kvm", "tcg"]

NIC_DEVICES: dict[NicModel, str] = {
    "synthetic": "virtio-net-pci",  # cloud kernels have virtio; Debian's has no tulip
    "legacy": "tulip",  # the DEC 21140 that Hyper-V emulates
    "virtio": "virtio-net-pci",
    "e1000": "e1000",
}

NicChoice = Literal["auto", "tulip", "virtio", "e1000"]
"""The adapter a rehearsal uses, whatever machine.json has; ``auto`` is as above."""
_CHOSEN: dict[str, NicModel] = {"tulip": "legacy", "virtio": "virtio", "e1000": "e1000"}

# Cloud images have virtio in their initial RAM disk, and need not have AHCI: Debian's cloud kernel lacks it. Windows
# has AHCI, and virtio only where somebody put it.
SCSI_STAND_IN, WINDOWS_STAND_IN = "virtio-scsi-pci", "ich9-ahci"
AHCI_PORTS = 6

BLOCK_DRIVERS = {"vhd": "vpc", "vhdx": "vhdx", "iso": "raw"}
"""QEMU's names of our formats."""

SANDBOX = ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
"""System calls no rehearsal needs, taken away from a QEMU that runs somebody's image (Linux)."""


def qemu_args(
    machine: Machine,
    *,
    program: str,
    files: Sequence[Path],
    control: str,
    accelerator: Accelerator,
    firmware: UefiFirmware | None = None,
    allow_network: bool = False,
    sandbox: bool = True,
) -> list[str]:
    """The command that starts ``machine``, stopped by nothing but QMP.

    ``files`` belong to ``machine.media`` in order: a qcow2 overlay for a disk, the file itself for a DVD.
    ``control`` is the QEMU chardev that carries QMP. ``firmware`` is for generation 2, with variables that
    may be written to. The serial port and SeaBIOS' debug port go to standard output. Raises
    UnsupportedFeature for a machine that cannot be rehearsed.
    """
    check_supported(machine)
    command = [program, "-name", "imagekit-rehearsal", "-nodefaults", "-no-user-config", "-display", "none"]
    command += SANDBOX if sandbox else ()
    command += [*_board(firmware), *_processor(machine, accelerator), "-m", f"{machine.memory >> 20}M"]
    command += ["-rtc", "base=utc", "-uuid", str(machine.uuid), *_smbios(machine)]
    # A guest that stops stays, so that its screen can still be read; one that resets stops.
    command += ["-boot", "strict=on", "-no-reboot", "-no-shutdown", "-device", "VGA"]
    command += ["-chardev", f"{control},id=control", "-mon", "chardev=control,mode=control"]
    command += ["-chardev", "stdio,id=console,mux=on,signal=off"]
    command += ["-device", "isa-serial,chardev=console"]
    if firmware is None:
        command += ["-device", "isa-debugcon,iobase=0x402,chardev=console"]
    command += _controllers(machine)
    for index, (medium, file) in enumerate(zip(machine.media, files, strict=True)):
        command += _medium(medium, file, index, ahci=_on_ahci(machine))
    for index, nic in enumerate(machine.nics):
        command += ["-netdev", f"user,id=net{index}{'' if allow_network else ',restrict=on'}"]
        # No option ROM: it would offer a network boot that nobody asked for.
        command += ["-device", f"{NIC_DEVICES[nic.model]},netdev=net{index},mac={nic.mac},romfile="]
    return command


def with_adapters(machine: Machine, nic: NicChoice) -> Machine:
    """The machine with every network adapter replaced by the one asked for.

    Raises UnsupportedFeature for tulip in generation 2: Hyper-V has its legacy adapter in generation 1 only.
    """
    if nic not in get_args(NicChoice):
        raise UsageError(f"network adapter {nic!r}", hint=f"choose {', '.join(get_args(NicChoice))}")
    if nic == "auto":
        return machine
    if nic == "tulip" and machine.generation == 2:
        raise UnsupportedFeature("generation 2 has no legacy network adapter", hint="use --nic virtio or e1000")
    adapters = tuple(one.model_copy(update={"model": _CHOSEN[nic]}) for one in machine.nics)
    return machine.model_copy(update={"nics": adapters})


def check_supported(machine: Machine) -> None:
    """Raise UnsupportedFeature for a machine that QEMU cannot stand in for."""
    if not _on_ahci(machine):
        return
    for medium in machine.media:
        if medium.number != 0 or medium.slot >= AHCI_PORTS:
            raise UnsupportedFeature(
                f"{medium.path} on {medium.place}: a machine for Windows is rehearsed with the first {AHCI_PORTS} "
                "slots of SCSI 0 only",
                hint="move it to one of those",
            )


def stand_ins(machine: Machine, accelerator: Accelerator | None = None) -> list[str]:
    """What of ``machine`` the rehearsal replaces by something else, in words, as far as is known before it starts."""
    found = [
        f"network adapter {nic.mac}: {NIC_DEVICES[nic.model]} stands in for Hyper-V's"
        for nic in machine.nics
        if nic.model != "legacy"
    ]
    if machine.generation == 2:
        device = WINDOWS_STAND_IN if _on_ahci(machine) else SCSI_STAND_IN
        found.append(f"SCSI controller: {device} stands in for Hyper-V's")
    if accelerator == "tcg" and machine.cpus > 1:
        found.append(f"{machine.cpus} processors: one that is emulated stands in for them")
    if machine.secure_boot != "off":
        found.append(
            f"Secure Boot: firmware with all of Microsoft's keys stands in for the template {machine.secure_boot!r}"
        )
    return found


def _on_ahci(machine: Machine) -> bool:
    return machine.secure_boot == "windows"


def _board(firmware: UefiFirmware | None) -> list[str]:
    if firmware is None:
        return ["-machine", "pc"]
    board = "q35,pflash0=firmware,pflash1=variables"
    arguments = []
    for node, flash in (("firmware", firmware.code), ("variables", firmware.variables)):
        fields = {
            "node-name": node,
            "driver": flash.format,
            "read-only": node == "firmware",
            "file": {"driver": "file", "filename": str(flash.path)},
        }
        arguments += ["-blockdev", json.dumps(fields)]
    if firmware.needs_smm:
        board += ",smm=on"
        arguments += ["-global", "driver=cfi.pflash01,property=secure,value=on"]
    return ["-machine", board, *arguments]


def _controllers(machine: Machine) -> list[str]:
    """The controllers that are not on the board."""
    if machine.generation == 1 or _on_ahci(machine):
        return []
    numbers = sorted({medium.number for medium in machine.media})
    return [part for number in numbers for part in ("-device", f"{SCSI_STAND_IN},id=scsi{number}")]


def _processor(machine: Machine, accelerator: Accelerator) -> list[str]:
    if accelerator == "kvm":
        return ["-accel", "kvm", "-cpu", "host", "-smp", str(machine.cpus)]
    # Newer distributions refuse the default processor, an x86-64-v1. Only one: a guest
    # that stands still for a reason of the emulation's, as several may give it, would be no verdict on its disk.
    return ["-accel", "tcg", "-cpu", "max", "-smp", "1"]


def _smbios(machine: Machine) -> list[str]:
    arguments: list[str] = []
    if machine.smbios.serial is not None:
        arguments += ["-smbios", f"type=1,serial={_escaped(machine.smbios.serial)}"]
    if machine.smbios.chassis_asset_tag is not None:
        arguments += ["-smbios", f"type=3,asset={_escaped(machine.smbios.chassis_asset_tag)}"]
    return arguments


def _medium(medium: Medium, file: Path, index: int, *, ahci: bool) -> list[str]:
    disk = medium.kind == "disk"
    node: dict[str, object] = {
        "node-name": f"medium{index}",
        "driver": "qcow2" if disk else BLOCK_DRIVERS[medium.format],
        "read-only": not disk,
        "file": {"driver": "file", "filename": str(file)},
    }
    if disk:
        node["cache"] = {"no-flush": True}  # the overlay is thrown away: no need to bring it safely to the disk
    kind = "hd" if disk else "cd"
    if ahci:
        device = f"ide-{kind},drive=medium{index},bus=ide.{medium.slot}"
    elif medium.controller == "ide":
        device = f"ide-{kind},drive=medium{index},bus=ide.{medium.number},unit={medium.slot}"
    else:
        device = f"scsi-{kind},drive=medium{index},bus=scsi{medium.number}.0,scsi-id=0,lun={medium.slot}"
    if disk and medium.number == medium.slot == 0:
        device += ",bootindex=1"
    # JSON, because a comma in a path would end an option of the short form.
    return ["-blockdev", json.dumps(node), "-device", device]


def _escaped(value: str) -> str:
    return value.replace(",", ",,")
