"""What ``enable`` opens on a driver, on a stand-in for compute-hyperv's (the real one: test_against_nova)."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from imagekit.child import Child
from imagekit.errors import UsageError
from imagekit.nova import VHDUtils, enable
from imagekit.nova.failures import OSWinException


class Manager:
    _TYPE_FOR_DISK_FORMAT: ClassVar = {"vhd": "disk", "vhdx": "disk", "iso": "dvd"}


def make_driver() -> Any:
    """Its parts share one cache, and have utilities of their own, as utilsfactory makes them."""
    kind = type("Manager", (Manager,), {"_TYPE_FOR_DISK_FORMAT": dict(Manager._TYPE_FOR_DISK_FORMAT)})
    cache = SimpleNamespace(fetch=None, _vhdutils=VHDUtils())
    operations = SimpleNamespace(_imagecache=cache, _block_dev_man=kind(), _vhdutils=VHDUtils())
    return SimpleNamespace(_vmops=operations, _imagecache=cache, capabilities={"supports_image_type_vhd": True})


def test_formats_are_disks_and_the_scheduler_is_told() -> None:
    driver = make_driver()
    enable(driver, formats=("qcow2", "raw", "vmdk"))
    types = type(driver._vmops._block_dev_man)._TYPE_FOR_DISK_FORMAT
    assert [types[one] for one in ("qcow2", "raw", "vmdk")] == ["disk"] * 3
    assert driver.capabilities["supports_image_type_vmdk"] is True
    assert driver.capabilities["supports_image_type_vhd"] is True
    assert "qcow2" not in Manager._TYPE_FOR_DISK_FORMAT
    assert callable(driver._imagecache.fetch)


def test_the_drivers_utilities_run_with_the_interpreter_that_was_named(tmp_path: Path) -> None:
    driver = make_driver()
    enable(driver, child=Child(python=str(tmp_path / "no-python")))
    for utilities in (driver._vmops._vhdutils, driver._imagecache._vhdutils):
        with pytest.raises(OSWinException, match="no-python cannot be started"):
            utilities.create_dynamic_vhd(str(tmp_path / "disk.vhdx"), 1 << 30)
    enable(driver, child=Child(python=sys.executable))
    driver._vmops._vhdutils.create_dynamic_vhd(str(tmp_path / "disk.vhdx"), 1 << 30)
    assert (tmp_path / "disk.vhdx").exists()


@pytest.mark.parametrize(
    ("driver", "options"),
    [(object(), {}), (make_driver(), {"formats": ("iso",)}), (make_driver(), {"target": "raw"})],
    ids=["no driver", "a format nobody converts", "a target Hyper-V does not start"],
)
def test_anything_else_is_a_usage_error(driver: Any, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        enable(driver, **options)
