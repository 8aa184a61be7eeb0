"""Against qemu-img itself: formats that it reads and writes for us, and images that want more than they should."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from imagekit.errors import CorruptImage, ImagekitError, ToolError, UnsafeImage
from imagekit.formats.files import LocalFile
from imagekit.qemu_img import EXTERNAL_SOURCES, EXTERNAL_TARGETS, compare, convert_in, convert_out, open_external
from imagekit.tool_process import ToolLimits
from tests.disks import md5, noise, text
from tests.oracles import need_tool
from tests.samples import sample

pytestmark = pytest.mark.oracle

KiB, MiB = 1 << 10, 1 << 20
SIZE = 6 * MiB
PIECES = {0: noise(70 * KiB), 2 * MiB: text(200 * KiB), SIZE - 512: noise(512)}
LIMITS = ToolLimits(reserve=0)


def qemu_img(*arguments: str | Path) -> str:
    done = subprocess.run([need_tool("qemu-img"), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    with path.open("wb") as out:
        for offset, data in PIECES.items():
            out.seek(offset)
            out.write(data)
    return path


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """Another file of this machine, as an image would like to name it."""
    path = tmp_path / "secret.raw"
    path.write_bytes(noise(SIZE, 9))
    return path


@pytest.mark.parametrize("format_name", EXTERNAL_SOURCES)
def test_what_qemu_img_writes_is_read_through_it(format_name: str, raw: Path, tmp_path: Path) -> None:
    image, out = tmp_path / "image, named 'oddly' — ü", tmp_path / "out=1, .raw"
    qemu_img("convert", "-f", "raw", "-O", format_name, raw, image)
    assert convert_in(image, format_name, out, limits=LIMITS) == SIZE
    assert out.read_bytes() == raw.read_bytes()
    with LocalFile.open_source(out) as file:
        assert file.allocated_size <= MiB


def test_it_can_be_had_as_a_file_without_a_name(raw: Path, tmp_path: Path) -> None:
    qemu_img("convert", "-f", "raw", "-O", "qcow", raw, tmp_path / "image")
    with open_external(tmp_path / "image", "qcow", folder=tmp_path, limits=LIMITS) as file:
        assert md5(file.pread(0, SIZE + 1)) == md5(raw.read_bytes())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.raw", "image"]


def test_a_real_qcow_of_the_first_version_is_read(tmp_path: Path) -> None:
    path = sample("image.qcow")
    convert_in(path, "qcow", tmp_path / "out.raw", limits=LIMITS)
    assert (tmp_path / "out.raw").stat().st_size == 102400
    compare(path, "qcow", tmp_path / "out.raw", "raw")


@pytest.mark.parametrize(
    ("format_name", "subformat"),
    [(name, subformat) for name, known in EXTERNAL_TARGETS.items() for subformat in (known or (None,))],
)
def test_what_it_writes_for_us_holds_the_disk(
    format_name: str, subformat: str | None, raw: Path, tmp_path: Path
) -> None:
    out = tmp_path / "web, the 'first'.img"
    convert_out(raw, format_name, out, subformat=subformat, limits=LIMITS)
    compare(raw, "raw", out, format_name)
    info = json.loads(qemu_img("info", "--output=json", out))
    assert (info["format"], info["virtual-size"]) == (format_name, SIZE)
    if format_name == "vmdk":
        assert info["format-specific"]["data"]["create-type"] == subformat
        assert f'SPARSE "{out.name}"'.encode() in out.read_bytes()[: 64 * KiB]
    if format_name == "vdi":
        assert (out.stat().st_size >= SIZE) == (subformat == "fixed")


# --- images that want more -------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_name", ["qcow", "qed"])
def test_an_image_on_top_of_another_file_is_refused(format_name: str, secret: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    qemu_img("create", "-q", "-f", format_name, "-b", secret, "-F", "raw", image)
    with pytest.raises(UnsafeImage, match="refers to another file") as caught:
        convert_in(image, format_name, tmp_path / "out.raw", limits=LIMITS)
    assert caught.value.rule == "backing-file"
    assert not (tmp_path / "out.raw").exists()


@pytest.mark.parametrize("format_name", EXTERNAL_SOURCES)
def test_a_damaged_image_is_an_error_with_qemu_img_s_words(format_name: str, raw: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    qemu_img("convert", "-f", "raw", "-O", format_name, raw, image)
    data = bytearray(image.read_bytes())
    data[16:64] = b"\xff" * 48
    image.write_bytes(data)
    with pytest.raises((ToolError, CorruptImage)) as caught:
        convert_in(image, format_name, tmp_path / "out.raw", limits=LIMITS)
    assert "/proc/self/fd" not in caught.value.message
    assert not (tmp_path / "out.raw").exists()


def test_a_disk_beyond_the_limit_of_files_is_not_written(raw: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    qemu_img("convert", "-f", "raw", "-O", "qed", raw, image)
    with pytest.raises(ImagekitError, match=f"a virtual size of {SIZE} bytes"):
        convert_in(image, "qed", tmp_path / "out.raw", limits=ToolLimits(file_size=SIZE - 1))


def test_too_little_memory_is_an_error(raw: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    qemu_img("convert", "-f", "raw", "-O", "qed", raw, image)
    with pytest.raises(ToolError, match="qemu-img cannot"):
        convert_in(image, "qed", tmp_path / "out.raw", limits=ToolLimits(memory=40 * MiB))
