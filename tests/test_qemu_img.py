"""qemu-img as a reader and writer of other formats: what is asked of it, and what becomes of its answers.

The programs here are stand-ins that answer as told; test_against_external_qemu_img.py is about the real one.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from imagekit.errors import (
    Cancelled,
    CorruptImage,
    ImagekitError,
    InvalidImage,
    SourceError,
    TargetError,
    ToolError,
    UnsafeImage,
    UnsupportedFeature,
)
from imagekit.formats.files import LocalFile
from imagekit.progress import Control, Progress
from imagekit.qemu_img import (
    EXTERNAL_SOURCES,
    EXTERNAL_TARGETS,
    convert_in,
    convert_out,
    find_qemu_img,
    image_options,
    open_external,
)
from imagekit.tool_process import ToolLimits
from tests.disks import noise

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-ins are shell scripts")

LIMITS = ToolLimits(reserve=0)
INFO: dict[str, object] = {"virtual-size": 4096, "format": "qed"}
WRITES = 'for last; do :; done; head -c 4096 /dev/zero > "$last"'
QED = b"QED\0" + bytes(4092)

StandIn = Callable[..., None]


@pytest.fixture
def qemu_img(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Puts a qemu-img first in the path that prints an info and runs a script to convert."""

    def install(*, info: object = INFO, convert: str = WRITES, before: str = "") -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        program = folder / "qemu-img"
        answer = info if isinstance(info, str) else json.dumps(info)
        program.write_text(
            f"#!/bin/sh\n{before}\nif [ $1 = info ]; then\ncat <<'E'\n{answer}\nE\nelse\n{convert}\nfi\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=":")

    return install


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qed"
    path.write_bytes(QED)
    return path


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(noise(8192))
    return path


def refused(
    image: Path, out: Path, kind: type[ImagekitError], message: str, format_name: str = "qed"
) -> ImagekitError:
    with pytest.raises(kind, match=message) as caught:
        convert_in(image, format_name, out, limits=LIMITS)
    assert not out.exists()
    return caught.value


# --- reading ---------------------------------------------------------------------------------------------------


def test_what_it_writes_is_the_disk(qemu_img: StandIn, image: Path, tmp_path: Path) -> None:
    qemu_img()
    out = tmp_path / "out.raw"
    assert convert_in(image, "qed", out, limits=LIMITS) == 4096
    assert out.read_bytes() == bytes(4096)
    assert out.stat().st_mode & 0o777 == 0o600


def test_its_arguments_name_one_file_as_one_format(qemu_img: StandIn, image: Path, tmp_path: Path) -> None:
    qemu_img(convert='for last; do :; done; printf "%s\\n" "$@" > "$last"; head -c 4096 /dev/zero >> "$last"')
    out = tmp_path / "out.raw"
    with pytest.raises(ToolError, match="of a disk of 4096"):
        convert_in(image, "qed", out, limits=LIMITS)
    info = dict(INFO, **{"virtual-size": 1 << 20})
    script = 'for last; do :; done; printf "%s\\n" "$@" > "$last"; truncate -s 1048576 "$last"'
    qemu_img(info=info, convert=script)
    convert_in(image, "qed", out, limits=LIMITS)
    arguments = out.read_bytes().rstrip(b"\0").decode().splitlines()
    assert arguments[:4] == ["convert", "-p", "-O", "raw"]
    assert arguments[5] == str(out)
    node = json.loads(arguments[4].removeprefix("json:"))
    name = node["file"].pop("filename")
    assert node == {"driver": "qed", "file": {"driver": "file"}, "backing": None}
    assert name.startswith("/proc/self/fd/") if sys.platform == "linux" else name == str(image)


def test_without_qemu_img_it_is_said_how_to_get_it(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    error = refused(image, tmp_path / "out.raw", ToolError, "qemu-img was not found")
    assert "apt-get install" in (error.hint or "")
    assert error.exit_code == 16


def test_its_last_words_are_told_with_the_file_s_own_name(qemu_img: StandIn, image: Path, tmp_path: Path) -> None:
    qemu_img(convert="echo \"qemu-img: Could not open '$5': it is \x1b[31mbroken\" >&2; exit 1")
    error = refused(
        image, tmp_path / "out.raw", ToolError, r"cannot convert it: qemu-img: Could not open '/.*disk\.qed'"
    )
    assert error.message.endswith("it is \\x1b[31mbroken")
    assert error.path == str(image)


def test_a_format_it_was_built_without_is_said_to_be_missing(qemu_img: StandIn, image: Path, tmp_path: Path) -> None:
    qemu_img(before="echo \"qemu-img: Unknown driver 'qed'\" >&2; exit 1")
    error = refused(image, tmp_path / "out.raw", ToolError, "cannot read it")
    assert "built without" in (error.hint or "")


def test_a_crash_is_called_by_its_signal(qemu_img: StandIn, image: Path, tmp_path: Path) -> None:
    qemu_img(convert="kill -SEGV $$")
    refused(image, tmp_path / "out.raw", ToolError, "ended by SIGSEGV")


@pytest.mark.parametrize("key", ["backing-filename", "full-backing-filename"])
def test_an_image_that_refers_to_another_is_refused(key: str, qemu_img: StandIn, image: Path, tmp_path: Path) -> None:
    qemu_img(info={**INFO, key: "/etc/passwd"})
    error = refused(image, tmp_path / "out.raw", UnsafeImage, "refers to another file: '/etc/passwd'")
    assert isinstance(error, UnsafeImage)
    assert error.rule == "backing-file"


def test_an_encrypted_image_is_refused(qemu_img: StandIn, image: Path, tmp_path: Path) -> None:
    qemu_img(info={**INFO, "encrypted": True})
    refused(image, tmp_path / "out.raw", UnsupportedFeature, "encrypted")


def test_a_disk_larger_than_allowed_is_refused_before_it_is_written(
    qemu_img: StandIn, image: Path, tmp_path: Path
) -> None:
    qemu_img(info={**INFO, "virtual-size": (64 << 40) + 512}, convert="kill -SEGV $$")
    refused(image, tmp_path / "out.raw", UnsupportedFeature, "a virtual size of 70368744178176 bytes")


@pytest.mark.parametrize("size", [0, -1, None, "4096", 1.5])
def test_a_size_that_is_none_is_refused(size: object, qemu_img: StandIn, image: Path, tmp_path: Path) -> None:
    qemu_img(info={**INFO, "virtual-size": size})
    refused(image, tmp_path / "out.raw", CorruptImage, "finds a virtual size of")


@pytest.mark.parametrize("info", ["", "{", "[]", "null"])
def test_an_info_that_is_none_is_refused(info: str, qemu_img: StandIn, image: Path, tmp_path: Path) -> None:
    qemu_img(info=info)
    refused(image, tmp_path / "out.raw", ToolError, "printed no JSON")


@pytest.mark.parametrize(
    ("format_name", "head"),
    [
        ("qed", b"QFI\xfb\0\0\0\1"),
        ("qcow", b"QFI\xfb\0\0\0\2"),
        ("qcow", b"QFI\xfb\0\0\0\3"),
        ("parallels", b"parallels"),
        ("parallels", b""),
    ],
)
def test_a_file_of_another_format_never_gets_there(
    format_name: str, head: bytes, qemu_img: StandIn, image: Path, tmp_path: Path
) -> None:
    qemu_img(before="kill -SEGV $$")
    image.write_bytes(head + bytes(1000))
    refused(image, tmp_path / "out.raw", InvalidImage, f"declared {format_name}, but the file starts", format_name)


@pytest.mark.parametrize("format_name", ["raw", "qcow2", "vmdk", "luks", "nbd", "dmg", "QED"])
def test_only_formats_of_the_list_are_read(format_name: str, image: Path, tmp_path: Path) -> None:
    error = refused(image, tmp_path / "out.raw", UnsupportedFeature, "is not read through qemu-img", format_name)
    assert all(name in (error.hint or "") for name in EXTERNAL_SOURCES)


def test_a_target_that_exists_is_left_alone(qemu_img: StandIn, image: Path, tmp_path: Path) -> None:
    qemu_img()
    out = tmp_path / "out.raw"
    out.write_bytes(b"mine")
    with pytest.raises(TargetError, match="exists already"):
        convert_in(image, "qed", out, limits=LIMITS)
    assert out.read_bytes() == b"mine"


def test_a_source_that_is_not_there_leaves_nothing(qemu_img: StandIn, tmp_path: Path) -> None:
    qemu_img()
    refused(tmp_path / "missing.qed", tmp_path / "out.raw", SourceError, "no such file")


def test_an_open_file_is_the_one_that_is_read_and_stays_open(qemu_img: StandIn, image: Path, tmp_path: Path) -> None:
    qemu_img()
    with LocalFile.open_source(image) as file:
        image.rename(tmp_path / "moved")
        image.write_bytes(b"another file")
        convert_in(file, "qed", tmp_path / "out.raw", limits=LIMITS)
        with open_external(file, "qed", limits=LIMITS) as raw:
            assert raw.name == str(image)
        assert file.pread(0, 4) == b"QED\0"


# --- the end of it ---------------------------------------------------------------------------------------------


def test_progress_is_told_in_bytes(qemu_img: StandIn, image: Path, tmp_path: Path) -> None:
    early, late = "(0.00/100%%)\\r    (25.00/100%%)\\r", "(100.00/100%%)\\r"
    qemu_img(convert=f"printf '{early}'; sleep 0.4; printf '{late}'; {WRITES}")
    seen: list[Progress] = []
    convert_in(image, "qed", tmp_path / "out.raw", limits=LIMITS, control=Control(seen.append))
    assert seen == [Progress("qemu-img", 1024, 4096), Progress("qemu-img", 4096, 4096)]


def test_a_wish_to_stop_leaves_nothing(qemu_img: StandIn, image: Path, no_leftovers: Path) -> None:
    qemu_img(convert="exec sleep 60")
    stop = threading.Event()
    threading.Timer(0.4, stop.set).start()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        convert_in(image, "qed", no_leftovers / "out.raw", limits=LIMITS, control=Control(cancel=stop))
    assert time.monotonic() - started < 20


def test_a_time_out_leaves_nothing(qemu_img: StandIn, image: Path, no_leftovers: Path) -> None:
    qemu_img(convert="exec sleep 60")
    with pytest.raises(ToolError, match="qemu-img took longer"):
        convert_in(image, "qed", no_leftovers / "out.raw", limits=ToolLimits(seconds=0.5, reserve=0))


# --- a file without a name -------------------------------------------------------------------------------------


def test_it_can_be_had_as_a_file_without_a_name(qemu_img: StandIn, image: Path, no_leftovers: Path) -> None:
    qemu_img()
    with open_external(image, "qed", folder=no_leftovers, limits=LIMITS) as file:
        assert list(no_leftovers.iterdir()) == []
        assert (file.name, file.size, file.pread(0, 5000)) == (str(image), 4096, bytes(4096))


def test_a_failure_leaves_no_file_and_no_folder(qemu_img: StandIn, image: Path, no_leftovers: Path) -> None:
    qemu_img(convert="exit 1")
    with pytest.raises(ToolError):
        open_external(image, "qed", folder=no_leftovers, limits=LIMITS)


def test_a_folder_that_is_not_there_is_the_target_s_fault(qemu_img: StandIn, image: Path, tmp_path: Path) -> None:
    qemu_img()
    with pytest.raises(TargetError, match="no temporary file"):
        open_external(image, "qed", folder=tmp_path / "missing")


# --- writing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format_name", "subformat", "options"),
    [
        ("qed", None, []),
        ("parallels", None, []),
        ("vdi", None, ["-o", "static=off"]),
        ("vdi", "fixed", ["-o", "static=on"]),
        ("vmdk", None, ["-o", "subformat=monolithicSparse"]),
        ("vmdk", "streamOptimized", ["-o", "subformat=streamOptimized"]),
    ],
)
def test_its_arguments_name_the_format_and_the_subformat(
    format_name: str, subformat: str | None, options: list[str], qemu_img: StandIn, raw: Path, tmp_path: Path
) -> None:
    qemu_img(convert='for last; do :; done; printf "%s\\n" "$@" > "$last"')
    out = tmp_path / "name, that stays=.img"
    convert_out(raw, format_name, out, subformat=subformat, limits=LIMITS)
    arguments = out.read_text().splitlines()
    assert arguments[:4] == ["convert", "-p", "-O", format_name]
    assert arguments[4:-2] == options
    assert arguments[-1] == str(out)
    node = json.loads(arguments[-2].removeprefix("json:"))
    assert (node["driver"], node["file"]["driver"]) == ("raw", "file")


@pytest.mark.parametrize(
    ("format_name", "subformat", "message"),
    [
        ("qcow2", None, "not written through qemu-img"),
        ("raw", None, "not written through qemu-img"),
        ("vmdk", "monolithicFlat", "no subformat 'monolithicFlat'"),
        ("qed", "dynamic", "no subformat 'dynamic'"),
    ],
)
def test_only_what_is_on_the_list_is_written(
    format_name: str, subformat: str | None, message: str, raw: Path, no_leftovers: Path
) -> None:
    with pytest.raises(UnsupportedFeature, match=message):
        convert_out(raw, format_name, no_leftovers / "out", subformat=subformat)


@pytest.mark.parametrize("size", [0, 511, 513])
def test_a_raw_disk_of_no_whole_sectors_is_refused(size: int, raw: Path, no_leftovers: Path) -> None:
    raw.write_bytes(bytes(size))
    with pytest.raises(UnsupportedFeature, match=f"a raw disk of {size} bytes"):
        convert_out(raw, "qed", no_leftovers / "out.qed")


def test_a_failed_write_leaves_nothing(qemu_img: StandIn, raw: Path, no_leftovers: Path) -> None:
    qemu_img(convert=f"{WRITES}; echo no luck >&2; exit 1")
    with pytest.raises(ToolError, match="no luck"):
        convert_out(raw, "qed", no_leftovers / "out.qed", limits=LIMITS)


def test_every_target_has_a_default(raw: Path) -> None:
    assert set(EXTERNAL_TARGETS) == {"parallels", "qed", "vdi", "vmdk"}


# --- names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_name", ["qcow2", "qcow", "qed", "vmdk", "parallels"])
def test_nothing_below_an_image_is_opened(format_name: str) -> None:
    assert json.loads(image_options("/a", format_name).removeprefix("json:"))["backing"] is None


def test_a_name_is_never_anything_but_a_file_s() -> None:
    for path in ("nbd://host/x", "json:{}", "/a,file.filename=/b", 'with "quotes"', "-o"):
        node = json.loads(image_options(path, "raw").removeprefix("json:"))
        assert node == {"driver": "raw", "file": {"driver": "file", "filename": str(Path(path).absolute())}}


def test_the_one_in_the_path_is_taken() -> None:
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    assert find_qemu_img() == shutil.which("qemu-img")
