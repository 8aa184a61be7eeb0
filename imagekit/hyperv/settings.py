"""What the operations that make a machine are told, from machine.json alone; and all of it as a plan to read.

Pure. The digest of these settings stands in the machine's notes, so that a second run knows whether the machine it
finds is the one it would make.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from imagekit.hyperv.request import Place, data_source_hint, kvp_pairs, slot_of
from imagekit.machine import Machine

TEMPLATES = {"off": None, "linux": "MicrosoftUEFICertificateAuthority", "windows": "MicrosoftWindows"}


def settings_of(machine: Machine, where: Place, *, datasource: str | None = None) -> dict[str, dict[str, Any]]:
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
            "serial_number": data_source_hint(machine, datasource),
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


def plan_of(*args: Any) -> Any:
    raise NotImplementedError
