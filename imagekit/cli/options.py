"""Options that several commands share, and the decorator that gives every command the common ones."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any
from uuid import UUID

import typer

from imagekit.cli.sizes import parse_seconds, parse_size
from imagekit.cli.ui import Ui
from imagekit.errors import UnsupportedFeature, UsageError
from imagekit.limits import Limits
from imagekit.references import parse_parent_map

Image = Annotated[
    str,
    typer.Argument(
        metavar="IMAGE",
        help="An image: qcow2, raw, VHD, VHDX, VMDK, VDI; a file, http(s)://… or glance:ID",
        show_default=False,
    ),
]
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


FollowReferences = Annotated[
    bool,
    typer.Option("--follow-references", help="Read the files that the image names, where its origin is trusted."),
]
ParentMap = Annotated[
    list[str] | None,
    typer.Option(
        "--parent-map",
        metavar="FROM=TO",
        help=r"Where a folder of Windows is here: 'C:\VMs=/mnt/vms'.",
        show_default=False,
    ),
]
IgnoreParentId = Annotated[
    bool, typer.Option("--ignore-parent-id", help="Take a parent that is not, or no longer, the one the child knows.")
]
SizeFrom = Annotated[
    str | None, typer.Option("--size-from", metavar="current|chs", help="Which of a VHD's two sizes counts.")
]


def remote(
    redirect_host: Annotated[
        list[str] | None,
        typer.Option(
            "--redirect-host",
            metavar="HOST",
            help="A host, or *.DOMAIN, that a server's redirect may lead to; can be repeated.",
            show_default=False,
        ),
    ] = None,
    http_timeout: Annotated[
        float,
        typer.Option("--http-timeout", metavar="S", help="Seconds of silence after which a server is asked again."),
    ] = 30.0,
    checksum: Annotated[
        str | None,
        typer.Option(
            "--checksum",
            metavar="ALGO:HEX|FILE|URL",
            help="What the whole file must hash to, or a list such as SHA256SUMS that says it; else exit 15.",
        ),
    ] = None,
    keyring: Annotated[
        str | None,
        typer.Option(
            "--keyring", metavar="FILE", help="OpenPGP keys, one of which must have signed --checksum's list (gpgv)."
        ),
    ] = None,
    partial_dir: Annotated[
        str | None,
        typer.Option(
            "--partial-dir",
            metavar="DIR",
            envvar="IMAGEKIT_PARTIAL_DIR",
            help="Keep what came of an interrupted download there, for the next run; needs a checksum.",
        ),
    ] = None,
    glance_url: Annotated[
        str | None,
        typer.Option(
            "--glance-url",
            metavar="URL",
            envvar="IMAGEKIT_GLANCE_URL",
            help="For glance:ID: a Glance without Keystone.",
        ),
    ] = None,
    os_cloud: Annotated[
        str | None,
        typer.Option("--os-cloud", metavar="NAME", envvar="OS_CLOUD", help="For glance:ID: a cloud of clouds.yaml."),
    ] = None,
) -> dict[str, Any]:
    """How a command line wants remote sources reached, as keywords of the library."""
    return {
        "redirect_hosts": tuple(redirect_host or ()),
        "http_timeout": http_timeout,
        "checksum": checksum,
        "keyring": keyring,
        "partial_dir": partial_dir,
        "glance_url": glance_url,
        "os_cloud": os_cloud,
    }


def chain(
    follow_references: FollowReferences = False,
    parent_map: ParentMap = None,
    ignore_parent_id: IgnoreParentId = False,
) -> dict[str, Any]:
    """What a command line says about the files that images refer to, as keywords of the library."""
    return {
        "follow_references": follow_references,
        "parent_map": parse_parent_map(parent_map or []),
        "ignore_parent_id": ignore_parent_id,
    }


def reading(
    follow_references: FollowReferences = False,
    parent_map: ParentMap = None,
    ignore_parent_id: IgnoreParentId = False,
    snapshot: Annotated[
        str | None, typer.Option("--snapshot", metavar="NAME", help="Read this internal snapshot of a qcow2.")
    ] = None,
    size_from: SizeFrom = None,
) -> dict[str, Any]:
    """How a command line wants its source read, as keywords of the library."""
    return {
        **chain(follow_references, parent_map, ignore_parent_id),
        "snapshot": snapshot,
        "size_from": size_from,
    }


Deep = Annotated[bool, typer.Option("--deep", help="Look at all tables: overlaps, pointers out of the file.")]
Confined = Annotated[
    bool | None,
    typer.Option(
        "--confined/--no-confined",
        envvar="IMAGEKIT_CONFINED",
        help="Read the image in a process that can do nothing else (Linux); default for what comes over a network.",
        show_default=False,
    ),
]


def _limit_option(name: str, parser: Callable[[str], int], metavar: str, help: str) -> Any:
    variable = f"IMAGEKIT_LIMIT_{name.upper().replace('-', '_')}"
    return typer.Option(
        f"--limit-{name}", metavar=metavar, parser=parser, envvar=variable, help=help, show_default=False
    )


def limits(
    limit_virtual_size: Annotated[
        int | None, _limit_option("virtual-size", parse_size, "SIZE", "Largest disk to read; default: 64 TiB.")
    ] = None,
    limit_output_bytes: Annotated[
        int | None,
        _limit_option("output-bytes", parse_size, "SIZE", "Most to write, without holes; default: 16 TiB."),
    ] = None,
    limit_metadata_memory: Annotated[
        int | None,
        _limit_option("metadata-memory", parse_size, "SIZE", "Memory for an image's tables; default: 512M."),
    ] = None,
    limit_seconds: Annotated[
        int | None, _limit_option("seconds", parse_seconds, "N", "Longest time to take; default: a day.")
    ] = None,
) -> Limits:
    """What an image may use at most."""
    given = {
        "virtual_size": limit_virtual_size,
        "output_bytes": limit_output_bytes,
        "metadata_memory": limit_metadata_memory,
        "seconds": limit_seconds,
    }
    return Limits(**{name: value for name, value in given.items() if value is not None})


TargetFormat = Annotated[
    str | None, typer.Option("--target-format", "-O", metavar="FMT", help="Format to write; default: by the name.")
]


def target(
    target_format: TargetFormat = None,
    subformat: Annotated[
        str | None,
        typer.Option(
            "--subformat", metavar="dynamic|fixed|differencing", help="Kind of VHD or VHDX; default: dynamic."
        ),
    ] = None,
    block_size: Annotated[
        int | None, size_option("--block-size", help="Bytes a block, or a cluster; default: as the format's owner.")
    ] = None,
    sector_size: Annotated[
        int | None, size_option("--sector-size", help="Logical sectors of a VHDX: 512 (default) or 4096.")
    ] = None,
    identifier: Annotated[
        str | None, typer.Option("--id", metavar="UUID", help="The disk's id; random unless given.")
    ] = None,
    parent: Annotated[
        str | None,
        typer.Option("--parent", metavar="FILE", help="Write a differencing disk on this one.", show_default=False),
    ] = None,
    compress: Annotated[bool, typer.Option("-c", help="Compress a qcow2.")] = False,
    options: Annotated[
        str | None,
        typer.Option(
            "-o",
            metavar="KEY=VALUE,…",
            help="qemu-img's: subformat=, block_size=, cluster_size=, compression_type=, force_size.",
        ),
    ] = None,
) -> dict[str, Any]:
    """What a command line says about the file to write, as keywords of the library."""
    asked: dict[str, Any] = {
        "target_format": target_format,
        "subformat": subformat,
        "block_size": block_size,
        "sector_size": sector_size,
        "identifier": _uuid(identifier),
        "parent": parent,
    }
    given = _qemu_options(options)
    kind = given.pop("compression", "zlib")
    return asked | given | ({"compression": kind} if compress else {})


def _uuid(text: str | None) -> UUID | None:
    if text is None:
        return None
    try:
        return UUID(text)
    except ValueError:
        raise UsageError(f"{text!r} is not a UUID", hint="leave it out for a random one") from None


def _qemu_options(text: str | None) -> dict[str, Any]:
    """What qemu-img's -o says, in our words."""
    found: dict[str, Any] = {}
    for item in filter(None, (text or "").split(",")):
        key, _, value = item.partition("=")
        if key == "subformat":
            found["subformat"] = value
        elif key in ("block_size", "cluster_size"):
            found["block_size"] = parse_size(value)
        elif key == "compression_type" and value in ("zlib", "zstd"):
            found["compression"] = value
        elif key == "force_size" and value in ("", "on", "true"):
            continue  # sizes are always exact here
        else:
            raise UnsupportedFeature(
                f"-o {item} is not supported",
                hint="known: subformat=, block_size=, cluster_size=, compression_type=, force_size=on",
            )
    return found


