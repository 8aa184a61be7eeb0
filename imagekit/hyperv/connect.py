"""From the name of a host to the host: which transport, who we are to it, and what it is told apart.

``hyperv`` is this computer; ``hyperv://[USER@]HOST[:PORT]`` another one, by WinRM.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from imagekit.errors import UsageError
from imagekit.hyperv.credentials import find_credentials
from imagekit.hyperv.host import NoHost, RealHost
from imagekit.hyperv.local import LocalTransport
from imagekit.hyperv.request import Family, as_family
from imagekit.hyperv.stage import HyperVLauncher, StageOptions
from imagekit.hyperv.transport import Transport
from imagekit.hyperv.winrm import WHY_HTTP, Auth, WinrmTransport, parse_endpoint
from imagekit.launch.launcher import LaunchPlan
from imagekit.machine import Machine
from imagekit.records import dataclass

LOCAL = "hyperv"


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach a host."""

    on: str = LOCAL
    family: Family | Literal["auto"] = "auto"
    auth: Auth = "negotiate"
    credentials: Path | None = None
    ca_file: Path | None = None
    certificate: Path | None = None
    certificate_key: Path | None = None
    configuration: str = "Microsoft.PowerShell"
    delegate: bool = False

    @classmethod
    def of(cls, on: str, settings: Mapping[str, Any]) -> Connection:
        """The connection to ``on`` with those of ``settings`` that are about connections."""
        known = {one.name for one in fields(cls)}
        given = {key: value for key, value in settings.items() if key in known and value is not None}
        if given.get("family", "auto") != "auto":
            given["family"] = as_family(given["family"])
        return cls(on=on, **given)

    @property
    def is_local(self) -> bool:
        return self.on in (LOCAL, f"{LOCAL}://", "localhost")


def open_transport(connection: Connection, *, say: Callable[[str], None] = lambda text: None) -> Transport:
    """The way to the host; nothing is sent yet. ``say`` is told what a user should know about it."""
    if connection.is_local:
        return LocalTransport()
    endpoint = parse_endpoint(
        connection.on,
        auth=connection.auth,
        ca_file=connection.ca_file,
        certificate=connection.certificate,
        certificate_key=connection.certificate_key,
        configuration=connection.configuration,
        delegate=connection.delegate,
    )
    if not endpoint.tls:
        say(f"{endpoint.url}: {WHY_HTTP}")
    known = find_credentials(
        endpoint.host, user=endpoint.user, file=connection.credentials, needed=endpoint.needs_password
    )
    return WinrmTransport(endpoint, known)


def open_host(connection: Connection, *, say: Callable[[str], None] = lambda text: None) -> RealHost:
    """The host; its kind is found out when it is first needed."""
    family = None if connection.family == "auto" else connection.family
    return RealHost(open_transport(connection, say=say), family=family, local=connection.is_local)


def open_launcher(
    bundle: str | os.PathLike[str], on: str, *, say: Callable[[str], None] = lambda text: None, **settings: Any
) -> HyperVLauncher:
    """The stage of ``bundle`` on the host ``on``; settings are fields of Connection and StageOptions."""
    options = _stage_options(settings)
    Machine.load(bundle)  # what is no bundle is said before a password is asked for
    return HyperVLauncher(bundle, open_host(Connection.of(on, settings), say=say), options)


def plan_launch(bundle: str | os.PathLike[str], on: str, **settings: Any) -> LaunchPlan:
    """What the stage would do; no host is reached, so the kind of host is 2016 unless said otherwise."""
    connection = Connection.of(on, settings)
    if not connection.is_local:
        parse_endpoint(connection.on, auth=connection.auth)
    family: Family = "2016" if connection.family == "auto" else connection.family
    host = NoHost(on, family, connection.is_local)
    return HyperVLauncher(bundle, host, _stage_options(settings)).plan()


def is_hyperv(on: str) -> bool:
    """Whether ``on`` names a Hyper-V host, this computer or another."""
    return on == LOCAL or on.startswith((f"{LOCAL}://", f"{LOCAL}+http"))


def _stage_options(settings: Mapping[str, Any]) -> StageOptions:
    known = {one.name for one in fields(StageOptions)}
    strange = set(settings) - known - {one.name for one in fields(Connection)}
    if strange:
        raise UsageError(f"a Hyper-V host has no option {', '.join(sorted(strange))}")
    return StageOptions(**{key: value for key, value in settings.items() if key in known and value is not None})
