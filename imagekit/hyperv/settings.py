"""What the operations that make a machine are told, from machine.json alone; and all of it as a plan to read.

Pure. The digest of these settings stands in the machine's notes, so that a second run knows whether the machine it
finds is the one it would make.
"""

from __future__ import annotations

import hashlib
import json
import ntpath
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from imagekit.cloudinit.iso9660 import volume_descriptors
from imagekit.errors import ImagekitError
from imagekit.hyperv import operations
from imagekit.hyperv.contract import OPERATIONS, check_parameters
from imagekit.hyperv.host import Host
from imagekit.hyperv.push import Item
from imagekit.hyperv.request import Place, kvp_pairs, serial_number, slot_of
from imagekit.launch.launcher import LaunchPlan, PlannedStep
from imagekit.machine import Machine

ISO_HEAD = 64 << 10
"""Bytes in which an ISO's volume descriptors lie."""
RUN, MACHINE_ID = "RUN", "MACHINE-ID"
"""In a plan: what only a run knows."""
TEMPLATES = {"off": None, "linux": "MicrosoftUEFICertificateAuthority", "windows": "MicrosoftWindows"}


def settings_of(machine: Machine, where: Place, *, nocloud: bool = False) -> dict[str, dict[str, Any]]:
    """By operation: create, configure, attach, finish."""
    media = zip(machine.media, where.files, strict=True)
    settings: dict[str, dict[str, Any]] = {
        "create": {
            "uuid": str(machine.uuid),
            "name": machine.name,
            "folder": where.folder,
            "generation": machine.generation,
            "cpus": machine.cpus,
            "memory": machine.memory,
        },
        "configure": {
            "nics": [
                {
                    "name": f"nic{index}",
                    "mac": nic.mac.replace(":", "").upper(),
                    "switch": nic.switch,
                    "vlan": nic.vlan,
                    "legacy": nic.model == "legacy",
                }
                for index, nic in enumerate(machine.nics)
            ],
            "pipe": f"\\\\.\\pipe\\{machine.uuid}_com1",
            "serial_number": serial_number(machine, nocloud=nocloud),
            "asset_tag": machine.smbios.chassis_asset_tag,
            "kvp": kvp_pairs(machine),
        },
        "attach": {
            "media": [{"path": path, "kind": medium.kind, **slot_of(medium)} for medium, path in media],
            "secure_boot": machine.secure_boot != "off",
            "template": TEMPLATES[machine.secure_boot],
        },
        "finish": {},
    }
    text = json.dumps(settings, sort_keys=True)
    spec = hashlib.sha256(text.encode()).hexdigest()[:32]
    settings["create"]["spec"] = settings["finish"]["spec"] = spec
    return settings


def is_nocloud(drive: Path) -> bool:
    """Whether a medium is one of cloud-init's NoCloud: an ISO whose volume is named cidata."""
    with drive.open("rb") as file:
        head = file.read(ISO_HEAD)
    with suppress(ImagekitError):
        return any(found.label.casefold() == "cidata" for found in volume_descriptors(head))
    return False


def plan_of(
    machine: Machine, where: Place, items: Sequence[Item], host: Host, settings: Mapping[str, Mapping[str, Any]]
) -> LaunchPlan:
    """Every step of push, create and start in order, each with its script and exactly what it is told.

    Two values only a run knows: the id that the host gives the machine, and the nonce in the name of a ``.part``.
    """
    asked: list[tuple[str, str, Mapping[str, Any]]] = [
        ("find", "the machine must not be there", find_parameters(machine, where)),
        ("preflight", "", preflight_parameters(machine, ntpath.dirname(where.folder))),
        ("make-folder", "", {"path": where.folder}),
    ]
    for item in items:
        part = f"{item.target}.{RUN}.part"
        asked += [
            ("file-info", "", {"path": item.target, "hash": True, "size": item.size}),
            ("publish-file", f"after {item.source.name} was copied to the .part", _publishing(item, part)),
        ]
    asked.append(("create", "", settings["create"]))
    asked += [(name, "", {"id": MACHINE_ID, **settings[name]}) for name in ("configure", "attach", "finish")]
    asked.append(("start", "", {"id": MACHINE_ID}))
    asked.append(("observe", "again and again", {"id": MACHINE_ID, "macs": [nic.mac for nic in machine.nics]}))
    steps = [_step(name, more, parameters, host) for name, more, parameters in asked]
    notes = []
    if host.family == "2008r2":
        notes.append(operations.PLAN_ONLY)
    return LaunchPlan("hyperv", host.target, tuple(steps), tuple(notes))


def find_parameters(machine: Machine, where: Place) -> dict[str, Any]:
    return {"uuid": str(machine.uuid), "name": machine.name, "folder": where.folder}


def preflight_parameters(machine: Machine, store: str) -> dict[str, Any]:
    return {
        "store": store,
        "bytes": sum(medium.size for medium in machine.media),
        "memory": machine.memory,
        "switches": sorted({nic.switch for nic in machine.nics if nic.switch is not None}),
    }


def _publishing(item: Item, part: str) -> dict[str, Any]:
    return {"part": part, "path": item.target, "size": item.size, "sha256": item.sha256}


def _step(name: str, more: str, parameters: Mapping[str, Any], host: Host) -> PlannedStep:
    check_parameters(name, parameters)
    request = operations.request(name, host.family, parameters)
    does = "; ".join(filter(None, [OPERATIONS[name].does, more]))
    return PlannedStep(name, does, script=request.script, script_name=request.script_name, data=dict(parameters))