_OUTPUT = Annotated[
    str,
    typer.Option(
        "--output", metavar="human|json", envvar="IMAGEKIT_OUTPUT", help="Form of the result (map: also svg)."
    ),
]
_PROGRESS = Annotated[
    str,
    typer.Option(
        "--progress", metavar="auto|bar|plain|json|none", envvar="IMAGEKIT_PROGRESS", help="Form of the progress."
    ),
]
_QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no messages, no word of what was done.")]
_VERBOSE = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")]
_DEBUG = Annotated[bool, typer.Option("--debug", help="On an error, print where in the program it came up.")]
_OUTPUTS = ("human", "json", "svg")
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


def command(
    *, drawn: bool = False, **groups: Callable[..., object]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function that takes a :class:`Ui` first a command, with the options every command has.

    A group is a function whose parameters become options; what it returns is passed to the command under the
    group's name. So options that belong together are declared once. ``drawn``: its result can be a picture.
    """

    return lambda function: _Command(function, {**groups, "ui": _common}, drawn)


class _Command:
    """A function as typer wants it; its signature is put together when it is asked for, since one command runs."""

    def __init__(self, function: Callable[..., None], makers: dict[str, Callable[..., object]], drawn: bool) -> None:
        functools.update_wrapper(self, function, ("__module__", "__name__", "__qualname__", "__doc__"))
        del self.__wrapped__  # type: ignore[attr-defined]  # its signature would win over ours
        self._function = function
        self._makers = makers
        self._drawn = drawn

    @functools.cached_property
    def _parts(self) -> dict[str, Mapping[str, inspect.Parameter]]:
        """The parameters of each group."""
        return {name: inspect.signature(one, eval_str=True).parameters for name, one in self._makers.items()}

    @functools.cached_property
    def __signature__(self) -> inspect.Signature:
        own = inspect.signature(self._function, eval_str=True)
        shown = [parameter for name, parameter in own.parameters.items() if name not in self._makers]
        shown += [parameter for part in self._parts.values() for parameter in part.values()]
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in shown]
        return own.replace(parameters=parameters)

    @property
    def __annotations__(self) -> dict[str, Any]:  # type: ignore[override]
        return {one.name: one.annotation for one in self.__signature__.parameters.values()}

    def __call__(self, **values: Any) -> None:
        made = {
            name: maker(**{key: values.pop(key) for key in self._parts[name]}) for name, maker in self._makers.items()
        }
        ui = made["ui"]
        assert isinstance(ui, Ui)
        if ui.output == "svg" and not self._drawn:
            raise typer.BadParameter("only map draws a picture", param_hint="--output")
        try:
            self._function(**made, **values)
        finally:
            ui.done()
