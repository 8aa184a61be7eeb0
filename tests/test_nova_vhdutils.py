"""The drop-in for os-win's VHDUtils: results and errors as compute-hyperv expects them."""

from __future__ import annotations

from pathlib import Path

import pytest

import imagekit
from imagekit.formats.base import GiB, MiB
from imagekit.nova import VHDUtils
from imagekit.nova.failures import OSWinException, VHDException, VHDWin32APIException
from imagekit.nova.vhdutils import INFO_MEMBERS
from tests.disks import noise
from tests.here import Here

SIZE = 5 * MiB
KINDS = ("vhd", "vhdx")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(noise(2 * MiB) + bytes(SIZE - 2 * MiB))
    return path


@pytest.fixture
def utils() -> VHDUtils:
    return VHDUtils(child=Here())


def disk(raw: Path, kind: str, subformat: str = "dynamic") -> str:
    path = raw.with_name(f"{subformat}.{kind}")
    imagekit.convert(raw, path, subformat=subformat)
    return str(path)


class TestFormat:
    @pytest.mark.parametrize(("name", "found"), [("a.vhd", "VHD"), ("a.VHDX", "VHDX"), ("dir.x/a.Vhdx", "VHDX")])
    def test_it_is_what_the_name_says(self, utils: VHDUtils, name: str, found: str) -> None:
        assert utils.get_vhd_format(name) == found

    @pytest.mark.parametrize("kind", KINDS)
    def test_without_a_known_suffix_the_signature_tells(self, utils: VHDUtils, raw: Path, kind: str) -> None:
        """The download of an image lies under its bare id."""
        bare = raw.with_name("0b2a7b1e")
        Path(disk(raw, kind)).rename(bare)
        assert utils.get_vhd_format(str(bare)) == kind.upper()

    def test_anything_else_is_an_error(self, utils: VHDUtils, raw: Path) -> None:
        for path in (raw, raw.with_name("missing")):
            with pytest.raises(VHDException, match="Could not retrieve VHD format"):
                utils.get_vhd_format(str(path))


class TestInfo:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("subformat", "number"), [("fixed", 2), ("dynamic", 3)])
    def test_it_has_all_that_windows_tells(
        self, utils: VHDUtils, raw: Path, kind: str, subformat: str, number: int
    ) -> None:
        path = disk(raw, kind, subformat)
        info = utils.get_vhd_info(path)
        assert set(info) == {name for names in INFO_MEMBERS.values() for name in names}
        assert info["VirtualSize"] == SIZE
        assert info["PhysicalSize"] == Path(path).stat().st_size
        assert info["SectorSize"] == 512
        assert (info["DeviceId"], info["ProviderSubtype"]) == ({"vhd": 2, "vhdx": 3}[kind], number)
        assert (info["ParentPath"], info["IsLoaded"]) == ("", False)
        assert utils.get_vhd_type(path) == number
        assert utils.get_vhd_parent_path(path) is None

    def test_only_what_was_asked_for(self, utils: VHDUtils, raw: Path) -> None:
        assert set(utils.get_vhd_size(disk(raw, "vhd"))) == {
            "VirtualSize",
            "PhysicalSize",
            "BlockSize",
            "SectorSize",
        }

    @pytest.mark.parametrize("kind", KINDS)
    def test_of_a_child_whose_parent_is_gone_too(self, utils: VHDUtils, raw: Path, kind: str) -> None:
        parent, child = disk(raw, kind), str(raw.with_name(f"child.{kind}"))
        utils.create_differencing_vhd(child, parent)
        assert utils.get_vhd_parent_path(child) == parent
        assert utils.get_vhd_info(child, open_parents=True)["ParentResolved"]
        Path(parent).unlink()
        info = utils.get_vhd_info(child)
        assert (info["ProviderSubtype"], info["VirtualSize"], info["ParentResolved"]) == (4, SIZE, False)
        assert Path(parent).name in info["ParentPath"]
        with pytest.raises(OSWinException, match="missing"):
            utils.get_vhd_info(child, open_parents=True)

    def test_a_damaged_disk_is_an_error_of_os_wins_family(self, utils: VHDUtils, raw: Path) -> None:
        broken = raw.with_name("broken.vhdx")
        broken.write_bytes(b"vhdxfile" + bytes(MiB))
        with pytest.raises(OSWinException) as caught:
            utils.get_vhd_info(str(broken))
        assert isinstance(caught.value.__cause__, imagekit.ImagekitError)

    def test_a_missing_one_has_windows_error_code(self, utils: VHDUtils, raw: Path) -> None:
        with pytest.raises(VHDWin32APIException) as caught:
            utils.get_vhd_info(str(raw.with_name("missing.vhd")))
        assert caught.value.error_code == 2


