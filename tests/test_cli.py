"""The command line as scripts see it: exit codes, stdout, stderr, JSON."""

from __future__ import annotations

import json
import os
import pkgutil
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from imagekit.cli.sizes import parse_size, short_size, show_size
from imagekit.errors import UsageError
from imagekit.formats import registry
from imagekit.formats.base import GiB, MiB

UUID = "8f2a6d5c-9d3e-4a54-8d4e-0f9b8d1f1c11"


def imagekit(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "imagekit", *arguments],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A raw disk of 8 MiB + 1024 bytes with data in two places."""
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(8 * MiB + 1024)
        file.seek(3 * MiB)
        file.write(b"imagekit" * 1000)
        file.seek(8 * MiB + 1000)
        file.write(b"end")
    (tmp_path / "note.txt").write_text("not a key\n")
    return path


def exit_error(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    record: dict[str, object] = json.loads(done.stderr.splitlines()[-1])
    return record


def test_version_is_answered_without_loading_the_command_line(tmp_path: Path) -> None:
    code = "import sys; sys.argv[1:] = ['--version']\nfrom imagekit.cli import main\n"
    code += "try: main()\nexcept SystemExit: print([m for m in ('typer', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == ["imagekit 0.1.0", "[]"]


def test_info_loads_no_more_than_it_needs(disk: Path) -> None:
    code = "import sys; sys.argv[1:] = ['info', 'disk.raw']\nfrom imagekit.cli import main\n"
    code += "try: main()\nexcept SystemExit: print({'dataclasses', 'pydantic', 'deflate'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=disk.parent)
    assert done.stdout.splitlines()[-1] == "set()"


def test_help_lists_the_commands_and_the_exit_codes(tmp_path: Path) -> None:
    done = imagekit("--help", cwd=tmp_path)
    for word in ("info", "convert", "prepare", "boot", "demo", "completion", "refused by the safety policy"):
        assert word in done.stdout


def test_info_prints_the_contract_as_json(disk: Path) -> None:
    done = imagekit("info", "disk.raw", "--output", "json", cwd=disk.parent)
    found = json.loads(done.stdout)
    assert (done.returncode, found["schema"], found["format"]) == (0, 1, "raw")
    assert found["virtual-size"] == disk.stat().st_size
    assert {"filename", "subformat", "actual-size", "block-size", "features", "findings"} <= set(found)


def test_convert_reports_what_it_did_as_json(disk: Path) -> None:
    done = imagekit("convert", "disk.raw", "disk.vhd", "--id", UUID, "--output", "json", cwd=disk.parent)
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert found["target"] == {
        "filename": "disk.vhd",
        "format": "vhd",
        "subformat": "dynamic",
        "virtual-size": 8 * MiB + 1024,
        "size": (disk.parent / "disk.vhd").stat().st_size,
        "id": UUID,
    }
    assert found["verified"] == "structure"
    assert found["data-bytes"] + found["zero-bytes"] == 8 * MiB + 1024


def test_the_same_id_gives_the_same_bytes_from_a_sparse_and_a_dense_source(disk: Path) -> None:
    (disk.parent / "dense.raw").write_bytes(disk.read_bytes())
    for source in ("disk", "dense"):
        done = imagekit("convert", f"{source}.raw", f"{source}.vhd", "--id", UUID, cwd=disk.parent)
        assert done.returncode == 0
    assert (disk.parent / "disk.vhd").read_bytes() == (disk.parent / "dense.vhd").read_bytes()


def test_a_round_trip_compares_as_the_same(disk: Path) -> None:
    assert imagekit("convert", "disk.raw", "disk.vhd", "-q", cwd=disk.parent).returncode == 0
    assert imagekit("compare", "disk.raw", "disk.vhd", cwd=disk.parent).returncode == 0
    with disk.open("r+b") as file:
        file.seek(3 * MiB)
        file.write(b"I")
    done = imagekit("compare", "disk.raw", "disk.vhd", "--output", "json", cwd=disk.parent)
    assert (done.returncode, json.loads(done.stdout)["offset"]) == (1, 3 * MiB)


def test_a_longer_disk_is_different_only_when_strict(disk: Path) -> None:
    longer = disk.parent / "longer.raw"
    longer.write_bytes(disk.read_bytes() + bytes(MiB))
    assert imagekit("compare", "disk.raw", "longer.raw", cwd=disk.parent).returncode == 0
    assert imagekit("compare", "disk.raw", "longer.raw", "--strict", cwd=disk.parent).returncode == 1


def test_measure_is_exact(disk: Path) -> None:
    for kind in ("dynamic", "fixed"):
        measured = imagekit(
            "measure", "disk.raw", "-O", "vhd", "--subformat", kind, "--output", "json", cwd=disk.parent
        )
        assert imagekit("convert", "disk.raw", f"{kind}.vhd", "--subformat", kind, cwd=disk.parent).returncode == 0
        assert json.loads(measured.stdout)["required"] == (disk.parent / f"{kind}.vhd").stat().st_size


def test_map_as_a_picture_is_an_svg_with_words(disk: Path) -> None:
    drawn = ElementTree.fromstring(imagekit("map", "disk.raw", "--output", "svg", cwd=disk.parent).stdout)
    space = "{http://www.w3.org/2000/svg}"
    assert drawn.tag == f"{space}svg"
    title, words = drawn.findtext(f"{space}title") or "", drawn.findtext(f"{space}desc") or ""
    assert title == "disk.raw (raw): where its data lies"
    assert "disk: " in words and "data: " in words
    tones = {rect.get("class") for rect in drawn.iter(f"{space}rect")}
    assert {"t0", "t4", "paper"} <= tones
    refused = imagekit("info", "disk.raw", "--output", "svg", cwd=disk.parent)
    assert (refused.returncode, "only map draws" in refused.stderr) == (2, True)


def test_map_as_json_is_one_array_that_covers_the_disk(disk: Path) -> None:
    extents = json.loads(imagekit("map", "disk.raw", "--output", "json", cwd=disk.parent).stdout)
    assert sum(extent["length"] for extent in extents) == 8 * MiB + 1024
    assert [extent["start"] for extent in extents] == sorted(extent["start"] for extent in extents)


def test_dry_run_writes_nothing(disk: Path) -> None:
    done = imagekit("convert", "disk.raw", "disk.vhd", "--dry-run", "--output", "json", cwd=disk.parent)
    assert (done.returncode, json.loads(done.stdout)["verified"]) == (0, "not written")
    assert not (disk.parent / "disk.vhd").exists()


def test_qemu_img_s_options_are_understood(disk: Path) -> None:
    arguments = ["convert", "-f", "raw", "-O", "vpc", "-o", "subformat=fixed,force_size", "-p", "-q", "-U"]
    assert imagekit(*arguments, "disk.raw", "out.img", cwd=disk.parent).returncode == 0
    assert json.loads(imagekit("info", "out.img", "--output", "json", cwd=disk.parent).stdout)["subformat"] == "fixed"


BAD_INPUT = {
    "missing source": (["convert", "none.raw", "x.vhd"], 10, "SourceError"),
    "folder as source": (["convert", ".", "x.vhd"], 10, "SourceError"),
    "no format in the name": (["convert", "disk.raw", "x.bin2"], 2, "UsageError"),
    "target is the source": (["convert", "disk.raw", "disk.raw"], 2, "UsageError"),
    "unknown format": (["convert", "disk.raw", "x.vhd", "-O", "floppy"], 12, "UnsupportedFeature"),
    "a format that is only known by name": (["convert", "disk.raw", "x.qed"], 12, "UnsupportedFeature"),
    "declared is not found": (["convert", "disk.raw", "x.vhd", "-f", "qcow2"], 11, "InvalidImage"),
    "missing folder": (["convert", "disk.raw", "no/x.vhd"], 14, "TargetError"),
    "unknown subformat": (["convert", "disk.raw", "x.vhd", "--subformat", "thin"], 12, "UnsupportedFeature"),
    "odd block size": (["convert", "disk.raw", "x.vhd", "--block-size", "3M"], 12, "UnsupportedFeature"),
    "too large for VHD": (["convert", "disk.raw", "x.vhd", "--size", "2041G"], 12, "UnsupportedFeature"),
    "shrinking": (["convert", "disk.raw", "x.vhd", "--size", "1M"], 2, "UsageError"),
    "no size": (["convert", "disk.raw", "x.vhd", "--size", "much"], 2, "UsageError"),
    "no UUID": (["convert", "disk.raw", "x.vhd", "--id", "me"], 2, "UsageError"),
    "a rule that does not exist": (["convert", "disk.raw", "x.vhd", "--allow", "all"], 2, "UsageError"),
    "a rule that cannot be allowed": (["convert", "disk.raw", "x.vhd", "--allow", "ambiguous"], 2, "UsageError"),
    "no such option": (["convert", "disk.raw", "x.vhd", "--frobnicate"], 2, "UsageError"),
    "no such command": (["convrt", "disk.raw"], 2, "UsageError"),
    "a disk beyond the caller's limit": (
        ["convert", "disk.raw", "x.vhd", "--limit-virtual-size", "1M"],
        13,
        "UnsafeImage",
    ),
    "no limit": (["convert", "disk.raw", "x.vhd", "--limit-seconds", "long"], 2, "UsageError"),
    "confined, and a program of others": (
        ["convert", "disk.raw", "x.vhd", "--confined", "--verify", "qemu-img"],
        12,
        "UnsupportedFeature",
    ),
    "no target in Glance": (["upload", "disk.vhd"], 2, "UsageError"),
    "no check for raw": (["check", "disk.raw"], 12, "UnsupportedFeature"),
    "another host": (["boot", ".", "--on", "xen"], 2, "UsageError"),
    "no bundle for a host": (["boot", ".", "--on", "hyperv"], 10, "SourceError"),
    "no bundle": (["boot", "."], 10, "SourceError"),
    "a bad host name": (["configdrive", "x.iso", "--hostname", "a b"], 2, "InvalidSpec"),
    "a key that is none": (["configdrive", "x.iso", "--ssh-key", "note.txt"], 2, "InvalidSpec"),
}


@pytest.mark.parametrize(("arguments", "code", "kind"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_has_its_exit_code_and_leaves_nothing(
    disk: Path, arguments: list[str], code: int, kind: str
) -> None:
    before = {path.name: path.read_bytes() for path in disk.parent.iterdir()}
    done = imagekit(*arguments, "--output", "json", cwd=disk.parent)
    record = exit_error(done)
    assert (done.returncode, record["code"], record["kind"]) == (code, code, kind), done.stderr
    assert record["message"]
    assert not done.stdout
    assert {path.name: path.read_bytes() for path in disk.parent.iterdir()} == before


def test_an_error_for_people_names_the_file_and_a_way_out(tmp_path: Path) -> None:
    done = imagekit("convert", "none.raw", "x.vhd", cwd=tmp_path)
    assert done.stderr == "imagekit: none.raw: no such file\nhint: check the path\n"


def test_debug_shows_where_it_happened(tmp_path: Path) -> None:
    assert "Traceback" in imagekit("info", "none.raw", "--debug", cwd=tmp_path).stderr


def test_an_existing_target_stays_unless_told(disk: Path) -> None:
    target = disk.parent / "x.vhd"
    target.write_bytes(b"precious")
    assert imagekit("convert", "disk.raw", "x.vhd", cwd=disk.parent).returncode == 14
    assert target.read_bytes() == b"precious"
    assert imagekit("convert", "disk.raw", "x.vhd", "--overwrite", cwd=disk.parent).returncode == 0
    assert target.read_bytes()[:8] == b"conectix"


def test_verify_none_is_not_taken_from_the_environment(disk: Path) -> None:
    done = imagekit("convert", "disk.raw", "x.vhd", cwd=disk.parent, env={"IMAGEKIT_VERIFY": "none"})
    assert done.returncode == 2
    found = imagekit("convert", "disk.raw", "x.vhd", cwd=disk.parent, env={"IMAGEKIT_VERIFY": "content"})
    assert "verified: content" in found.stdout


def test_overwrite_is_not_taken_from_the_environment(disk: Path) -> None:
    (disk.parent / "x.vhd").write_bytes(b"precious")
    done = imagekit("convert", "disk.raw", "x.vhd", cwd=disk.parent, env={"IMAGEKIT_OVERWRITE": "1"})
    assert done.returncode == 14


def test_progress_as_json_lines_ends_with_all_of_it(disk: Path) -> None:
    done = imagekit("convert", "disk.raw", "x.vhd", "--progress", "json", cwd=disk.parent)
    records = [json.loads(line) for line in done.stderr.splitlines()]
    assert {record["message_type"] for record in records} == {"progress"}
    copied = [record for record in records if record["phase"] == "copy"]
    assert copied[-1]["done"] == copied[-1]["total"] > 0


def test_names_from_images_cannot_speak_to_the_terminal(disk: Path) -> None:
    evil = disk.parent / "a\x1b[31m\u202eb.raw"
    evil.write_bytes(disk.read_bytes())
    done = imagekit("info", evil.name, cwd=disk.parent)
    assert "\x1b" not in done.stdout
    assert "\u202e" not in done.stdout
    assert "\\x1b[31m" in done.stdout


def test_check_exits_11_for_a_damaged_image_and_repair_mends_a_lost_footer(disk: Path) -> None:
    assert imagekit("convert", "disk.raw", "x.vhd", cwd=disk.parent).returncode == 0
    whole = (disk.parent / "x.vhd").read_bytes()
    (disk.parent / "x.vhd").write_bytes(bytes(512) + whole[512:])
    assert imagekit("check", "x.vhd", cwd=disk.parent).returncode == 11
    assert imagekit("check", "x.vhd", "--repair", cwd=disk.parent).returncode == 0
    assert (disk.parent / "x.vhd").read_bytes() == whole


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with (tmp_path / "big.raw").open("wb") as file:
        for _ in range(192):
            file.write(os.urandom(MiB))
    arguments = ["convert", "big.raw", "big.vhd", "--progress", "json", "--verify", "content"]
    process = subprocess.Popen(
        [sys.executable, "-m", "imagekit", *arguments], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stderr is not None
    process.stderr.readline()  # it is at work
    process.send_signal(number)
    _, messages = process.communicate(timeout=30)
    assert process.returncode == code, messages
    assert [path.name for path in tmp_path.iterdir()] == ["big.raw"]


def test_completion_offers_commands_and_options(tmp_path: Path) -> None:
    env = {"COMP_WORDS": "imagekit conv", "COMP_CWORD": "1", "_IMAGEKIT_COMPLETE": "complete_bash"}
    assert imagekit(cwd=tmp_path, env=env).stdout.split() == ["convert"]
    for shell in ("bash", "zsh", "fish", "powershell"):
        assert "_IMAGEKIT_COMPLETE" in imagekit("completion", shell, cwd=tmp_path).stdout
    assert imagekit("completion", "sh", cwd=tmp_path).returncode == 2


def test_the_table_of_commands_is_what_the_modules_register() -> None:
    """A command that is missing there would be missing from the command line."""
    from importlib import import_module

    import imagekit.cli
    from imagekit.cli.app import COMMANDS, GROUPS, command_name

    modules = [one.name for one in pkgutil.iter_modules(imagekit.cli.__path__) if one.name not in ("app", "options")]
    with_commands = {one for one in modules if hasattr(import_module(f"imagekit.cli.{one}"), "app")}
    assert with_commands == {*COMMANDS, *GROUPS}
    for module, names in COMMANDS.items():
        registered = import_module(f"imagekit.cli.{module}").app.registered_commands
        assert [command_name(one) for one in registered] == list(names)


def test_one_command_is_made_without_the_others() -> None:
    from imagekit.cli.app import application, command_name

    assert [command_name(one) for one in application("info").registered_commands] == ["info", "completion"]
    assert len(application("no-such-command").registered_commands) == len(application().registered_commands) > 10


def test_options_of_other_commands_are_not_put_together(disk: Path) -> None:
    code = "import sys; from imagekit.cli.app import run; run(['info', 'disk.raw'])\n"
    code += "from imagekit.cli import images\n"
    code += "print([one.__name__ for one in (images.info, images.convert) if '__signature__' in vars(one)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=disk.parent)
    assert done.stdout.splitlines()[-1] == "['info']"


def test_info_loads_no_other_command(disk: Path) -> None:
    code = "import sys; sys.argv[1:] = ['info', 'disk.raw']\nfrom imagekit.cli import main\n"
    code += "heavy = ['imagekit.cli.guests', 'importlib.metadata', 'hashlib', 'rich', 'dataclasses', 'tempfile']\n"
    code += "try: main()\nexcept SystemExit: print([m for m in heavy if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=disk.parent)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", 512), ("20G", 20 * GiB), ("20GiB", 20 * GiB), ("20gb", 20 * GiB), ("1.5 MiB", 3 * MiB // 2), ("7B", 7)],
)
def test_sizes_are_powers_of_two(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1X", "0.3", "1e9", "1,5G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


def test_sizes_are_shown_in_bytes_too() -> None:
    assert show_size(20 * GiB) == "20 GiB (21474836480 bytes)"
    assert show_size(512) == "512 bytes"
    assert short_size(1023 * MiB) == "1023 MiB"


TOY = """
from imagekit.formats.base import DiskFormat, DiskImage, ImageInfo
from imagekit.formats.raw import RawImage, FlatWriter


