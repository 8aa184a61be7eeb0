"""The application: all commands together, and what becomes of errors and signals."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from importlib import import_module
from types import FrameType
from typing import Any

import typer

import imagekit
from imagekit.cli.ui import show_error
from imagekit.errors import EXIT_CODES, ImagekitError, UsageError

INTERRUPTED, TERMINATED, INTERNAL = 130, 143, 70
COMPLETE_VARIABLE = "_IMAGEKIT_COMPLETE"
"""Set by the shell's script when it asks for completions."""

# What typer's parser raises: click's ClickException, which typer brings along in some versions.
ParserError: Any = typer.BadParameter.__mro__[2]

_EXIT_CODES = "\n".join(f"{code:>4}  {meaning}" for code, meaning in EXIT_CODES)
EPILOG = "Exit codes:\n\n\b\n" + _EXIT_CODES

COMMANDS: dict[str, tuple[str, ...]] = {
    "images": ("info", "map", "check", "compare", "measure", "convert"),
    "disks": ("create", "resize", "merge", "rebase"),
    "guests": ("configdrive", "prepare", "boot", "demo"),
    "batch": ("batch",),
    "uploads": ("upload",),
}
"""Module of imagekit.cli → its commands, in the order of the help."""

GROUPS = {"hyperv": "app", "cache": "group"}
"""Module whose commands follow the module's name → what they are in, there."""


def _root(version: bool = typer.Option(False, "--version", "-V", help="Print the version.")) -> None:
    if version:
        print(f"imagekit {imagekit.__version__}")
        raise typer.Exit


def completion(shell: str = typer.Argument(metavar="SHELL", help="bash, zsh, fish or powershell.")) -> None:
    """Print a shell's completion script.

    bash: eval "$(imagekit completion bash)"
    """
    from typer.completion import get_completion_script

    known = ("bash", "zsh", "fish", "powershell")
    if shell not in known:
        raise UsageError(f"no completion for {shell!r}", hint=f"shells: {', '.join(known)}")
    print(get_completion_script(prog_name="imagekit", complete_var=COMPLETE_VARIABLE, shell=shell))


def application(wanted: str = "") -> typer.Typer:
    """All commands; or just the one wanted, where there is one of that name: what is not made costs no time."""
    made = typer.Typer(
        name="imagekit",
        help="Any cloud image to a running Hyper-V guest: convert, add guest metadata, rehearse the boot.",
        epilog=EPILOG,
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback()(_root)
    every = not (wanted in GROUPS or any(wanted in names for names in COMMANDS.values()))
    for module, names in COMMANDS.items():
        if every or wanted in names:
            part: typer.Typer = import_module(f"imagekit.cli.{module}").app
            chosen = [one for one in part.registered_commands if every or command_name(one) == wanted]
            made.registered_commands.extend(chosen)
    for group, attribute in GROUPS.items():
        if every or wanted == group:
            made.add_typer(getattr(import_module(f"imagekit.cli.{group}"), attribute), name=group)
    made.command()(completion)
    return made


def command_name(command: Any) -> str:
    """What a user types for a command that typer has registered."""
    return str(command.name or command.callback.__name__.replace("_", "-"))


class _Terminated(BaseException):
    """SIGTERM, as an exception: so that everything is cleaned up on the way out."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def run(arguments: list[str]) -> int:
    """Run one command line; returns its exit code."""
    if COMPLETE_VARIABLE in os.environ:
        from typer.completion import completion_init

        completion_init()
    signal.signal(signal.SIGTERM, _terminate)
    as_json = _wants_json(arguments)
    try:
        wanted = arguments[0] if arguments and COMPLETE_VARIABLE not in os.environ else ""
        code = application(wanted)(args=arguments, prog_name="imagekit", standalone_mode=False)
        if sys.stdout is not None:  # closed before we began
            sys.stdout.flush()
        if code == INTERRUPTED:  # typer has caught Ctrl-C itself
            raise KeyboardInterrupt
        return int(code or 0)
    except ImagekitError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        show_error(error, as_json=as_json)
        return error.exit_code
    except ParserError as error:
        show_error(_explain(error, arguments), as_json=as_json)
        return _explain(error, arguments).exit_code
    except (KeyboardInterrupt, typer.Abort):
        print(f"imagekit: interrupted, {_what_is_left(arguments)}", file=sys.stderr)
        return INTERRUPTED
    except _Terminated:
        print(f"imagekit: terminated, {_what_is_left(arguments)}", file=sys.stderr)
        return TERMINATED
    except BrokenPipeError:
        sys.stdout = None  # nobody reads: do not complain again at exit
        if sys.platform == "win32":
            return INTERNAL
        return 128 + signal.SIGPIPE
    except Exception as error:
        traceback.print_exc()
        internal = ImagekitError(
            f"internal error: {error!r}", hint="this is a bug: please report it with the lines above"
        )
        show_error(internal, as_json=as_json)
        return INTERNAL


def _what_is_left(arguments: list[str]) -> str:
    if "--into-parent" in arguments:
        return "the child still holds all it held: merge it again, with --ignore-parent-id"
    if "--repair" in arguments or {"resize", "rebase"} & set(arguments[:1]):
        return "the disk is as it was or as it was to be: run it again"
    if arguments[:1] == ["hyperv"] or any(word.startswith("hyperv") for word in arguments[1:]):
        return "what it made on the host is undone, or named by the journal"
    return "nothing is left behind"


def _wants_json(arguments: list[str]) -> bool:
    joined = " ".join(arguments)
    return any(f"--{name}{sign}json" in joined for name in ("output", "progress") for sign in " =")


def _explain(error: Any, arguments: list[str]) -> UsageError:
    """A parser's error in our words."""
    command = next((word for word in arguments if not word.startswith("-")), "")
    commands: Any = typer.main.get_command(application())
    hint = f"imagekit {command} --help" if command in commands.commands else "imagekit --help"
    return UsageError(error.format_message(), hint=f"see {hint}")
