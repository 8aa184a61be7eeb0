"""Commands about guests: configdrive, prepare, boot, demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from imagekit import api
from imagekit.cli.drives import show_check
from imagekit.cli.hyperv import connection_options, describe_plan, events, finish, place_options
from imagekit.cli.options import (
    Confined,
    Format,
    Image,
    Jobs,
    NoSync,
    Overwrite,
    allowed,
    command,
    remote,
    size_option,
)
from imagekit.cli.sizes import show_size
from imagekit.cli.ui import Ui, line, table
from imagekit.errors import BootFailed, UsageError
from imagekit.workers import keep_freed_memory

if TYPE_CHECKING:
    from imagekit.launch.qemu_command import NicChoice
    from imagekit.launch.result import BootResult

app = typer.Typer()

Spec = Annotated[
    Path | None, typer.Option("--spec", metavar="FILE", help="Guest spec, YAML or JSON; other options win over it.")
]
MAX_FILE = 4 << 20
"""Bytes read from a file that an option names."""


def guest_fields(
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Name of the machine.")] = None,
    hostname: Annotated[
        str | None, typer.Option("--hostname", metavar="NAME", help="Host name; default: the name.")
    ] = None,
    uuid: Annotated[
        str | None, typer.Option("--uuid", metavar="UUID", help="Instance id; random unless given.")
    ] = None,
    ssh_key: Annotated[
        list[Path] | None,
        typer.Option(
            "--ssh-key", metavar="FILE", help="Public key of who may log in; can be repeated.", show_default=False
        ),
    ] = None,
    user_data: Annotated[
        Path | None, typer.Option("--user-data", metavar="FILE", help="For cloud-init: #cloud-config, a script, …")
    ] = None,
    password_file: Annotated[
        Path | None,
        typer.Option("--password-file", metavar="FILE", help="Administrator's password, the first line."),
    ] = None,
    generate_password: Annotated[
        bool,
        typer.Option("--generate-password", help="Make a password; it is printed encrypted for the ssh-rsa key."),
    ] = False,
    password_out: Annotated[
        Path | None,
        typer.Option("--password-out", metavar="FILE", help="Write the password that was made to this file instead."),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option("--guest", metavar="PROFILE", help="linux (default), debian12, rhel, windows, flatcar or fcos."),
    ] = None,
    hyperv_tools: Annotated[
        bool, typer.Option("--hyperv-tools", help="Have the guest install the daemons that tell Hyper-V its address.")
    ] = False,
    random_seed: Annotated[bool, typer.Option("--random-seed", help="Add 512 random bytes for the guest.")] = False,
    network: Annotated[
        str | None,
        typer.Option("--network", metavar="dhcp|FILE", help="dhcp, or a file with the network section of a spec."),
    ] = None,
    mac: Annotated[
        str | None, typer.Option("--mac", metavar="MAC", help="MAC address; derived from the uuid otherwise.")
    ] = None,
) -> dict[str, Any]:
    """The spec's fields that the options give, read from the files they name."""
    from imagekit.cloudinit.specfile import read_regular_file, read_spec_file

    fields: dict[str, Any] = {"name": name, "hostname": hostname, "uuid": uuid, "mac": mac, "network": network}
    fields |= {
        "guest": profile,
        "hyperv_tools": hyperv_tools or None,
        "random_seed": "random" if random_seed else None,
    }
    fields |= {"generate_password": generate_password, "password_out": password_out}
    if ssh_key:
        texts = [read_regular_file(path, limit=MAX_FILE).decode("utf-8", "replace") for path in ssh_key]
        fields["ssh_keys"] = [line.strip() for text in texts for line in text.splitlines() if _is_key(line)]
        if not fields["ssh_keys"]:
            raise UsageError(
                "no key in the files of --ssh-key", hint="name a public key, such as ~/.ssh/id_ed25519.pub"
            )
    if user_data is not None:
        fields["user_data"] = read_regular_file(user_data, limit=MAX_FILE)
    if password_file is not None:
        text = read_regular_file(password_file, limit=MAX_FILE).decode("utf-8", "replace")
        fields["password"] = text.split("\n", 1)[0].rstrip("\r")
    if network is not None and network != "dhcp":
        values = read_spec_file(Path(network)).values
        fields["network"] = values.get("network", values)
    return fields


