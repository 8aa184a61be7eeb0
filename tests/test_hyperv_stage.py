"""The stage on a model of a host: steps, their order, and what becomes of failures.

The model is our belief of Hyper-V behind the contract of operations (tests/hyperv_model.py), not a recording. The
state machine drives it with faults at any call; what must hold after every step is written down as invariants.
"""

from __future__ import annotations

import dataclasses
import hashlib
import ntpath
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from imagekit.errors import ImagekitError, SourceError, TargetError, UnsafeImage, UsageError
from imagekit.hyperv.journal import NAME, Journal
from imagekit.hyperv.stage import HyperVLauncher, StageOptions
from imagekit.hyperv.transport import HostError, TransportError
from imagekit.machine import FILE_NAME, Machine
from tests.hyperv_model import FAULTS, STORE, Fault, Killed, ModelFile, ModelHost

UUID = "8f2a6d5c-9d3e-4a54-8d4e-0f9b8d1f1c11"
DISK, DRIVE = b"the disk" * 100, b"the config drive" * 20
FOLDER = f"{STORE}\\web1-{UUID}"


def write_bundle(folder: Path, **changes: Any) -> Path:
    """A bundle of generation 1 (or as ``changes`` say) with small files."""
    folder.mkdir(parents=True, exist_ok=True)
    second = changes.get("generation") == 2
    disk = "web1.vhdx" if second else "web1.vhd"
    (folder / disk).write_bytes(DISK)
    (folder / "web1-config.iso").write_bytes(DRIVE)
    controller = {"controller": "scsi" if second else "ide"}
    media = [
        controller | {"path": disk, "format": disk[5:], "kind": "disk"} | measured(DISK),
        controller
        | {"path": "web1-config.iso", "format": "iso", "kind": "dvd"}
        | ({"slot": 1} if second else {"number": 1})
        | measured(DRIVE),
    ]
    fields: dict[str, Any] = {
        "uuid": UUID,
        "name": "web1",
        "firmware": "uefi" if second else "bios",
        "cpus": 2,
        "nics": [{"mac": "02:15:5d:00:00:01", "switch": "LAN", "vlan": 100}],
        "media": media,
    }
    (folder / FILE_NAME).write_bytes(Machine.parse(fields | changes).dumps())
    return folder


def measured(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "web1")


@pytest.fixture
def host() -> ModelHost:
    return ModelHost()


def operations(host: ModelHost) -> list[str]:
    return [name for name, _ in host.calls]


def test_a_machine_is_made_complete(bundle: Path, host: ModelHost) -> None:
    HyperVLauncher(bundle, host).create()
    (machine,) = host.machines.values()
    assert (machine.name, machine.uuid, machine.stage, machine.state) == ("web1", UUID, "ready", "Off")
    assert machine.media == {("IDE", 0, 0): f"{FOLDER}\\web1.vhd", ("IDE", 1, 0): f"{FOLDER}\\web1-config.iso"}
    assert machine.nics == [{"name": "nic0", "mac": "02155D000001", "switch": "LAN", "vlan": 100, "legacy": False}]
    assert machine.settings["pipe"] == f"\\\\.\\pipe\\{UUID}_com1"
    assert {path: file.data for path, file in host.files.items()} == {
        f"{FOLDER}\\web1.vhd".lower(): DISK,
        f"{FOLDER}\\web1-config.iso".lower(): DRIVE,
    }


def test_generation_2_is_on_scsi(tmp_path: Path, host: ModelHost) -> None:
    HyperVLauncher(write_bundle(tmp_path / "b", generation=2), host).create()
    (machine,) = host.machines.values()
    assert sorted(machine.media) == [("SCSI", 0, 0), ("SCSI", 0, 1)]


def test_every_step_may_be_repeated(bundle: Path, host: ModelHost) -> None:
    launcher = HyperVLauncher(bundle, host)
    for step in ("push", "push", "create", "create", "start", "start", "stop", "stop", "eject", "delete", "delete"):
        getattr(launcher, step)()
    assert not host.machines and not host.files and FOLDER.lower() not in host.folders


def test_files_on_the_host_are_not_sent_twice(bundle: Path, host: ModelHost) -> None:
    HyperVLauncher(bundle, host).push()
    host.calls.clear()
    HyperVLauncher(bundle, host).create()
    assert "write-chunk" not in operations(host)


