"""The commands of a case: ours and its rivals', with the flags that serve each best."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from tests.benchmarks import cases, installed
from tests.benchmarks.cases import Case
from tests.benchmarks.measure import Contender

OURS = "imagekit"
LIMITS = (sys.executable, "-m", "tests.benchmarks.limits")
QEMU_FORMATS = {"vhd": "vpc", "vhdx": "vhdx", "raw": "raw"}
FAST = ("-m", "16", "-W")
TOOLS = {
    cases.BEST: "qemu-img",
    cases.DEFAULT: "qemu-img",
    cases.CP: "cp",
    cases.NBDCOPY: "nbdcopy",
}


MOST_ROUNDS = {cases.DEFAULT: 3, cases.NBDCOPY: 2}
"""The slow ones, whose ratios leave no doubt."""


def contenders(case: Case, sources: dict[str, Path], folder: Path) -> list[Contender]:
    """Ours first, then the rivals whose programs are there."""
    found = [_ours(OURS, case, sources, folder, case.options)]
    for rival in case.rivals:
        tool = TOOLS.get(rival)
        if tool is None or shutil.which(tool):
            found.append(replace(_rival(rival, case, sources, folder), rounds=MOST_ROUNDS.get(rival)))
    return found


def _ours(name: str, case: Case, sources: dict[str, Path], folder: Path, options: tuple[str, ...]) -> Contender:
    if case.command == cases.CACHE_COPY:
        entry = sources[case.source]
        copy = (sys.executable, "-m", "tests.benchmarks.cache_copy", str(entry), *options, "copy")
        return Contender(name, copy, entry.with_name(f"{entry.stem}_copy{entry.suffix}"), self_timed=True)
    command = [installed.command(), case.command]
    if case.source:
        command.append(str(sources[case.source]))
    if not case.target:
        return Contender(name, (*command, *options))
    target = folder / f"ours.{case.target}"
    return Contender(name, (*command, "-q", *([] if case.sync else ["--no-sync"]), *options, str(target)), target)


def _rival(rival: str, case: Case, sources: dict[str, Path], folder: Path) -> Contender:
    target = folder / f"theirs.{case.target}"
    source = str(sources[case.source]) if case.source else ""
    if rival in (cases.BEST, cases.DEFAULT):
        command = _qemu_img(case, source, target, FAST if rival == cases.BEST else ())
        if case.sync:
            command = ("sh", "-c", '"$@" && sync "$0"', str(target), *command)
        return Contender(rival, command, target)
    if rival == cases.CP:
        return Contender(rival, ("cp", "--sparse=always", str(sources["disk.raw"]), str(target)), target)
    if rival == cases.NBDCOPY:
        served = ("[", "qemu-nbd", "-r", "-f", "qcow2", source, "]") if source.endswith(".qcow2") else (source,)
        return Contender(rival, ("nbdcopy", "--", *served, str(target)), target)
    if rival == cases.FLOOR:
        return Contender(rival, (*LIMITS, "both", source, str(target)), target, self_timed=True)
    if rival == cases.READ:
        return Contender(rival, (*LIMITS, "read", source), self_timed=True)
    if rival == cases.PYTHON:
        return Contender(rival, (str(Path(installed.command()).with_name("python")), "-c", "pass"))  # the same start
    assert rival == cases.STRUCTURE
    return _ours(rival, case, sources, folder, ())


def _qemu_img(case: Case, source: str, target: Path, flags: tuple[str, ...]) -> tuple[str, ...]:
    options = [] if case.target == "raw" else [f"subformat={'fixed' if case.fixed else 'dynamic'}"]
    if case.target == "vhd":
        options.append("force_size=on")  # the disk's own size, as ours; else it is rounded to a geometry
    stated = ("-o", ",".join(options)) if options else ()
    return ("qemu-img", "convert", *flags, "-O", QEMU_FORMATS[case.target], *stated, source, str(target))