def _is_key(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def medium_fields(
    media: Annotated[
        str,
        typer.Option(
            "--media", metavar="iso|vfat", help="File system of the config drive; none: prepare makes none."
        ),
    ] = "iso",
    disk: Annotated[
        str | None,
        typer.Option(
            "--disk", metavar="vhd|vhdx", help="Put the config drive into a disk; generation 2 takes no VHD."
        ),
    ] = None,
    partition: Annotated[
        bool | None,
        typer.Option(
            "--partition/--no-partition",
            help="VFAT in a partition, or on the whole disk. Default: in a partition when there is a disk.",
            show_default=False,
        ),
    ] = None,
) -> dict[str, Any]:
    """What the medium of the metadata is."""
    return {"media": media, "disk": disk, "partition": partition}


def metadata_fields(
    datasource: Annotated[
        str,
        typer.Option(
            "--datasource", metavar="configdrive|nocloud|cloudstack", help="Who reads it: the layout of the files."
        ),
    ] = "configdrive",
    nova_compatible: Annotated[
        bool, typer.Option("--nova-compatible", help="All versions and the EC2 files, as Nova writes them.")
    ] = False,
    network_config: Annotated[
        int, typer.Option("--network-config", metavar="1|2", help="Version of NoCloud's network-config.")
    ] = 1,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse also what lint only warns of.")] = False,
) -> dict[str, Any]:
    """How the metadata is written."""
    return {
        "datasource": datasource,
        "nova_compatible": nova_compatible,
        "network_config": network_config,
        "strict": strict,
    }


@app.command()
@command(guest=guest_fields, medium=medium_fields, metadata=metadata_fields)
def configdrive(
    ui: Ui,
    guest: dict[str, Any],
    medium: dict[str, Any],
    metadata: dict[str, Any],
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="The file to write.", show_default=False)] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            "--check", metavar="MEDIUM", help="Read a medium instead, and say what is on it and who reads it."
        ),
    ] = None,
    spec: Spec = None,
    machine: Annotated[
        Path | None,
        typer.Option(
            "--machine", metavar="BUNDLE", help="The machine it is for: its adapters have to be the spec's."
        ),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of a spec, and write nothing.")
    ] = False,
    overwrite: Overwrite = False,
    no_sync: NoSync = False,
) -> None:
    """Write a config drive: ISO 9660 or VFAT, label config-2, as it is or in a disk.

    It is read back and compared before it gets its name, and only its owner may read it. With --check nothing is
    written: any medium is read, and exit 11 says that guests cannot use it.
    """
    if schema:
        from imagekit.cloudinit.model import spec_schema

        ui.result(spec_schema(), lambda: json.dumps(spec_schema(), indent=2))
        return
    if check is not None:
        if out is not None:
            raise UsageError(f"--check reads {check}, and {out} would be written", hint="leave out one of them")
        show_check(ui, check, guest=guest["guest"], machine=machine, strict=metadata["strict"])
        return
    if out is None:
        raise UsageError("no name for the medium", hint="name the file to write, or a medium to --check")
    if spec is None and guest["name"] is None:
        guest["name"] = "guest"
    drive = api.build_config_drive(
        spec, out, machine_of=machine, overwrite=overwrite, sync=not no_sync, **medium, **metadata, **guest
    )
    for warning in drive.warnings:
        ui.warn(warning)
    what = f"{drive.path}: config drive for {drive.uuid}, {drive.packing.name}"
    ui.result(
        drive.to_json(), f"{what}, {drive.size} bytes, sha256 {drive.sha256}{_password(drive.encrypted_password)}"
    )


