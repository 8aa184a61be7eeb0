"""Commands about images: info, map, check, compare, measure, convert."""

from __future__ import annotations

import json
from typing import Annotated, Any
from uuid import UUID

import typer

from imagekit import api
from imagekit.cli.options import (
    Format,
    Image,
    Jobs,
    NoSync,
    Overwrite,
    allowed,
    command,
    size_option,
)
from imagekit.cli.sizes import parse_size, short_size, show_size
from imagekit.cli.ui import Ui, refuse_from_environment, table
from imagekit.errors import CorruptImage, UnsupportedFeature, UsageError
from imagekit.report import Report
from imagekit.workers import keep_freed_memory

app = typer.Typer()


@app.command()
@command()
def info(ui: Ui, image: Image, format: Format = None) -> None:
    """Show format, sizes, features and safety findings.

    Reads headers only, and works on images that convert refuses.
    """
    found = api.info(image, format=format)
    document = found.to_json()

    def human() -> str:
        features = found.info.features
        rows: dict[str, object] = {
            "image": found.filename,
            "format": " ".join(filter(None, (found.info.format, found.info.subformat))),
            "virtual size": show_size(found.info.virtual_size),
            "file size": show_size(found.file_size),
            "on the medium": show_size(found.actual_size),
            "block size": show_size(found.info.block_size) if found.info.block_size else None,
            "refers to": ", ".join(reference.name for reference in found.info.references),
        }
        rows |= {name.replace("-", " "): str(value) for name, value in features.items() if value not in (False, 0)}
        lines = [table(rows)]
        lines += [f"{finding.severity.value}: {finding.message} [{finding.rule}]" for finding in found.findings]
        return "\n".join(lines)

    ui.result(document, human)


@app.command("map")
@command(allow=allowed)
def map_(ui: Ui, image: Image, allow: frozenset[str], format: Format = None) -> None:
    """List where the guest's data lies in the file.

    As JSON it is the array of qemu-img map.
    """
    with api.open_image(image, format=format, allow=allow) as disk:
        extents = disk.extents()
        if ui.json:
            # Line by line: a large disk has millions of extents.
            opening = "["
            for extent in extents:
                print(opening + json.dumps(extent.to_json()), end="")
                opening = ",\n"
            print("]" if opening != "[" else "[]")
            return
        print(f"{'start':>16}  {'length':>16}  {'kind':<10}  {'offset':>16}")
        for extent in extents:
            kind = "compressed" if extent.compressed else "data" if extent.data else "zero"
            where = f"{extent.offset:#16x}" if extent.offset is not None and extent.data else f"{'-':>16}"
            print(f"{extent.start:#16x}  {extent.length:#16x}  {kind:<10}  {where}")


@app.command()
@command()
def check(
    ui: Ui,
    image: Image,
    format: Format = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend what can be mended with certainty, in place.")
    ] = False,
) -> None:
    """Check the structure; exit 11 when it is damaged."""
    result = api.check(image, format=format, repair=repair)

    def human() -> str:
        lines = [f"{'leak' if one.leak else 'damage'}: {one.message} [{one.code}]" for one in result.problems]
        mended = "repaired; " if result.repaired else ""
        verdict = "sound" if result.sound else "damaged"
        return "\n".join([*lines, f"{result.filename}: {mended}{result.format} structure is {verdict}"])

    ui.result(result.to_json(), human)
    if not result.sound:
        raise typer.Exit(CorruptImage.exit_code)


@app.command()
@command()
def compare(
    ui: Ui,
    one: Annotated[str, typer.Argument(metavar="A", show_default=False)],
    other: Annotated[str, typer.Argument(metavar="B", show_default=False)],
    format: Annotated[str | None, typer.Option("--format", "-f", metavar="FMT", help="Format of A.")] = None,
    other_format: Annotated[
        str | None, typer.Option("--other-format", "-F", metavar="FMT", help="Format of B.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", "-s", help="Disks of different size are different.")] = False,
    jobs: Jobs = None,
) -> None:
    """Compare the content of two images; exit 1 if different.

    Formats do not matter; a longer disk whose tail is zero is the same, unless --strict.
    """
    result = api.compare(one, other, formats=(format, other_format), strict=strict, jobs=jobs, progress=ui.callback())
    ui.result(result.to_json(), result.reason)
    if not result.same:
        raise typer.Exit(1)