class ToyImage(RawImage):
    def info(self):
        return ImageInfo(format="toy", virtual_size=self.virtual_size, features={"toy": True})


class Toy(DiskFormat):
    name = "toy"
    suffixes = (".toy",)
    subformats = ("toy",)

    def probe(self, file):
        return "toy magic at the end" if file.pread(file.size - 3, 3) == b"toy" else None

    def open(self, file, *, resolver=None, options=None):
        return ToyImage(file, file.size - 3)

    def writer(self, virtual_size, options):
        return FlatWriter(virtual_size, b"toy")


FORMAT = Toy()
"""


def test_adding_a_format_is_adding_a_file(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A module in the formats' folder is found by info, convert, compare and the command line."""
    import imagekit.formats
    from imagekit.cli.app import run

    folder = disk.parent / "more"
    folder.mkdir()
    (folder / "toy.py").write_text(TOY)
    monkeypatch.setattr(imagekit.formats, "__path__", [*imagekit.formats.__path__, str(folder)])
    registry.formats.cache_clear()
    try:
        source, target = str(disk), str(disk.parent / "disk.toy")
        assert run(["convert", source, target, "-q"]) == 0
        assert run(["info", target, "--output", "json"]) == 0
        assert '"format": "toy"' in capsys.readouterr().out
        assert run(["convert", target, str(disk.parent / "back.vhd"), "-q"]) == 0
        assert run(["compare", source, str(disk.parent / "back.vhd")]) == 0
    finally:
        registry.formats.cache_clear()
        sys.modules.pop("imagekit.formats.toy", None)