class TestCreate:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_dynamic_disk_is_empty_and_exact(self, utils: VHDUtils, tmp_path: Path, kind: str) -> None:
        path = str(tmp_path / f"new.{kind}")
        utils.create_dynamic_vhd(path, 40 * GiB)
        assert utils.get_vhd_size(path)["VirtualSize"] == 40 * GiB
        assert imagekit.check(path).sound

    @pytest.mark.parametrize("kind", KINDS)
    def test_no_existing_file_is_touched(self, utils: VHDUtils, raw: Path, kind: str) -> None:
        path = disk(raw, kind)
        before = Path(path).read_bytes()
        with pytest.raises(VHDWin32APIException) as caught:
            utils.create_dynamic_vhd(path, GiB)
        assert caught.value.error_code == 80
        with pytest.raises(VHDWin32APIException):
            utils.create_differencing_vhd(path, disk(raw, kind, "fixed"))
        assert Path(path).read_bytes() == before

    @pytest.mark.parametrize("kind", KINDS)
    def test_convert_and_flatten_need_no_parent_afterwards(self, utils: VHDUtils, raw: Path, kind: str) -> None:
        parent, child = disk(raw, kind), str(raw.with_name(f"child.{kind}"))
        utils.create_differencing_vhd(child, parent)
        utils.convert_vhd(child, str(raw.with_name(f"copy.{kind}")))
        utils.flatten_vhd(child)
        Path(parent).unlink()
        for path in (child, raw.with_name(f"copy.{kind}")):
            assert utils.get_vhd_type(str(path)) == 3
            assert imagekit.compare(path, raw).same

    def test_a_guid_is_the_disks(self, utils: VHDUtils, raw: Path) -> None:
        path = disk(raw, "vhdx")
        utils.set_vhd_guid(path, "6f9c1d2e-0b1a-4c3d-8e5f-001122334455")
        assert imagekit.info(path).info.features["disk-id"] == "6f9c1d2e-0b1a-4c3d-8e5f-001122334455"


