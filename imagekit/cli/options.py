"""Options that several commands share, and the decorator that gives every command the common ones."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
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


def size_option(*names: str, help: str) -> Any:
    """An option whose text is a size; the value is bytes."""
    return typer.Option(*names, metavar="SIZE", parser=parse_size, help=help, show_default=False)


def allowed(
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow",
            metavar="RULE",
            help="Accept what this rule of the safety policy refuses.",
            show_default=False,
        ),
    ] = None,
    force_share: Annotated[bool, typer.Option("--force-share", "-U", help="The same as --allow in-use.")] = False,
) -> frozenset[str]:
    """The rules of the safety policy that a command line allows."""
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
_OUTPUTS = ("human", "json")
_PROGRESSES = ("auto", "bar", "plain", "json", "none")


def _common(
    output: _OUTPUT = "human",
    progress: _PROGRESS = "auto",
    quiet: _QUIET = False,
    verbose: _VERBOSE = False,
    debug: _DEBUG = False,
) -> Ui:
    """The options of every command; app.run looks at --debug itself, also when parsing fails."""
    for name, value, choices in (("output", output, _OUTPUTS), ("progress", progress, _PROGRESSES)):
        if value not in choices:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(choices)}", param_hint=f"--{name}")
    return Ui(output, progress, quiet, verbose)


def command(**groups: Callable[..., object]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function that takes a :class:`Ui` first a command, with the options every command has.

    A group is a function whose parameters become options; what it returns is passed to the command under the
    group's name. So options that belong together are declared once.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function, eval_str=True)
        makers = {**groups, "ui": _common}
        parts = {name: inspect.signature(maker, eval_str=True).parameters for name, maker in makers.items()}
        shown = [parameter for name, parameter in own.parameters.items() if name not in makers]
        shown += [parameter for part in parts.values() for parameter in part.values()]
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in shown]

        @functools.wraps(function)
        def wrapped(**values: Any) -> None:
            made = {name: maker(**{key: values.pop(key) for key in parts[name]}) for name, maker in makers.items()}
            ui = made["ui"]
            assert isinstance(ui, Ui)
            try:
                function(**made, **values)
            finally:
                ui.done()

        wrapped.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {one.name: one.annotation for one in parameters}
        del wrapped.__wrapped__  # its signature would win over ours
        return wrapped

    return decorate
