"""Against qemu-img and other readers: the same content, the same map, the same judgement of the structure.

What QEMU wrote is read by us, what we wrote is read by QEMU, and images made from the specification alone are read
by both. libvhdi and dissect are asked as well where they are a second opinion on a VHD.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fixtures import vhd_images
from fixtures.qcow2_images import Cluster, Compressed, Plain, Recipe, Split, Zero, make
from imagekit.conversion import convert_image
from imagekit.errors import ImagekitError, UnsafeImage
from imagekit.formats import registry
from imagekit.formats.base import JSON, Extent
from imagekit.formats.files import LocalFile, MemoryFile
from imagekit.plan import ConvertOptions
from imagekit.sources import Reading, open_source
from tests.disks import IDENTIFIER, content, md5, noise, text
from tests.oracles import dissect_md5, need_tool, qemu_img_md5, vhdi_md5
from tests.samples import sample

pytestmark = pytest.mark.oracle

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
K64 = 64 * KiB
QUICK = ConvertOptions(sync=False, identifier=IDENTIFIER)
CURRENT = "current_size"


def qemu(tool: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [need_tool(tool), *map(str, arguments)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{tool} {arguments}: {done.stderr}"
    return done.stdout


def driver(format_name: str) -> str:
    return "vpc" if format_name == "vhd" else format_name


# --- what must hold for any image ------------------------------------------------------------------------------


def said_of_bytes(extents: list[dict[str, JSON]], format_name: str) -> Iterator[tuple[int, dict[str, JSON]]]:
    """Where what is said of the bytes changes, and what is said from there on.

    What lies where is compared for data only: QEMU also tells the place that a zero cluster keeps, and whether the
    host has a hole under data. Where no file can lie below, it calls every byte present.
    """
    last: dict[str, JSON] = {}
    layered = format_name == "qcow2"
    for extent in extents:
        assert isinstance(extent["start"], int)
        said: dict[str, JSON] = {"data": extent["data"], "present": extent["present"] or not layered}
        if extent["data"] and isinstance(extent.get("offset"), int):
            said["shift"] = extent["offset"] - extent["start"]  # type: ignore[operator]
        if not extent["data"]:
            said["zero"] = extent["zero"]
        if said != last:
            yield extent["start"], said
        last = said


def assert_read_alike(
    path: Path, format_name: str, expected: bytes, *, maps: bool = True, size: str = CURRENT
) -> None:
    """Content and map of an image, as we and qemu-img see them; ``size`` says where a VHD's size comes from."""
    with open_source(path, Reading(declared=format_name)) as source:
        assert md5(content(source.image)) == md5(expected)
        ours = [extent.to_json() for extent in source.image.extents()]
    options = {"force_size_calc": size} if format_name == "vhd" else {}
    assert qemu_img_md5(path, driver(format_name), **options) == md5(expected)
    if maps:
        described = {"driver": driver(format_name), "file": {"driver": "file", "filename": str(path)}, **options}
        theirs = json.loads(qemu("qemu-img", "map", "--output=json", f"json:{json.dumps(described)}"))
        assert list(said_of_bytes(ours, format_name)) == list(said_of_bytes(theirs, format_name))


def assert_checked_alike(path: Path) -> None:
    """A sound qcow2, by our check and theirs."""
    qemu("qemu-img", "check", "-q", "-f", "qcow2", path)
    with LocalFile.open_source(path) as file:
        assert registry.find("qcow2").check(file) == []


def assert_converts(path: Path, tmp_path: Path, *subformats: str) -> None:
    """Our VHDs of an image hold what qemu-img finds in the image itself."""
    for subformat in subformats or ("dynamic",):
        target = tmp_path / f"{subformat}.vhd"
        report = convert_image(path, target, ConvertOptions(sync=False, subformat=subformat))
        one, other = (
            json.dumps({"driver": driver(name), "file": {"driver": "file", "filename": str(image)}})
            for name, image in ((report.source_format, path), ("vhd", target))
        )
        assert "identical" in qemu("qemu-img", "compare", f"json:{one}", f"json:{other}")
        target.unlink()


