"""Runs in an environment with Nova 27, compute-hyperv 16 and os-win 5.9: their real code, on our utilities.

One line of JSON in: what to do. One out: what came of it. What only Windows has is stood in for, nothing else: the
version of Windows, its file copy, and a machine that is not there.
"""

# mypy: ignore-errors
# ruff: noqa: E402, I001
from __future__ import annotations

import builtins
import json
import shutil
import sys
import types
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
builtins.WindowsError = type("WindowsError", (OSError,), {})  # type: ignore[attr-defined]

asked = json.loads(sys.stdin.readline())

if asked.get("eventlet"):
    import eventlet

    eventlet.monkey_patch(os=False)

from os_win import _utils as os_win_utils
from os_win import exceptions as os_win_exceptions
from os_win import utilsfactory
from os_win.utils import hostutils
from os_win.utils import pathutils as os_win_pathutils

utilsfactory.utils_map["vhdutils"] = [{"path": "imagekit.nova.VHDUtils"}]
utilsfactory.utils.get_windows_version = lambda: "10.0.20348"


def copy(self, source, target, fail_if_exists=True):
    if fail_if_exists and Path(target).exists():
        raise OSError(f"exists: {target}")
    # In a thread of the system's, as os-win calls Windows.
    os_win_utils.avoid_blocking_call(shutil.copyfile, source, target)


os_win_pathutils.PathUtils.copy = copy

from nova import exception, objects
from nova.conf import CONF
from nova.virt import images
from oslo_concurrency import lockutils
from compute_hyperv.nova import block_device_manager, driver as driver_module, imagecache, migrationops, pathutils
from compute_hyperv.nova import snapshotops, vmops

import imagekit.nova

CONF([], project="nova")
CONF.set_override("instances_path", asked["instances"])
CONF.set_override("use_cow_images", asked.get("cow", True))
CONF.set_override("max_concurrent_disk_ops", asked.get("disk_ops", 0), group="compute")
lockutils.set_defaults(asked["instances"])
objects.register_all()


def no_machine(self, name):
    raise os_win_exceptions.HyperVVMNotFoundException(vm_name=name)


import os_win.utils.compute.vmutils10 as vmutils10

vmutils10.VMUtils10.get_vm_config_root_dir = no_machine
vmutils10.VMUtils10.__init__ = lambda self, *args, **more: None
hostutils.HostUtils.__init__ = lambda self, *args, **more: None

fetches = []


def fetch(context, image_id, path, trusted_certs=None):
    fetches.append(image_id)
    # A second name, not a copy: Nova downloads in a way that lets others work, a copy here would not.
    Path(path).hardlink_to(asked["images"][image_id]["path"])


images.fetch = fetch
images.get_info = lambda context, image_id: {"disk_format": asked["images"][image_id]["disk_format"]}


def instance(name, image_id, root_gb, old_flavor=None):
    return types.SimpleNamespace(
        name=name,
        uuid=asked.get("uuid", "8f2a6d5c-9d3e-4a54-8d4e-0f9b8d1f1c11"),
        image_ref=image_id,
        flavor=types.SimpleNamespace(root_gb=root_gb),
        old_flavor=old_flavor,
        vm_state="building",
        trusted_certs=None,
        system_metadata={"image_disk_format": asked["images"][image_id]["disk_format"]},
    )


def make_driver():
    paths = pathutils.PathUtils()
    utils = utilsfactory.get_vhdutils()
    assert type(utils) is imagekit.nova.VHDUtils, type(utils)
    cache = imagecache.ImageCache()
    blocks = block_device_manager.BlockDeviceInfoManager.__new__(block_device_manager.BlockDeviceInfoManager)
    ops = vmops.VMOps.__new__(vmops.VMOps)
    ops._vhdutils, ops._pathutils, ops._imagecache, ops._block_dev_man = utils, paths, cache, blocks
    moves = migrationops.MigrationOps.__new__(migrationops.MigrationOps)
    moves._vhdutils, moves._pathutils, moves._imagecache = utils, paths, cache
    snaps = snapshotops.SnapshotOps.__new__(snapshotops.SnapshotOps)
    snaps._vhdutils, snaps._pathutils = utils, paths
    made = driver_module.HyperVDriver.__new__(driver_module.HyperVDriver)
    made._vmops, made._imagecache, made._migrationops, made._snapshotops = ops, cache, moves, snaps
    return made


def spawn(driver, name, image_id, root_gb):
    (Path(asked["instances"]) / name).mkdir(exist_ok=True)
    return driver._vmops._create_root_vhd(None, instance(name, image_id, root_gb))


