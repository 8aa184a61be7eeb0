"""Against qemu-img, for what goes beyond reading one qcow2: writing, repairs, snapshots, chains and data files.

What we wrote is checked and read by QEMU, what we mended is judged by its check, and what it made we read as it does.
"""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Literal

import pytest

from fixtures.qcow2_images import Cluster, Compressed, Plain, Recipe, Snapshot, Zero, make
from imagekit import changes, copying
from imagekit.formats import registry
from imagekit.formats.base import JSON, DiskImage, OpenOptions, Reference, WriterOptions
from imagekit.formats.files import LocalFile, MemoryFile
from imagekit.formats.qcow2 import FORMAT, Qcow2Image
from imagekit.formats.raw import RawImage
from imagekit.plan import build_plan
from tests.disks import IDENTIFIER, content, convert, md5, noise, text
from tests.oracles import need_tool, qemu_img_md5

pytestmark = pytest.mark.oracle

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
K64 = 64 * KiB


def qemu(tool: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [need_tool(tool), *map(str, arguments)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{tool} {arguments}: {done.stderr}{done.stdout}"
    return done.stdout


def write(path: Path, *commands: str) -> None:
    qemu("qemu-io", "-f", "qcow2", *[word for command in commands for word in ("-c", command)], path)


def checked(path: Path) -> dict[str, object]:
    """What qemu-img check found, whether it likes it or not."""
    command = [need_tool("qemu-img"), "check", "--output=json", "-f", "qcow2", str(path)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
    assert isinstance(found, dict)
    return {key: found.get(key, 0) for key in ("check-errors", "corruptions", "leaks")}


SOUND = {"check-errors": 0, "corruptions": 0, "leaks": 0}


# --- what we write ---------------------------------------------------------------------------------------------


def far_matches(length: int) -> bytes:
    """Repeats at distances inside and outside of the window that QEMU inflates with."""
    chance = random.Random(2)
    out = bytearray(chance.randbytes(40_000))
    while len(out) < length:
        start = len(out) - chance.choice([50, 4095, 4096, 4097, 20_000, 32_768, 40_000])
        out += out[start : start + chance.randint(20, 2000)]
    return bytes(out[:length])


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A raw disk of all sorts, with an end inside a cluster."""
    parts = [
        noise(200 * KiB, 1),
        bytes(312 * KiB),
        text(300 * KiB, 2),
        bytes(2 * MiB + 200 * KiB),
        noise(K64, 3) + bytes(K64) + text(K64, 4) + noise(512, 5) + bytes(K64 - 512),
        far_matches(MiB),
        bytes(MiB + 1536),
        text(4096, 7),
    ]
    content = b"".join(parts)
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    path.write_bytes(content)
    return path, content


Compression = Literal["zlib", "zstd"]
COMPRESSIONS: list[Compression | None] = [None, "zlib", "zstd"]
USUAL = (9, 12, 16, 21)


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=["plain", "zlib", "zstd"])
@pytest.mark.parametrize(
    "bits", [pytest.param(bits, marks=[pytest.mark.slow] if bits not in USUAL else []) for bits in range(9, 22)]
)
def test_a_qcow2_that_we_made(
    bits: int, compression: Compression | None, disk: tuple[Path, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "image.qcow2"
    options = WriterOptions(IDENTIFIER, block_size=1 << bits, compression=compression)
    path.write_bytes(convert(MemoryFile(disk[1]), "raw", "qcow2", options=options, jobs=3).data)
    assert checked(path) == SOUND
    assert qemu_img_md5(path, "qcow2") == md5(disk[1])
    info = json.loads(qemu("qemu-img", "info", "--output=json", "-f", "qcow2", path))
    assert (info["virtual-size"], info["cluster-size"]) == (len(disk[1]), 1 << bits)
    assert info["format-specific"]["data"]["compression-type"] == (compression or "zlib")
    if compression is not None:
        stored = json.loads(qemu("qemu-img", "check", "--output=json", "-f", "qcow2", path))
        assert stored["compressed-clusters"] > 0


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=["plain", "zlib", "zstd"])
def test_a_guest_may_write_to_a_qcow2_that_we_made(
    compression: Compression | None, disk: tuple[Path, bytes], tmp_path: Path
) -> None:
    """QEMU allocates behind our tables, and in the rest of our refcount blocks."""
    path = tmp_path / "image.qcow2"
    options = WriterOptions(IDENTIFIER, block_size=4096, compression=compression)
    path.write_bytes(convert(MemoryFile(disk[1]), "raw", "qcow2", options=options, size=40 * MiB).data)
    write(path, "write -P 5 100k 10k", "write -P 6 32M 4M", "write -z 0 8k", "discard 600k 64k")
    assert checked(path) == SOUND
    with LocalFile.open_source(path) as file:
        assert md5(content(FORMAT.open(file))) == qemu_img_md5(path, "qcow2")
        assert FORMAT.check(file) == []


def test_ours_is_no_larger_than_what_qemu_img_packs(disk: tuple[Path, bytes], tmp_path: Path) -> None:
    """The same streams for zlib; zstd differs by its version."""
    for how in COMPRESSIONS[1:]:
        theirs = tmp_path / f"{how}.qcow2"
        packing = f"compression_type={how},cluster_size=4k"
        qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", packing, disk[0], theirs)
        options = WriterOptions(IDENTIFIER, block_size=4096, compression=how)
        ours = convert(MemoryFile(disk[1]), "raw", "qcow2", options=options)
        assert ours.size < theirs.stat().st_size * 1.02


def test_a_disk_of_16_tib_that_we_made_is_sound(tmp_path: Path) -> None:
    """Sparse, with a piece at either end; QEMU reads both."""
    size = 16 * TiB

    class Wide(RawImage):
        def pread_into(self, offset: int, buffer: memoryview) -> None:
            buffer[:] = (b"\x11" if offset < GiB else b"\x22") * len(buffer)

    image = Wide(MemoryFile(), size)
    options = WriterOptions(IDENTIFIER, compression=None)
    plan = build_plan(RawImage(MemoryFile(), size), source_format="raw", target_format="qcow2", options=options)
    layout = plan.layout()
    path = tmp_path / "image.qcow2"
    path.touch()
    with LocalFile.open_for_change(path) as file:
        for block in (0, size // K64 - 1):
            data = bytearray(K64)
            image.pread_into(block * K64, memoryview(data))
            file.pwrite(layout.place(block), data)
        file.truncate(layout.file_size)
        for offset, metadata in layout.metadata():
            file.pwrite(offset, metadata)
    assert checked(path) == SOUND
    command = [
        need_tool("qemu-io"),
        "-r",
        "-f",
        "qcow2",
        "-c",
        "read -P 0x11 0 64k",
        "-c",
        f"read -P 0x22 {size - K64} 64k",
    ]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True)
    assert "failed" not in done.stdout
    assert done.returncode == 0


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=["plain", "zlib", "zstd"])
def test_a_hundred_megabytes_written_by_threads_to_a_file(compression: Compression | None, tmp_path: Path) -> None:
    source, path = tmp_path / "source.raw", tmp_path / "image.qcow2"
    source.write_bytes(
        b"".join((noise(MiB, at) if at % 3 else far_matches(MiB)) for at in range(40)) + bytes(60 * MiB)
    )
    path.touch()
    options = WriterOptions(IDENTIFIER, compression=compression)
    with LocalFile.open_source(source) as file, LocalFile.open_for_change(path) as target:
        image = registry.find("raw").open(file)
        plan = build_plan(image, source_format="raw", target_format="qcow2", options=options)
        result = copying.copy_image(plan, image, file, target, jobs=4)
        assert result.file_size == target.size <= plan.file_size
    assert checked(path) == SOUND
    assert "identical" in qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, path)


# --- what we mend ----------------------------------------------------------------------------------------------


def mend(path: Path) -> bool:
    """Whether there was anything to mend."""
    with LocalFile.open_for_change(path) as file:
        steps = FORMAT.repair(file)
        changes.apply(steps, file)
    return bool(steps)


def test_an_image_whose_writer_was_killed_is_clean_again(tmp_path: Path) -> None:
    """With lazy refcounts they are written at the end, and the end did not come."""
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "64M")
    command = [
        need_tool("qemu-io"),
        "-f",
        "qcow2",
        "-c",
        "write -P 1 0 5M",
        "-c",
        "write -P 2 30M 64k",
        "-c",
        "abort",
    ]
    subprocess.run([*command, str(path)], capture_output=True)
    with LocalFile.open_source(path) as file:
        image = FORMAT.open(file)
        assert "dirty" in [fact.code for fact in image.info().facts]
        before = md5(content(image))
        assert FORMAT.check(file) != []
    assert mend(path)
    assert checked(path) == SOUND
    with LocalFile.open_source(path) as file:
        image = FORMAT.open(file)
        assert (image.info().facts, md5(content(image))) == ((), before)
        assert FORMAT.check(file) == []
    assert not mend(path)


MIXED: dict[int, Cluster] = {
    0: Plain(noise(4096)),
    1: Compressed(text(4096)),
    2: Compressed(text(4096, 1)),
    3: Zero(noise(4096)),
    9: Plain(noise(4096, 2)),
    600: Plain(noise(4096, 3)),
}


@pytest.mark.parametrize("order", [0, 4, *(pytest.param(order, marks=pytest.mark.slow) for order in (1, 3, 6))])
def test_what_we_mend_qemu_img_finds_sound(order: int, tmp_path: Path) -> None:
    """Refcounts and copied flags at random; what a guest reads stays what it was."""
    path = tmp_path / "image.qcow2"
    one = Snapshot("1", "one", {0: MIXED[0], 2: MIXED[2], 5: Plain(noise(4096, 4))}, size=700 * 4096)
    snapshots = (one,) if order >= 3 else ()
    recipe = Recipe(size=700 * 4096, clusters=MIXED, cluster_bits=12, refcount_order=order, snapshots=snapshots)
    sound = make(recipe)
    path.write_bytes(sound.data)
    assert checked(path) == SOUND
    for seed in range(6):
        chance, data = random.Random(seed), bytearray(sound.data)
        block = sound.refcount_blocks[0]
        used = max(1, (len(data) // 4096 << order) // 8)
        for _ in range(chance.randint(1, 4)):
            data[block + chance.randrange(used)] ^= 1 << chance.randrange(2 if order < 6 else 1)
        for number in chance.sample([0, 3, 9, 600], 2):
            data[sound.l2_entry(number)] ^= 0x80
        path.write_bytes(data)
        assert checked(path) != SOUND
        assert mend(path)
        assert checked(path) == SOUND
        assert path.read_bytes() == sound.data


def test_what_qemu_leaked_is_freed(tmp_path: Path) -> None:
    """A snapshot's entry is struck from the header: all that only it used is lost."""
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    write(path, "write -P 1 0 5M", "write -c -P 2 30M 64k")
    qemu("qemu-img", "snapshot", "-c", "first", path)
    write(path, "write -P 3 1M 1M")
    data = bytearray(path.read_bytes())
    data[60:72] = bytes(12)
    path.write_bytes(data)
    leaks, corruptions = (checked(path)[key] for key in ("leaks", "corruptions"))
    assert (leaks, corruptions) != (0, 0)
    expected = qemu_img_md5(path, "qcow2")
    assert mend(path)
    assert checked(path) == SOUND
    assert qemu_img_md5(path, "qcow2") == expected


# --- snapshots -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["cluster_size=64k", "cluster_size=4k,extended_l2=off", "extended_l2=on", "compat=0.10"])
def with_snapshots(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Three states of a disk: plain and compressed, zeroed, and grown."""
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", request.param, path, "16M")
    write(path, "write -P 1 0 3M", "write -c -P 2 10M 64k")
    qemu("qemu-img", "snapshot", "-c", "first", path)
    write(path, "write -P 3 1M 1M", "write -z 2M 128k", "write -P 9 5000000 3000")
    qemu("qemu-img", "snapshot", "-c", "second one", path)
    qemu("qemu-img", "snapshot", "-d", "first", path)
    qemu("qemu-img", "snapshot", "-c", "third", path)
    write(path, "write -P 4 0 8M")
    return path


@pytest.mark.parametrize("snapshot", ["second one", "third", "2", "3"])
def test_a_snapshot_is_the_disk_that_qemu_img_finds_in_it(
    snapshot: str, with_snapshots: Path, tmp_path: Path
) -> None:
    raw = tmp_path / "snapshot.raw"
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-l", snapshot, with_snapshots, raw)
    with LocalFile.open_source(with_snapshots) as file:
        image = FORMAT.open(file, options=OpenOptions(snapshot=snapshot))
        assert md5(content(image)) == md5(raw.read_bytes())
        now = FORMAT.open(file)
        assert md5(content(now)) == qemu_img_md5(with_snapshots, "qcow2")
        assert now.info().features["snapshot-list"] == [
            {"id": "2", "name": "second one"},
            {"id": "3", "name": "third"},
        ]


def test_a_snapshot_of_a_disk_that_grew_since_has_the_size_it_had(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "16M")
    write(path, "write -P 1 0 16M")
    qemu("qemu-img", "snapshot", "-c", "small", path)
    qemu("qemu-img", "resize", "-q", path, "40M")
    write(path, "write -P 2 8M 30M")
    with LocalFile.open_source(path) as file:
        image = FORMAT.open(file, options=OpenOptions(snapshot="small"))
        assert content(image) == b"\1" * (16 * MiB)


def test_an_image_with_snapshots_made_by_the_book_is_read_alike(tmp_path: Path) -> None:
    path, raw = tmp_path / "image.qcow2", tmp_path / "snapshot.raw"
    recipe = Recipe(
        size=700 * 4096,
        clusters=MIXED,
        cluster_bits=12,
        snapshots=(
            Snapshot("1", "one", {0: MIXED[0], 2: MIXED[2], 5: Plain(noise(4096, 4))}, size=700 * 4096),
            Snapshot("2", "two", {1: Compressed(text(4096, 9))}, size=700 * 4096),
        ),
    )
    path.write_bytes(make(recipe).data)
    assert checked(path) == SOUND
    for snapshot in recipe.snapshots:
        qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-l", snapshot.name, path, raw)
        assert md5(raw.read_bytes()) == md5(recipe.content(snapshot))


# --- other files -----------------------------------------------------------------------------------------------


def opened(path: Path) -> Qcow2Image:
    """With every reference followed, as qemu-img follows them."""

    def resolve(reference: Reference) -> DiskImage:
        other = path.parent / reference.name
        if reference.format == "qcow2":
            return opened(other)
        file = LocalFile.open_source(other)
        return RawImage(file, file.size)

    return FORMAT.open(LocalFile.open_source(path), resolver=resolve)


def borders(extents: list[dict[str, JSON]]) -> list[tuple[JSON, JSON]]:
    """Where data begins and how deep it lies (None: where zeros begin)."""
    found: list[tuple[JSON, JSON]] = []
    for one in extents:
        depth = one["depth"] if one["data"] else None
        if not found or found[-1][1] != depth:
            found.append((one["start"], depth))
    return found


def assert_chain_read_alike(path: Path) -> None:
    with opened(path) as image:
        assert md5(content(image)) == qemu_img_md5(path, "qcow2")
        ours = [one.to_json() for one in image.extents()]
    theirs = json.loads(qemu("qemu-img", "map", "--output=json", "-f", "qcow2", path))
    assert borders(ours) == borders(theirs)


@pytest.mark.parametrize("size", ["5M", "16M", "23M"], ids=["shorter", "same", "longer"])
@pytest.mark.parametrize("base", ["raw", "qcow2", "qcow2,compressed"])
@pytest.mark.parametrize(
    "overlay",
    [
        "cluster_size=64k",
        "extended_l2=on",
        pytest.param("compression_type=zstd,cluster_size=2M", marks=pytest.mark.slow),
    ],
)
def test_an_overlay_on_any_base_is_the_disk_that_qemu_img_sees(
    overlay: str, base: str, size: str, tmp_path: Path
) -> None:
    top, below, source = tmp_path / "top.qcow2", tmp_path / "base", tmp_path / "base.raw"
    kind, _, compressed = base.partition(",")
    total = int(size[:-1]) * MiB
    source.write_bytes(
        (far_matches(2 * MiB) + bytes(MiB) + noise(MiB + 512))[:total].ljust(total - 70_000, b"\0") + text(70_000)
    )
    qemu("qemu-img", "convert", *["-c"] * bool(compressed), "-f", "raw", "-O", kind, source, below)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", overlay, "-b", "base", "-F", kind, top, "16M")
    write(top, "write -P 7 100k 3k", "write -z 1M 500k", "write -P 8 15M 1M", "write -c -P 9 4M 2M")
    assert_chain_read_alike(top)


def test_a_chain_of_four(tmp_path: Path) -> None:
    below = tmp_path / "0.raw"
    below.write_bytes(noise(3 * MiB))
    kind = "raw"
    for number, how in enumerate(("cluster_size=64k", "extended_l2=on", "cluster_size=512"), start=1):
        path = tmp_path / f"{number}.qcow2"
        qemu(
            "qemu-img", "create", "-q", "-f", "qcow2", "-o", how, "-b", below.name, "-F", kind, path, f"{number + 3}M"
        )
        write(path, f"write -P {number} {number * 300}k 200k", f"write -z {number * 400}k 60k")
        below, kind = path, "qcow2"
    assert_chain_read_alike(below)


@pytest.mark.parametrize("how", ["data_file_raw=off", "data_file_raw=on", "extended_l2=on", "preallocation=metadata"])
def test_a_qcow2_whose_data_lies_elsewhere_is_read_alike(how: str, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    where = f"data_file={tmp_path / 'data.raw'},{how}"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", where, path, str(8 * MiB + 1536))
    write(path, "write -P 1 0 1000", "write -P 2 100k 1M", "write -z 300k 200k", "write -P 3 8M 1536")
    with LocalFile.open_source(path) as file:
        assert FORMAT.check(file) == []
    with opened(path) as image:
        assert image.info().features["data-file-raw"] is ("raw=on" in how)
        assert md5(content(image)) == qemu_img_md5(path, "qcow2")
        if "raw=on" in how:
            data = (tmp_path / "data.raw").read_bytes()  # whole clusters
            assert content(image).ljust(len(data), b"\0") == data


@pytest.mark.parametrize("extended", [False, True], ids=["", "extended"])
def test_a_data_file_made_by_the_book_is_read_alike(tmp_path: Path, *, extended: bool) -> None:
    clusters: dict[int, Cluster] = {
        0: Plain(noise(1 << 14)),
        3: Zero(noise(1 << 14)),
        5: Zero(),
        8: Plain(text(1 << 14)),
    }
    recipe = Recipe(
        size=9 << 14, clusters=clusters, cluster_bits=14, data_file=str(tmp_path / "data"), extended_l2=extended
    )
    made = make(recipe)
    path = tmp_path / "image.qcow2"
    path.write_bytes(made.data)
    (tmp_path / "data").write_bytes(made.external)
    assert checked(path) == SOUND
    assert qemu_img_md5(path, "qcow2") == md5(recipe.content())
    with opened(path) as image:
        assert content(image) == recipe.content()