# --- qcow2 as qemu-img writes it -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A raw disk of all sorts: noise, text, zeros, short pieces, an end inside a cluster."""
    parts = [
        noise(200 * KiB, 1),
        bytes(312 * KiB),
        text(300 * KiB, 2),
        bytes(4 * MiB + 200 * KiB),
        noise(K64, 3) + bytes(K64) + text(K64, 4) + noise(512, 5) + bytes(K64 - 512),
        noise(100 * KiB, 6),
        bytes(3 * MiB + 1536),
        text(4096, 7),
    ]
    content = b"".join(parts)
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    path.write_bytes(content)
    return path, content


def made(how: str, *, compressed: bool = False, slow: bool = False) -> object:
    marks = [pytest.mark.slow] if slow else []
    return pytest.param(how, compressed, id=how + ",-c" * compressed, marks=marks)


USUAL_SIZES = (512, 4096, K64, 2 * MiB)
MADE = [
    *[
        made(f"cluster_size={size}", compressed=compressed, slow=size not in USUAL_SIZES)
        for size in (1 << bits for bits in range(9, 22))
        for compressed in (False, True)
    ],
    *[made(f"compat=0.10,cluster_size={size}", compressed=True) for size in (512, K64, 2 * MiB)],
    *[made(f"compat=0.10,cluster_size={size}", slow=size != K64) for size in (512, K64, 2 * MiB)],
    *[made(f"compression_type=zstd,cluster_size={size}", compressed=True) for size in USUAL_SIZES],
    *[made(f"extended_l2=on,cluster_size={size}") for size in (16 * KiB, K64, 2 * MiB)],
    *[made(f"extended_l2=on,cluster_size={size}", compressed=True, slow=size != K64) for size in (16 * KiB, K64)],
    *[made(f"refcount_bits={bits}", slow=bits not in (1, 8, 64)) for bits in (1, 2, 4, 8, 32, 64)],
    made("refcount_bits=8", compressed=True),
    made("preallocation=metadata"),
    made("preallocation=falloc", slow=True),
    made("lazy_refcounts=on", slow=True),
]


@pytest.mark.parametrize(("how", "compressed"), MADE)
def test_a_qcow2_that_qemu_img_made(how: str, disk: tuple[Path, bytes], tmp_path: Path, *, compressed: bool) -> None:
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *["-c"] * compressed, "-o", how, disk[0], path)
    assert_read_alike(path, "qcow2", disk[1])
    assert_checked_alike(path)
    assert_converts(path, tmp_path)


WRITTEN: dict[str, list[str]] = {
    "plain": ["write -P 1 0 1M", "write -P 2 5000k 300k"],
    "unaligned": ["write -P 1 1000 5000", "write -P 2 65535 2", "write -P 3 8388000 608"],
    "zeroed": ["write -P 1 0 4M", "write -z 1M 1M", "write -z 2500k 100k"],
    "zeroed and unmapped": ["write -P 1 0 4M", "write -z -u 1M 1M", "write -z -u 3000000 100000"],
    "discarded": ["write -P 1 0 4M", "discard 1M 1M", "discard 3M 64k"],
    "zeroed where nothing was": ["write -z 1M 4M"],
    "plain over compressed": ["write -c -P 7 64k 64k", "write -c -P 8 256k 64k", "write -P 9 80k 4k"],
    "scattered": [f"write -P {at % 250 + 1} {at * 300}k 4k" for at in range(27)],
}