def test_a_booted_machine_is_recognised_though_its_disk_changed(bundle: Path, host: ModelHost) -> None:
    launcher = HyperVLauncher(bundle, host)
    launcher.create()
    launcher.start()
    launcher.create()
    assert len(host.machines) == 1
    launcher.delete()
    assert not host.machines and not host.files


def test_another_machine_of_that_name_is_refused_and_left_alone(bundle: Path, host: ModelHost) -> None:
    host.add_machine("web1")
    with pytest.raises(UnsafeImage, match="another machine named 'web1'"):
        HyperVLauncher(bundle, host).create()
    assert len(host.machines) == 1 and not host.files and operations(host) == ["probe", "find"]


def test_a_copy_with_our_notes_is_not_guessed_about(bundle: Path, host: ModelHost) -> None:
    launcher = HyperVLauncher(bundle, host)
    launcher.create()
    host.add_machine("imported").uuid = UUID
    for step in (launcher.create, launcher.delete):
        with pytest.raises(UnsafeImage, match="2 machines with the uuid"):
            step()
    assert len(host.machines) == 2


def test_other_values_are_not_put_on_a_machine_that_exists(bundle: Path, host: ModelHost) -> None:
    HyperVLauncher(bundle, host).create()
    write_bundle(bundle, cpus=4)
    with pytest.raises(TargetError, match="made from other values"):
        HyperVLauncher(bundle, host).create()


def test_a_file_of_others_is_neither_replaced_nor_removed(bundle: Path, host: ModelHost) -> None:
    HyperVLauncher(bundle, host).push()
    HyperVLauncher(bundle, host).delete()
    host.add_file(f"{FOLDER}\\web1.vhd", b"somebody's")
    launcher = HyperVLauncher(bundle, host)
    with pytest.raises(TargetError):
        launcher.create()
    launcher.delete()
    assert [file.data for file in host.files.values()] == [b"somebody's"]


def test_a_missing_switch_is_said_before_anything_is_sent(bundle: Path, host: ModelHost) -> None:
    host.switches.clear()
    with pytest.raises(TargetError, match="no switch 'LAN'"):
        HyperVLauncher(bundle, host).create()
    assert not host.files and FOLDER.lower() not in host.folders


def test_a_bundle_that_changed_is_not_sent(bundle: Path, host: ModelHost) -> None:
    (bundle / "web1.vhd").write_bytes(DISK[::-1])
    with pytest.raises(ImagekitError, match="SHA-256"):
        HyperVLauncher(bundle, host).create()
    assert not host.calls


