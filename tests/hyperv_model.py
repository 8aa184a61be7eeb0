"""A model of a Hyper-V host behind the contract of operations: our belief of how one behaves, not a recording.

It knows slots, names that are not unique, files that are in use or sparse, the rights a machine gets on its disks,
jobs, and that switching off what is off is 32775. Faults are put in from outside: an operation may be refused, fail
in the middle, take effect without an answer, or be the last thing that this computer asked before it died.
"""

from __future__ import annotations

import base64
import hashlib
import ntpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from imagekit.hyperv.contract import check_parameters, judge
from imagekit.hyperv.request import Family
from imagekit.hyperv.transport import HostError, TransportError

Fault = Literal["refused", "halfway", "lost-before", "lost-after", "lost-halfway", "killed-before", "killed-after"]
FAULTS: tuple[Fault, ...] = (
    "refused",
    "halfway",
    "lost-before",
    "lost-after",
    "lost-halfway",
    "killed-before",
    "killed-after",
)
STORE = "D:\\VMs"
SLOTS = {"IDE": (2, 2), "SCSI": (4, 64)}
MIB = 1 << 20


class Killed(BaseException):
    """This computer died: nothing after it runs."""


@dataclass
class ModelFile:
    path: str
    data: bytes
    sparse: bool = False
    rights: set[str] = field(default_factory=set)
    """Machines that may open it: Hyper-V adds one when it attaches, replacing the file loses them."""


@dataclass
class ModelMachine:
    id: str
    name: str
    path: str
    generation: int
    uuid: str = ""
    spec: str = ""
    stage: str = ""
    state: str = "Off"
    memory: int = 0
    media: dict[tuple[str, int, int], str] = field(default_factory=dict)
    nics: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


