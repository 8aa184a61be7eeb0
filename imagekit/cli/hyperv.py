"""Commands about Hyper-V hosts: the stage's steps, each alone.

    imagekit hyperv create web1 --host host1 --store D:\\VMs

Nothing is asked off a terminal, and no password is taken from the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import imagekit
from imagekit.cli.options import command
from imagekit.cli.ui import Ui, lines, table
from imagekit.errors import BootFailed, ImagekitError
from imagekit.progress import Control

if TYPE_CHECKING:
    from imagekit.hyperv.stage import HyperVLauncher
    from imagekit.launch.launcher import LaunchPlan
    from imagekit.launch.result import BootResult, Evidence

app = typer.Typer(
    name="hyperv",
    help="A prepared bundle on a Hyper-V host, step by step.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that prepare made.", show_default=False)]
Host = Annotated[
    str,
    typer.Option(
        "--host",
        metavar="[USER@]HOST[:PORT]",
        envvar="IMAGEKIT_HYPERV_HOST",
        help="The host, by WinRM; this computer unless given. Port 5985 is HTTP with sealed messages.",
        show_default=False,
    ),
]
Timeout = Annotated[float, typer.Option("--timeout", metavar="S", help="Give up after so many seconds.")]
Marker = Annotated[
    str | None, typer.Option("--marker", metavar="TEXT", help="Text the guest prints when all is well.")
]
AcceptUnknown = Annotated[
    bool, typer.Option("--accept-unknown", help="Exit 0 also when the guest says nothing readable.")
]


def connection_options(
    auth: Annotated[
        str,
        typer.Option(
            "--auth",
            metavar="negotiate|ntlm|kerberos|credssp|certificate|basic",
            envvar="IMAGEKIT_HYPERV_AUTH",
            help="How to log in. User and password: IMAGEKIT_HYPERV_USER and _PASSWORD, a file, the keyring.",
        ),
    ] = "negotiate",
    credentials: Annotated[
        Path | None,
        typer.Option("--credentials", metavar="FILE", help="File with the lines user=… and password=…, mode 600."),
    ] = None,
    ca_file: Annotated[
        Path | None,
        typer.Option(
            "--ca-file", metavar="FILE", envvar="IMAGEKIT_HYPERV_CA_FILE", help="Certificates to trust, PEM."
        ),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option("--certificate", metavar="FILE", help="Our certificate, PEM.")
    ] = None,
    certificate_key: Annotated[
        Path | None, typer.Option("--certificate-key", metavar="FILE", help="Its key, PEM.")
    ] = None,
    configuration: Annotated[
        str, typer.Option("--configuration", metavar="NAME", help="Session configuration, such as a JEA endpoint.")
    ] = "Microsoft.PowerShell",
    delegate: Annotated[
        bool, typer.Option("--delegate", help="Let the host act as us towards a share (Kerberos).")
    ] = False,
    family: Annotated[
        str,
        typer.Option(
            "--family", metavar="auto|2008r2|2012|2012r2|2016", help="Kind of host; auto asks it. 2016: and later."
        ),
    ] = "auto",
) -> dict[str, Any]:
    """How to reach a host, as keywords of the library."""
    return {
        "auth": auth,
        "credentials": credentials,
        "ca_file": ca_file,
        "certificate": certificate,
        "certificate_key": certificate_key,
        "configuration": configuration,
        "delegate": delegate,
        "family": family,
    }


def place_options(
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            metavar="FOLDER",
            envvar="IMAGEKIT_HYPERV_STORE",
            help=r"Folder on the host for machines (D:\VMs); default: the host's own.",
        ),
    ] = None,
    share: Annotated[
        Path | None,
        typer.Option(
            "--share",
            metavar="FOLDER",
            envvar="IMAGEKIT_HYPERV_SHARE",
            help="That same folder as this computer reaches it; needed for files of 64 MiB and more.",
        ),
    ] = None,
    journal: Annotated[
        Path | None,
        typer.Option("--journal", metavar="FILE", help="What was made where; default: in BUNDLE."),
    ] = None,
) -> dict[str, Any]:
    """Where a machine goes, as keywords of the library."""
    return {"store": store, "share": share, "journal": journal}


def as_target(host: str) -> str:
    """What ``--host`` names, as ``--on`` would."""
    if not host:
        return "hyperv"
    return host if "://" in host else f"hyperv://{host}"


def open_stage(
    ui: Ui, bundle: Path, on: str, connection: dict[str, Any], where: dict[str, Any], **options: Any
) -> HyperVLauncher:
    from imagekit.hyperv.connect import open_launcher

    control = Control(ui.callback())
    return open_launcher(bundle, on, say=ui.warn, control=control, **connection, **where, **options)


def run_step(ui: Ui, stage: HyperVLauncher, step: Callable[[], None]) -> None:
    """Take a step, print what it did."""
    try:
        step()
    except ImagekitError:
        for line in stage.outcome.done:
            ui.say(f"was done: {line}")
        raise
    finally:
        stage.close()
    ui.result(stage.outcome.to_json(), lines(stage.outcome.done))


@app.command()
@command(connection=connection_options, where=place_options)
def plan(
    ui: Ui,
    connection: dict[str, Any],
    where: dict[str, Any],
    bundle: Bundle,
    host: Host = "",
    scripts: Annotated[bool, typer.Option("--scripts", help="Print the scripts' text too.")] = False,
) -> None:
    """Print every script and its data; nothing is sent.

    Needs --store, and --family where it is not 2016 or later: no host is asked.
    """
    from imagekit.hyperv.connect import plan_launch

    made = plan_launch(bundle, as_target(host), **connection, **where)
    ui.result(made.to_json(), lambda: describe_plan(made, scripts=scripts))


@app.command()
@command(connection=connection_options, where=place_options)
def push(ui: Ui, connection: dict[str, Any], where: dict[str, Any], bundle: Bundle, host: Host = "") -> None:
    """Bring the bundle's files to the host, checked there."""
    stage = open_stage(ui, bundle, as_target(host), connection, where)
    run_step(ui, stage, stage.push)


