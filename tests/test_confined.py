"""A confined process reads images: same results, same errors, and nothing else that it could do."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import imagekit
from fixtures import qcow2_images, vhd_images
from imagekit.confinement import jobs as confined
from imagekit.confinement import seccomp
from imagekit.confinement import start as confined_start
from imagekit.conversion import convert_image
from imagekit.errors import Cancelled, CorruptImage, ImagekitError, ToolError, UnsafeImage, UnsupportedFeature
from imagekit.formats.files import LocalFile
from imagekit.limits import Limits
from imagekit.plan import ConvertOptions
from imagekit.progress import Progress
from tests.disks import IDENTIFIER, noise, text
from tests.oracles import need_tool
from tests.variants import SOURCES

KiB, MiB = 1 << 10, 1 << 20
CONTENT = noise(MiB) + bytes(2 * MiB) + text(MiB) + bytes(600 * KiB) + noise(4 * KiB)
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Landlock and seccomp are Linux's")
pytestmark = linux_only


def both_ways(source: Path, name: str, **options: Any) -> tuple[bytes, bytes]:
    """The target of a conversion in this process, and of a confined one."""
    made = []
    for folder, alone in (("here", False), ("confined", True)):
        target = source.parent / folder / name
        target.parent.mkdir(exist_ok=True)
        report = imagekit.convert(source, target, identifier=IDENTIFIER, sync=False, confined=alone, **options)
        assert bool(report.confinement) == alone
        made.append(target.read_bytes())
    return made[0], made[1]


def write(folder: Path, kind: str) -> Path:
    made = SOURCES[kind](CONTENT)
    path = folder / f"disk.{made.format}"
    path.write_bytes(made.data)
    return path


ALONE = [kind for kind in SOURCES if SOURCES[kind](CONTENT).below is None]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["raw", "vhd", "vhdx", "qcow2"])
@pytest.mark.parametrize("kind", ALONE)
def test_every_kind_becomes_the_same_file(tmp_path: Path, kind: str, target: str) -> None:
    """Also proof that all modules are loaded before the process can open nothing any more."""
    here, confined = both_ways(write(tmp_path, kind), f"out.{target}", verify="content")
    assert here == confined


@pytest.mark.parametrize(
    ("kind", "target"), [("qcow2 zstd", "vhdx"), ("vmdk stream", "vhd"), ("vhd fixed", "raw")], ids=str
)
def test_a_confined_conversion_makes_the_same_file(tmp_path: Path, kind: str, target: str) -> None:
    here, confined = both_ways(write(tmp_path, kind), f"out.{target}", verify="content")
    assert here == confined


def test_a_compressed_target_is_the_same_with_32_threads(tmp_path: Path) -> None:
    here, confined = both_ways(write(tmp_path, "qcow2 mixed"), "out.qcow2", compression="zlib", jobs=32)
    assert here == confined


def test_packed_images_are_unpacked_by_the_confined_process(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd.gz"
    path.write_bytes(gzip.compress(gzip.compress(write(tmp_path, "vhd dynamic").read_bytes(), mtime=0), mtime=0))
    here, confined = both_ways(path, "out.raw")
    assert here == confined


def test_chains_are_followed_by_asking_for_each_file(tmp_path: Path) -> None:
    (tmp_path / "b.raw").write_bytes(CONTENT)
    recipe = qcow2_images.Recipe(
        size=len(CONTENT),
        clusters={3: qcow2_images.Plain(noise(64 * KiB, 5))},
        backing="b.raw",
        backing_format="raw",
    )
    child = tmp_path / "child.qcow2"
    child.write_bytes(qcow2_images.make(recipe).data)
    here, confined = both_ways(child, "out.vhd", follow_references=True)
    assert here == confined
    found = imagekit.info(child, follow_references=True, confined=True)
    assert [(name, info.format) for name, info in found.chain] == [(str(tmp_path / "b.raw"), "raw")]
    with pytest.raises(UnsafeImage, match="backing-file"):
        imagekit.convert(child, tmp_path / "no.vhd", confined=True)


def test_a_differencing_target_links_to_its_parent_as_ever(tmp_path: Path) -> None:
    parent = tmp_path / "parent.vhdx"
    imagekit.create(parent, len(CONTENT), sync=False)
    here, confined = both_ways(
        write(tmp_path, "raw"), "child.vhdx", parent=str(parent), parent_map={"C:\\VMs": str(tmp_path)}
    )
    assert here == confined


def test_a_file_that_is_open_already_needs_no_name(tmp_path: Path) -> None:
    path = write(tmp_path, "qcow2 zlib")
    with LocalFile.open_source(path) as file:
        path.unlink()
        options = ConvertOptions(confined=True, sync=False)
        report = convert_image(file, tmp_path / "out.raw", options)
        assert file.pread(0, 4) == b"QFI\xfb", "and stays open"
    assert (tmp_path / "out.raw").read_bytes() == CONTENT
    assert report.source == str(path)


def test_info_says_the_same(tmp_path: Path) -> None:
    for kind in ("vhd dynamic", "qcow2 v2"):
        path = write(tmp_path, kind)
        here, there = imagekit.info(path).to_json(), imagekit.info(path, confined=True).to_json()
        assert there.pop("confinement")
        here.pop("confinement")
        assert here == there


# --- errors ------------------------------------------------------------------------------------------------------


def attributes(error: ImagekitError) -> tuple[Any, ...]:
    return type(error), error.message, error.hint, error.path, error.offset, getattr(error, "rule", None)


@pytest.mark.parametrize(
    "data",
    [
        qcow2_images.make(qcow2_images.Recipe(size=MiB)).data[:100],
        qcow2_images.make(qcow2_images.Recipe(size=MiB, backing="/etc/passwd", backing_format="raw")).data,
        vhd_images.dynamic(4 * MiB, {0: noise(2 * MiB)})[: 2 * MiB],
        b"",
    ],
    ids=["cut header", "backing file", "cut data", "empty"],
)
def test_errors_are_the_same(tmp_path: Path, no_leftovers: Path, data: bytes) -> None:
    path = tmp_path / "image"
    path.write_bytes(data)
    errors = []
    for alone in (False, True):
        with pytest.raises(ImagekitError) as caught:
            imagekit.convert(path, no_leftovers / "out.vhd", confined=alone, sync=False)
        errors.append(attributes(caught.value))
    assert errors[0] == errors[1]


def test_the_target_is_refused_before_anything_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined_start, "BOOT", "raise SystemExit(99)")
    (tmp_path / "out.vhd").touch()
    with pytest.raises(ImagekitError, match="exists already"):
        imagekit.convert(write(tmp_path, "raw"), tmp_path / "out.vhd", confined=True)


def test_a_process_that_does_not_start_is_no_fault_of_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confined_start, "BOOT", "import nothing_like_this")
    with pytest.raises(ToolError, match="nothing_like_this"):
        imagekit.convert(write(tmp_path, "raw"), tmp_path / "out.vhd", confined=True)


def test_what_cannot_be_confined_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, "raw")
    with pytest.raises(UnsupportedFeature, match="verify by qemu-img"):
        imagekit.convert(path, tmp_path / "out.vhd", confined=True, verify="qemu-img")


def test_elsewhere_it_says_that_it_is_not_confined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined, "POSSIBLE", False)
    report = imagekit.convert(write(tmp_path, "raw"), tmp_path / "out.vhd", confined=True, sync=False)
    assert any("not confined" in note for note in report.notes)
    assert report.confinement == ()


LIES = """
import json, socket, sys
s = json.loads(sys.argv[1]); sys.path[:] = s['path']
from imagekit.confinement.channel import Channel
c = Channel(socket.socket(fileno=s['socket']))
c.say(ready=['limits'])
c.receive()
"""


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("import os; os.kill(os.getpid(), 24)", "more of the processor's time"),
        ("raise SystemExit(0)", "ended with 0"),
    ],
)
def test_a_crash_is_a_refusal(
    tmp_path: Path, no_leftovers: Path, monkeypatch: pytest.MonkeyPatch, action: str, expected: str
) -> None:
    monkeypatch.setattr(confined_start, "BOOT", LIES + action)
    with pytest.raises(UnsafeImage, match=expected):
        imagekit.convert(write(tmp_path, "raw"), no_leftovers / "out.vhd", confined=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lie",
    [
        "c.say(done={'source': 1})",
        "c.say(done=None)",
        "c.say(ask='secrets')",
        "c.say(ask='reference', reference={'kind': 'backing-file', 'name': '/etc/passwd', 'format': None, "
        "'names': []}, origin='x', skip=0)",
        "c.say(ask='target', needed='many', file_size=[])",
        "c.say(progress=3)",
        "c.say(error=7)",
        "c._socket.sendall(b'\\xff' * 64)",
        "c._socket.sendall(b'\\x05\\0\\0\\0\\0{nope')",
        "c.say(surprise=1)",
    ],
)
def test_a_process_that_was_taken_over_gets_nothing_by_lying(
    tmp_path: Path, no_leftovers: Path, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    monkeypatch.setattr(confined_start, "BOOT", LIES + lie)
    with pytest.raises(UnsafeImage, match="confined-crash"):
        imagekit.convert(write(tmp_path, "raw"), no_leftovers / "out.vhd", confined=True)


def test_nonsense_from_the_confined_process_is_a_refusal(
    tmp_path: Path, no_leftovers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confined_start, "BOOT", LIES + "c.say(ask='secrets')")
    with pytest.raises(UnsafeImage, match="confined-crash"):
        imagekit.convert(write(tmp_path, "raw"), no_leftovers / "out.vhd", confined=True)


def test_a_target_that_grows_beyond_its_limit_ends_the_process(
    tmp_path: Path, no_leftovers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = """
