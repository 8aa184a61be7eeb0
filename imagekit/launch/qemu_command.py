"""The QEMU command line of a rehearsal, built from machine.json alone.

A generation 1 machine becomes an i440FX PC: BIOS, disk on IDE 0:0, config drive as DVD on IDE 1:0, as
Hyper-V lays it out. What QEMU cannot offer is replaced and said so (``stand_ins``): it has no Hyper-V
network adapter. The firmware tables never claim Microsoft as the maker: Linux then expects Hyper-V's
storage and ignores the IDE disk.

Pure: nothing is started or looked at here. Generation 2 is not rehearsed yet.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from imagekit.errors import UnsupportedFeature
from imagekit.machine import Machine, Medium, NicModel

Accelerator = Literal["kvm", "tcg"]

NIC_DEVICES: dict[NicModel, str] = {
    "synthetic": "virtio-net-pci",  # cloud kernels have virtio; Debian's has no tulip
    "legacy": "tulip",  # the DEC 21140 that Hyper-V emulates
    "virtio": "virtio-net-pci",
    "e1000": "e1000",
}

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
    allow_network: bool = False,
    sandbox: bool = True,
) -> list[str]:
    """The command that starts ``machine``, stopped by nothing but QMP.

    ``files`` belong to ``machine.media`` in order: a qcow2 overlay for a disk, the file itself for a DVD.
    ``control`` is the QEMU chardev that carries QMP. The serial port and the firmware's debug port go to
    standard output. Raises UnsupportedFeature for a generation that cannot be rehearsed.
    """
    check_supported(machine)
    command = [program, "-name", "imagekit-rehearsal", "-nodefaults", "-no-user-config", "-display", "none"]
    command += SANDBOX if sandbox else ()
    command += ["-machine", "pc", *_processor(machine, accelerator), "-m", f"{machine.memory >> 20}M"]
    command += ["-rtc", "base=utc", "-uuid", str(machine.uuid), *_smbios(machine)]
    # A guest that stops stays, so that its screen can still be read; one that resets stops.
    command += ["-boot", "strict=on", "-no-reboot", "-no-shutdown", "-device", "VGA"]
    command += ["-chardev", f"{control},id=control", "-mon", "chardev=control,mode=control"]
    command += ["-chardev", "stdio,id=console,mux=on,signal=off"]
    command += [
        "-device",
        "isa-serial,chardev=console",
        "-device",
        "isa-debugcon,iobase=0x402,chardev=console",
    ]
    for index, (medium, file) in enumerate(zip(machine.media, files, strict=True)):
        command += _medium(medium, file, index)
    for index, nic in enumerate(machine.nics):
        command += ["-netdev", f"user,id=net{index}{'' if allow_network else ',restrict=on'}"]
        # No option ROM: it would offer a network boot that nobody asked for.
        command += ["-device", f"{NIC_DEVICES[nic.model]},netdev=net{index},mac={nic.mac},romfile="]
    return command


def check_supported(machine: Machine) -> None:
    """Raise UnsupportedFeature for a machine that QEMU cannot stand in for."""
    if machine.generation != 1:
        raise UnsupportedFeature(
            f"a generation {machine.generation} machine cannot be rehearsed yet",
            hint="prepare it with --generation 1",
        )


def stand_ins(machine: Machine) -> list[str]:
    """What of ``machine`` the rehearsal replaces by something else, in words."""
    return [
        f"network adapter {nic.mac}: {NIC_DEVICES[nic.model]} stands in for Hyper-V's"
        for nic in machine.nics
        if nic.model != "legacy"
    ]


def _processor(machine: Machine, accelerator: Accelerator) -> list[str]:
    if accelerator == "kvm":
        accel, cpu = "kvm", "host"
    else:
        accel, cpu = "tcg,thread=multi", "max"  # newer distributions refuse the default, an x86-64-v1
    return ["-accel", accel, "-cpu", cpu, "-smp", str(machine.cpus)]


def _smbios(machine: Machine) -> list[str]:
    arguments: list[str] = []
    if machine.smbios.serial is not None:
        arguments += ["-smbios", f"type=1,serial={_escaped(machine.smbios.serial)}"]
    if machine.smbios.chassis_asset_tag is not None:
        arguments += ["-smbios", f"type=3,asset={_escaped(machine.smbios.chassis_asset_tag)}"]
    return arguments


def _medium(medium: Medium, file: Path, index: int) -> list[str]:
    disk = medium.kind == "disk"
    node: dict[str, object] = {
        "node-name": f"medium{index}",
        "driver": "qcow2" if disk else BLOCK_DRIVERS[medium.format],
        "read-only": not disk,
        "file": {"driver": "file", "filename": str(file)},
    }
    if disk:
        node["cache"] = {"no-flush": True}  # the overlay is thrown away: no need to bring it safely to the disk
    device = f"ide-{'hd' if disk else 'cd'},drive=medium{index},bus=ide.{medium.number},unit={medium.slot}"
    if disk and medium.number == medium.slot == 0:
        device += ",bootindex=1"
    # JSON, because a comma in a path would end an option of the short form.
    return ["-blockdev", json.dumps(node), "-device", device]


def _escaped(value: str) -> str:
    return value.replace(",", ",,")
