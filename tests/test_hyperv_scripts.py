"""Our scripts against a grammar and against recorded and documented facts: all that can be known without Windows."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest

from imagekit.hyperv.contract import OPERATIONS
from imagekit.hyperv.operations import EVERYWHERE, NOT_ON_2008R2, request
from tests.powershell import COMMON, VERSIONS, Command, Script, facts, has, parameters, read_scripts, shipped

pytestmark = pytest.mark.oracle

CIM_TYPES = {"string": "string", "string[]": "string[]", "boolean": "bool", "uint16": "uint16", "uint64": "uint64"}
CIM_TYPES |= {"uint16[]": "uint16[]"}


def is_old(name: str) -> bool:
    """Whether Windows Server 2008 R2 runs the script."""
    return (
        name.endswith(".v1.ps1") or name in ("common.ps1", "bootstrap.ps1") or name.removesuffix(".ps1") in EVERYWHERE
    )


def is_new(name: str) -> bool:
    """Whether Windows Server 2012 and later run the script."""
    return not name.endswith(".v1.ps1")


def test_every_script_parses() -> None:
    assert {name: script.errors for name, script in shipped().items() if script.errors} == {}
    assert len(shipped()) > 30


@pytest.mark.parametrize(
    "broken",
    ["if ($a) { 'b'", "foreach ($a in) { }", "Invoke-Operation { 'a' -and Test-Path 'b' }", "@{ 'a' = }", "'open"],
)
def test_the_gate_refuses_a_script_that_is_broken(tmp_path: Path, broken: str) -> None:
    (tmp_path / "broken.ps1").write_text(broken)
    assert read_scripts([tmp_path / "broken.ps1"])["broken.ps1"].errors


def test_scripts_are_ascii_so_that_no_code_page_changes_them() -> None:
    for script in files("imagekit.hyperv").joinpath("scripts").iterdir():
        assert script.read_bytes().isascii(), script.name
        assert b"\t" not in script.read_bytes(), script.name


@pytest.mark.parametrize("family", ["2008r2", "2012", "2012r2", "2016"])
def test_every_operation_has_a_script_for_every_kind_of_host(family: str) -> None:
    for operation in set(OPERATIONS) - (NOT_ON_2008R2 if family == "2008r2" else frozenset()):
        asked = request(operation, family, {})
        assert asked.script.count("\nparam(") == 1, operation
        assert asked.script.rstrip().endswith("}"), operation


def test_every_command_is_known() -> None:
    """A function of the parts that a script is made of, a cmdlet of Hyper-V with its module named, or a plain one."""
    strange = []
    for script in shipped().values():
        known = _functions(script)
        for command in script.commands:
            module, _, cmdlet = command.name.rpartition("\\")
            if module == "Hyper-V":
                good = cmdlet in facts()["cmdlets"]
            elif module == "Storage":
                good = cmdlet in facts()["later"]
            else:
                good = cmdlet in known or cmdlet in facts()["powershell-2.0"]
                good |= is_new(script.name) and not is_old(script.name) and cmdlet in facts()["later"]
                good &= cmdlet not in facts()["cmdlets"]
            if not good:
                strange.append(f"{script.name}:{command.line} {command.name}")
    assert strange == []


def test_every_cmdlet_and_parameter_exists_on_every_version(capsys: pytest.CaptureFixture[str]) -> None:
    """Those that come after a question (`Test-Parameter`) need to be there only where its answer is yes."""
    wrong, table = [], []
    used: dict[tuple[str, str], set[str]] = {}
    for script in shipped().values():
        for command in script.commands:
            if not command.name.startswith("Hyper-V\\"):
                continue
            for version in VERSIONS:
                if all(has(guard, version) for guard in command.guards):
                    wrong += _lacking(script, command, version)
                    used.setdefault((command.cmdlet, version), set()).update(command.named)
    for cmdlet in sorted({cmdlet for cmdlet, _ in used}):
        counts = [str(len(used[cmdlet, version])) if (cmdlet, version) in used else "-" for version in VERSIONS]
        table.append(f"{cmdlet:<30}" + "".join(f"{count:>8}" for count in counts))
    with capsys.disabled():
        print(f"\n{'parameters used of':<30}" + "".join(f"{version:>8}" for version in VERSIONS))
        print("\n".join(table))
    assert wrong == []
    assert len(table) > 25


def _lacking(script: Script, command: Command, version: str) -> list[str]:
    known = parameters(command.cmdlet, version)
    if known is None:
        return [f"{script.name}:{command.line} {command.cmdlet} is not on {version}"]
    return [
        f"{script.name}:{command.line} {command.cmdlet} -{name} is not on {version}"
        for name in command.named
        if name.lower() not in known | COMMON
    ]


def test_the_contract_would_notice(tmp_path: Path) -> None:
    (tmp_path / "x.ps1").write_text(
        "Hyper-V\\Set-VMFirmware -VM $vm -SecureBootTemplate 'a'\n"
        "if (Test-Parameter 'Hyper-V\\Set-VM' 'CheckpointType') { Hyper-V\\Set-VM -VM $vm -CheckpointType 'A' }\n"
    )
    script = read_scripts([tmp_path / "x.ps1"])["x.ps1"]
    unguarded, guarded = (one for one in script.commands if one.name.startswith("Hyper-V\\"))
    assert _lacking(script, unguarded, "2012") and _lacking(script, unguarded, "2012r2")
    assert not _lacking(script, unguarded, "2016")
    assert guarded.guards == (("Hyper-V\\Set-VM", "CheckpointType"),)
    assert not has(guarded.guards[0], "2012r2") and has(guarded.guards[0], "2016")
    # Documented for 2016, absent in the recording of a real one.
    assert not has(("Hyper-V\\Set-VM", "AutomaticCheckpointsEnabled"), "2016")


def test_cmdlets_are_called_with_named_parameters_only() -> None:
    for script in shipped().values():
        for command in script.commands:
            if command.name.startswith(("Hyper-V\\", "Storage\\")):
                assert command.first in (None, "command_parameter"), f"{script.name}:{command.line}"


def test_the_self_test_asks_for_everything_that_scripts_use_without_asking() -> None:
    text = files("imagekit.hyperv").joinpath("scripts", "selftest.ps1").read_text(encoding="ascii")
    asked = {
        cmdlet: set(re.findall(r"'([A-Za-z]+)'", names))
        for cmdlet, names in re.findall(r"'([A-Z][a-z]+-[A-Z][A-Za-z]+)' = @\(([^)]*)\)", text)
    }
    used: dict[str, set[str]] = {}
    for script in shipped().values():
        for command in script.commands:
            if command.name.startswith("Hyper-V\\") and not command.guards:
                used.setdefault(command.cmdlet, set()).update(set(command.named) - {"ErrorAction"})
    assert asked == used


def test_what_2008_r2_runs_is_powershell_2() -> None:
    wrong = []
    for script in (one for one in shipped().values() if is_old(one.name)):
        functions = _functions(script)
        for command in script.commands:
            if command.name in functions:
                continue
            known = facts()["powershell-2.0"].get(command.name)
            if known is None:
                wrong.append(f"{script.name}:{command.line} {command.name}")
                continue
            names = set(known.lower().split()) | COMMON
            wrong += [f"{script.name}:{command.line} -{name}" for name in command.named if name.lower() not in names]
            # `Where-Object Name -eq 'x'` came with 3.0.
            if command.name in ("Where-Object", "ForEach-Object"):
                wrong += [] if command.texts[0].startswith("{") else [f"{script.name}:{command.line} no block"]
    assert wrong == []


@pytest.mark.parametrize(
    "later",
    [
        *("[pscustomobject]", "[ordered]", "::new(", "$PSItem", " -in ", " -notin ", " -shl ", " -shr ", "$using:"),
        *("CimInstance", "ConvertTo-Json", "Get-FileHash", "#requires", "enum "),
    ],
)
def test_what_2008_r2_runs_has_no_later_syntax(later: str) -> None:
    for name in shipped():
        if is_old(name):
            text = files("imagekit.hyperv").joinpath("scripts", name).read_text(encoding="ascii")
            code = "\n".join(line for line in text.lower().split("\n") if not line.lstrip().startswith("#"))
            assert later.lower() not in code, name


def test_every_wmi_property_that_is_set_exists_with_its_type() -> None:
    wrong, count = [], 0
    for script in shipped().values():
        first = is_old(script.name)
        for name in ("wmi-v1", "wmi-v2") if script.name == "common.ps1" else ("wmi-v1",) if first else ("wmi-v2",):
            known = {**facts()[name]["documented"], **facts()[name].get("recorded", {})}
            for class_name, prop, kind in script.sets:
                count += 1
                cim = known.get(class_name, {}).get(prop)
                if cim is None or CIM_TYPES[cim] != kind:
                    wrong.append(f"{script.name}: {class_name}.{prop} is {cim}, set as {kind}")
    assert wrong == []
    assert count > 30


def test_every_wmi_method_and_sub_type_is_known() -> None:
    for script in shipped().values():
        space = facts()["wmi-v1" if is_old(script.name) else "wmi-v2"]
        methods = {name for names in space["methods"].values() for name in names}
        for command in script.commands:
            if command.name == "Invoke-Wmi" and command.values:
                assert command.values[0] in methods, f"{script.name}:{command.line}"
        subtypes = {name for names in facts()["wmi-v1"]["subtypes"].values() for name in names}
        for text in script.strings:
            if re.fullmatch(r"Microsoft (Synthetic|Emulated|Virtual|Serial)[A-Za-z/ ]*", text):
                assert text in subtypes, script.name


def test_data_never_becomes_script() -> None:
    """Nothing that runs text: the one place is the bootstrap, which runs the constant script."""
    for name in shipped():
        text = files("imagekit.hyperv").joinpath("scripts", name).read_text(encoding="ascii")
        for way in ("Invoke-Expression", "iex ", "[scriptblock]::Create", "ScriptBlock]::Create", "InvokeScript"):
            assert name == "bootstrap.ps1" or way.lower() not in text.lower(), name


def _functions(script: Script) -> set[str]:
    """Those of the parts that are put before a script, and its own."""
    parts = {"common.ps1", script.name}
    if script.name.endswith(".v1.ps1"):
        parts.add("common.v1.ps1")
    elif script.name == "common.ps1":
        parts = {"common.ps1"}
    elif script.name.removesuffix(".ps1") in EVERYWHERE:
        # Only what both families have.
        both = set(shipped()["common.v1.ps1"].functions) & set(shipped()["common.v3.ps1"].functions)
        return both | {name for part in parts for name in shipped()[part].functions}
    else:
        parts.add("common.v3.ps1")
    return {name for part in parts for name in shipped()[part].functions}
