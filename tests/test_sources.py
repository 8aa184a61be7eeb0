"""Sources: opened once, judged, and watched for changes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from fixtures import vhd_images
from fixtures.qcow2_images import Plain, Recipe, Snapshot, make
from imagekit.errors import (
    CorruptImage,
    ImagekitError,
    InvalidImage,
    SourceError,
    UnknownFormat,
    UnsafeImage,
    UnsupportedFeature,
)
from imagekit.formats import qcow2_check
from imagekit.formats.base import OpenOptions, Problem
from imagekit.formats.files import MemoryFile
from imagekit.sources import Reading, located, open_source
from tests.disks import content, md5, noise
from tests.samples import sample, sample_facts

K64 = 1 << 16
RECIPE = Recipe(size=4 * K64, clusters={0: Plain(noise(K64))})
BACKED = Recipe(size=K64, backing="/etc/passwd")


def written(folder: Path, data: bytes, name: str = "image") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def test_an_image_is_opened_as_what_it_is_whatever_its_name(tmp_path: Path) -> None:
    with open_source(written(tmp_path, make(RECIPE).data, "disk.vhd")) as source:
        assert source.format == "qcow2"
        assert content(source.image) == RECIPE.content()
        assert source.findings == ()
        source.check_unchanged()


def test_a_fixed_vhd_is_no_raw_disk_with_a_tail(tmp_path: Path) -> None:
    with open_source(written(tmp_path, vhd_images.fixed(noise(K64)))) as source:
        assert (source.format, source.image.virtual_size) == ("vhd", K64)


def test_what_no_format_claims_is_raw(tmp_path: Path) -> None:
    with open_source(written(tmp_path, noise(1000))) as source:
        assert (source.format, source.image.virtual_size) == ("raw", 1000)


def test_declared_raw_takes_the_bytes_as_they_are_and_says_so(tmp_path: Path) -> None:
    data = make(BACKED).data
    with open_source(written(tmp_path, data), Reading(declared="raw")) as source:
        assert content(source.image) == data
        assert [finding.rule for finding in source.findings] == ["declared-raw"]


@pytest.mark.parametrize(
    ("data", "declared", "rule"),
    [
        (make(BACKED).data, None, "backing-file"),
        (make(Recipe(size=K64, data_file="/dev/sda")).data, None, "data-file"),
        (vhd_images.differencing(1 << 22, "parent.vhd"), None, "parent-file"),
        (make(RECIPE).data + vhd_images.Footer(size=512, disk_type=2).bytes(), None, "ambiguous"),
        (make(RECIPE).data, "vhd", "format-mismatch"),
        (make(Recipe(size=K64, incompatible=1 << 40)).data, None, "unknown-feature"),
        (make(Recipe(size=K64, incompatible=2)).data, None, "corrupt-bit"),
        (make(RECIPE).poked(32, 2, 4).data, None, "encrypted"),
    ],
)
def test_what_the_policy_refuses_is_described_if_only_asked_about(
    data: bytes, declared: str | None, rule: str, tmp_path: Path
) -> None:
    """`info` opens what `convert` refuses, and tells the finding."""
    path = written(tmp_path, data)
    with pytest.raises(UnsafeImage) as caught:
        open_source(path, Reading(declared=declared))
    assert (caught.value.rule, caught.value.path) == (rule, str(path))
    if rule != "format-mismatch":
        with open_source(path, Reading(declared=declared, allow=None)) as source:
            assert rule in [finding.rule for finding in source.findings]
            assert source.image.info().virtual_size


def test_what_the_caller_allows_is_opened(tmp_path: Path) -> None:
    path = written(tmp_path, make(Recipe(size=K64, incompatible=2)).data)
    with open_source(path, Reading(allow=frozenset({"corrupt-bit"}))) as source:
        assert [finding.rule for finding in source.findings] == ["corrupt-bit"]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", UnknownFormat),
        (b"vhdxfile" + bytes(1000), InvalidImage),
        (b"QED\0" + bytes(1000), UnsupportedFeature),
        (b"KDMV" + bytes(1000), UnsupportedFeature),
        (b"QFI\xfb\0\0\0\1" + bytes(1000), UnsupportedFeature),
        (make(RECIPE).data[: 3 * K64], CorruptImage),
    ],
    ids=["empty", "vhdx", "qed", "vmdk", "qcow1", "truncated"],
)
def test_what_cannot_be_opened_is_an_error_with_the_files_name(
    data: bytes, kind: type[Exception], tmp_path: Path
) -> None:
    path = written(tmp_path, data)
    with pytest.raises(kind) as caught:
        open_source(path)
    assert str(path) in str(caught.value)


def test_an_image_that_is_refused_is_closed_again(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("/proc")
    path = written(tmp_path, make(BACKED).data)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(UnsafeImage):
            open_source(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --- changes ---------------------------------------------------------------------------------------------------


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"x")


def _replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be changed there")
@pytest.mark.parametrize(
    "change",
    [_overwrite, lambda path: os.truncate(path, 100), lambda path: os.truncate(path, 1 << 20), _replace, os.unlink],
    ids=["overwritten", "cut", "grown", "replaced", "removed"],
)
def test_a_source_that_changed_is_noticed(change: object, tmp_path: Path) -> None:
    path = written(tmp_path, noise(K64))
    os.utime(path, (1, 1))
    with open_source(path) as source:
        source.check_unchanged()
        assert callable(change)
        change(path)
        with pytest.raises(SourceError, match="changed while it was read") as caught:
            source.check_unchanged()
    assert caught.value.hint is not None


def test_reading_is_no_change(tmp_path: Path) -> None:
    path = written(tmp_path, make(RECIPE).data)
    with open_source(path) as source:
        content(source.image)
        path.read_bytes()
        source.check_unchanged()


def test_an_error_gets_the_name_of_the_file_it_is_about_unless_it_has_one() -> None:
    with pytest.raises(CorruptImage, match="here: broken"), located(MemoryFile(name="here")):
        raise CorruptImage("broken")
    with pytest.raises(CorruptImage, match="there: broken"), located(MemoryFile(name="here")):
        raise CorruptImage("broken", path="there")


# --- real images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rule"),
    [("fat-differential.vhd", "parent-file"), ("win8-child.vhd", "parent-file")],
)
def test_a_real_differencing_disk_is_refused_and_described(name: str, rule: str) -> None:
    path = sample(name)
    with pytest.raises(UnsafeImage) as caught:
        open_source(path)
    assert caught.value.rule == rule
    with open_source(path, Reading(allow=None)) as source:
        assert source.image.info().subformat == "differencing"
        assert source.image.info().references[0].name.endswith((".vhd", "fat-parent.vhd"))


@pytest.mark.parametrize("name", ["image.vhd", "afl5.img", "image.qcow", "afl9.vmdk"])
def test_a_real_image_that_cannot_be_read_is_refused_in_words(name: str) -> None:
    with pytest.raises((CorruptImage, UnsupportedFeature)) as caught:
        open_source(sample(name))
    assert len(str(caught.value)) > 20
    assert sample_facts(name).note


@pytest.mark.parametrize("name", ["disk.vhd", "disk.QCOW2", "disk.vhdx", "disk.vmdk"])
def test_a_name_that_promises_a_format_which_is_not_there_is_refused(tmp_path: Path, name: str) -> None:
    """A fixed VHD cut short has no footer any more, and would pass for raw."""
    path = tmp_path / name
    path.write_bytes(bytes(4096))
    with pytest.raises(UnsafeImage) as caught:
        open_source(path)
    assert caught.value.rule == "name-mismatch"
    with open_source(path, Reading(declared="raw")) as source:
        assert source.format == "raw"
    with open_source(path, Reading(allow=None)) as source:
        assert [finding.rule for finding in source.findings] == ["name-mismatch"]


def test_an_empty_file_is_called_empty_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    path.touch()
    with pytest.raises(UnknownFormat, match="empty"):
        open_source(path)


def test_a_snapshot_is_read_as_the_disk_was_then(tmp_path: Path) -> None:
    then, now = Plain(noise(K64, 1)), Plain(noise(K64, 2))
    before = Snapshot("1", "before", clusters={1: then, 2: then})
    recipe = Recipe(size=4 * K64, clusters={1: now}, snapshots=(before,))
    path = written(tmp_path, make(recipe).data, "disk.qcow2")
    with open_source(path) as source:
        assert md5(content(source.image)) == md5(recipe.content())
    with open_source(path, Reading(view=OpenOptions(snapshot="before"))) as source:
        assert md5(content(source.image)) == md5(recipe.content(before))
    with pytest.raises(ImagekitError, match="after") as caught:
        open_source(path, Reading(view=OpenOptions(snapshot="after")))
    assert "before" in str(caught.value.hint)
    with pytest.raises(UnsupportedFeature, match="have no choice of snapshot"):
        open_source(written(tmp_path, noise(1024), "disk.raw"), Reading(view=OpenOptions(snapshot="before")))


# --- what no check could go through ----------------------------------------------------------------------------


def _on_many_windows(tmp_path: Path, patch: pytest.MonkeyPatch) -> Path:
    patch.setattr(qcow2_check, "WINDOW", 8)
    patch.setattr(qcow2_check, "MAX_WINDOWS", 3)
    clusters = {at: Plain(noise(512)) for at in range(50)}
    return written(tmp_path, make(Recipe(size=100 * 512, clusters=clusters, cluster_bits=9)).data)


def test_tables_that_no_check_goes_through_are_refused_unless_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an image would only have to be too much for the check to be judged by its headers alone."""
    path = _on_many_windows(tmp_path, monkeypatch)
    with pytest.raises(UnsafeImage, match="windows") as caught:
        open_source(path, Reading(deep=True))
    assert caught.value.rule == "unchecked"
    with open_source(path, Reading(deep=True, allow=frozenset({"unchecked"}))) as source:
        assert [finding.rule for finding in source.findings] == ["unchecked"]
    with open_source(path, Reading(deep=True, allow=None)) as source:
        assert [finding.rule for finding in source.findings] == ["unchecked"]
    with open_source(path) as source:
        assert source.findings == ()


