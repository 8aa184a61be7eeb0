"""Commands about disks as such: create, resize, merge, rebase."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagekit import api
from imagekit.cli.images import show_report
from imagekit.cli.options import (
    Format,
    Image,
    Jobs,
    NoSync,
    Overwrite,
    allowed,
    chain,
    command,
    target,
)
from imagekit.cli.sizes import parse_size, show_size
from imagekit.cli.ui import Ui, lines
from imagekit.report import Report

if TYPE_CHECKING:
    from imagekit.disks import DiskReport

app = typer.Typer()


@app.command()
@command(allow=allowed, chain=chain, made=target)
def create(
    ui: Ui,
    path: Annotated[str, typer.Argument(metavar="TARGET", help="The file to write.", show_default=False)],
    allow: frozenset[str],
    chain: dict[str, Any],
    made: dict[str, Any],
    size: Annotated[
        str | None,
        typer.Argument(metavar="[SIZE]", help="Bytes, or 20G; a child has its parent's.", show_default=False),
    ] = None,
    preallocate: Annotated[bool, typer.Option("--preallocate", help="Leave no holes in the file.")] = False,
    overwrite: Overwrite = False,
    no_sync: NoSync = False,
) -> None:
    """Make a new disk of zeros, or with --parent a differencing one."""
    report = api.create(
        path,
        None if size is None else parse_size(size),
        preallocate=preallocate,
        overwrite=overwrite,
        sync=not no_sync,
        allow=allow,
        **chain,
        **made,
    )
    _show(ui, report)


@app.command()
@command(allow=allowed)
def resize(
    ui: Ui,
    image: Image,
    size: Annotated[str, typer.Argument(metavar="SIZE", help="Bytes, or 20G.", show_default=False)],
    allow: frozenset[str],
    format: Format = None,
    shrink: Annotated[
        bool, typer.Option("--shrink", help="Make it smaller, where nothing but zeros would be lost.")
    ] = False,
) -> None:
    """Give a disk another size, in place: raw, VHD, VHDX."""
    report = api.resize(
        image, parse_size(size), shrink=shrink, source_format=format, allow=allow, progress=ui.callback()
    )
    _show(ui, report)


@app.command()
@command(allow=allowed, chain=chain, made=target)
def merge(
    ui: Ui,
    child: Annotated[str, typer.Argument(metavar="CHILD", help="The last disk of the chain.", show_default=False)],
    allow: frozenset[str],
    chain: dict[str, Any],
    made: dict[str, Any],
    path: Annotated[
        str | None, typer.Argument(metavar="[TARGET]", help="The file to write.", show_default=False)
    ] = None,
    into_parent: Annotated[
        bool, typer.Option("--into-parent", help="Write into the child's parent instead of a new file.")
    ] = False,
    format: Format = None,
    verify: Annotated[
        str, typer.Option("--verify", metavar="structure|content", help="How to check it.")
    ] = "content",
    overwrite: Overwrite = False,
    no_sync: NoSync = False,
    jobs: Jobs = None,
) -> None:
    """Make one disk of a chain; needs --follow-references."""
    if (path is None) != into_parent:
        raise typer.BadParameter("name a file to write, or --into-parent, and not both", param_hint="TARGET")
    result = api.merge(
        child,
        path,
        source_format=format,
        verify=verify,
        overwrite=overwrite,
        sync=not no_sync,
        jobs=jobs,
        allow=allow,
        progress=ui.callback(),
        **chain,
        **made,
    )
    if isinstance(result, Report):
        show_report(ui, result)
    else:
        _show(ui, result)


@app.command()
@command(allow=allowed, chain=chain)
def rebase(
    ui: Ui,
    child: Annotated[str, typer.Argument(metavar="CHILD", help="A differencing disk.", show_default=False)],
    allow: frozenset[str],
    chain: dict[str, Any],
    parent: Annotated[str, typer.Option("--parent", metavar="FILE", help="Where its parent is now.")],
    format: Format = None,
) -> None:
    """Tell a differencing disk where its parent is now."""
    _show(ui, api.rebase(child, parent, source_format=format, allow=allow, **chain))


def _show(ui: Ui, report: DiskReport) -> None:
    for note in report.notes:
        ui.say(f"note: {note}")

    def human() -> str:
        was = "" if report.old_virtual_size is None else f" (was {show_size(report.old_virtual_size)})"
        parent = [] if report.parent is None else [f"parent {report.parent}"]
        identifier = "" if report.identifier is None else f", id {report.identifier}"
        kind = " ".join(filter(None, (report.format, report.subformat)))
        disk = (
            f"{report.filename} ({kind}): disk {show_size(report.virtual_size)}{was}, "
            f"file {show_size(report.file_size)}{identifier}"
        )
        return lines([disk, *parent])

    ui.report(report.to_json(), human)
