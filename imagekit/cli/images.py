"""Commands about images: info, map, check, compare, measure, convert."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from imagekit import api, pictures
from imagekit.cli.options import (
    Confined,
    Deep,
    Format,
    Image,
    Jobs,
    NoSync,
    Overwrite,
    allowed,
    chain,
    command,
    limits,
    reading,
    remote,
    size_option,
    target,
)
from imagekit.cli.sizes import short_size, show_size
from imagekit.cli.ui import Ui, line, lines, refuse_from_environment, table
from imagekit.cli.upload_options import describe_upload, show_upload, upload_fields
from imagekit.conversion import NOT_CONFINED
from imagekit.errors import CorruptImage, UsageError
from imagekit.formats.base import SECTOR, DiskImage, Extent
from imagekit.limits import Limits
from imagekit.policy import REFERENCES
from imagekit.profiles import PROFILES
from imagekit.remote.addresses import STDIN
from imagekit.report import Report
from imagekit.workers import keep_freed_memory

app = typer.Typer()


@app.command()
@command(reading=reading, remote=remote, limits=limits)
def info(
    ui: Ui,
    image: Image,
    reading: dict[str, Any],
    remote: dict[str, Any],
    limits: Limits,
    format: Format = None,
    deep: Deep = False,
    confined: Confined = None,
    hyperv: Annotated[
        bool, typer.Option("--hyperv", help="Look into the disk: is the guest on it ready for Hyper-V?")
    ] = False,
) -> None:
    """Show format, sizes, features and safety findings.

    Reads headers only unless --deep, and works on images that convert refuses. With --follow-references also looks
    for the files that the image names, and judges them. With --hyperv reads the guest's boot loaders, kernel modules,
    cloud-init and fstab, without mounting anything; what it cannot read it calls unknown.
    """
    if hyperv and image == STDIN:
        raise UsageError("--hyperv reads the image twice, which standard input cannot be", hint="give a file")
    found = api.info(image, format=format, limits=limits, deep=deep, confined=confined, **reading, **remote)
    if confined and not found.confinement:
        ui.warn(NOT_CONFINED)
    document: dict[str, object] = dict(found.to_json())
    ready = None
    if hyperv:
        ready = api.readiness(image, format=format, limits=limits, confined=confined, **reading, **remote)
    if ready is not None:
        document["hyperv"] = ready.to_json()

    def human() -> str:
        features = found.info.features
        rows: dict[str, object] = {
            "image": found.filename,
            "format": " ".join(filter(None, (found.info.format, found.info.subformat))),
            "virtual size": show_size(found.info.virtual_size),
            "file size": show_size(found.file_size),
            "on the medium": show_size(found.actual_size),
            "block size": show_size(found.info.block_size) if found.info.block_size else None,
            "lies on": " ← ".join(name for name, _ in found.chain),
            "refers to": ", ".join(reference.name for reference in found.info.references),
        }
        rows |= {name.replace("-", " "): str(value) for name, value in features.items() if value not in (False, 0)}
        answered = REFERENCES if reading["follow_references"] else frozenset()
        more = [
            f"{'allowed' if one.rule in answered else one.severity.value}: {one.message} [{one.rule}]"
            for one in found.findings
        ]
        if ready is not None:
            generations = " and ".join(str(number) for number in ready.generations) or "none"
            more += ["", f"on Hyper-V: bootable as generation {generations}"]
            more += [f"{check.status:<8} {check.name}: {check.detail}" for check in ready.checks]
        return "\n".join(filter(None, (table(rows), lines(more))))

    ui.result(document, human)


@app.command("map")
@command(drawn=True, allow=allowed, reading=reading, remote=remote)
def map_(
    ui: Ui,
    image: Image,
    allow: frozenset[str],
    reading: dict[str, Any],
    remote: dict[str, Any],
    format: Format = None,
) -> None:
    """List where the guest's data lies in the file.

    As JSON it is the array of qemu-img map; with --output svg a picture.
    """
    with api.open_image(image, format=format, allow=allow, **reading, **remote) as disk:
        extents = disk.extents()
        if ui.output == "svg":
            print(_drawn(image, disk), end="")
            return
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
            place = extent.offset if extent.data and extent.file is None else None
            where = f"{'-':>16}" if place is None else f"{place:#16x}"
            print(f"{extent.start:#16x}  {extent.length:#16x}  {kind:<10}  {where}")


def _drawn(image: str, disk: DiskImage) -> str:
    """The map as an SVG document, and its sums in words."""
    sums = {"data": 0, "of it compressed": 0, "zero": 0}

    def counted() -> Iterator[Extent]:
        for extent in disk.extents():
            sums["data" if extent.data else "zero"] += extent.length
            sums["of it compressed"] += extent.length if extent.compressed else 0
            yield extent

    size = disk.virtual_size
    cells = pictures.occupancy(counted(), size, min(pictures.COLUMNS * pictures.ROWS, max(1, size // SECTOR)))
    facts = {"disk": short_size(size), **{name: short_size(value) for name, value in sums.items() if value}}
    info = disk.info()
    kind = " ".join(filter(None, (info.format, info.subformat)))
    return pictures.document(cells, f"{image} ({kind}): where its data lies", facts)


@app.command()
@command(remote=remote)
def check(
    ui: Ui,
    image: Image,
    remote: dict[str, Any],
    format: Format = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend what can be mended with certainty, in place.")
    ] = False,
) -> None:
    """Check the structure; exit 11 when it is damaged."""
    result = api.check(image, format=format, repair=repair, **remote)

    def human() -> str:
        found = [f"{'leak' if one.leak else 'damage'}: {one.message} [{one.code}]" for one in result.problems]
        mended = "repaired; " if result.repaired else ""
        verdict = "sound" if result.sound else "damaged"
        return lines([*found, f"{result.filename}: {mended}{result.format} structure is {verdict}"])

    ui.result(result.to_json(), human)
    if not result.sound:
        raise typer.Exit(CorruptImage.exit_code)


@app.command()
@command(allow=allowed, chain=chain, remote=remote)
def compare(
    ui: Ui,
    one: Annotated[str, typer.Argument(metavar="A", show_default=False)],
    other: Annotated[str, typer.Argument(metavar="B", show_default=False)],
    allow: frozenset[str],
    chain: dict[str, Any],
    remote: dict[str, Any],
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
    result = api.compare(
        one,
        other,
        formats=(format, other_format),
        strict=strict,
        jobs=jobs,
        progress=ui.callback(),
        allow=allow,
        **chain,
        **remote,
    )
    ui.result(result.to_json(), line(result.reason))
    if not result.same:
        raise typer.Exit(1)


Size = Annotated[int | None, size_option("--size", help="Grow the disk to this size.")]
Align = Annotated[int | None, size_option("--align", help="Round the disk's size up to a multiple, such as 1M.")]
Profile = Annotated[
    str | None, typer.Option("--for", metavar="PROFILE", help=f"Kind of host: {', '.join(PROFILES)}.")
]


@app.command()
@command(allow=allowed, reading=reading, remote=remote, target=target, limits=limits)
def measure(
    ui: Ui,
    source: Image,
    allow: frozenset[str],
    reading: dict[str, Any],
    remote: dict[str, Any],
    target: dict[str, Any],
    limits: Limits,
    format: Format = None,
    profile: Profile = None,
    size: Size = None,
    align: Align = None,
) -> None:
    """Tell the exact size that a converted file will have."""
    target_format = target.pop("target_format")
    if target_format is None and profile is None:
        raise UsageError("measure needs a target format", hint="add -O vhd")
    found = api.measure(
        source,
        target_format,
        profile=profile,
        source_format=format,
        size=size,
        align=align,
        allow=allow,
        limits=limits,
        progress=ui.callback(),
        **reading,
        **remote,
        **target,
    )
    most = "" if found["exact"] else " at most"
    ui.result(found, lambda: f"required size: {found['required']}{most}\nvirtual size: {found['virtual-size']}")


@app.command()
@command(allow=allowed, reading=reading, remote=remote, made=target, limits=limits, image=upload_fields)
def convert(
    ui: Ui,
    source: Image,
    allow: frozenset[str],
    reading: dict[str, Any],
    remote: dict[str, Any],
    made: dict[str, Any],
    limits: Limits,
    image: dict[str, Any],
    target: Annotated[
        str | None,
        typer.Argument(metavar="[TARGET]", help="The file to write; may be left out with --for.", show_default=False),
    ] = None,
    format: Format = None,
    profile: Profile = None,
    size: Size = None,
    align: Align = None,
    fix_gpt: Annotated[
        bool, typer.Option("--fix-gpt", help="Move the GPT's backup header to the last sector of a disk that grows.")
    ] = False,
    verify: Annotated[
        str,
        typer.Option(
            "--verify", metavar="structure|content|qemu-img|none", envvar="IMAGEKIT_VERIFY", help="How to check it."
        ),
    ] = "structure",
    preallocate: Annotated[bool, typer.Option("--preallocate", help="Leave no holes in the file.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
    confined: Confined = None,
    upload: Annotated[
        str | None,
        typer.Option(
            "--upload", metavar="glance:NAME", help="Send the result to Glance; without a TARGET no file stays here."
        ),
    ] = None,
    overwrite: Overwrite = False,
    no_sync: NoSync = False,
    jobs: Jobs = None,
    show: Annotated[bool, typer.Option("-p", hidden=True)] = False,
) -> None:
    """Convert an image to VHD, VHDX, qcow2 or raw."""
    refuse_from_environment("IMAGEKIT_VERIFY", verify, "none")
    keep_freed_memory()
    if show:
        ui.progress = "bar" if ui.progress == "auto" else ui.progress
    options: dict[str, Any] = {
        "profile": profile,
        "source_format": format,
        "size": size,
        "align": align,
        "fix_gpt": fix_gpt,
        "verify": verify,
        "preallocate": preallocate,
        "dry_run": dry_run,
        "confined": confined,
        "limits": limits,
        "overwrite": overwrite,
        "sync": not no_sync,
        "jobs": jobs,
        "allow": allow,
        "progress": ui.callback(),
        **reading,
        **remote,
        **made,
    }
    if upload is None:
        if image:
            raise UsageError("what is said about an image in Glance needs --upload glance:NAME")
        show_report(ui, api.convert(source, target, **options))
        return
    from imagekit.uploads import convert_and_upload

    report, found = convert_and_upload(source, target, upload, **options, **image)
    for note in report.notes:
        ui.say(f"note: {note}")
    show_upload(ui, found)
    ui.result(
        {**report.to_json(), "upload": found.to_json()},
        lambda: f"{describe_report(report)}\n{describe_upload(found)}",
    )


def show_report(ui: Ui, report: Report) -> None:
    """Notes on stderr, the result on stdout."""
    for note in report.notes:
        ui.say(f"note: {note}")
    if ui.verbose:
        ui.say(f"copied by the kernel: {show_size(report.kernel_copied_bytes)}")
    ui.report(report.to_json(), lambda: describe_report(report))


def describe_report(report: Report) -> str:
    """Two lines on a conversion, for people."""
    rate = short_size(report.data_bytes / max(report.seconds, 1e-6))
    written = report.verified != "not written"
    what = f"verified: {report.verified}" if written else "would be written"
    speed = f" in {report.seconds:.1f} s ({rate}/s)" if written else ""
    return lines(
        (
            f"{report.source} ({report.source_format}) → "
            f"{report.target} ({report.target_format} {report.subformat}), {what}",
            f"disk {show_size(report.virtual_size)}, file {short_size(report.target_size)}, "
            f"data {short_size(report.data_bytes)}{speed}, id {report.identifier}",
        )
    )
