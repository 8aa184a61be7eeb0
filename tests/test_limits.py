"""Limits: each one stops what is above it, by its own rule, wherever it is set."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path

import pytest

import imagekit
from fixtures import qcow2_images, vhd_images
from imagekit.errors import UnsafeImage, UsageError
from imagekit.limits import RUN_MEMORY, Limits
from imagekit.policy import RULES
from imagekit.progress import Control
from imagekit.sources import Reading, open_source
from tests.disks import noise
from tests.test_cli import imagekit as command

KiB, MiB = 1 << 10, 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A dynamic VHD of 8 MiB: every other block of 512 KiB holds data."""
    blocks = {number: noise(512 * KiB, number) for number in range(0, 16, 2)}
    path = tmp_path / "disk.vhd"
    path.write_bytes(vhd_images.dynamic(8 * MiB, blocks, block_size=512 * KiB))
    return path


@pytest.mark.parametrize("confined", [False, True], ids=["here", "confined"])
@pytest.mark.parametrize(
    ("limits", "rule"),
    [
        (Limits(virtual_size=8 * MiB - 1), "limit-virtual-size"),
        (Limits(output_bytes=4 * MiB - 1), "limit-output-bytes"),
        (Limits(metadata_memory=16 * 28 - 1), "limit-metadata-memory"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_limit_refuses_by_its_own_name(
    image: Path, no_leftovers: Path, limits: Limits, rule: str, confined: bool
) -> None:
    with pytest.raises(UnsafeImage, match=rule) as caught:
        imagekit.convert(image, no_leftovers / "disk.vhd", limits=limits, confined=confined, sync=False)
    assert (caught.value.rule, rule in RULES) == (rule, True)


def test_what_is_just_within_the_limits_is_converted(image: Path, tmp_path: Path) -> None:
    limits = Limits(virtual_size=8 * MiB, output_bytes=4 * MiB, metadata_memory=8 * RUN_MEMORY)
    report = imagekit.convert(image, tmp_path / "out.vhd", block_size=512 * KiB, limits=limits, sync=False)
    assert report.data_bytes == 4 * MiB


def test_a_plan_in_too_many_pieces_is_refused(image: Path, no_leftovers: Path) -> None:
    limits = Limits(metadata_memory=8 * RUN_MEMORY - 1)
    with pytest.raises(UnsafeImage, match="more than 7 runs"):
        imagekit.convert(image, no_leftovers / "out.vhd", block_size=512 * KiB, limits=limits, sync=False)


def test_preallocated_output_counts_whole(image: Path, no_leftovers: Path) -> None:
    with pytest.raises(UnsafeImage, match="limit-output-bytes"):
        imagekit.convert(
            image, no_leftovers / "disk.raw", limits=Limits(output_bytes=4 * MiB), preallocate=True, sync=False
        )


def test_what_takes_too_long_is_refused() -> None:
    control = Control().within(0.0)
    time.sleep(0.01)
    with pytest.raises(UnsafeImage, match="limit-seconds"):
        control.check()
    assert control.within(60).deadline == control.deadline, "a later end does not replace an earlier one"


def test_the_look_at_all_tables_ends_with_the_time(image: Path) -> None:
    """Also where there are no bytes of a guest yet."""
    late = Control().within(0.0)
    time.sleep(0.01)
    with open_source(image, control=late):
        pass
    with pytest.raises(UnsafeImage, match="limit-seconds"):
        open_source(image, Reading(deep=True), control=late)


def test_info_shows_what_convert_refuses(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(qcow2_images.make(qcow2_images.Recipe(size=2 * MiB)).data)
    found = imagekit.info(path, limits=Limits(virtual_size=MiB))
    assert [finding.rule for finding in found.findings] == ["limit-virtual-size"]


def test_limits_come_from_the_environment_too(image: Path) -> None:
    done = command(
        *("convert", str(image), "out.raw", "--output", "json"),
        cwd=image.parent,
        env={"IMAGEKIT_LIMIT_VIRTUAL_SIZE": "4M"},
    )
    record = json.loads(done.stderr.splitlines()[-1])
    assert (done.returncode, "limit-virtual-size" in record["message"]) == (13, True)
    assert Limits.from_environment({"IMAGEKIT_LIMIT_SECONDS": "90"}) == Limits(seconds=90)
    with pytest.raises(UsageError, match="IMAGEKIT_LIMIT_SECONDS"):
        Limits.from_environment({"IMAGEKIT_LIMIT_SECONDS": "soon"})


def test_limits_can_be_pickled_and_must_let_something_through() -> None:
    limits = Limits(seconds=5)
    assert pickle.loads(pickle.dumps(limits)) == limits
    with pytest.raises(UsageError, match="metadata-memory"):
        Limits(metadata_memory=0)
