"""Options that several commands share, and the decorator that gives every command the common ones."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from imagekit.cli.sizes import parse_size
from imagekit.cli.ui import Ui

Image = Annotated[str, typer.Argument(metavar="IMAGE", help="An image file: qcow2, raw, vhd.", show_default=False)]
Format = Annotated[
    str | None,
    typer.Option(
        "--format", "-f", metavar="FMT", help="The format the image must have; without it, it is found out."
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", "-m", metavar="N", envvar="IMAGEKIT_JOBS", help="Threads; default: all usable cores."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing target, when the new one is done.")]
NoSync = Annotated[
    bool,
    typer.Option("--no-sync", envvar="IMAGEKIT_NO_SYNC", help="Do not wait until the target is on the medium."),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow", metavar="RULE", help="Accept what this rule of the safety policy refuses.", show_default=False
    ),
]
ForceShare = Annotated[bool, typer.Option("--force-share", "-U", help="The same as --allow in-use.")]


def size_option(*names: str, help: str) -> Any:
    """An option whose text is a size; the value is bytes."""
    return typer.Option(*names, metavar="SIZE", parser=parse_size, help=help, show_default=False)


def allowed(allow: list[str] | None, *, force_share: bool) -> frozenset[str]:
    """The rules a command line allows."""
    return frozenset([*(allow or []), *(["in-use"] if force_share else [])])


_OUTPUT = Annotated[
    str, typer.Option("--output", metavar="human|json", envvar="IMAGEKIT_OUTPUT", help="Form of the result.")
]
_PROGRESS = Annotated[
    str,
    typer.Option(
        "--progress", metavar="auto|bar|plain|json|none", envvar="IMAGEKIT_PROGRESS", help="Form of the progress."
    ),
]
_QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no messages.")]
_VERBOSE = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")]
_DEBUG = Annotated[bool, typer.Option("--debug", help="On an error, print where in the program it came up.")]
_CHOICES = {"output": ("human", "json"), "progress": ("auto", "bar", "plain", "json", "none")}


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes a :class:`Ui` first the options every command has."""
    own = inspect.signature(function, eval_str=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    common = [
        inspect.Parameter("output", keyword, default="human", annotation=_OUTPUT),
        inspect.Parameter("progress", keyword, default="auto", annotation=_PROGRESS),
        inspect.Parameter("quiet", keyword, default=False, annotation=_QUIET),
        inspect.Parameter("verbose", keyword, default=False, annotation=_VERBOSE),
        inspect.Parameter("debug", keyword, default=False, annotation=_DEBUG),
    ]

    @functools.wraps(function)
    def wrapped(**values: Any) -> None:
        for name, choices in _CHOICES.items():
            if values[name] not in choices:
                raise typer.BadParameter(f"{values[name]!r} is none of {', '.join(choices)}", param_hint=f"--{name}")
        values.pop("debug")  # app.run looks at it, also when parsing fails
        ui = Ui(*(values.pop(name) for name in ("output", "progress", "quiet", "verbose")))
        try:
            function(ui, **values)
        finally:
            ui.done()

    parameters = [parameter.replace(kind=keyword) for name, parameter in own.parameters.items() if name != "ui"]
    wrapped.__signature__ = own.replace(parameters=[*parameters, *common])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {one.name: one.annotation for one in [*parameters, *common]}
    del wrapped.__wrapped__  # its signature would win over ours
    return wrapped


def read_bytes(path: Path, *, limit: int = 4 << 20) -> bytes:
    """The content of a small file that a user names; SourceError when it cannot be read."""
    from imagekit.cloudinit.specfile import read_regular_file

    return read_regular_file(path, limit=limit)
