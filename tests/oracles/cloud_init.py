"""cloud-init as Debian or Ubuntu ships it, asked what it makes of a config drive.

It is not on PyPI: the package and its Python dependencies are downloaded with apt-get and unpacked into the
tests' cache; nothing is installed. The files are read the way a guest reads them, from the seed folder.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.cache import cache_dir, locked
from tests.oracles import need_tool

_SYSTEM_PYTHON = "/usr/bin/python3"  # the one that Debian's packages with C code are built for
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}

_READ = """
import json, sys
packages, folder, macs = sys.argv[1:]
sys.path.insert(0, packages)
from cloudinit import distros, helpers
from cloudinit.sources.DataSourceConfigDrive import DataSourceConfigDrive
paths = helpers.Paths({"run_dir": folder + "/run", "cloud_dir": folder})
source = DataSourceConfigDrive({}, distros.fetch("debian")("debian", {}, paths), paths)
source.known_macs = json.loads(macs)
if not source._get_data():
    sys.exit("cloud-init does not take it for a config drive")
host = source.get_hostname(fqdn=True)
user_data = source.get_userdata_raw()
print(json.dumps({
    "instance_id": source.get_instance_id(),
    "fqdn": getattr(host, "hostname", host),
    "hostname": getattr(source.get_hostname(), "hostname", source.get_hostname()),
    "keys": source.get_public_ssh_keys(),
    "user_data": (user_data or b"").hex() if isinstance(user_data, bytes) else user_data.encode().hex(),
    "meta": source.metadata.get("meta"),
    "network": source.network_config,
}))
"""

_RENDER = """
import argparse, json, os, sys
packages, jobs, macs = sys.argv[1:]
sys.path.insert(0, packages)
from cloudinit.cmd.devel import net_convert
for job in json.loads(jobs):
    if child := os.fork():  # the converter changes tables of its own, so that it runs only once
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{job} failed")
        continue
    with open(job["source"]) as source:
        net_convert.handle_args("net-convert", argparse.Namespace(
            network_data=source, kind=job["kind"], directory=job["out"], distro=job["distro"],
            mac=json.loads(macs), output_kind=job["write"], debug=False))
    os._exit(0)
"""

_NO_CLOUD = """
import json, sys
packages, folder = sys.argv[1:]
sys.path.insert(0, packages)
from cloudinit import distros, helpers
from cloudinit.sources.DataSourceNoCloud import DataSourceNoCloud
paths = helpers.Paths({"run_dir": folder + "/run", "cloud_dir": folder})
config = {"datasource": {"NoCloud": {"fs_label": None}}}
source = DataSourceNoCloud(config, distros.fetch("debian")("debian", {}, paths), paths)
if not source._get_data():
    sys.exit("cloud-init does not take it for NoCloud")
data = source.get_userdata_raw() or b""
print(json.dumps({
    "instance_id": source.get_instance_id(),
    "keys": source.get_public_ssh_keys(),
    "local_hostname": source.metadata.get("local-hostname"),
    "user_data": (data if isinstance(data, bytes) else data.encode()).hex(),
    "network": source.network_config,
}))
"""

_MERGE = """
import json, os, sys
packages, folder, distro = sys.argv[1:]
sys.path.insert(0, packages)
from cloudinit import helpers, user_data, util
from cloudinit.handlers.cloud_config import CloudConfigPartHandler
from cloudinit.handlers.jinja_template import JinjaTemplatePartHandler
from cloudinit.settings import PER_ALWAYS
paths = helpers.Paths({"run_dir": folder, "cloud_dir": folder})
with open(paths.get_runpath("instance_data_sensitive"), "w") as file:
    json.dump({"v1": {"distro": distro}}, file)
with open(folder + "/user-data", "rb") as file:
    message = user_data.UserDataProcessor(paths).process(file.read())
handler = CloudConfigPartHandler(paths)
handler.cloud_fn = folder + "/merged"
templates = JinjaTemplatePartHandler(paths, sub_handlers=[handler])
by_type = {kind: each for each in (handler, templates) for kind in each.list_types()}
handler.handle_part(None, "__begin__", None, None, None, None)
for part in message.walk():
    kind = part.get_content_type()
    if kind in by_type:
        payload = util.fully_decoded_payload(part)
        by_type[kind].handle_part(None, kind, part.get_filename(), payload, PER_ALWAYS, part)
handler.handle_part(None, "__end__", None, None, None, None)
with open(folder + "/merged") as file:
    print(json.dumps(util.load_yaml(file.read())))
"""

_CONVERT = """
import sys
packages = sys.argv.pop(1)
sys.path.insert(0, packages)
from cloudinit.cmd.main import main
sys.exit(main(sys.argv))
"""


_IDENTIFY = """
DI_MAIN=noop
. "$1"
medium=$2 offset=$3
is_container() { return 1; }
blkid() { command blkid -p -O "$offset" -o export "$medium"; }
read_fs_info
for source in ConfigDrive NoCloud; do
    if dscheck_$source; then echo "FOUND $source"; fi