def test_large_files_do_not_go_through_winrm(bundle: Path, host: ModelHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagekit.hyperv.push.WINRM_LIMIT", 100)
    with pytest.raises(UsageError, match="WinRM itself takes files below"):
        HyperVLauncher(bundle, host).create()
    assert not host.files


def test_a_second_hop_is_refused_with_its_reason(bundle: Path, host: ModelHost) -> None:
    options = StageOptions(store="\\\\filer\\vms")
    with pytest.raises(UsageError, match="second hop") as caught:
        HyperVLauncher(bundle, host, options).create()
    assert caught.value.hint is not None and "credssp" in caught.value.hint
    assert not host.calls


def test_files_go_through_a_share_that_is_the_store(bundle: Path, host: ModelHost, tmp_path: Path) -> None:
    """Of any size; what the share holds is what the host hashes."""
    share = tmp_path / "mounted"
    share.mkdir()

    def smb(operation: str, asked: dict[str, Any]) -> None:
        if operation == "make-folder":
            (share / ntpath.basename(asked["path"])).mkdir()
        for path in share.rglob("*.*"):
            there = f"{STORE}\\{path.parent.name}\\{path.name}"
            host.files.setdefault(there.lower(), ModelFile(there, path.read_bytes()))
            path.unlink()

    host.before = smb
    HyperVLauncher(bundle, host, StageOptions(share=share)).create()
    assert "write-chunk" not in operations(host)
    assert sorted(file.data for file in host.files.values()) == sorted([DISK, DRIVE])
    assert [machine.stage for machine in host.machines.values()] == ["ready"]


def test_a_share_that_is_not_mounted_is_said_before_anything_is_sent(bundle: Path, host: ModelHost) -> None:
    with pytest.raises(TargetError, match="no folder here"):
        HyperVLauncher(bundle, host, StageOptions(share=bundle / "none")).create()
    assert operations(host) == ["probe"]


def test_a_sparse_file_is_refused_by_the_host_and_all_is_undone(bundle: Path, host: ModelHost) -> None:
    def made_sparse(operation: str, asked: dict[str, Any]) -> None:
        if operation == "attach":
            host.files[f"{FOLDER}\\web1.vhd".lower()].sparse = True

    host.before = made_sparse
    with pytest.raises(HostError, match="0xC03A001A") as caught:
        HyperVLauncher(bundle, host).create()
    assert caught.value.kind == "sparse" and caught.value.exit_code == 16
    assert not host.machines and not host.files and list(host.folders.values()) == [STORE]


def test_a_slot_that_is_taken_is_a_failure_that_is_undone(bundle: Path, host: ModelHost) -> None:
    def taken(operation: str, asked: dict[str, Any]) -> None:
        if operation == "attach":
            host.machines[asked["id"]].media["IDE", 1, 0] = "D:\\other.iso"

    host.before = taken
    with pytest.raises(HostError, match="slot is taken"):
        HyperVLauncher(bundle, host).create()
    assert not host.machines and not host.files


def test_a_disk_that_somebody_replaced_has_lost_the_machines_rights(bundle: Path, host: ModelHost) -> None:
    """Starting fails, and the machine stays for its owner to look at."""
    launcher = HyperVLauncher(bundle, host)
    launcher.create()
    host.add_file(f"{FOLDER}\\web1.vhd", DISK)
    with pytest.raises(HostError, match="0x80070005") as caught:
        launcher.start()
    assert caught.value.kind == "denied"
    assert [(machine.stage, machine.state) for machine in host.machines.values()] == [("ready", "Off")]


def test_deleting_without_the_journal_says_which_files_stay(bundle: Path, host: ModelHost) -> None:
    """The machine's notes say that it is ours; of the files nothing does."""
    HyperVLauncher(bundle, host).create()
    (bundle / NAME).unlink()
    launcher = HyperVLauncher(bundle, host)
    launcher.delete()
    assert not host.machines and len(host.files) == 2
    said = "\n".join(launcher.outcome.done)
    for name in ("web1.vhd", "web1-config.iso"):
        assert f"left {FOLDER}\\{name}: this computer's journal does not name it" in said
    host.files.clear()
    launcher.delete()
    assert launcher.outcome.done == ["nothing of this bundle is on the host"]


@pytest.mark.parametrize(
    ("there", "ours"),
    [(DISK, True), (DISK[::-1], False), (DISK[:-1], False), (None, False)],
    ids=["what was sent", "other bytes of that size", "a shorter file", "nothing"],
)
def test_a_file_whose_publishing_nobody_saw_is_ours_if_it_is_what_was_sent(
    bundle: Path, host: ModelHost, there: bytes | None, ours: bool
) -> None:
    """As a run leaves it that was killed while it published: begun, and the .part is gone."""
    path = f"{FOLDER}\\web1.vhd"
    with Journal(bundle / NAME, host="model", uuid=UUID, run="killed") as journal:
        journal.begin("file", path)
    if there is not None:
        host.add_file(path, there)
    launcher = HyperVLauncher(bundle, host)
    launcher.delete()
    left = [] if ours or there is None else [there]
    assert [file.data for file in host.files.values()] == left
    assert (f"removed {path}" in launcher.outcome.done) is ours
    assert any(line.startswith(f"left {path}") for line in launcher.outcome.done) is bool(left)


def test_deleting_while_a_job_merges_disks_fails_and_is_repeated(bundle: Path, host: ModelHost) -> None:
    """Its files stay until the machine is gone."""
    launcher = HyperVLauncher(bundle, host)
    launcher.create()
    host.merging = 1
    with pytest.raises(HostError, match="being merged"):
        launcher.delete()
    assert len(host.machines) == 1 and len(host.files) == 2
    launcher.delete()
    assert not host.machines and not host.files


def test_a_host_that_keeps_its_own_uuid_is_said(bundle: Path, host: ModelHost) -> None:
    host.sets_uuid = False
    launcher = HyperVLauncher(bundle, host)
    launcher.create()
    assert any("another uuid, 00000000-0000" in line for line in launcher.outcome.done)


def test_two_runs_at_once_are_refused(bundle: Path, host: ModelHost) -> None:
    with Journal(bundle / NAME, host="model", uuid=UUID, run="x"), pytest.raises(SourceError, match="another run"):
        HyperVLauncher(bundle, host).create()
    assert not host.files


def test_a_run_from_another_computer_does_not_join_in(tmp_path: Path, host: ModelHost) -> None:
    """Its journal does not know the folder that the first run made."""
    one, two = write_bundle(tmp_path / "one"), write_bundle(tmp_path / "two")
    host.faults = {5: "killed-after"}
    with pytest.raises(Killed):
        HyperVLauncher(one, host).create()
    host.dead = False
    with pytest.raises(TargetError, match="knows nothing of it"):
        HyperVLauncher(two, host).create()
    HyperVLauncher(one, host).create()
    assert len(host.machines) == 1


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if not fault.startswith("killed")])
def test_a_failure_at_any_call_leaves_nothing_behind(tmp_path: Path, fault: Fault) -> None:
    """And a second attempt succeeds."""
    calls = count_calls(tmp_path / "count")
    for number in range(calls):
        bundle, host = write_bundle(tmp_path / f"b{number}"), ModelHost()
        theirs = host.add_file(f"{STORE}\\theirs.vhd", b"theirs")
        host.faults = {number: fault}
        with pytest.raises((HostError, TransportError, TargetError)):
            HyperVLauncher(bundle, host).create()
        assert not host.machines, number
        assert list(host.files.values()) == [theirs], number
        assert list(host.folders.values()) == [STORE], number
        HyperVLauncher(bundle, host).create()
        assert [machine.stage for machine in host.machines.values()] == ["ready"]