TargetFormat = Annotated[
    str | None, typer.Option("--target-format", "-O", metavar="FMT", help="Format to write; default: by the name.")
]
Subformat = Annotated[
    str | None, typer.Option("--subformat", metavar="dynamic|fixed", help="Kind of VHD; default: dynamic.")
]
QemuOptions = Annotated[
    str | None, typer.Option("-o", metavar="KEY=VALUE,…", help="qemu-img's: subformat=, block_size=, force_size.")
]


@app.command()
@command()
def measure(
    ui: Ui,
    source: Image,
    target_format: TargetFormat = None,
    format: Format = None,
    subformat: Subformat = None,
    block_size: Annotated[int | None, size_option("--block-size", help="Bytes a block.")] = None,
    size: Annotated[int | None, size_option("--size", help="Size of the disk, if larger than the source's.")] = None,
    options: QemuOptions = None,
) -> None:
    """Tell the exact size that a converted file will have."""
    if target_format is None:
        raise UsageError("measure needs a target format", hint="add -O vhd")
    asked = {"subformat": subformat, "block_size": block_size} | _qemu_options(options)
    found = api.measure(source, target_format, source_format=format, size=size, progress=ui.callback(), **asked)
    ui.result(found, lambda: f"required size: {found['required']}\nvirtual size: {found['virtual-size']}")


@app.command()
@command(allow=allowed)
def convert(
    ui: Ui,
    source: Image,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The file to write.", show_default=False)],
    allow: frozenset[str],
    format: Format = None,
    target_format: TargetFormat = None,
    subformat: Subformat = None,
    block_size: Annotated[
        int | None, size_option("--block-size", help="Bytes a block; VHD: 2M unless given.")
    ] = None,
    size: Annotated[int | None, size_option("--size", help="Grow the disk to this size.")] = None,
    identifier: Annotated[
        str | None, typer.Option("--id", metavar="UUID", help="The disk's id; random unless given.")
    ] = None,
    verify: Annotated[
        str,
        typer.Option(
            "--verify", metavar="structure|content|qemu-img|none", envvar="IMAGEKIT_VERIFY", help="How to check it."
        ),
    ] = "structure",
    preallocate: Annotated[bool, typer.Option("--preallocate", help="Leave no holes in the file.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
    overwrite: Overwrite = False,
    no_sync: NoSync = False,
    jobs: Jobs = None,
    options: QemuOptions = None,
    show: Annotated[bool, typer.Option("-p", hidden=True)] = False,
    compress: Annotated[bool, typer.Option("-c", hidden=True)] = False,
) -> None:
    """Convert qcow2, raw or VHD to VHD or raw."""
    refuse_from_environment("IMAGEKIT_VERIFY", verify, "none")
    if compress:
        raise UnsupportedFeature("neither VHD nor raw can be compressed", hint="leave out -c")
    keep_freed_memory()
    if show:
        ui.progress = "bar" if ui.progress == "auto" else ui.progress
    asked: dict[str, Any] = {"subformat": subformat, "block_size": block_size} | _qemu_options(options)
    report = api.convert(
        source,
        target,
        source_format=format,
        target_format=target_format,
        size=size,
        identifier=_uuid(identifier),
        verify=verify,
        preallocate=preallocate,
        dry_run=dry_run,
        overwrite=overwrite,
        sync=not no_sync,
        jobs=jobs,
        allow=allow,
        progress=ui.callback(),
        **asked,
    )
    for note in report.notes:
        ui.say(f"note: {note}")
    if ui.verbose:
        ui.say(f"copied by the kernel: {show_size(report.kernel_copied_bytes)}")
    ui.result(report.to_json(), lambda: describe_report(report))


def describe_report(report: Report) -> str:
    """Two lines on a conversion, for people."""
    rate = short_size(report.data_bytes / max(report.seconds, 1e-6))
    written = report.verified != "not written"
    what = f"verified: {report.verified}" if written else "would be written"
    speed = f" in {report.seconds:.1f} s ({rate}/s)" if written else ""
    return (
        f"{report.source} ({report.source_format}) → "
        f"{report.target} ({report.target_format} {report.subformat}), {what}\n"
        f"disk {show_size(report.virtual_size)}, file {short_size(report.target_size)}, "
        f"data {short_size(report.data_bytes)}{speed}, id {report.identifier}"
    )


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
        elif key == "block_size":
            found["block_size"] = parse_size(value)
        elif key == "force_size" and value in ("", "on", "true"):
            continue  # sizes are always exact here
        else:
            raise UnsupportedFeature(
                f"-o {item} is not supported", hint="known: subformat=, block_size=, force_size=on"
            )
    return found