class TestResize:
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_grows(self, utils: VHDUtils, raw: Path, kind: str) -> None:
        path = disk(raw, kind)
        utils.resize_vhd(path, 2 * GiB, is_file_max_size=False)
        assert utils.get_vhd_size(path)["VirtualSize"] == 2 * GiB
        assert imagekit.compare(path, raw).same

    @pytest.mark.parametrize("kind", KINDS)
    def test_to_a_file_size_it_leaves_room_for_the_format(self, utils: VHDUtils, raw: Path, kind: str) -> None:
        path = disk(raw, kind)
        wanted = utils.get_internal_vhd_size_by_file_size(path, GiB)
        utils.resize_vhd(path, GiB)
        assert utils.get_vhd_size(path)["VirtualSize"] == wanted
        assert 0 < GiB - wanted < 40 * MiB
        assert wanted % 512 == 0

    def test_the_same_size_is_no_work_and_a_smaller_one_an_error(self, utils: VHDUtils, raw: Path) -> None:
        path = disk(raw, "vhd")
        before = Path(path).read_bytes()
        utils.resize_vhd(path, SIZE, is_file_max_size=False)
        with pytest.raises(VHDException, match="smaller size"):
            utils.resize_vhd(path, SIZE - 512, is_file_max_size=False)
        assert Path(path).read_bytes() == before

    def test_a_differencing_vhdx_grows_and_a_differencing_vhd_does_not(self, utils: VHDUtils, raw: Path) -> None:
        for kind in KINDS:
            utils.create_differencing_vhd(str(raw.with_name(f"child.{kind}")), disk(raw, kind))
        child = str(raw.with_name("child.vhdx"))
        utils.resize_vhd(child, GiB, is_file_max_size=False)
        assert utils.get_vhd_size(child)["VirtualSize"] == GiB
        assert imagekit.compare(child, raw, follow_references=True).same
        with pytest.raises(VHDWin32APIException):
            utils.resize_vhd(str(raw.with_name("child.vhd")), GiB, is_file_max_size=False)

    @pytest.mark.parametrize("size", [500 * GiB, 1000 * GiB, 2040 * GiB])
    def test_large_file_sizes_are_whole_sectors_of_disk(self, utils: VHDUtils, raw: Path, size: int) -> None:
        found = utils.get_internal_vhd_size_by_file_size(disk(raw, "vhd"), size)
        assert found % 512 == 0
        assert 0 <= (size - 2048) * (2 * MiB) // (2 * MiB + 4) - found < 512

    def test_of_a_child_it_is_its_bases(self, utils: VHDUtils, raw: Path) -> None:
        parent, child = disk(raw, "vhd", "fixed"), str(raw.with_name("child.vhd"))
        utils.create_differencing_vhd(child, parent)
        assert utils.get_internal_vhd_size_by_file_size(child, GiB) == GiB - 512


class TestMerge:
    def test_a_larger_child_grows_its_parent_and_goes(self, utils: VHDUtils, raw: Path) -> None:
        parent, child = disk(raw, "vhdx"), str(raw.with_name("child.vhdx"))
        utils.create_differencing_vhd(child, parent)
        utils.resize_vhd(child, GiB, is_file_max_size=False)
        utils.merge_vhd(child)
        assert not Path(child).exists()
        assert utils.get_vhd_size(parent)["VirtualSize"] == GiB
        assert imagekit.compare(parent, raw).same

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_reconnected_child_merges_into_the_copy_of_its_parent(
        self, utils: VHDUtils, raw: Path, kind: str
    ) -> None:
        """As compute-hyperv makes a snapshot: root and base are copied elsewhere, connected, merged."""
        parent, child = disk(raw, kind), str(raw.with_name(f"child.{kind}"))
        utils.create_differencing_vhd(child, parent)
        elsewhere = raw.parent / "export"
        elsewhere.mkdir()
        base, root = elsewhere / f"base.{kind}", elsewhere / f"root.{kind}"
        base.write_bytes(Path(parent).read_bytes())
        root.write_bytes(Path(child).read_bytes())
        before = Path(parent).read_bytes()
        utils.reconnect_parent_vhd(str(root), str(base))
        assert utils.get_vhd_parent_path(str(root)) == str(base)
        utils.merge_vhd(str(root), delete_merged_image=False)
        assert root.exists()
        assert imagekit.compare(base, raw).same
        assert Path(parent).read_bytes() == before


class TestHost:
    def test_attaching_is_windows_business(self, utils: VHDUtils, raw: Path) -> None:
        path = disk(raw, "vhd")
        with pytest.raises(OSWinException, match="only Windows"):
            utils.attach_virtual_disk(path)
        with pytest.raises(OSWinException, match="only Windows"):
            utils.get_virtual_disk_physical_path(path)
        assert not utils.is_virtual_disk_file_attached(path)
        utils.detach_virtual_disk(path)

    def test_the_best_format_is_vhdx(self, utils: VHDUtils) -> None:
        assert utils.get_best_supported_vhd_format() == "VHDX"