@pytest.mark.parametrize("fault", ["killed-before", "killed-after"])
def test_a_run_that_was_killed_at_any_call_is_finished_by_the_next(tmp_path: Path, fault: Fault) -> None:
    calls = count_calls(tmp_path / "count")
    for number in range(calls):
        for afterwards in ("create", "delete"):
            bundle, host = write_bundle(tmp_path / f"{afterwards}{number}"), ModelHost()
            theirs = host.add_file(f"{STORE}\\theirs.vhd", b"theirs")
            host.faults = {number: fault}
            with pytest.raises(Killed):
                HyperVLauncher(bundle, host).create()
            host.dead = False
            getattr(HyperVLauncher(bundle, host), afterwards)()
            if afterwards == "create":
                assert [machine.stage for machine in host.machines.values()] == ["ready"]
                HyperVLauncher(bundle, host).delete()
            assert not host.machines and list(host.files.values()) == [theirs], number
            assert list(host.folders.values()) == [STORE], number


@pytest.mark.parametrize("theirs", [DISK, b"somebody's"], ids=["the same bytes", "other bytes"])
@pytest.mark.parametrize("ending", ["refused", "lost", "killed"])
def test_a_file_that_somebody_puts_there_at_the_last_moment_stays_theirs(
    bundle: Path, host: ModelHost, theirs: bytes, ending: str
) -> None:
    """Whether the host says so, does not answer, or this computer dies at that moment."""
    path = f"{FOLDER}\\web1.vhd"

    def race(operation: str, asked: dict[str, Any]) -> None:
        if operation == "publish-file" and asked["path"] == path:
            host.before = None
            host.add_file(path, theirs)
            if ending == "lost":
                raise TransportError("the connection was lost")
            if ending == "killed":
                host.dead = True
                raise Killed

    host.before = race
    with pytest.raises((ImagekitError, Killed)):
        HyperVLauncher(bundle, host).create()
    host.dead = False
    HyperVLauncher(bundle, host).delete()
    assert [file.data for file in host.files.values()] == [theirs]


def count_calls(folder: Path) -> int:
    host = ModelHost()
    HyperVLauncher(write_bundle(folder), host).create()
    return len(host.calls)


def test_what_a_lost_host_may_keep_is_said_and_removed_later(bundle: Path, host: ModelHost) -> None:
    launcher = HyperVLauncher(bundle, host)

    def cut(operation: str, asked: dict[str, Any]) -> None:
        host.gone |= operation == "attach"

    host.before = cut
    with pytest.raises(TransportError) as caught:
        launcher.create()
    assert caught.value.hint is not None
    assert "may be left" in caught.value.hint and f"file {FOLDER}\\web1.vhd" in caught.value.hint
    host.gone, host.before = False, None
    HyperVLauncher(bundle, host).delete()
    assert not host.machines and not host.files


