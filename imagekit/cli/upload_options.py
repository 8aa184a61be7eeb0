"""What ``upload`` and ``convert --upload`` share: options about an image in Glance, and the image for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagekit.cli.sizes import show_size
from imagekit.cli.ui import Ui, table
from imagekit.errors import UsageError

if TYPE_CHECKING:
    from imagekit.glance.upload import Upload


def upload_fields(
    disk_format: Annotated[
        str | None,
        typer.Option("--disk-format", metavar="FMT", help="What Glance is to call its format; default: what it is."),
    ] = None,
    property: Annotated[
        list[str] | None,
        typer.Option(
            "--property",
            metavar="KEY=VALUE",
            help="A property of the image in Glance, instead of what was found; KEY= leaves it out.",
            show_default=False,
        ),
    ] = None,
    visibility: Annotated[
        str | None,
        typer.Option(
            "--visibility", metavar="private|shared|community|public", help="Who sees it; default: Glance's."
        ),
    ] = None,
    protected: Annotated[bool, typer.Option("--protected", help="Nobody can delete it in Glance.")] = False,
    same_name: Annotated[
        bool, typer.Option("--same-name", help="Also where an image in Glance has that name already.")
    ] = False,
) -> dict[str, Any]:
    """What a command line says about the image in Glance, as keywords of the library; what is given only."""
    given = [one.partition("=") for one in property or ()]
    if wrong := [key for key, sign, _ in given if not (key and sign)]:
        raise UsageError(f"--property {wrong[0]!r}", hint="write it KEY=VALUE, or KEY= to leave it out")
    fields = {
        "disk_format": disk_format,
        "properties": {key: value for key, _, value in given},
        "visibility": visibility,
        "protected": protected,
        "same_name": same_name,
    }
    return {name: value for name, value in fields.items() if value}


def show_upload(ui: Ui, found: Upload) -> None:
    """What to say besides the result."""
    for warning in found.warnings:
        ui.warn(warning)


def describe_upload(found: Upload) -> str:
    """The image in Glance, for people."""
    rows = {
        "image": f"{found.name}, id {found.id}, active",
        "disk format": found.disk_format,
        "size": show_size(found.size),
        "virtual size": show_size(found.virtual_size),
        found.checksum.algorithm: found.checksum.value,
        "properties": ", ".join(f"{key}={value}" for key, value in found.values.items()),
    }
    return table(rows)