@app.command()
@command(connection=connection_options, where=place_options)
def create(ui: Ui, connection: dict[str, Any], where: dict[str, Any], bundle: Bundle, host: Host = "") -> None:
    """Push, and make the machine; complete or not at all."""
    stage = open_stage(ui, bundle, as_target(host), connection, where)
    run_step(ui, stage, stage.create)


@app.command()
@command(connection=connection_options, where=place_options)
def start(ui: Ui, connection: dict[str, Any], where: dict[str, Any], bundle: Bundle, host: Host = "") -> None:
    """Switch the machine on."""
    stage = open_stage(ui, bundle, as_target(host), connection, where)
    run_step(ui, stage, stage.start)


@app.command()
@command(connection=connection_options, where=place_options)
def wait(
    ui: Ui,
    connection: dict[str, Any],
    where: dict[str, Any],
    bundle: Bundle,
    host: Host = "",
    timeout: Timeout = 300.0,
    marker: Marker = None,
    accept_unknown: AcceptUnknown = False,
) -> None:
    """Watch the machine and say how far it came: running, heartbeat, address, serial text, ARP."""
    options = {"marker": marker, "on_event": events(ui)}
    stage = open_stage(ui, bundle, as_target(host), connection, where, **options)
    try:
        result = stage.wait(timeout)
    finally:
        stage.close()
    finish(ui, bundle, result, accept_unknown=accept_unknown)


@app.command()
@command(connection=connection_options, where=place_options)
def stop(
    ui: Ui,
    connection: dict[str, Any],
    where: dict[str, Any],
    bundle: Bundle,
    host: Host = "",
    force: Annotated[bool, typer.Option("--force", help="Switch off without asking the guest.")] = False,
) -> None:
    """Shut the machine down."""
    stage = open_stage(ui, bundle, as_target(host), connection, where)
    run_step(ui, stage, lambda: stage.stop(force=force))


