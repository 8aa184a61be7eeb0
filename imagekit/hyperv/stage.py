"""The stage: a bundle's machine on a Hyper-V host, from the first look to the last file removed.

    preflight ─▶ push ─▶ create ─▶ configure ─▶ ready ─▶ start ─▶ wait … eject, stop, delete

Every step may be repeated. What makes a machine ours is the uuid in its notes; beside it stand a digest of what was
asked for and whether it is complete. A step that fails undoes what this run made and nothing else; where the host
does not answer any more, the error says what may be left and the journal remembers it.

The order of cmdlets lies in the scripts; what was asked for, in which order, and what becomes of failures lies here.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from imagekit.errors import ImagekitError, SourceError, TargetError, UnsafeImage, UsageError
from imagekit.hyperv.host import Host
from imagekit.hyperv.journal import NAME as JOURNAL
from imagekit.hyperv.journal import Journal
from imagekit.hyperv.push import Item, check_route, push_file
from imagekit.hyperv.request import Place, check, check_host_path
from imagekit.hyperv.settings import find_parameters, is_nocloud, plan_of, preflight_parameters, settings_of
from imagekit.hyperv.undo import ours, remove, settle, try_remove
from imagekit.hyperv.waiting import Waiter
from imagekit.launch.launcher import LaunchPlan, OnEvent
from imagekit.launch.result import BootResult
from imagekit.machine import FILE_NAME, Machine
from imagekit.progress import SILENT, Control
from imagekit.records import dataclass, field, replace

CONSOLE_NAME = "hyperv-console.log"
STOP_SECONDS = 180.0


@dataclass(frozen=True, slots=True)
class StageOptions:
    """How a caller wants the stage done; ``store`` None is the folder the host keeps machines in."""

    store: str | None = None
    share: Path | None = None
    """The store, as this computer reaches it."""
    journal: Path | None = None
    marker: str | None = None
    out: Path | None = None
    on_event: OnEvent | None = None
    control: Control = SILENT


@dataclass(slots=True)
class Outcome:
    """What a step did, in words."""

    step: str
    done: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        return {"schema": 1, "backend": "hyperv", "step": self.step, "done": list(self.done)}


class HyperVLauncher:
    """The launcher of a bundle on ``host``."""

    def __init__(self, bundle: str | os.PathLike[str], host: Host, options: StageOptions | None = None) -> None:
        folder = Path(bundle)
        self._folder = folder.parent if folder.name == FILE_NAME else folder
        self._host, self._options = host, options or StageOptions()
        self.machine = Machine.load(self._folder)
        self._uuid = str(self.machine.uuid)
        self._known_store: str | None = None
        self.outcome = Outcome("none")

    # --- the protocol of launchers ---

    def plan(self) -> LaunchPlan:
        """Every operation with its script and data; the host is not asked, so its store must be named."""
        store = self._options.store
        if store is None:
            raise UsageError("a plan asks no host, so it needs the folder", hint=r"--store D:\VMs")
        where = check(self.machine, store, self._host.family)
        return plan_of(self.machine, where, self._items(where), self._host, self._settings(where))

    def create(self) -> None:
        """Push the files and make the machine, complete or not at all."""
        self.outcome = Outcome("create")
        where = self._prepare()
        with self._journal() as journal:
            self._settle(journal, where)
            if self._adopt(journal, where):
                return
            with self._undone_on_failure(journal, where):
                self._push(journal, where)
                self._build(journal, where)

    def push(self) -> None:
        """Bring the files to the host, without a machine."""
        self.outcome = Outcome("push")
        where = self._prepare()
        with self._journal() as journal:
            self._settle(journal, where)
            if self._adopt(journal, where):
                return
            with self._undone_on_failure(journal, where):
                self._push(journal, where)

    def start(self) -> None:
        self.outcome = Outcome("start")
        machine = self._the_machine()
        if machine["state"] == "Running":
            self._say("it runs already")
            return
        self._host.call("start", {"id": machine["id"]})
        self._say(f"started {machine['name']}")

    def wait(self, timeout: float) -> BootResult:
        self.outcome = Outcome("wait")
        options = self._options
        waiter = Waiter(
            self._host,
            self.machine,
            self._the_machine()["id"],
            marker=options.marker,
            on_event=options.on_event,
            control=options.control,
        )
        result = waiter.wait(timeout)
        console = bytes(waiter.known.console)
        return result if not console else _with_console(result, self._keep(console))

    def stop(self, *, force: bool = False) -> None:
        """Ask the guest to shut down; ``force`` switches off."""
        self.outcome = Outcome("stop")
        machine = self._the_machine()
        if machine["state"] == "Off":
            self._say("it is off already")
            return
        self._host.call("stop", {"id": machine["id"], "force": force}, timeout=STOP_SECONDS)
        self._say(f"stopped {machine['name']}")

    def eject(self) -> None:
        """Take the config drive out: it holds secrets, and is read at the first boot only."""
        self.outcome = Outcome("eject")
        self._host.call("eject", {"id": self._the_machine()["id"]})
        self._say("ejected the config drive")

    def delete(self) -> None:
        """Remove the machine, and the files and folder that the journal names."""
        self.outcome = Outcome("delete")
        where = self._place()
        with self._journal() as journal:
            self._settle(journal, where)
            machines = self._ours(where)
            _refuse_copies(machines, self._host.target, self._uuid)
            if machines and not journal.present("machine"):
                # Made from another computer, or the journal is lost: the notes say it is ours all the same.
                journal.begin("machine", self._uuid)
            self.outcome.done += [
                f"removed {what}" for what in remove(self._host, journal, journal.present(), machines)
            ]
        self._say_what_stays(where)
        if not self.outcome.done:
            self._say("nothing of this bundle is on the host")

    def _say_what_stays(self, where: Place) -> None:
        """Files with the names of ours that no journal here names: who made them, nobody can tell."""
        for path in where.files:
            if self._host.call("file-info", {"path": path, "hash": False, "size": 0})["exists"]:
                self._say(f"left {path}: this computer's journal does not name it; if it is yours, remove it there")

    def close(self) -> None:
        """Say goodbye to the host."""
        self._host.close()

    # --- the steps ---

    def _prepare(self) -> Place:
        """Everything that can be refused before anything is written anywhere."""
        self.machine.check_media(self._folder, digests=True)
        where = self._place()
        items = self._items(where)
        check_route(self._host, self._store(), items, self._options.share)
        return where

    def _settle(self, journal: Journal, where: Place) -> None:
        settle(self._host, journal, {item.target.lower(): (item.size, item.sha256) for item in self._items(where)})

    def _adopt(self, journal: Journal, where: Place) -> bool:
        """Whether the machine is there, complete and as asked for. Removes an incomplete one of ours."""
        found = self._find(where)
        machines = ours(found, uuid=self._uuid, name=self.machine.name, folder=where.folder)
        foreign = [one for one in found if one not in machines]
        if foreign:
            raise UnsafeImage(
                f"{self._host.target} has another machine named {self.machine.name!r}, or with its uuid: "
                + ", ".join(f"{one['name']} in {one['path']}" for one in foreign),
                rule="name-taken",
                hint="prepare the bundle under another --name; imagekit touches no machine that it did not make",
            )
        _refuse_copies(machines, self._host.target, self._uuid)
        if not machines:
            return False
        (machine,) = machines
        if machine.get("stage") == "ready":
            if machine.get("spec") == self._spec(where):
                self._say(f"{machine['name']} is there already")
                return True
            raise TargetError(
                f"{self._host.target} has this machine already, made from other values",
                hint="`imagekit hyperv delete` it first",
            )
        if not journal.present("machine"):
            raise TargetError(
                f"{self._host.target} has this machine half made, by a run this computer knows nothing of",
                hint="wait for that run; if it died, `imagekit hyperv delete` removes the machine",
            )
        remove(self._host, journal, journal.present("machine"), machines)
        self._say("removed what an interrupted run had left of the machine")
        return False

    def _push(self, journal: Journal, where: Place) -> None:
        host, options = self._host, self._options
        store = self._store()
        found = host.call("preflight", preflight_parameters(self.machine, store))
        if found["problems"]:
            raise TargetError(
                f"{host.target}: " + "; ".join(str(problem["message"]) for problem in found["problems"]),
                hint="nothing was sent",
            )
        self._make_folder(journal, where)
        for item in self._items(where):
            control = options.control
            sent = push_file(host, journal, item, run=journal.run, share=options.share, store=store, control=control)
            self._say(f"{'sent' if sent else 'found'} {item.target}")

    def _make_folder(self, journal: Journal, where: Place) -> None:
        known = journal.names("folder", where.folder)
        if not known:
            journal.begin("folder", where.folder)
        made = self._host.call("make-folder", {"path": where.folder})["created"]
        if made or known:
            journal.made("folder", where.folder)
            return
        journal.gone("folder", where.folder)
        raise TargetError(
            f"{where.folder} is on {self._host.target} already, and this computer's journal knows nothing of it",
            hint="another run may be at work; if it died elsewhere, use its journal (--journal) or remove the folder",
        )

    def _build(self, journal: Journal, where: Place) -> None:
        host = self._host
        settings = self._settings(where)
        self._options.control.check()
        journal.begin("machine", self._uuid)
        made = host.call("create", settings["create"])
        journal.made("machine", self._uuid)
        for operation in ("configure", "attach", "finish"):
            self._options.control.check()
            answer = host.call(operation, {"id": made["id"], **settings[operation]})
            if operation == "configure" and answer.get("uuid") not in (None, self._uuid):
                self._say(
                    f"the firmware tells the guest another uuid, {answer['uuid']}: this host does not let it be set"
                )
        self._say(f"made {self.machine.name}")

    @contextmanager
    def _undone_on_failure(self, journal: Journal, where: Place) -> Iterator[None]:
        """Undo what this run made when anything goes wrong, Ctrl-C too; the first error stays the error."""
        try:
            yield
        except BaseException as error:
            left = self._undo(journal, where)
            if left and isinstance(error, ImagekitError):
                error.hint = "; ".join(filter(None, [error.hint, f"may be left: {', '.join(left)}", _LEFT]))
            raise

    def _undo(self, journal: Journal, where: Place) -> list[str]:
        try:
            self._settle(journal, where)
            machines = self._ours(where) if journal.present("machine", this_run=True) else []
        except ImagekitError as error:
            return [f"{entry.kind} {entry.what}" for entry in journal.present(this_run=True)] or [error.message]
        return try_remove(self._host, journal, journal.present(this_run=True), machines)

    # --- what is asked for ---

    def _store(self) -> str:
        if self._known_store is None:
            self._known_store = check_host_path(self._options.store or str(self._host.call("probe", {})["store"]))
        return self._known_store

    def _place(self) -> Place:
        return check(self.machine, self._store(), self._host.family)

    def _items(self, where: Place) -> list[Item]:
        media = zip(self.machine.media, where.files, strict=True)
        return [
            Item(self._folder / medium.path, target, medium.size, medium.sha256 or "") for medium, target in media
        ]

    def _find(self, where: Place) -> list[dict[str, Any]]:
        return list(self._host.call("find", find_parameters(self.machine, where))["machines"])

    def _ours(self, where: Place) -> list[dict[str, Any]]:
        return ours(self._find(where), uuid=self._uuid, name=self.machine.name, folder=where.folder)

    def _the_machine(self) -> dict[str, Any]:
        machines = self._ours(self._place())
        if len(machines) != 1:
            raise SourceError(
                f"{self._host.target} has {len(machines)} machines with the uuid {self._uuid}",
                hint="make it with `imagekit hyperv create`",
            )
        return machines[0]

    def _settings(self, where: Place) -> dict[str, dict[str, Any]]:
        drives = [self._folder / medium.path for medium in self.machine.media if medium.kind == "dvd"]
        return settings_of(self.machine, where, nocloud=any(is_nocloud(drive) for drive in drives))

    def _spec(self, where: Place) -> str:
        return str(self._settings(where)["create"]["spec"])

    def _journal(self) -> Journal:
        path = self._options.journal or self._folder / JOURNAL
        return Journal(path, host=self._host.target, uuid=self._uuid, run=secrets.token_hex(8))

    def _keep(self, console: bytes) -> Path:
        path = (self._options.out or self._folder) / CONSOLE_NAME
        try:
            path.write_bytes(console)
        except OSError as error:
            raise TargetError(f"the console's record cannot be written: {error.strerror}", path=path) from error
        return path

    def _say(self, text: str) -> None:
        self.outcome.done.append(text)


_LEFT = "`imagekit hyperv delete` removes what is left once the host answers"


def _with_console(result: BootResult, console: Path) -> BootResult:
    return replace(result, console=console)


def _refuse_copies(machines: list[dict[str, Any]], target: str, uuid: str) -> None:
    """An exported and imported machine carries the notes of its original: which one is meant, nobody can tell."""
    if len(machines) > 1:
        raise UnsafeImage(
            f"{target} has {len(machines)} machines with the uuid {uuid}",
            rule="uuid-taken",
            hint="a copy has the notes of its original: take the uuid out of the notes of all but one",
        )