@pytest.mark.parametrize("error", [CorruptImage, InvalidImage, UnsupportedFeature])
def test_a_check_that_ends_with_an_error_is_no_check(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(image: object) -> list[Problem]:
        raise error("nobody can follow this")

    monkeypatch.setattr(qcow2_check, "check", broken)
    path = written(tmp_path, make(Recipe(size=512, clusters={0: Plain(noise(512))}, cluster_bits=9)).data)
    with pytest.raises(UnsafeImage, match="nobody can follow this") as caught:
        open_source(path, Reading(deep=True))
    assert caught.value.rule == "unchecked"


def test_damage_that_a_guest_would_meet_is_damage_whatever_else_is_refused(tmp_path: Path) -> None:
    """It is for a new download, not for leave to read it all the same."""
    made = make(Recipe(size=8 * 512, clusters={0: Plain(noise(512))}, cluster_bits=9))
    both = made.poked(made.l2_entry(0), 1 << 40).poked(48, 1 << 40)  # the data, and the table of refcounts
    path = written(tmp_path, both.data)
    with pytest.raises(CorruptImage, match="behind the file's end"):
        open_source(path, Reading(deep=True))
    with open_source(path, Reading(deep=True, allow=None)) as source:
        assert [finding.rule for finding in source.findings] == ["outside-file", "structure"]


def test_raw_has_no_tables_to_check(tmp_path: Path) -> None:
    with open_source(written(tmp_path, noise(4096)), Reading(deep=True)) as source:
        assert source.findings == ()