@app.command()
@command(connection=connection_options, where=place_options)
def eject(ui: Ui, connection: dict[str, Any], where: dict[str, Any], bundle: Bundle, host: Host = "") -> None:
    """Take the config drive out, after the first boot."""
    stage = open_stage(ui, bundle, as_target(host), connection, where)
    run_step(ui, stage, stage.eject)


@app.command()
@command(connection=connection_options, where=place_options)
def delete(ui: Ui, connection: dict[str, Any], where: dict[str, Any], bundle: Bundle, host: Host = "") -> None:
    """Remove the machine, and the files that its journal names."""
    stage = open_stage(ui, bundle, as_target(host), connection, where)
    run_step(ui, stage, stage.delete)


@app.command()
@command(connection=connection_options)
def selftest(
    ui: Ui,
    connection: dict[str, Any],
    host: Host = "",
    disk: Annotated[
        Path | None,
        typer.Option("--disk", metavar="FILE", help="A VHD or VHDX: the host attaches it read-only and hashes it."),
    ] = None,
    disk_there: Annotated[
        str | None,
        typer.Option(
            "--disk-there", metavar="PATH", help="Where that disk is on the host, if that is another computer."
        ),
    ] = None,
) -> None:
    """Look at a host, changing nothing: versions, parameters, switches, volumes, rights.

    With --output json it is made to be posted: no names of people, no secrets.
    """
    from imagekit.hyperv.connect import Connection, open_host
    from imagekit.hyperv.selftest import run_selftest

    target = open_host(Connection.of(as_target(host), connection), say=ui.warn)
    try:
        report = run_selftest(target, disk=disk, there=disk_there, progress=ui.callback())
    finally:
        target.close()
    ui.result({"imagekit": imagekit.__version__, **report.to_json()}, report.describe)
    report.judge()


def events(ui: Ui) -> Callable[[Evidence], None] | None:
    """Who is told of evidence as it comes in."""
    if ui.quiet or ui.progress == "none":
        return None
    return lambda event: ui.say(f"{event.second:7.1f} s  {event.stage:<10}  {event.line}")


def finish(ui: Ui, bundle: Path, result: BootResult, *, accept_unknown: bool) -> None:
    """Print a boot on a host; BootFailed unless it is accepted."""
    ui.result(result.to_json(), lambda: describe_boot(result))
    if not result.accepted(accept_unknown=accept_unknown):
        silent = "the console was silent or could not be read"
        raise BootFailed(
            f"verdict {result.verdict}, at stage {result.stage}",
            path=bundle,
            hint=f"look at {result.console}" if result.console else silent,
        )


def describe_boot(result: BootResult) -> str:
    rows = {"verdict": result.verdict, "stage": result.stage, **result.checks}
    rows |= {"addresses": ", ".join(result.addresses) or "none known", "seconds": f"{result.seconds:.1f}"}
    return table({**rows, "console": result.console})


def describe_plan(plan: LaunchPlan, *, scripts: bool = False) -> str:
    """A plan for people: each step, what it runs, what it is told."""
    import json
    import shlex

    told = [f"plan for {plan.target} ({plan.backend}); nothing is sent"]
    for number, step in enumerate(plan.steps, 1):
        told += ["", f"{number}. {step.name}: {step.does}"]
        if step.command:
            told.append(f"   {shlex.join(step.command)}")
        if step.script_name:
            told.append(f"   script {step.script_name}")
        if step.data is not None:
            told += ["   " + line for line in json.dumps(step.data, indent=2, ensure_ascii=False).splitlines()]
        if scripts and step.script:
            told += ["   | " + line for line in step.script.splitlines()]
    for note in plan.notes:
        told += ["", f"note: {note}"]
    return lines(told)
