"""What the import plugin has done in a process of its own; the plugin itself runs in tests/test_against_glance.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import imagekit
from fixtures.qcow2_images import Plain, Recipe, make
from imagekit.child import Child
from imagekit.errors import CorruptImage, ImagekitError, UnsafeImage
from imagekit.formats.base import MiB
from imagekit.glance.importing import import_image
from imagekit.launch.tiny_guest import write_tiny_guest
from tests.disks import noise

IDENTIFIER = "6f9c1d2e-0b1a-4c3d-8e5f-001122334455"


def asked(source: Path, target: Path, **more: Any) -> dict[str, Any]:
    return {
        "source": str(source),
        "target": str(target),
        "stated_format": "qcow2",
        "target_format": target.suffix[1:],
        "identifier": IDENTIFIER,
        "limits": {},
        **more,
    }


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    """As it lies in the staging area: a name without a suffix."""
    path = tmp_path / IDENTIFIER
    path.write_bytes(make(Recipe(size=8 * MiB, clusters={3: Plain(noise(65536))})).data)
    return path


@pytest.mark.parametrize("target", ["vhd", "vhdx"])
def test_the_result_is_the_images_content_and_says_its_sizes(staged: Path, tmp_path: Path, target: str) -> None:
    made = tmp_path / f"{IDENTIFIER}.{target}"
    found = Child().run("import_image", asked(staged, made))
    assert (found["size"], found["virtual-size"]) == (made.stat().st_size, 8 * MiB)
    assert imagekit.compare(staged, made).same
    assert found["properties"] == {}  # nothing on it boots
    again = tmp_path / f"again.{target}"
    import_image(**asked(staged, again))
    assert again.read_bytes() == made.read_bytes()


def test_what_the_disk_shows_becomes_properties(tmp_path: Path) -> None:
    write_tiny_guest(tmp_path / "tiny")
    found = import_image(**asked(tmp_path / "tiny", tmp_path / "tiny.vhdx", stated_format="raw"))
    assert found["properties"] == {"hw_machine_type": "hyperv-gen1"}


@pytest.mark.parametrize(
    ("more", "cut", "error"),
    [
        ({"stated_format": "raw"}, None, UnsafeImage),
        ({"stated_format": "vhd"}, None, UnsafeImage),
        ({"limits": {"virtual_size": MiB}}, None, UnsafeImage),
        ({"limits": {"output_bytes": 1000}}, None, UnsafeImage),
        ({}, 70000, CorruptImage),
    ],
    ids=["raw", "vhd", "virtual-size", "output-bytes", "torn"],
)
def test_what_is_refused_leaves_no_target(
    staged: Path, no_leftovers: Path, more: dict[str, Any], cut: int | None, error: type[ImagekitError]
) -> None:
    if cut is not None:
        staged.write_bytes(staged.read_bytes()[:cut])
    with pytest.raises(error):
        import_image(**asked(staged, no_leftovers / "target.vhdx", **more))