done
echo ASKED
"""


def ds_identify(disk: Path, offset: int = 0) -> set[str]:
    """The data sources that ds-identify finds where the only file system is the one at ``offset`` of ``disk``."""
    script = packages().parents[1] / "cloud-init/ds-identify"
    done = subprocess.run(
        ["/bin/sh", "-c", _IDENTIFY, "sh", str(script), str(disk), str(offset)],
        capture_output=True,
        text=True,
        env=_ENVIRONMENT,
    )
    if "ASKED" not in done.stdout:
        pytest.fail(f"ds-identify failed: {done.stderr.strip()}")
    return {line.split()[1] for line in done.stdout.splitlines() if line.startswith("FOUND ")}


def read_config_drive(folder: Path, *, nics: dict[str, str]) -> dict[str, Any]:
    """What the ConfigDrive data source says; the drive's files are in ``folder``/seed/config_drive.

    ``nics`` gives the names of the guest's adapters by MAC address.
    """
    answer: dict[str, Any] = json.loads(_python(_READ, str(packages()), str(folder), json.dumps(nics)))
    return answer


def read_no_cloud(folder: Path) -> dict[str, Any]:
    """What the NoCloud data source says; the files are in ``folder``/seed/nocloud."""
    answer: dict[str, Any] = json.loads(_python(_NO_CLOUD, str(packages()), str(folder)))
    return answer


def merged_cloud_config(user_data: bytes, folder: Path, *, distro: str = "debian") -> dict[str, Any]:
    """The one cloud-config that cloud-init makes of all parts of user data; ``folder`` is for its files.

    ``distro`` is what templates are told of the guest, the ID of its os-release.
    """
    (folder / "user-data").write_bytes(user_data)
    merged: dict[str, Any] = json.loads(_python(_MERGE, str(packages()), str(folder), distro))
    return merged


def render_networks(jobs: list[dict[str, str]], *, nics: dict[str, str]) -> None:
    """Let cloud-init's own converter write a guest's network for every job, in one process.

    A job has the file ``source``, its ``kind`` (``network_data.json`` or ``yaml``), what to ``write`` (netplan, eni,
    sysconfig, network-manager), the ``distro`` that writes it, and the folder ``out``.
    """
    macs = [f"{name},{mac}" for mac, name in nics.items()]
    _python(_RENDER, str(packages()), json.dumps(jobs), json.dumps(macs))


def netplan(network_data: Path, *, out: Path, nics: dict[str, str]) -> str:
    """The netplan file that cloud-init's own converter writes for a network_data.json."""
    macs = [f"--mac={name},{mac}" for mac, name in nics.items()]
    command = ["devel", "net-convert", "-k", "network_data.json", "-p", str(network_data)]
    _python(_CONVERT, str(packages()), *command, "-d", str(out), "-D", "debian", "-O", "netplan", *macs)
    return (out / "etc/netplan/50-cloud-init.yaml").read_text(encoding="utf-8")


def _python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [_SYSTEM_PYTHON, "-I", "-c", code, *arguments], capture_output=True, text=True, env=_ENVIRONMENT
    )
    if done.returncode != 0:
        pytest.fail(f"cloud-init failed: {done.stderr.strip()}")
    return done.stdout


@functools.cache
def packages() -> Path:
    """The folder of Python packages with cloud-init in it, downloaded at first use."""
    need_tool("apt-get")
    need_tool("dpkg-deb")
    if not Path(_SYSTEM_PYTHON).exists():
        _missing(f"{_SYSTEM_PYTHON} does not exist")
    release = platform.freedesktop_os_release()
    folder = cache_dir("cloud-init") / f"{release['ID']}-{release.get('VERSION_ID', 'rolling')}"
    complete = folder / "complete"
    with locked(folder.with_suffix(".lock")):
        if not complete.exists():
            try:
                _download(folder)
            except subprocess.CalledProcessError as error:
                _missing(f"cloud-init cannot be downloaded: {error.stderr.strip()[-200:]}")
            complete.touch()
    return folder / "usr/lib/python3/dist-packages"


def _download(folder: Path) -> None:
    """Unpack cloud-init and the Python packages it depends on."""
    folder.mkdir(exist_ok=True)
    names = _dependencies()
    if not names:
        _apt("apt-get", "update")  # takes root; everything else does not
        names = _dependencies()
    if not names:
        _missing("apt knows no package cloud-init (run apt-get update)")
    _apt("apt-get", "download", *names, cwd=folder)
    for package in folder.glob("*.deb"):
        _apt("dpkg-deb", "-x", str(package), str(folder))
        package.unlink()


def _dependencies() -> list[str]:
    """Debian's names of cloud-init and of every Python package below it; empty when apt does not know it."""
    only = [f"--no-{what}" for what in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")]
    try:
        lines = _apt("apt-cache", "depends", "--recurse", *only, "cloud-init").splitlines()
    except subprocess.CalledProcessError:
        return []
    return sorted({line for line in lines if line == "cloud-init" or line.startswith("python3-")})


def _apt(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=cwd, env={**os.environ, "LC_ALL": "C"}
    )
    return done.stdout


def _missing(what: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}, and under CI no oracle may be missing", pytrace=False)
    pytest.skip(what)