class ModelHost:
    """The host. ``call`` is the contract's; everything else is for the test's hands."""

    local = False
    hops = False

    def __init__(self, *, family: Family = "2016", target: str = "model") -> None:
        self.family: Family = family
        self.target = target
        self.files: dict[str, ModelFile] = {}
        self.folders: dict[str, str] = {STORE.lower(): STORE}
        self.machines: dict[str, ModelMachine] = {}
        self.switches = {"LAN"}
        self.free = 1 << 40
        self.disks: dict[str, bytes] = {}
        """Content of disks, by path, as the host reads it."""
        self.checks: list[dict[str, str]] = [{"name": "module", "status": "ok", "detail": "Hyper-V 2.0.0.0"}]
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.faults: dict[int, Fault] = {}
        """By number of the call from now on."""
        self.has_hyperv = True
        self.sets_uuid = True
        """Whether the uuid in the firmware's tables can be set."""
        self.merging = 0
        """So many times a machine cannot be removed, because a job still merges its disks."""
        self.dead = False
        self.gone = False
        """The host does not answer any more."""
        self.on_kill: Any = None
        self.before: Callable[[str, dict[str, Any]], None] | None = None
        """Told of every operation before it takes effect: what somebody else does at that moment."""
        self._next = 0

    def close(self) -> None:
        pass

    def call(self, operation: str, parameters: Mapping[str, Any], *, timeout: float = 0) -> dict[str, Any]:
        if self.dead:
            raise Killed
        check_parameters(operation, parameters)
        fault = self.faults.pop(0, None)
        self.faults = {number - 1: one for number, one in self.faults.items()}
        if self.before is not None:
            self.before(operation, dict(parameters))
        if self.gone or fault == "lost-before":
            raise TransportError("the connection was lost")
        if fault == "killed-before":
            self._die()
        if fault == "refused":
            raise HostError("refused by the test", kind="denied")
        self.calls.append((operation, dict(parameters)))
        halfway = fault in ("halfway", "lost-halfway")
        answer: dict[str, Any] = getattr(self, "_" + operation.replace("-", "_"))(dict(parameters), halfway=halfway)
        if fault == "halfway":
            raise HostError("failed in the middle", kind="failed")
        if fault in ("lost-after", "lost-halfway"):
            raise TransportError("the answer was lost")
        if fault == "killed-after":
            self._die()
        return judge(operation, {"ok": True, "result": answer}, self.target)

    def _die(self) -> None:
        self.dead = True
        if self.on_kill is not None:
            self.on_kill()
        raise Killed

    # --- looking ---

    def _probe(self, asked: dict[str, Any], *, halfway: bool) -> dict[str, Any]:
        if not self.has_hyperv:
            raise HostError("there is no Hyper-V here", kind="unsupported")
        return {"store": STORE, "family": self.family}

    def _preflight(self, asked: dict[str, Any], *, halfway: bool) -> dict[str, Any]:
        problems = [f"no switch {name!r}" for name in asked["switches"] if name not in self.switches]
        if asked["bytes"] > self.free:
            problems.append("no space")
        if asked["store"].lower() not in self.folders:
            problems.append(f"no folder {asked['store']}")
        return {"problems": [{"kind": "x", "message": problem} for problem in problems]}

    def _find(self, asked: dict[str, Any], *, halfway: bool) -> dict[str, Any]:
        found = [
            {"id": one.id, "name": one.name, "uuid": one.uuid, "spec": one.spec, "stage": one.stage}
            | {"state": one.state, "path": one.path}
            for one in self.machines.values()
            if one.uuid == asked["uuid"] or one.name == asked["name"]
        ]
        return {"machines": found}

    def _file_info(self, asked: dict[str, Any], *, halfway: bool) -> dict[str, Any]:
        file = self.files.get(asked["path"].lower())
        if file is None:
            return {"exists": False}
        info: dict[str, Any] = {"exists": True, "size": len(file.data)}
        if asked["hash"]:
            info["sha256"] = hashlib.sha256(file.data).hexdigest()
        return info

    def _observe(self, asked: dict[str, Any], *, halfway: bool) -> dict[str, Any]:
        on = self._machine(asked).state == "Running"
        return {"state": "Running" if on else "Off", "heartbeat": "OkApplicationsUnknown" if on else ""} | {
            "addresses": ["192.0.2.77"] if on else [],
            "neighbours": [],
        }

    def _read_serial(self, asked: dict[str, Any], *, halfway: bool) -> dict[str, Any]:
        return {"data": ""}

    def _selftest(self, asked: dict[str, Any], *, halfway: bool) -> dict[str, Any]:
        return {"checks": self.checks}

    def _hash_disk(self, asked: dict[str, Any], *, halfway: bool) -> dict[str, Any]:
        content = self.disks[asked["path"]]
        return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest().upper()}

    # --- files ---

    def _make_folder(self, asked: dict[str, Any], *, halfway: bool) -> dict[str, Any]:
        path = asked["path"]
        if path.lower() in self.folders:
            return {"created": False}
        self._need_folder(ntpath.dirname(path))
        self.folders[path.lower()] = path
        return {"created": True}

    def _write_chunk(self, asked: dict[str, Any], *, halfway: bool) -> dict[str, Any]:
        path, data = asked["path"], base64.b64decode(asked["data"])
        self._need_folder(ntpath.dirname(path))
        file = self.files.get(path.lower())
        if asked["offset"] == 0:
            if file is not None:
                raise HostError("the file exists", kind="exists")
            file = self.files[path.lower()] = ModelFile(path, b"")
        if file is None or len(file.data) != asked["offset"]:
            raise HostError("not the end of the file", kind="mismatch")
        file.data += data[: len(data) // 2] if halfway else data
        return {"size": len(file.data)}

    def _publish_file(self, asked: dict[str, Any], *, halfway: bool) -> dict[str, Any]:
        part = self.files.get(asked["part"].lower())
        if part is None:
            raise HostError("no such file", kind="not-found")
        if len(part.data) != asked["size"] or hashlib.sha256(part.data).hexdigest() != asked["sha256"]:
            raise HostError("size or SHA-256 differ", kind="mismatch")
        if asked["path"].lower() in self.files:
            raise HostError("the file exists", kind="exists")
        if halfway:
            return {}
        del self.files[asked["part"].lower()]
        self.files[asked["path"].lower()] = ModelFile(asked["path"], part.data)
        return {}

    def _remove_file(self, asked: dict[str, Any], *, halfway: bool) -> dict[str, Any]:
        key = asked["path"].lower()
        for machine in self.machines.values():
            if machine.state != "Off" and key in (path.lower() for path in machine.media.values()):
                raise HostError("the file is in use", kind="in-use")
        if halfway:
            return {"removed": False}
        return {"removed": self.files.pop(key, None) is not None}

    def _remove_folder(self, asked: dict[str, Any], *, halfway: bool) -> dict[str, Any]:
        key = asked["path"].lower()
        inside = [one for one in [*self.files, *self.folders] if one.startswith(key + "\\")]
        inside += [one.path for one in self.machines.values() if (one.path.lower() + "\\").startswith(key + "\\")]
        if inside or key not in self.folders or halfway:
            return {"removed": False}
        del self.folders[key]
        return {"removed": True}

    # --- machines ---

    def _create(self, asked: dict[str, Any], *, halfway: bool) -> dict[str, Any]:
        """One step for the host: it holds a lock while it looks for twins and makes the machine."""
        if any(one.uuid == asked["uuid"] or one.name == asked["name"] for one in self.machines.values()):
            raise HostError("a machine with this name or uuid exists", kind="exists")
        if asked["memory"] % (2 * MIB):
            raise HostError("memory is no multiple of 2 MiB", kind="invalid")
        self._need_folder(asked["folder"])
        machine = self.add_machine(asked["name"], path=asked["folder"], generation=asked["generation"])
        machine.memory = asked["memory"]
        if not halfway:
            machine.uuid, machine.spec, machine.stage = asked["uuid"], asked["spec"], "building"
        return {"id": machine.id}

    def _configure(self, asked: dict[str, Any], *, halfway: bool) -> dict[str, Any]:
        machine = self._machine(asked)
        for nic in asked["nics"]:
            if nic["legacy"] and machine.generation == 2:
                raise HostError("no legacy adapter in generation 2", kind="invalid")
            if nic["switch"] is not None and nic["switch"] not in self.switches:
                raise HostError("no such switch", kind="not-found")
            machine.nics = [one for one in machine.nics if one["name"] != nic["name"]] + [nic]
            if halfway:
                break
        machine.settings |= {key: asked[key] for key in ("pipe", "serial_number", "asset_tag", "kvp")}
        return {"uuid": machine.uuid if self.sets_uuid else "00000000-0000-0000-0000-000000000001"}

    def _attach(self, asked: dict[str, Any], *, halfway: bool) -> dict[str, Any]:
        machine = self._machine(asked)
        for medium in asked["media"]:
            self._attach_one(machine, medium)
            if halfway:
                break
        return {}

    def _attach_one(self, machine: ModelMachine, medium: dict[str, Any]) -> None:
        slot = (medium["controller"], medium["number"], medium["slot"])
        controllers, slots = SLOTS[slot[0]]
        if slot[1] >= controllers or slot[2] >= slots or (slot[0] == "IDE") != (machine.generation == 1):
            raise HostError("no such slot", kind="invalid")
        if slot in machine.media:
            raise HostError("the slot is taken", kind="in-use")
        if machine.generation == 2 and medium["path"].lower().endswith(".vhd"):
            raise HostError("generation 2 takes no VHD", kind="invalid")
        file = self.files.get(medium["path"].lower())
        if file is None:
            raise HostError("no such file", kind="not-found")
        if file.sparse:
            raise HostError("0xC03A001A: the file is sparse", kind="sparse")
        machine.media[slot] = file.path
        file.rights.add(machine.id)

    def _finish(self, asked: dict[str, Any], *, halfway: bool) -> dict[str, Any]:
        machine = self._machine(asked)
        if not halfway:
            machine.stage = "ready"
        return {}

    def _start(self, asked: dict[str, Any], *, halfway: bool) -> dict[str, Any]:
        machine = self._machine(asked)
        for path in machine.media.values():
            file = self.files.get(path.lower())
            if file is None:
                raise HostError("a file of the machine is missing", kind="not-found")
            if machine.id not in file.rights:
                raise HostError("0x80070005: access denied", kind="denied")
        if not halfway:
            machine.state = "Running"
            for path in machine.media.values():
                if not path.lower().endswith(".iso"):
                    self.files[path.lower()].data += b" booted"
        return {}

    def _stop(self, asked: dict[str, Any], *, halfway: bool) -> dict[str, Any]:
        machine = self._machine(asked)
        code = 32775 if machine.state == "Off" else 4096
        if not halfway:
            machine.state = "Off"
        return {"code": code}

    def _eject(self, asked: dict[str, Any], *, halfway: bool) -> dict[str, Any]:
        machine = self._machine(asked)
        machine.media = {slot: path for slot, path in machine.media.items() if not path.lower().endswith(".iso")}
        return {}

    def _delete(self, asked: dict[str, Any], *, halfway: bool) -> dict[str, Any]:
        machine = self.machines.get(asked["id"])
        if machine is None:
            return {"deleted": False}
        if machine.uuid != asked["uuid"]:
            raise HostError("the machine's notes changed", kind="mismatch")
        machine.state = "Off"
        if self.merging:
            self.merging -= 1
            raise HostError("disks are still being merged", kind="timeout")
        if not halfway:
            del self.machines[machine.id]
        return {"deleted": not halfway}

    # --- for the test's hands ---

    def add_machine(self, name: str, *, path: str = "C:\\Other", generation: int = 1) -> ModelMachine:
        self._next += 1
        machine = ModelMachine(f"id-{self._next}", name, path, generation)
        self.machines[machine.id] = machine
        return machine

    def add_file(self, path: str, data: bytes) -> ModelFile:
        folder = ntpath.dirname(path)
        self.folders.setdefault(folder.lower(), folder)
        file = self.files[path.lower()] = ModelFile(path, data)
        return file

    def _machine(self, asked: dict[str, Any]) -> ModelMachine:
        try:
            return self.machines[asked["id"]]
        except KeyError:
            raise HostError("no such machine", kind="not-found") from None

    def _need_folder(self, path: str) -> None:
        if path.lower() not in self.folders:
            raise HostError(f"no folder {path}", kind="not-found")
