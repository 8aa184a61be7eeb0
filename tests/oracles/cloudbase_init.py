"""cloudbase-init, the agent inside Windows guests, asked what it makes of a medium.

Its own search and its own services run, unchanged. What only Windows has is put in their place: a raw disk is a file
with the disk's bytes, a DVD or a mounted volume is a folder with what another program unpacked (the Joliet names of
an ISO, as Windows shows them), and its mtools are this machine's.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.oracles import need_tool, need_venv

_ASK = r'''
import json, os, subprocess, sys, types, warnings
warnings.simplefilter("ignore")
tools, questions = json.load(sys.stdin)
told = {}

class Disk:
    """What cloudbase-init's own class does with a physical drive of Windows: reads at sectors of 512 bytes."""
    fixed = True
    def __init__(self, path): self._path = path
    def __enter__(self): self._file = open(self._path, "rb"); return self
    def __exit__(self, *_): self._file.close()
    def __str__(self): return self._path
    @property
    def size(self): return os.path.getsize(self._path)
    def seek(self, offset): return self._file.seek(offset // 512 * 512)
    def read(self, size, skip=0): return self._file.read(size + skip)[skip:]
    def partitions(self): return []

disk = types.ModuleType("cloudbaseinit.utils.windows.disk")
disk.Disk = Disk
sys.modules["cloudbaseinit.utils.windows.disk"] = disk

class OsUtils:
    def get_cdrom_drives(self): return told["dvds"]
    def get_volumes(self): return told["volumes"]
    def get_physical_disks(self): return told["disks"]
    def get_volume_label(self, drive): return told["labels"].get(drive)
    def execute_process(self, args, shell=True):
        done = subprocess.run(args, capture_output=True)
        return done.stdout, done.stderr, done.returncode

from cloudbaseinit import conf
from cloudbaseinit.osutils import factory
factory.get_os_utils = OsUtils
from cloudbaseinit.metadata.services import configdrive, nocloudservice
from cloudbaseinit.metadata.services.osconfigdrive import factory as managers
from cloudbaseinit.metadata.services.osconfigdrive.windows import WindowsConfigDriveManager
managers.get_config_drive_manager = WindowsConfigDriveManager
conf.CONF([], project="cloudbase-init", default_config_files=[])
conf.CONF.set_override("bsdtar_path", tools["bsdtar"])
conf.CONF.set_override("mtools_path", tools["mtools"])
kinds = {"config": configdrive.ConfigDriveService, "nocloud": nocloudservice.NoCloudConfigDriveService}

def answer(service):
    service._metadata_file = service._metadata_file.replace("\\", "/")
    if not service.load():
        return None
    network = service.get_network_details_v2() or ((), (), ())
    user_data = service.get_user_data()
    found = {
        "instance_id": service.get_instance_id(),
        "host_name": service.get_host_name(),
        "keys": service.get_public_keys(),
        "password": service.get_admin_password(),
        "user_data": None if user_data is None else user_data.hex(),
        "links": [(link.name, link.mac_address, link.mtu) for link in network[0]],
        "networks": [
            (one.link, one.address_cidr, list(one.dns_nameservers or []),
             [(route.network_cidr, route.gateway) for route in one.routes or []])
            for one in network[1]
        ],
    }
    service.cleanup()
    return found

answers = []
for told in questions:
    try:
        answers.append(answer(kinds[told["service"]]()))
    except Exception as error:  # it found a medium, and fell over what is on it
        answers.append({"failed": repr(error)})
print(json.dumps(answers))
'''


@dataclass(frozen=True, slots=True)
class Windows:
    """What a Windows guest has: raw disks as files, DVDs and volumes as folders, with their labels.

    ``service`` is who is asked about it, ``config`` or ``nocloud``.
    """

    disks: tuple[Path, ...] = ()
    dvds: tuple[tuple[Path, str], ...] = ()
    volumes: tuple[tuple[Path, str], ...] = ()
    service: str = "config"


def ask(windows: Sequence[Windows], scratch: Path) -> list[dict[str, Any] | None]:
    """What the service finds and reads in each guest, None for nothing, ``failed`` when that is too little for it.

    ``scratch`` is a folder for its tools.
    """
    for tool in ("mlabel", "mcopy"):  # under their names there; they know their job by their name, so no links
        script = scratch / f"{tool}.exe"
        script.write_text(f'#!/bin/sh\nexec {need_tool(tool)} "$@"\n')
        script.chmod(0o755)
    told = [
        {
            "service": one.service,
            "disks": [str(path) for path in one.disks],
            "dvds": [str(path) for path, _ in one.dvds],
            "volumes": [str(path) for path, _ in one.volumes],
            "labels": {str(path): label for path, label in (*one.dvds, *one.volumes)},
        }
        for one in windows
    ]
    text = json.dumps([{"bsdtar": need_tool("bsdtar"), "mtools": str(scratch)}, told])
    command = [str(need_venv("cloudbase_init")), "-c", _ASK]
    done = subprocess.run(command, capture_output=True, text=True, input=text)
    if done.returncode != 0:
        pytest.fail(f"cloudbase-init failed: {done.stderr.strip()[-2000:]}")
    answers: list[dict[str, Any] | None] = json.loads(done.stdout.splitlines()[-1])
    return answers