@pytest.mark.parametrize("commands", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize(
    "how",
    [
        "lazy_refcounts=off",
        "extended_l2=on",
        pytest.param("compat=0.10", marks=pytest.mark.slow),
        pytest.param("cluster_size=4k", marks=pytest.mark.slow),
    ],
)
def test_a_qcow2_that_a_guest_wrote_to(how: str, commands: list[str], tmp_path: Path) -> None:
    """Zero clusters with and without a place, subclusters of every kind, discarded ones."""
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", how, path, "8M")
    qemu("qemu-io", "-f", "qcow2", "-d", "unmap", *[word for command in commands for word in ("-c", command)], path)
    raw = tmp_path / "image.raw"
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    assert_read_alike(path, "qcow2", raw.read_bytes())
    assert_checked_alike(path)
    assert_converts(path, tmp_path)


def test_a_qcow2_with_snapshots_and_bitmaps(tmp_path: Path) -> None:
    """Clusters shared between states, a saved state larger than the disk is now, dirty bitmaps with content."""
    path, raw = tmp_path / "image.qcow2", tmp_path / "image.raw"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 5M", "-c", "write -c -P 2 30M 64k", path)
    qemu("qemu-img", "snapshot", "-c", "first", path)
    qemu("qemu-img", "bitmap", "--add", "-f", "qcow2", path, "dirty")
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 3 1M 1M", "-c", "write -z 4M 1M", path)
    qemu("qemu-img", "snapshot", "-c", "second", path)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 4 2M 9M", path)
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    assert_read_alike(path, "qcow2", raw.read_bytes())
    assert_checked_alike(path)
    with open_source(path) as source:
        features = source.image.info().features
        assert (features["snapshots"], features["bitmaps"]) == (2, 1)
        kinds = {one.kind for one in source.image.ranges()}
    assert {"snapshot table", "snapshot L1 table", "bitmap directory", "bitmap table", "bitmap"} <= kinds


@pytest.mark.slow
def test_an_encrypted_qcow2_is_named_refused_and_its_structure_checked(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    secret = ["--object", "secret,id=s,data=secret"]
    command = [need_tool("qemu-img"), "create", "-q", *secret, "-f", "qcow2", "-o", options, str(path), "8M"]
    # To choose the number of iterations it measures its own CPU time, which on some virtual machines now and then
    # seems to be none; nothing else is a reason to try again.
    for _ in range(12):
        done = subprocess.run(command, capture_output=True, text=True)
        if "Unable to get accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    with pytest.raises(UnsafeImage, match="encrypted"):
        open_source(path)
    with LocalFile.open_source(path) as file:
        assert registry.find("qcow2").check(file) == []


def test_a_qcow2_with_its_data_elsewhere_is_named_refused_and_its_structure_checked(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data'}", path, "8M")
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", path)
    with pytest.raises(UnsafeImage, match="data-file"):
        open_source(path)
    with LocalFile.open_source(path) as file:
        assert registry.find("qcow2").check(file) == []


# --- qcow2 as the specification has it -------------------------------------------------------------------------


def by_the_book(bits: int, *, extended: bool) -> dict[int, Cluster]:
    size = 1 << bits
    clusters: dict[int, Cluster] = {
        5: Plain(noise(size)),
        2: Compressed(text(size)),
        3: Compressed(text(size, 1)),
        0: Zero(),
        1: Zero(noise(size)),
        9: Plain(text(size)),
    }
    if extended:
        part = size // 32
        choices = [None, b"", noise(part, 2), text(part, 3)]
        clusters[7] = Split(tuple(choices[at % 4] for at in range(32)))
    return clusters


@pytest.mark.parametrize("zstd", [False, True], ids=["zlib", "zstd"])
@pytest.mark.parametrize(
    ("bits", "extended"),
    [(9, False), (12, False), (16, False), (21, False), (14, True), (16, True), (21, True)],
    ids=lambda value: ("extended" * value) if isinstance(value, bool) else str(value),
)
def test_a_qcow2_made_by_the_book(bits: int, tmp_path: Path, *, zstd: bool, extended: bool) -> None:
    size = 1 << bits
    for order in (0, 3, 6, 4) if bits < 21 else (4,):
        recipe = Recipe(
            size=10 * size - 512,
            clusters=by_the_book(bits, extended=extended),
            cluster_bits=bits,
            refcount_order=order,
            zstd=zstd,
            extended_l2=extended,
        )
        path = tmp_path / "image.qcow2"
        path.write_bytes(make(recipe).data)
        assert_checked_alike(path)
        if order == 4:
            assert_read_alike(path, "qcow2", recipe.content())
            assert_converts(path, tmp_path)


# --- what qemu-img check finds ---------------------------------------------------------------------------------


def damaged(made: bytes, chance: random.Random) -> bytes:
    """One word of the metadata changed: cleared, a bit flipped, moved on, or another word in its place."""
    image = registry.find("qcow2").open(MemoryFile(made))
    ranges = [one for one in image.ranges() if one.kind not in ("header", "data", "compressed data")]
    place = chance.choice(ranges)
    end = min(place.offset + place.length, len(made) - 8)
    words = [at for at in range(place.offset, end, 8) if any(made[at : at + 8])] or [place.offset]
    at, other = chance.choice(words), chance.choice(words)
    value = int.from_bytes(made[at : at + 8], "big")
    changed = chance.choice(
        [
            0,
            value ^ 1 << chance.randrange(1, 56),
            value ^ 1 << 63,
            value + (1 << chance.randrange(9, 24)),
            int.from_bytes(made[other : other + 8], "big"),
        ]
    )
    return made[:at] + (changed % 2**64).to_bytes(8, "big") + made[at + 8 :]


def judged_by_qemu(path: Path) -> tuple[bool, bool]:
    """(damage, leaks) as qemu-img check sees them; refusing to open is damage."""
    command = [need_tool("qemu-img"), "check", "--output=json", "-f", "qcow2", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 1 or not done.stdout:
        return True, False
    found = json.loads(done.stdout)
    return bool(found.get("corruptions") or found.get("check-errors")), bool(found.get("leaks"))


def judged_by_us(path: Path) -> tuple[bool, bool]:
    with LocalFile.open_source(path) as file:
        try:
            problems = registry.find("qcow2").check(file)
        except ImagekitError:
            return True, False
    # Clusters that share places are no damage: `aliased` is a budget of our own, against images that only unfold.
    damage = [one for one in problems if not one.leak and one.code != "aliased"]
    return bool(damage), any(one.leak for one in problems)


def assert_judged_alike(seeds: range, tmp_path: Path) -> None:
    """Damage is damage for both, and leaks are leaks where there is no damage that hides what is used."""
    path = tmp_path / "image.qcow2"
    images = [
        make(Recipe(size=200 * 512, clusters=by_the_book(9, extended=False), cluster_bits=9)).data,
        make(Recipe(size=12 << 14, clusters=by_the_book(14, extended=True), cluster_bits=14, extended_l2=True)).data,
        make(Recipe(size=80 << 12, clusters=by_the_book(12, extended=False), cluster_bits=12, refcount_order=2)).data,
    ]
    differ = []
    for seed in seeds:
        chance = random.Random(seed)
        path.write_bytes(damaged(chance.choice(images), chance))
        ours, theirs = judged_by_us(path), judged_by_qemu(path)
        if ours[0] != theirs[0] or (not ours[0] and ours[1] != theirs[1]):
            differ.append((seed, ours, theirs))
    assert differ == []


def test_a_damaged_qcow2_is_judged_as_qemu_img_judges_it(tmp_path: Path) -> None:
    assert_judged_alike(range(60), tmp_path)


@pytest.mark.slow
def test_a_thousand_damaged_qcow2_are_judged_as_qemu_img_judges_them(tmp_path: Path) -> None:
    assert_judged_alike(range(1000, 2000), tmp_path)


# --- VHD as qemu-img writes it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, "force_size=on"], ids=["by geometry", "forced"])
@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
def test_a_vhd_that_qemu_img_made(subformat: str, size: str | None, disk: tuple[Path, bytes], tmp_path: Path) -> None:
    path = tmp_path / "image.vhd"
    how = f"subformat={subformat}" + (f",{size}" if size else "")
    qemu("qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", how, disk[0], path)
    with open_source(path) as source:
        virtual_size = source.image.virtual_size
        assert source.findings == ()
    assert virtual_size == len(disk[1]) if size else virtual_size >= len(disk[1])
    assert_read_alike(path, "vhd", disk[1].ljust(virtual_size, b"\0"), maps=subformat == "dynamic")
    assert_converts(path, tmp_path)


def test_a_vhd_that_a_guest_wrote_to_in_any_order(tmp_path: Path) -> None:
    path, raw = tmp_path / "image.vhd", tmp_path / "image.raw"
    qemu("qemu-img", "create", "-q", "-f", "vpc", "-o", "force_size=on", path, "40M")
    places = random.Random(1).sample(range(0, 40 * MiB - K64, 4096), 30)
    commands = [f"write -P {at % 250 + 1} {at} 60k" for at in places]
    qemu("qemu-io", "-f", "vpc", *[word for command in commands for word in ("-c", command)], path)
    qemu("qemu-img", "convert", "-f", "vpc", "-O", "raw", path, raw)
    assert_read_alike(path, "vhd", raw.read_bytes())
    assert_converts(path, tmp_path)


@pytest.mark.parametrize("disk_type", ["dynamic", "fixed"])
def test_a_vhd_made_by_the_book(disk_type: str, tmp_path: Path) -> None:
    path = tmp_path / "image.vhd"
    blocks = {3: noise(2 * MiB), 0: text(2 * MiB), 4: noise(MiB)}
    expected = vhd_images.dynamic_content(9 * MiB, blocks)
    footer = vhd_images.Footer(size=9 * MiB, disk_type=2, creator=b"win ")
    if disk_type == "fixed":
        path.write_bytes(vhd_images.fixed(expected, footer))
    else:
        dynamic = vhd_images.Footer(size=9 * MiB, creator=b"win ")
        path.write_bytes(vhd_images.dynamic(9 * MiB, blocks, footer=dynamic))
    assert_read_alike(path, "vhd", expected, maps=disk_type == "dynamic")


# --- VHD as we write it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subformat", "block_size"), [("dynamic", None), ("dynamic", 512 * KiB), ("dynamic", 8 * MiB), ("fixed", None)]
)
@pytest.mark.parametrize("grown", [0, 512, 5 * MiB])
def test_a_vhd_that_we_made(
    subformat: str, block_size: int | None, grown: int, disk: tuple[Path, bytes], tmp_path: Path
) -> None:
    """Without any option that tells the size: qemu-img, libvhdi and we agree on it and on every byte."""
    path = tmp_path / "image.vhd"
    size = len(disk[1]) + grown
    options = ConvertOptions(sync=False, subformat=subformat, block_size=block_size, size=size)
    convert_image(disk[0], path, options)
    expected = disk[1].ljust(size, b"\0")
    info = json.loads(qemu("qemu-img", "info", "--output=json", "-f", "vpc", path))
    assert info["virtual-size"] == size
    assert qemu_img_md5(path, "vpc") == md5(expected)
    assert_read_alike(path, "vhd", expected, maps=subformat == "dynamic")
    assert vhdi_md5(path) == md5(expected)


@pytest.mark.parametrize("size", [3 * MiB, 127 * GiB, 2040 * GiB], ids=["3 MiB", "127 GiB", "2040 GiB"])
def test_an_empty_vhd_of_any_size_has_that_size_for_qemu(size: int, tmp_path: Path) -> None:
    source, path = tmp_path / "empty.qcow2", tmp_path / "image.vhd"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", source, str(size))
    convert_image(source, path, QUICK)
    info = json.loads(qemu("qemu-img", "info", "--output=json", "-f", "vpc", path))
    assert info["virtual-size"] == size
    mapped = json.loads(qemu("qemu-img", "map", "--output=json", "-f", "vpc", path))
    assert [(one["length"], one["zero"], one["data"]) for one in mapped] == [(size, True, False)]


def test_a_vhd_that_we_made_is_read_alike_by_dissect(disk: tuple[Path, bytes], tmp_path: Path) -> None:
    path = tmp_path / "image.vhd"
    convert_image(disk[0], path, QUICK)
    assert dissect_md5(path, "vhd") == md5(disk[1])


def test_a_guest_may_write_to_a_vhd_that_we_made(disk: tuple[Path, bytes], tmp_path: Path) -> None:
    """QEMU finds its way in our layout, and we find ours in what it allocates behind it."""
    path = tmp_path / "image.vhd"
    convert_image(disk[0], path, ConvertOptions(sync=False, size=40 * MiB))
    qemu("qemu-io", "-f", "vpc", "-c", "write -P 5 100k 10k", "-c", "write -P 6 32M 4M", path)
    expected = bytearray(disk[1].ljust(40 * MiB, b"\0"))
    expected[100 * KiB : 110 * KiB] = b"\5" * (10 * KiB)
    expected[32 * MiB : 36 * MiB] = b"\6" * (4 * MiB)
    assert_read_alike(path, "vhd", bytes(expected))


@pytest.mark.parametrize("name", ["ext2.qcow2", "image.qcow2", "ntfs-dynamic.vhd", "ext2.vhd"])
def test_a_real_image_has_the_content_and_the_map_that_qemu_img_sees(name: str, tmp_path: Path) -> None:
    path = sample(name)
    with open_source(path) as source:
        expected, format_name = content(source.image), source.format
    # One of them was made by QEMU itself, which took the size from the geometry.
    assert_read_alike(path, format_name, expected, size="chs" if name == "ext2.vhd" else CURRENT)
    assert_converts(path, tmp_path, "dynamic", "fixed")


def test_a_raw_disk_has_the_map_that_qemu_img_sees(disk: tuple[Path, bytes], tmp_path: Path) -> None:
    path = tmp_path / "sparse.raw"
    with path.open("wb") as out:
        for at in range(0, len(disk[1]), K64):
            if any(disk[1][at : at + K64]):
                out.seek(at)
                out.write(disk[1][at : at + K64])
        out.truncate(len(disk[1]))
    assert_read_alike(path, "raw", disk[1])


def test_verification_may_be_left_to_qemu_img(disk: tuple[Path, bytes], tmp_path: Path) -> None:
    need_tool("qemu-img")
    for subformat in ("dynamic", "fixed"):
        options = ConvertOptions(sync=False, subformat=subformat, verify="qemu-img")
        assert convert_image(disk[0], tmp_path / f"{subformat}.vhd", options).verified == "qemu-img"


# --- an image in use -------------------------------------------------------------------------------------------


@contextmanager
def qemu_writes(path: Path, format_name: str) -> Iterator[None]:
    """A QEMU that holds the image open for writing, as a running machine does."""
    command = [need_tool("qemu-io"), "-f", format_name, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        process.stdout.readline()  # it answers once the image is open
        try:
            yield
        finally:
            process.stdin.write("quit\n")
            process.stdin.flush()


@contextmanager
def qemu_nbd_writes(path: Path, format_name: str) -> Iterator[None]:
    """The same by qemu-nbd, which shares nothing but the locks with qemu-io."""
    socket, pid = path.with_suffix(".sock"), path.with_suffix(".pid")
    command = [
        need_tool("qemu-nbd"),
        "-f",
        format_name,
        "-k",
        str(socket),
        "--fork",
        "--pid-file",
        str(pid),
        str(path),
    ]
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        subprocess.run(["kill", pid.read_text().strip()], check=True)


Holder = Callable[[Path, str], "object"]


@pytest.mark.skipif(sys.platform != "linux", reason="open file description locks")
@pytest.mark.parametrize("holder", [qemu_writes, qemu_nbd_writes], ids=["qemu-io", "qemu-nbd"])
@pytest.mark.parametrize("format_name", ["qcow2", "raw", "vpc"])
def test_an_image_that_qemu_writes_to_is_refused(
    format_name: str, holder: Callable[..., object], tmp_path: Path, no_leftovers: Path
) -> None:
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-q", "-f", format_name, path, "4M")
    with holder(path, format_name):  # type: ignore[attr-defined]
        with pytest.raises(UnsafeImage, match="QEMU has the image open for writing") as caught:
            convert_image(path, no_leftovers / "target.vhd", QUICK)
        assert (caught.value.rule, caught.value.exit_code) == ("in-use", 13)
        with open_source(path, Reading(allow=frozenset({"in-use"}))) as source:
            assert "in-use" in [finding.rule for finding in source.findings]


@pytest.mark.skipif(sys.platform != "linux", reason="open file description locks")
def test_an_image_that_qemu_only_reads_is_not_in_use(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    command = [need_tool("qemu-io"), "-r", "-f", "qcow2", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        process.stdout.readline()
        convert_image(path, tmp_path / "target.vhd", QUICK)
        process.stdin.write("quit\n")
        process.stdin.flush()


@pytest.mark.skipif(sys.platform != "linux", reason="open file description locks")
def test_qemu_does_not_write_to_what_we_read(tmp_path: Path) -> None:
    """It may read meanwhile; afterwards it may do what it likes."""
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    write = [need_tool("qemu-io"), "-f", "qcow2", "-c", "write -P 1 0 64k", str(path)]
    with open_source(path):
        refused = subprocess.run(write, capture_output=True, text=True)
        assert 'Failed to get "write" lock' in refused.stderr
        qemu("qemu-io", "-r", "-f", "qcow2", "-c", "read 0 64k", path)
        qemu("qemu-img", "info", path)
    subprocess.run(write, check=True, capture_output=True)


def test_extents_are_what_the_map_command_prints(disk: tuple[Path, bytes], tmp_path: Path) -> None:
    """The same keys, so that scripts for one read the other."""
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk[0], path)
    theirs = json.loads(qemu("qemu-img", "map", "--output=json", "-f", "qcow2", path))
    keys = {key for one in theirs for key in one}
    assert keys - set(Extent(0, 1, data=True, zero=False, offset=0).to_json()) == set()
