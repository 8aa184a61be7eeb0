"""``configdrive --check``: what is on a medium of guest metadata, for people and for scripts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer
import yaml

from imagekit import api
from imagekit.cli.sizes import show_size
from imagekit.cli.ui import Ui, lines, table
from imagekit.errors import InvalidImage

if TYPE_CHECKING:
    from imagekit.cloudinit.agents import Seen
    from imagekit.cloudinit.manifest import Entry
    from imagekit.cloudinit.model import GuestProfile
    from imagekit.contents.drive_check import DriveCheck, VolumeCheck


def show_check(ui: Ui, medium: Path, *, guest: str | None, machine: Path | None, strict: bool) -> None:
    """Check a medium and print the result; exit 11 when guests cannot use it."""
    profile = cast("GuestProfile | None", guest)
    checked = api.check_config_drive(medium, guest=profile, machine_of=machine, strict=strict)
    ui.result(checked.to_json(), lambda: lines(_lines(checked)))
    if not checked.sound:
        raise typer.Exit(InvalidImage.exit_code)


def _lines(checked: DriveCheck) -> Iterator[str]:
    drive = checked.drive
    kind = "raw" if drive.format == "raw" else f"{drive.format.upper()} disk"
    yield f"{drive.path}: {kind}, {show_size(drive.size)}"
    for finding in drive.findings:
        yield f"{finding.severity.value}: {finding.message} [{finding.rule}]"
    for one in checked.volumes:
        yield ""
        yield from _volume(one)
    yield ""
    yield from (f"warning: {warning}" for warning in checked.warnings)
    yield from (f"error: {problem}" for problem in checked.problems)
    yield f"{drive.path}: {'guests can use it' if checked.sound else 'guests cannot use it as it is'}"


def _volume(checked: VolumeCheck) -> Iterator[str]:
    volume = checked.volume
    name = {"iso9660": "ISO 9660", "vfat": "VFAT"}[volume.file_system]
    kind = "" if checked.tree is None else f", the files of {checked.tree.datasource}"
    yield f"{name} ({', '.join(volume.details)}) on {volume.place}, label {volume.label!r}{kind}"
    for entry in checked.files:
        yield from _file(entry)
    yield ""
    width = max(len(seen.agent) for seen in checked.seen)
    for seen in checked.seen:
        yield f"  {seen.agent:<{width}}  {'reads it' if seen.found else 'does not read it'}: {seen.reason}"
        if seen.found:
            yield from _facts(seen, width)


def _file(entry: Entry) -> Iterator[str]:
    what = f"the same as {entry.same_as}" if entry.same_as else entry.what
    yield f"  {entry.size:>8}  {entry.path}  {what}"
    if entry.content is not None:
        shown = yaml.safe_dump(entry.content, sort_keys=False, allow_unicode=True, width=1000).removesuffix("\n...\n")
        yield from (f"            {line}" for line in shown.splitlines())


def _facts(seen: Seen, width: int) -> Iterator[str]:
    rows = {name: ", ".join(value) if isinstance(value, list) else value for name, value in seen.facts.items()}
    yield from (f"{'':<{width}}    {line}" for line in table(rows).splitlines())