def _password(encrypted: str | None) -> str:
    """How a password that was made is handed over, for people."""
    return "" if encrypted is None else f"\npassword, encrypted for the ssh-rsa key: {encrypted}"


@app.command()
@command(guest=guest_fields, medium=medium_fields, metadata=metadata_fields, allow=allowed, remote=remote)
def prepare(
    ui: Ui,
    image: Image,
    guest: dict[str, Any],
    medium: dict[str, Any],
    metadata: dict[str, Any],
    allow: frozenset[str],
    remote: dict[str, Any],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the bundle; made if need be.")],
    spec: Spec = None,
    cpus: Annotated[int | None, typer.Option("--cpus", metavar="N", help="Processors.")] = None,
    memory: Annotated[int | None, size_option("--memory", help="Memory, in steps of 2 MiB.")] = None,
    switch: Annotated[str | None, typer.Option("--switch", metavar="NAME", help="Virtual switch on Hyper-V.")] = None,
    vlan: Annotated[int | None, typer.Option("--vlan", metavar="ID", help="VLAN on that switch.")] = None,
    generation: Annotated[
        str | None,
        typer.Option(
            "--generation",
            metavar="auto|1|2",
            help="Hyper-V generation; auto: 2 if the image has a UEFI boot loader.",
        ),
    ] = None,
    secure_boot: Annotated[
        str | None,
        typer.Option(
            "--secure-boot",
            metavar="auto|linux|windows|off",
            help="Secure Boot template, for generation 2; auto: as the boot loader is signed.",
        ),
    ] = None,
    size: Annotated[int | None, size_option("--size", help="Grow the disk to this size.")] = None,
    fix_gpt: Annotated[
        bool, typer.Option("--fix-gpt", help="Move the GPT's backup header to the last sector of a disk that grows.")
    ] = False,
    ignore_properties: Annotated[
        bool,
        typer.Option("--ignore-properties", help="Of an image in Glance: take nothing from its properties."),
    ] = False,
    confined: Confined = None,
    format: Format = None,
    no_sync: NoSync = False,
    jobs: Jobs = None,
) -> None:
    """Make disk, config drive and machine.json of an image.

    What an image's properties in Glance say (generation, firmware, Secure Boot, operating system, least disk and
    memory, config drive) holds as far as no option says otherwise; conflicts are told before it is fetched.
    """
    keep_freed_memory()
    machine: dict[str, Any] = {
        "cpus": cpus,
        "memory": memory,
        "switch": switch,
        "vlan": vlan,
        "generation": _generation(generation),
        "secure_boot": secure_boot,
    }
    machine = {key: value for key, value in machine.items() if value is not None}
    bundle = api.prepare(
        image,
        out,
        spec=spec,
        machine=machine or None,
        size=size,
        fix_gpt=fix_gpt,
        source_format=format,
        confined=confined,
        sync=not no_sync,
        jobs=jobs,
        allow=allow,
        ignore_properties=ignore_properties,
        progress=ui.callback(),
        **remote,
        **medium,
        **metadata,
        **guest,
    )
    for note in (*bundle.report.notes, *bundle.warnings):
        ui.warn(note)
    made, report, choice = bundle.machine, bundle.report, bundle.choice

    def human() -> str:
        rows = {
            "bundle": bundle.path,
            "machine": f"{made.name}, uuid {made.uuid}",
            "generation": f"{made.generation} ({choice.generation_reason})",
            "Secure Boot": f"{made.secure_boot} ({choice.secure_boot_reason})",
            "processors": made.cpus,
            "memory": show_size(made.memory),
            "disk": f"{made.media[0].path}, {show_size(report.virtual_size)}, verified: {report.verified}",
            "config drive": made.media[1].path if len(made.media) > 1 else "none",
            "MAC": ", ".join(nic.mac for nic in made.nics),
        }
        return (
            table(rows) + f"{_password(bundle.encrypted_password)}\n\n" + line(f"next: imagekit boot {bundle.path}")
        )

    ui.result(bundle.to_json(), human)