import os, time
c.say(ask='target', needed=1, file_size=1 << 30)
_, (fd,) = c.receive()
os.pwrite(fd, bytes(4 << 20), 0)
time.sleep(60)
"""
    monkeypatch.setattr(confined_start, "BOOT", LIES + writes)
    monkeypatch.setattr(confined, "SPARE_OUTPUT", MiB)
    with pytest.raises(UnsafeImage, match="limit-output-bytes"):
        imagekit.convert(
            write(tmp_path, "raw"), no_leftovers / "out.raw", confined=True, limits=Limits(output_bytes=MiB)
        )


# --- progress and cancel -----------------------------------------------------------------------------------------


def test_progress_passes_through(tmp_path: Path) -> None:
    seen: list[Progress] = []
    imagekit.convert(write(tmp_path, "raw"), tmp_path / "out.vhd", confined=True, sync=False, progress=seen.append)
    assert [one.phase for one in seen][-1] == "sync"
    assert {"plan", "copy"} <= {one.phase for one in seen}


def test_cancel_ends_it_soon(tmp_path: Path, no_leftovers: Path) -> None:
    source = tmp_path / "large.raw"
    source.write_bytes(noise(64 * MiB))
    cancel, at = threading.Event(), [0.0]

    def on_progress(progress: Progress) -> None:
        if progress.phase == "copy" and not cancel.is_set():
            at[0] = time.monotonic()
            cancel.set()

    with pytest.raises(Cancelled):
        imagekit.convert(
            source, no_leftovers / "out.qcow2", compression="zlib", confined=True, progress=on_progress, cancel=cancel
        )
    assert time.monotonic() - at[0] < 1.0, "250 ms are promised, on a machine that does nothing else"


def test_it_does_not_outlive_who_started_it(tmp_path: Path) -> None:
    """The starter is killed while the confined process waits for its job."""
    program = (
        "import sys, time\n"
        "from imagekit.confinement import jobs as confined, start as confined_start\n"
        "from imagekit.plan import ConvertOptions\n"
        "with confined_start.started(confined._settings(ConvertOptions(), 1)) as (process, channel):\n"
        "    assert channel.hear(60)\n"
        "    print(process.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    starter.kill()
    starter.wait()
    starter.stdout.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
        state = Path(f"/proc/{pid}/stat")
        if state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z":
            break  # nobody collects orphans here
    else:
        assert not Path(f"/proc/{pid}").exists()


# --- what it cannot do -------------------------------------------------------------------------------------------

ATTEMPTS = {
    "open a file": "os.open('/etc/passwd', os.O_RDONLY)",
    "make a file": "os.open('/tmp/x', os.O_WRONLY | os.O_CREAT)",
    "list a folder": "os.listdir('/')",
    "look at a name": "os.stat('/etc')",
    "read a link": "os.readlink('/proc/self/exe')",
    "remove a file": "os.unlink('/tmp/x')",
    "connect": "socket.socket()",
    "connect locally": "socket.socket(socket.AF_UNIX)",
    "start a program": "os.execv('/bin/true', ['true'])",
    "fork": "os.fork()",
    "signal its starter": "os.kill(os.getppid(), 0)",
    "raise its limits": "resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))",
    "look into another process": "libc.ptrace(16, os.getppid(), 0, 0) and fail()",
    "run what it wrote": "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)",
    "make a namespace": "libc.unshare(0x10000000) and fail()",
}
TRY = """
import ctypes, json, mmap, os, resource, socket, sys, threading
sys.path[:] = json.loads(sys.argv[1])
from imagekit.confinement import seccomp
from imagekit.confinement import child as confined_child
libc = ctypes.CDLL(None, use_errno=True)
def fail():
    raise OSError(ctypes.get_errno(), 'refused')
