"""The library: one function a task, the same ones the command line calls.

All of it is thread-safe, changes no global state and prints nothing. ``progress`` is called with
:class:`~imagekit.progress.Progress` values from the caller's thread; setting ``cancel`` makes the call raise
Cancelled within about 250 ms, with nothing left behind.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from imagekit import policy
from imagekit.changes import apply as apply_changes
from imagekit.conversion import at_hand, convert_image, planned, reading, target_format
from imagekit.errors import SourceError, UnsupportedFeature, UsageError
from imagekit.formats import registry
from imagekit.formats.base import AS_IS, JSON, DiskImage
from imagekit.formats.files import LocalFile
from imagekit.plan import ConvertOptions
from imagekit.profiles import apply_profile
from imagekit.progress import Callback, Control
from imagekit.records import replace
from imagekit.remote.addresses import file_name, is_elsewhere, is_fetched, is_glance
from imagekit.report import SCHEMA, Report
from imagekit.results import CheckResult, Comparison, Inspection
from imagekit.sources import Reading, located, open_source
from imagekit.verify import first_difference

if TYPE_CHECKING:
    from imagekit.bundle import Bundle, ConfigDrive
    from imagekit.cloudinit.model import GuestProfile
    from imagekit.cloudinit.tree import Datasource
    from imagekit.contents.drive_check import DriveCheck
    from imagekit.contents.readiness import Readiness
    from imagekit.disks import DiskReport
    from imagekit.guest import SpecLike
    from imagekit.launch.launcher import LaunchPlan
    from imagekit.launch.qemu_command import NicChoice
    from imagekit.launch.result import BootResult, Evidence

PathLike = str | os.PathLike[str]

REMOTE_OPTIONS = ("redirect_hosts", "http_timeout", "checksum", "keyring", "partial_dir", "glance_url", "os_cloud")
READING_OPTIONS = (
    *("allow", "follow_references", "parent_map", "ignore_parent_id", "snapshot", "size_from", "limits"),
    *REMOTE_OPTIONS,
)


def info(
    image: PathLike,
    *,
    format: str | None = None,
    deep: bool = False,
    confined: bool | None = None,
    cancel: threading.Event | None = None,
    **options: Any,
) -> Inspection:
    """Headers, features and findings of an image; works on images that :func:`convert` refuses.

    ``options`` as in :func:`open_image`; with ``follow_references`` the whole chain is opened and judged. ``deep``
    also judges what only a pass over all tables can show. With ``confined``, the default for what comes over a
    network, a process that can do nothing else reads the image (imagekit.confinement.jobs).
    """
    asked = replace(reading_options(format, options), confined=confined)
    if asked.is_confined(elsewhere=is_elsewhere(image)):
        from imagekit.confinement import jobs as confinement

        if confinement.POSSIBLE:
            control = Control(cancel=cancel)
            with at_hand(image, asked, control=control) as here, here.blamed():
                seen = confinement.inspect(here.file, asked, deep=deep, control=control)
            return Inspection(
                seen.name,
                seen.info,
                seen.file_size,
                seen.actual_size,
                (*here.findings, *seen.findings),
                seen.chain,
                seen.confinement,
            )
    with open_source(image, replace(reading(asked, deep=deep), allow=None)) as source:
        return Inspection(
            filename=source.original.name,
            info=source.image.info(),
            file_size=source.original.size,
            actual_size=source.original.allocated_size,
            findings=source.findings,
            chain=tuple((one.original.name, one.image.info()) for one in source.below()),
        )


def readiness(
    image: PathLike, *, format: str | None = None, confined: bool | None = None, **options: Any
) -> Readiness:
    """Whether a guest is ready for Hyper-V, as far as looking at its disk tells; ``options`` as for open_image.

    ``confined`` as in :func:`info`.
    """
    from imagekit.contents.looking import as_seen
    from imagekit.contents.readiness import check_readiness

    asked = replace(reading_options(format, options), confined=confined)
    if asked.is_confined(elsewhere=is_elsewhere(image)):
        from imagekit.confinement import jobs as confinement

        if confinement.POSSIBLE:
            with at_hand(image, asked) as here, here.blamed():
                asked = replace(asked, stated_format=here.format or asked.stated_format)
                return confinement.look(here.file, asked, as_seen).readiness
    with open_source(image, reading(asked)) as source, located(source.file):
        return check_readiness(source.image)


def open_image(image: PathLike, *, format: str | None = None, **options: Any) -> DiskImage:
    """The guest's disk in an image file, judged by the safety policy; closing it closes the file.

    ``options`` are those fields of :class:`~imagekit.plan.ConvertOptions` that say how to read: ``allow``,
    ``follow_references``, ``parent_map``, ``ignore_parent_id``, ``snapshot``, ``size_from``, ``limits``, ``checksum``
    and, for an address (``http://…``), ``redirect_hosts`` and ``http_timeout``.
    """
    return open_source(image, _reading(format, options)).image


def _reading(format: str | None, options: Mapping[str, Any]) -> Reading:
    """How to open a source, from the keywords of a function that only reads."""
    return reading(reading_options(format, options))


def reading_options(format: str | None, options: Mapping[str, Any]) -> ConvertOptions:
    """The same of a function that only reads."""
    if wrong := sorted(set(options) - set(READING_OPTIONS)):
        raise UsageError(f"unknown options: {', '.join(wrong)}", hint=f"options: {', '.join(READING_OPTIONS)}")
    return make_options({"source_format": format, **options})


def convert(
    source: PathLike,
    target: PathLike | None = None,
    *,
    profile: str | None = None,
    progress: Callback | None = None,
    cancel: threading.Event | None = None,
    **options: Any,
) -> Report:
    """Convert an image; ``options`` are the fields of :class:`~imagekit.plan.ConvertOptions`.

    ``profile`` names the kind of host to write for (imagekit.profiles). Without a ``target`` the file gets the
    source's name, with the suffix of its format, in the working directory.
    """
    control = Control(progress, cancel)
    asked = make_options(options)
    if profile is not None:
        asked = apply_profile(profile, asked)
    if target is None:
        target = default_target(source, asked)
    wanted = asked.target_format
    if wanted is not None and not (registry.is_known(wanted) and registry.find(wanted).subformats):
        from imagekit.external import convert_by_qemu_img, is_external

        if is_external(asked):
            return convert_by_qemu_img(source, target, asked, control=control)
    return convert_image(source, target, asked, control=control)


def default_target(source: PathLike, options: ConvertOptions) -> Path:
    """Where a conversion goes that names no target: the working directory."""
    if options.target_format is None:
        raise UsageError("neither a target nor a format is named", hint="name the file to write, or add --for hyperv")
    return Path(file_name(source)).with_suffix(registry.find(options.target_format).suffixes[0])


def make_options(values: Mapping[str, Any]) -> ConvertOptions:
    """The options that keywords are; UsageError for what none is called."""
    known = set(ConvertOptions.__match_args__)
    if unknown := sorted(set(values) - known):
        raise UsageError(f"unknown options: {', '.join(unknown)}", hint=f"options: {', '.join(sorted(known))}")
    values = dict(values)
    parent_map = values.get("parent_map", ())
    values["parent_map"] = tuple(parent_map.items() if isinstance(parent_map, Mapping) else parent_map)
    values["redirect_hosts"] = tuple(values.get("redirect_hosts", ()))
    values["allow"] = policy.check_allowed(values.get("allow", ()))
    if isinstance(values.get("identifier"), str):
        values["identifier"] = UUID(values["identifier"])
    return ConvertOptions(**values)


def measure(
    source: PathLike,
    format: str | None,
    *,
    profile: str | None = None,
    progress: Callback | None = None,
    cancel: threading.Event | None = None,
    **options: Any,
) -> dict[str, JSON]:
    """The size, in bytes, that the target file of a conversion will have (``required``).

    ``exact``, or, for a compressed target, the most that it can have.
    """
    asked = make_options({**options, "target_format": format})
    if profile is not None:
        asked = apply_profile(profile, asked)
    chosen = target_format("", asked)
    with planned(source, chosen, asked, control=Control(progress, cancel)) as conversion:
        plan = conversion.plan
        return {
            "schema": SCHEMA,
            "required": plan.file_size,
            "exact": options.get("compression") is None,
            "virtual-size": plan.virtual_size,
            "data-bytes": plan.data_bytes,
            "format": plan.target_format,
        }


def compare(
    one: PathLike,
    other: PathLike,
    *,
    formats: tuple[str | None, str | None] = (None, None),
    strict: bool = False,
    jobs: int | None = None,
    progress: Callback | None = None,
    cancel: threading.Event | None = None,
    **options: Any,
) -> Comparison:
    """Compare guest content across formats. A longer disk whose tail is zero is the same unless ``strict``.

    ``options`` as in :func:`open_image`; ``snapshot``, ``size_from`` and ``checksum`` are about ``one``.
    """
    asked = _reading(formats[0], options)
    with ExitStack() as stack:
        left = stack.enter_context(open_source(one, asked))
        right = stack.enter_context(
            open_source(
                other, replace(asked, declared=formats[1], view=AS_IS, access=replace(asked.access, checksum=None))
            )
        )
        sizes = left.image.virtual_size, right.image.virtual_size
        if strict and sizes[0] != sizes[1]:
            return Comparison(False, min(sizes), f"the disks have {sizes[0]} and {sizes[1]} bytes")
        at = first_difference(left.image, right.image, jobs=jobs, control=Control(progress, cancel))
        left.check_unchanged()
        right.check_unchanged()
    if at is not None:
        return Comparison(False, at, f"the content differs at guest offset {at:#x}")
    tail = "" if sizes[0] == sizes[1] else f"; one disk is {abs(sizes[0] - sizes[1])} bytes longer, all zero"
    return Comparison(True, None, f"the content is the same{tail}")


def check(image: PathLike, *, format: str | None = None, repair: bool = False, **options: Any) -> CheckResult:
    """Check an image's structure; with ``repair`` mend what can be mended with certainty and check again.

    ``options`` say how to reach an address: ``checksum``, ``redirect_hosts``, … as for :func:`open_image`.
    """
    with open_source(image, replace(_reading(format, options), allow=None)) as source:
        policy.enforce(
            [finding for finding in source.findings if finding.rule in ("ambiguous", "format-mismatch", "in-use")],
            path=source.file.name,
        )
        chosen = registry.find(source.format)
        with located(source.file):
            problems = tuple(chosen.check(source.file))
        name = source.file.name
        if repair and source.wrappers:
            raise UnsupportedFeature("a packed image is not repaired in place", path=name, hint="unpack it first")
        if repair and is_fetched(source.original):
            raise UnsupportedFeature("a remote image is not repaired in place", path=name, hint="fetch it first")
    if not repair:
        return CheckResult(name, chosen.name, problems)
    with LocalFile.open_for_change(image) as file, located(file):
        if file.held_for_writing:
            raise SourceError("QEMU has the image open for writing", path=name, hint="stop the machine first")
        # Also where nothing is wrong: a mark that a writer left (qcow2's dirty bit) can go.
        try:
            changes = chosen.repair(file)
        except UnsupportedFeature:
            if problems:
                raise
            changes = []
        apply_changes(changes, file)
        return CheckResult(name, chosen.name, tuple(chosen.check(file)), repaired=bool(changes))


def create(target: PathLike, size: int | None = None, **options: Any) -> DiskReport:
    """Write a new disk of ``size`` bytes of zeros; with ``parent`` a differencing one, of its parent's size.

    ``options`` are fields of :class:`~imagekit.plan.ConvertOptions`.
    """
    from imagekit.disks import create_disk

    return create_disk(target, size, make_options(options))


def resize(
    image: PathLike,
    size: int,
    *,
    shrink: bool = False,
    progress: Callback | None = None,
    cancel: threading.Event | None = None,
    **options: Any,
) -> DiskReport:
    """Give a disk another virtual size in place; smaller only with ``shrink`` and where only zeros are lost."""
    from imagekit.disks import resize_disk

    return resize_disk(image, size, make_options(options), shrink=shrink, control=Control(progress, cancel))


def merge(
    child: PathLike,
    target: PathLike | None = None,
    *,
    progress: Callback | None = None,
    cancel: threading.Event | None = None,
    **options: Any,
) -> Report | DiskReport:
    """Make one disk of a chain: a new file, or without a ``target`` the child's parent, in place.

    Needs ``follow_references=True``: the child decides which files are read, or written to.
    """
    control, asked = Control(progress, cancel), make_options(options)
    if target is None:
        from imagekit.disks import merge_into_parent

        return merge_into_parent(child, asked, control=control)
    return convert_image(child, target, asked, control=control)


def rebase(child: PathLike, parent: PathLike, **options: Any) -> DiskReport:
    """Make a differencing disk name another file as its parent, the same disk unless ``ignore_parent_id``."""
    from imagekit.disks import rebase_disk

    return rebase_disk(child, parent, make_options(options))


def identify(image: PathLike, identifier: UUID | str, **options: Any) -> DiskReport:
    """Give a VHD or VHDX another id, in place; its content stays. For a copy that is to be a disk of its own."""
    from imagekit.disks import identify_disk

    return identify_disk(image, UUID(str(identifier)), make_options(options))


def build_config_drive(
    spec: SpecLike | None = None,
    path: PathLike = "config.iso",
    *,
    media: Literal["iso", "vfat"] = "iso",
    disk: Literal["vhd", "vhdx"] | None = None,
    partition: bool | None = None,
    datasource: Datasource = "configdrive",
    nova_compatible: bool = False,
    network_config: Literal[1, 2] = 1,
    machine_of: PathLike | None = None,
    strict: bool = False,
    password_out: PathLike | None = None,
    overwrite: bool = False,
    sync: bool = True,
    **guest: Any,
) -> ConfigDrive:
    """Write a guest's config drive; ``guest`` are fields of the spec, as in :func:`prepare`.

    ``media`` is the file system and ``disk`` what it lies in, by default what the suffix of ``path`` says.
    ``partition`` is for VFAT, which has one in a disk unless told otherwise. ``datasource`` is who reads it;
    ``nova_compatible`` adds all that Nova writes, ``network_config`` is NoCloud's version of network-config.
    What the guest would not accept is refused before anything is written, with ``strict`` also what it would only
    stumble over; ``machine_of`` names the bundle or machine.json whose adapters the network has to be about, and
    whose uuid is the guest's unless it is given. With ``generate_password`` a password is made, and returned
    encrypted for the ssh-rsa key or written to ``password_out``.
    """
    from imagekit.bundle import hand_over, make_metadata, write_config_drive
    from imagekit.cloudinit.render import Rendering
    from imagekit.guest import make_guest
    from imagekit.machine import Machine
    from imagekit.media import Packing

    machine = None if machine_of is None else Machine.load(machine_of)
    packing = Packing(media, disk or Packing.by_name(path).disk, partition)
    rendering = Rendering(datasource, nova_compatible, network_config)
    made = make_guest(spec, default_uuid=None if machine is None else str(machine.uuid), **guest)
    metadata = make_metadata(made, rendering=rendering, machine=machine, strict=strict)
    encrypted = hand_over(made, password_out, sync=sync)
    drive = write_config_drive(made, path, packing=packing, metadata=metadata, overwrite=overwrite, sync=sync)
    return replace(drive, encrypted_password=encrypted)


def check_config_drive(
    path: PathLike,
    *,
    guest: GuestProfile | None = None,
    machine_of: PathLike | None = None,
    strict: bool = False,
) -> DriveCheck:
    """Read any medium of guest metadata: what is on it, who reads it, what is wrong. Holds no secret.

    It is judged for a ``guest``, by default Linux, and for the machine of the bundle or machine.json ``machine_of``.
    With ``strict`` what the guest would only stumble over is wrong, too.
    """
    from imagekit.contents.drive_check import check_drive
    from imagekit.machine import Machine

    machine = None if machine_of is None else Machine.load(machine_of)
    return check_drive(path, guest=guest, machine=machine, strict=strict)


_CONVERSION = (
    *("source_format", "size", "block_size", "subformat", "verify", "sync", "jobs", "timestamp", "fix_gpt"),
    "confined",
    *READING_OPTIONS,
)


def prepare(
    image: PathLike,
    out: PathLike,
    *,
    spec: SpecLike | None = None,
    media: Literal["iso", "vfat", "none"] = "iso",
    disk: Literal["vhd", "vhdx"] | None = None,
    partition: bool | None = None,
    datasource: Datasource = "configdrive",
    nova_compatible: bool = False,
    network_config: Literal[1, 2] = 1,
    strict: bool = False,
    password_out: PathLike | None = None,
    ignore_properties: bool = False,
    progress: Callback | None = None,
    cancel: threading.Event | None = None,
    **guest: Any,
) -> Bundle:
    """Make a bundle of an image: disk, config drive, machine.json.

    ``media`` and ``disk`` say what the config drive is: ISO 9660 on a DVD, or in a disk, or VFAT in a disk; with
    ``media="none"`` there is none. ``datasource``, ``nova_compatible``, ``network_config`` and ``strict`` as in
    :func:`build_config_drive`.

    Keywords are fields of the spec (``name``, ``hostname``, ``uuid``, ``ssh_keys``, ``user_data``, ``password``,
    ``network``, ``mac``, ``machine``, ``meta``) and of the conversion (``size``, ``source_format``, ``verify``,
    which is ``"content"`` unless said otherwise, …). What an image's properties in Glance say about the machine holds
    as far as nothing else is asked for (imagekit.glance.properties), unless ``ignore_properties``.
    """
    from imagekit.bundle import hand_over, prepare_bundle
    from imagekit.cloudinit.render import Rendering
    from imagekit.guest import make_guest, name_for
    from imagekit.media import Packing

    conversion = {key: guest.pop(key) for key in _CONVERSION if key in guest}
    options = make_options({"verify": "content", **conversion})
    packing = Packing.choose(media, disk, partition)
    decided = None
    if is_glance(image):
        from imagekit.glance import properties as glance_properties

        found = glance_properties.look_up(image, options)
        kind = None if ignore_properties else glance_properties.default_guest(found)
        name = name_for(f"glance:{found.name or found.id}")
        image, made = found.label, make_guest(spec, default_name=name, default_guest=kind, **guest)
        if not ignore_properties:
            decided = glance_properties.decide(found, made, options, config_drive=packing is not None)
            made, options = decided.guest, decided.options
            if packing is not None:
                packing.check_generation(made.spec.machine.generation)
    else:
        made = make_guest(spec, default_name=name_for(image), **guest)
    encrypted = hand_over(made, password_out, sync=options.sync)
    bundle = prepare_bundle(
        image,
        out,
        made,
        options=options,
        packing=packing,
        rendering=Rendering(datasource, nova_compatible, network_config),
        strict=strict,
        control=Control(progress, cancel),
    )
    if decided is not None:
        bundle = replace(bundle, choice=decided.explained(bundle.choice), warnings=(*decided.notes, *bundle.warnings))
    return replace(bundle, encrypted_password=encrypted)


def boot(
    bundle: PathLike,
    *,
    on: str = "qemu",
    rehearse: bool = False,
    timeout: float = 300.0,
    marker: str | None = None,
    allow_network: bool = False,
    accelerator: Literal["auto", "kvm", "tcg"] = "auto",
    nic: NicChoice = "auto",
    out: PathLike | None = None,
    on_event: Callable[[Evidence], None] | None = None,
    cancel: threading.Event | None = None,
    **host: Any,
) -> BootResult:
    """Boot a bundle and say how far it came.

    ``on`` is ``"qemu"``, a rehearsal (:func:`imagekit.launch.rehearsal.rehearse`), ``"hyperv"``, this computer, or
    ``"hyperv://HOST"``; a host gets the files and the machine first. ``rehearse=True`` rehearses before that, and
    nothing is sent unless it booted. ``nic`` is the adapter to rehearse with, ``"tulip"`` being Hyper-V's legacy one.
    ``host`` are fields of :class:`~imagekit.hyperv.stage.StageOptions` (``store``,
    ``share``, …) and :class:`~imagekit.hyperv.connect.Connection` (``auth``, ``ca_file``, …).
    """
    from imagekit.launch.qemu import QemuLauncher

    rehearsal = QemuLauncher(
        bundle,
        marker=marker,
        allow_network=allow_network,
        accelerator=accelerator,
        nic=nic,
        out=out,
        on_event=on_event,
        cancel=cancel,
    )
    if on == "qemu":
        if host:
            raise UsageError(f"a rehearsal has no option {', '.join(sorted(host))}")
        return rehearsal.wait(timeout)
    from imagekit.hyperv.connect import is_hyperv, open_launcher

    if not is_hyperv(on):
        raise UsageError(f"booting on {on!r}", hint="use qemu, hyperv or hyperv://HOST")
    host.setdefault("control", Control(None, cancel))
    stage = open_launcher(
        bundle, on, marker=marker, out=None if out is None else Path(out), on_event=on_event, **host
    )
    try:
        if rehearse and (result := rehearsal.wait(timeout)).verdict != "booted":
            return result
        stage.create()
        stage.start()
        return stage.wait(timeout)
    finally:
        stage.close()


def plan_boot(bundle: PathLike, *, on: str = "qemu", nic: NicChoice = "auto", **host: Any) -> LaunchPlan:
    """What :func:`boot` would run, complete; nothing is started or sent, and no host is asked."""
    if on == "qemu":
        from imagekit.launch.qemu import QemuLauncher

        return QemuLauncher(bundle, nic=nic).plan()
    from imagekit.hyperv.connect import is_hyperv, plan_launch

    if not is_hyperv(on):
        raise UsageError(f"booting on {on!r}", hint="use qemu, hyperv or hyperv://HOST")
    return plan_launch(bundle, on, **host)