def run():
    driver = make_driver()
    imagekit.nova.enable(driver, target=asked.get("target", "vhdx"))
    task, out = asked["task"], {}
    if task == "spawn":
        out["root"] = spawn(driver, "web1", asked["image"], asked["root_gb"])
        out["again"] = spawn(driver, "web2", asked["image"], asked["root_gb"])
        out["types"] = sorted(block_device_manager.BlockDeviceInfoManager._TYPE_FOR_DISK_FORMAT)
        out["capabilities"] = {key: value for key, value in driver.capabilities.items() if "image_type" in key}
    elif task == "cached":
        out["path"] = driver._vmops._imagecache.get_cached_image(
            None, instance("web1", asked["image"], asked["root_gb"])
        )
    elif task == "snapshot":
        out["root"] = spawn(driver, "web1", asked["image"], asked["root_gb"])
        uploaded = []
        snaps = driver._snapshotops
        snaps._vmutils = types.SimpleNamespace(
            take_vm_snapshot=lambda name: "checkpoint", remove_vm_snapshot=lambda path: None
        )

        def keep(context, image_id, path):
            shutil.copyfile(path, asked["upload"])
            uploaded.append(snaps._vhdutils.get_vhd_format(path).lower())

        snaps._save_glance_image = keep
        snaps._snapshot(None, instance("web1", asked["image"], asked["root_gb"]), "id", lambda **_: None)
        out["uploaded"] = uploaded
    elif task == "resize":
        out["root"] = spawn(driver, "web1", asked["image"], asked["root_gb"])
        info = driver._vmops._vhdutils.get_vhd_info(out["root"])
        driver._migrationops._check_resize_vhd(out["root"], info, asked["new_gb"] * 2**30)
        out["size"] = driver._vmops._vhdutils.get_vhd_size(out["root"])["VirtualSize"]
    elif task == "signatures":
        out.update(signatures())
    elif task == "heartbeat":
        out.update(heartbeat(lambda name: spawn(driver, name, asked["image"], asked["root_gb"])))
    elif task == "library heartbeat":
        out.update(heartbeat(from_the_library()))
    out["fetches"] = fetches
    return out


def signatures():
    """Name → parameters with defaults, of os-win's class and of ours."""
    import inspect

    from os_win.utils.storage.virtdisk.vhdutils import VHDUtils

    def parameters(kind, name):
        function = getattr(kind, name, None)
        return function and [[one.name, repr(one.default)] for one in inspect.signature(function).parameters.values()]

    names = [name for name, value in vars(VHDUtils).items() if callable(value) and not name.startswith("_")]
    return {
        "theirs": {name: parameters(VHDUtils, name) for name in names},
        "ours": {name: parameters(imagekit.nova.VHDUtils, name) for name in names},
    }


def from_the_library():
    """A root disk made by imagekit's own cache and functions, without compute-hyperv."""
    from imagekit.cache import ImageCache
    from imagekit.nova import prepare_root

    folder = Path(asked["instances"])
    cache = ImageCache(folder / "_base", instances=(folder,))
    cache.folder.mkdir()

    def make(name):
        (folder / name).mkdir()

        def fetched(path):
            fetch(None, asked["image"], path)

        target = folder / name / f"root.{asked.get('target', 'vhdx')}"
        return str(prepare_root(cache, asked["image"], fetched, target, size=asked["root_gb"] * 2**30).path)

    return make


def heartbeat(make):
    """How late a 50 ms heartbeat comes while instances are spawned by green threads and an image is converted."""
    import time

    import eventlet

    late, stop = [], []

    def beat():
        while not stop:
            wanted = time.monotonic() + 0.05
            eventlet.sleep(0.05)
            late.append(time.monotonic() - wanted)

    beating = eventlet.spawn(beat)
    eventlet.sleep(0)
    started = time.monotonic()
    workers = [eventlet.spawn(make, f"web{number}") for number in range(10)]
    roots = [worker.wait() for worker in workers]
    spent = time.monotonic() - started
    stop.append(True)
    beating.wait()
    return {"roots": roots, "latest": max(late), "beats": len(late), "seconds": spent}


try:
    answer = run()
except exception.NovaException as error:
    answer = {"nova_exception": type(error).__name__, "message": str(error), "fetches": fetches}
except os_win_exceptions.OSWinException as error:
    answer = {"os_win_exception": type(error).__name__, "message": str(error), "fetches": fetches}
print(json.dumps(answer))