settings = {"parent": os.getppid(), "memory": 1 << 28, "limits": {"RLIMIT_NOFILE": 24, "RLIMIT_CORE": 0}}
if sys.argv[3] == "landlock":
    seccomp.restrict_calls = lambda: False
elif sys.argv[3] == "seccomp":
    confined_child.rights.landlock_version = lambda: 0
print(*confined_child._confine(settings), file=sys.stderr)
try:
    exec(sys.argv[2])
except (OSError, ValueError) as error:
    os.write(1, b"refused")
else:
    os.write(1, b"done")
threads = [threading.Thread(target=int) for _ in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
os.write(1, b", and threads")
os._exit(0)
"""


def attempt(action: str, only: str = "both") -> str:
    command = [sys.executable, "-c", TRY, json.dumps(sys.path), action, only]
    done = subprocess.run(command, capture_output=True, timeout=60)
    return done.stdout.decode() or done.stderr.decode()


@pytest.mark.parametrize("action", ATTEMPTS.values(), ids=ATTEMPTS)
@pytest.mark.slow
def test_a_confined_process_cannot(action: str) -> None:
    assert attempt(action) == "refused, and threads"


def test_landlock_alone_and_seccomp_alone_keep_files_closed() -> None:
    action = ATTEMPTS["open a file"]
    assert [attempt(action, one) for one in ("both", "landlock", "seccomp")] == ["refused, and threads"] * 3
    assert attempt("os.getpid()") == "done, and threads"


def test_filters_for_both_machines_are_well_formed() -> None:
    """Every jump stays inside, and the last instruction is a verdict (the kernel takes no other)."""
    for machine in seccomp.ARCHITECTURES:
        program = seccomp.build_filter(machine, 1234)
        steps = [program[at : at + 8] for at in range(0, len(program), 8)]
        assert len(program) % 8 == 0
        for number, step in enumerate(steps):
            code = int.from_bytes(step[:2], sys.byteorder)
            if code in (seccomp.JUMP_EQUAL, seccomp.JUMP_ANY_BIT):
                assert number + 1 + max(step[2], step[3]) < len(steps)
        assert int.from_bytes(steps[-1][:2], sys.byteorder) == seccomp.RETURN


OPENS = re.compile(r"\b(open|openat|openat2|creat|execve|execveat|socket|connect|fork|vfork|name_to_handle_at)\(")


@pytest.mark.parametrize(
    ("kind", "target"),
    [("qcow2 zstd", "vhdx"), ("vmdk stream", "vhd"), ("vhdx dynamic", "qcow2")],
    ids=str,
)
@pytest.mark.slow
def test_strace_sees_no_open_after_the_start(tmp_path: Path, kind: str, target: str) -> None:
    """All system calls of the confined process, from the filter to its end: none opens, connects or starts."""
    need_tool("strace")
    source = write(tmp_path, kind)
    script = (
        f"import imagekit; imagekit.convert({str(source)!r}, {str(tmp_path / 'out')!r}, target_format={target!r}, "
    )
    script += "confined=True, sync=False, verify='content')"
    subprocess.run(
        ["strace", "-ff", "-qq", "-o", str(tmp_path / "trace"), sys.executable, "-c", script], check=True, timeout=300
    )
    traces = {path: path.read_text(errors="replace") for path in tmp_path.glob("trace.*")}
    confined_traces = [text for text in traces.values() if "seccomp(SECCOMP_SET_MODE_FILTER" in text]
    assert len(confined_traces) == 1
    after = confined_traces[0].partition("seccomp(SECCOMP_SET_MODE_FILTER")[2].splitlines()
    threads = re.findall(r"clone\(.*= (\d+)$", "\n".join(after), re.MULTILINE)
    for thread in threads:
        after += traces[tmp_path / f"trace.{thread}"].splitlines()
    assert any(line.startswith("pread") for line in after), "the image was read there"
    assert threads, "and by threads"
    assert [line for line in after if OPENS.search(line)] == []


def test_the_signals_of_a_terminal_do_not_reach_it() -> None:
    """Ctrl-C is for the starter, which ends the confined process itself."""
    if sys.platform == "win32":
        raise RuntimeError("not there on Windows")
    options = confined._settings(ConvertOptions(), 1)
    with confined_start.started(options) as (process, channel):
        assert channel.hear(60.0)
        if sys.platform == "win32":
            raise RuntimeError("not there on Windows")
        assert os.getpgid(process.pid) != os.getpgid(0)


@pytest.mark.parametrize("missing", [["deflate"], ["deflate", "isal"]], ids=["isal", "zlib"])
def test_a_library_that_is_missing_has_its_stand_in_confined_too(
    missing: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process finds modules where this one does, so it does not find them."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in missing:
        (hidden / f"{name}.py").write_text("raise ImportError('not installed')")
    monkeypatch.syspath_prepend(str(hidden))
    recipe = qcow2_images.Recipe(size=MiB, clusters={0: qcow2_images.Compressed(text(64 * KiB))})
    path = tmp_path / "disk.qcow2"
    path.write_bytes(qcow2_images.make(recipe).data)
    imagekit.convert(path, tmp_path / "out.raw", confined=True, sync=False)
    assert (tmp_path / "out.raw").read_bytes()[: 64 * KiB] == text(64 * KiB)


def test_corruption_found_while_copying_is_the_same_error(tmp_path: Path, no_leftovers: Path) -> None:
    recipe = qcow2_images.Recipe(size=MiB, clusters={0: qcow2_images.Compressed(text(64 * KiB))})
    made = qcow2_images.make(recipe)
    data = bytearray(made.data)
    at = data.rindex(qcow2_images.compress(text(64 * KiB))[:16])
    data[at : at + 16] = b"\xff" * 16
    path = tmp_path / "disk.qcow2"
    path.write_bytes(data)
    with pytest.raises(CorruptImage, match="deflate"):
        imagekit.convert(path, no_leftovers / "out.vhd", confined=True, sync=False)
