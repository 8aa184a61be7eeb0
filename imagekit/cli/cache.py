"""Commands about the compute driver's image cache: list, add, prune."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from imagekit.cli.options import Format, allowed, command
from imagekit.cli.sizes import parse_size, show_size
from imagekit.cli.ui import Ui, line, lines
from imagekit.errors import UsageError

if TYPE_CHECKING:
    from imagekit.cache import ImageCache

app = typer.Typer()
group = typer.Typer(help="The compute driver's image cache: one conversion an image.", rich_markup_mode=None)
app.add_typer(group, name="cache")

DAY = 86400
_AGE = re.compile(r"(\d+)([dhms]?)")
_SECONDS = {"": DAY, "d": DAY, "h": 3600, "m": 60, "s": 1}

Instances = Annotated[
    list[Path] | None,
    typer.Option("--instances", metavar="DIR", help="Where disks may lie that are built on the entries."),
]
Nova = Annotated[bool, typer.Option("--nova", help="The folder is compute-hyperv's _base: its names, its locks.")]


def folder(
    directory: Annotated[
        Path, typer.Option("--cache", metavar="DIR", envvar="IMAGEKIT_CACHE", help="The cache's folder.")
    ],
    instances: Instances = None,
    nova: Nova = False,
) -> dict[str, Any]:
    """Which cache a command line is about."""
    return {"folder": directory, "instances": tuple(instances or ()), "shared_with_nova": nova}


def _cache(where: dict[str, Any], allow: frozenset[str] = frozenset()) -> ImageCache:
    from imagekit import policy
    from imagekit.cache import ImageCache

    if not where["folder"].is_dir():
        raise UsageError(
            "the cache's folder does not exist", path=where["folder"], hint="make it first: mkdir -p DIR"
        )
    return ImageCache(**where, allow=policy.check_allowed(allow))


@group.command("list")
@command(where=folder)
def list_entries(ui: Ui, where: dict[str, Any]) -> None:
    """Show what is in the cache: sizes, hits, when it was last used, and by how many disks."""
    entries = _cache(where).entries()

    def human() -> str:
        total = show_size(sum(entry.file_size for entry in entries))
        rows = [
            f"{entry.path.name}: disk {show_size(entry.virtual_size)}, file {show_size(entry.file_size)}, "
            f"{entry.hits} hits, used {_ago(entry.used)}, {len(entry.users)} users"
            for entry in entries
        ]
        return lines([*rows, f"{len(entries)} entries, {total}"])

    ui.result({"schema": 1, "entries": [entry.to_json() for entry in entries]}, human)


@group.command()
@command(where=folder, allow=allowed)
def add(
    ui: Ui,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="The image's file.", show_default=False)],
    where: dict[str, Any],
    allow: frozenset[str],
    name: Annotated[
        str | None, typer.Option("--image-id", metavar="ID", help="Its id in Glance; default: the file's name.")
    ] = None,
    digest: Annotated[
        str | None, typer.Option("--digest", metavar="ALGO:HEX", help="What the file's checksum must be.")
    ] = None,
    target_format: Annotated[str, typer.Option("--target-format", "-O", metavar="vhd|vhdx")] = "vhdx",
    format: Format = None,
) -> None:
    """Convert an image into the cache, unless it is there."""
    from imagekit.cache import Target

    entry = _cache(where, allow).get(
        name or Path(image).stem,
        image,
        digest=digest,
        target=Target(_family(target_format)),
        source_format=format,
        progress=ui.callback(),
    )
    done = "added" if entry.made else "is there already"
    ui.result(
        {**entry.to_json(), "added": entry.made},
        line(f"{entry.path.name} {done}: disk {show_size(entry.virtual_size)}, file {show_size(entry.file_size)}"),
    )


@group.command()
@command(where=folder)
def prune(
    ui: Ui,
    where: dict[str, Any],
    unused: Annotated[
        str | None, typer.Option("--unused", metavar="AGE", help="Remove what nobody used for so long: 30d, 12h.")
    ] = None,
    size: Annotated[
        str | None, typer.Option("--max-size", metavar="SIZE", help="Remove the least used beyond this size in all.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, remove nothing.")] = False,
) -> None:
    """Remove entries that nobody used for long; never one that is in use or has children."""
    if unused is None and size is None:
        raise typer.BadParameter("say what may go: --unused 30d, --max-size 200G, or both", param_hint="--unused")
    done = _cache(where).prune(
        unused_for=None if unused is None else parse_age(unused),
        max_bytes=None if size is None else parse_size(size),
        dry_run=dry_run,
    )
    verb = "would be removed" if dry_run else "removed"
    rows = [
        *(f"{path.name}: {verb}" for path in done.removed),
        *(f"{path.name}: kept, {why}" for path, why in done.kept),
        f"{len(done.removed)} {verb}, {show_size(done.freed)}",
    ]
    document = {
        "schema": 1,
        "removed": [str(path) for path in done.removed],
        "kept": [{"filename": str(path), "reason": why} for path, why in done.kept],
        "freed": done.freed,
        "dry-run": dry_run,
    }
    ui.result(document, lines(rows))


def parse_age(text: str) -> float:
    """Seconds, from ``30d``, ``12h``, ``90m``, ``5s`` or a bare number of days."""
    match = _AGE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not an age", hint="for example 30d, 12h, 90m")
    return float(int(match[1]) * _SECONDS[match[2]])


def _family(text: str) -> Literal["vhd", "vhdx"]:
    if text in ("vhd", "vpc"):
        return "vhd"
    if text == "vhdx":
        return "vhdx"
    raise UsageError(f"the cache holds vhd or vhdx, not {text}", hint="-O vhdx")


def _ago(stamp: float) -> str:
    seconds = max(0, int(time.time() - stamp))
    for unit, name in ((DAY, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds // unit} {name} ago"
    return f"{seconds} s ago"