def _generation(text: str | None) -> object:
    return int(text) if text in ("1", "2") else text


@app.command()
@command(connection=connection_options, where=place_options)
def boot(
    ui: Ui,
    connection: dict[str, Any],
    where: dict[str, Any],
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that prepare made.", show_default=False)],
    on: Annotated[
        str,
        typer.Option(
            "--on",
            metavar="qemu|hyperv|hyperv://HOST",
            help="Where to boot: a rehearsal in QEMU, this computer's Hyper-V, or a host by WinRM.",
        ),
    ] = "qemu",
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Before a host gets anything: rehearse, and stop unless it boots.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be run; run nothing.")] = False,
    timeout: Annotated[float, typer.Option("--timeout", metavar="S", help="Give up after so many seconds.")] = 300.0,
    marker: Annotated[
        str | None, typer.Option("--marker", metavar="TEXT", help="Text the guest prints when all is well.")
    ] = None,
    accept_unknown: Annotated[
        bool, typer.Option("--accept-unknown", help="Exit 0 also when the guest says nothing readable.")
    ] = False,
    allow_network: Annotated[
        bool, typer.Option("--allow-network", help="Let the guest reach this computer's network.")
    ] = False,
    accelerator: Annotated[
        str, typer.Option("--accelerator", metavar="auto|kvm|tcg", help="How QEMU runs the guest.")
    ] = "auto",
    nic: Annotated[
        str,
        typer.Option(
            "--nic",
            metavar="auto|tulip|virtio|e1000",
            help="Network adapter of the rehearsal; tulip is the one that Hyper-V's legacy adapter emulates.",
        ),
    ] = "auto",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder for console log and screenshot; default: BUNDLE."),
    ] = None,
) -> None:
    """Boot a bundle: rehearsed in QEMU, or on a Hyper-V host.

    The bundle's files are not changed. Exit 17 when it did not boot or nobody can tell.
    """
    if accelerator not in ("auto", "kvm", "tcg"):
        raise UsageError(f"accelerator {accelerator!r}", hint="choose auto, kvm or tcg")
    host = {} if on == "qemu" else {**connection, **where, "say": ui.warn}
    if plan:
        made = api.plan_boot(
            bundle, on=on, nic=cast("NicChoice", nic), **({} if on == "qemu" else {**connection, **where})
        )
        ui.result(made.to_json(), lambda: describe_plan(made))
        return
    result = api.boot(
        bundle,
        on=on,
        rehearse=rehearse,
        timeout=timeout,
        marker=marker,
        allow_network=allow_network,
        accelerator=cast(Literal["auto", "kvm", "tcg"], accelerator),
        nic=cast("NicChoice", nic),
        out=out,
        on_event=events(ui),
        **host,
    )
    if result.backend == "hyperv":
        finish(ui, bundle, result, accept_unknown=accept_unknown)
        return
    ui.result(result.to_json(), lambda: describe_boot(result))
    if not result.accepted(accept_unknown=accept_unknown) or on != "qemu":
        raise BootFailed(
            f"verdict {result.verdict}, at stage {result.stage}",
            path=bundle,
            hint=f"look at {result.screenshot or 'the console'} and {result.console or 'at nothing: it was silent'}",
        )


def describe_boot(result: BootResult) -> str:
    """The result of a boot, for people."""
    return table(
        {
            "verdict": result.verdict,
            "stage": result.stage,
            "accelerator": result.accelerator,
            "seconds": f"{result.seconds:.1f}",
            "console": result.console,
            "screenshot": result.screenshot,
        }
    )


@app.command()
@command()
def demo(
    ui: Ui,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for the results; made anew, must not exist.")
    ] = Path("demo-out"),
) -> None:
    """A tour on an image it makes: convert, prepare, boot."""
    from imagekit.demo import run_demo

    result = run_demo(out, say=ui.say)
    ui.result(result.to_json(), lambda: f"\nThe guest says it booted. Its screen: {result.boot.screenshot}")