class HostLife(RuleBasedStateMachine):
    """Runs of imagekit, other people's doings and every fault, in any order."""

    @initialize()
    def begin(self) -> None:
        self.scratch = Path(tempfile.mkdtemp(prefix="imagekit-hyperv-"))
        self.mine = write_bundle(self.scratch / "one")
        self.theirs = write_bundle(self.scratch / "two")
        self.host = ModelHost()
        self.host.on_kill = self.freeze
        self.frozen: dict[Path, bytes] = {}
        self.foreign_files: dict[str, bytes] = {}
        self.foreign_machines: set[str] = set()

    def teardown(self) -> None:
        if hasattr(self, "scratch"):
            shutil.rmtree(self.scratch)

    def freeze(self) -> None:
        """What is on this computer's disk when it dies."""
        for folder in (self.mine, self.theirs):
            if (folder / NAME).exists():
                self.frozen[folder / NAME] = (folder / NAME).read_bytes()

    def ran(self, bundle: Path, step: str, faults: dict[int, Fault]) -> bool:
        before = self.snapshot()
        self.host.faults = dict(faults)
        self.host.dead = False
        try:
            getattr(HyperVLauncher(bundle, self.host), step)()
            return True
        except Killed:
            for path, data in self.frozen.items():
                path.write_bytes(data)
            return False
        except ImagekitError:
            if step in ("create", "push") and len(faults) == 1:
                # One fault that did not hit the undoing: all that this run made is gone again.
                assert not self.snapshot() - before
            return False
        finally:
            self.host.faults, self.host.dead, self.frozen = {}, False, {}

    def snapshot(self) -> set[str]:
        host = self.host
        return {*host.files, *host.folders, *host.machines} - set(self.foreign_files)

    faults = st.dictionaries(st.integers(0, 22), st.sampled_from(FAULTS), max_size=2)

    @rule(faults=faults, step=st.sampled_from(["create", "create", "push", "delete"]))
    def we_run(self, faults: dict[int, Fault], step: str) -> None:
        done = self.ran(self.mine, step, faults)
        machines = [one for one in self.host.machines.values() if one.id not in self.foreign_machines]
        if done and step == "create":
            assert [one.stage for one in machines] == ["ready"]
            assert len(machines[0].media) >= 1 and len(machines[0].nics) == 1
        if done and step == "delete":
            assert not machines

    @rule(faults=faults, step=st.sampled_from(["create", "delete"]))
    def another_computer_runs(self, faults: dict[int, Fault], step: str) -> None:
        self.ran(self.theirs, step, faults)

    @rule(faults=faults, step=st.sampled_from(["start", "stop", "eject"]))
    def we_switch(self, faults: dict[int, Fault], step: str) -> None:
        self.ran(self.mine, step, faults)

    @rule(name=st.sampled_from(["web1.vhd", "web1-config.iso", "notes.txt"]))
    def somebody_puts_a_file(self, name: str) -> None:
        path = f"{FOLDER}\\{name}"
        if FOLDER.lower() in self.host.folders and path.lower() not in self.host.files:
            self.host.add_file(path, b"somebody's")
            self.foreign_files[path.lower()] = b"somebody's"

    @precondition(lambda self: not self.foreign_machines)
    @rule()
    def somebody_makes_a_machine_of_that_name(self) -> None:
        machine = self.host.add_machine("web1")
        self.foreign_machines.add(machine.id)

    @rule()
    def somebody_takes_theirs_away(self) -> None:
        for identifier in self.foreign_machines:
            del self.host.machines[identifier]
        for path in self.foreign_files:
            del self.host.files[path]
        self.foreign_machines, self.foreign_files = set(), {}

    @invariant()
    def there_are_never_two_machines_for_one_uuid(self) -> None:
        ours = [one for one in self.host.machines.values() if one.id not in self.foreign_machines]
        assert len(ours) <= 1

    @invariant()
    def nothing_of_others_was_touched(self) -> None:
        for path, data in self.foreign_files.items():
            assert path in self.host.files and self.host.files[path].data == data
        assert self.foreign_machines <= set(self.host.machines)


TestHostLife = HostLife.TestCase
TestHostLife.settings = settings(
    max_examples=60, stateful_step_count=15, suppress_health_check=[HealthCheck.too_slow], deadline=None
)


@pytest.mark.slow
def test_a_long_life_of_a_host() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(HostLife, settings=settings(max_examples=300, stateful_step_count=30, deadline=None))


def test_the_outcome_says_what_was_done(bundle: Path, host: ModelHost) -> None:
    launcher = HyperVLauncher(bundle, host)
    launcher.create()
    assert launcher.outcome.to_json()["done"] == [
        f"sent {FOLDER}\\web1.vhd",
        f"sent {FOLDER}\\web1-config.iso",
        "made web1",
    ]
    assert dataclasses.is_dataclass(launcher.outcome)
