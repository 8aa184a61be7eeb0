"""The command upload."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from imagekit.cli.options import Format, Image, allowed, command, limits, remote
from imagekit.cli.ui import Ui
from imagekit.cli.upload_options import describe_upload, show_upload, upload_fields
from imagekit.limits import Limits
from imagekit.uploads import upload as upload_image

app = typer.Typer()


@app.command()
@command(allow=allowed, remote=remote, limits=limits, made=upload_fields)
def upload(
    ui: Ui,
    image: Image,
    target: Annotated[str, typer.Argument(metavar="glance:NAME", help="The image to be.", show_default=False)],
    allow: frozenset[str],
    remote: dict[str, Any],
    limits: Limits,
    made: dict[str, Any],
    format: Format = None,
) -> None:
    """Send a disk to Glance, with the properties that Hyper-V needs.

    It is judged like any image, and active in Glance with the hash of what was sent, or not there. min_disk,
    hw_machine_type, os_secure_boot and os_type come from a look at the disk.
    """
    found = upload_image(
        image, target, format=format, limits=limits, allow=allow, progress=ui.callback(), **remote, **made
    )
    show_upload(ui, found)
    ui.result(found.to_json(), lambda: describe_upload(found))
