"""Chains of five: made by us, written to by an independent program as a host would, read, merged, compared.

Every child is made by ``create --parent`` and gets single sectors, runs and zeros from a generator that shares
nothing with imagekit; 7-Zip flattens the same chain where it is there.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import imagekit
from fixtures import vhd_images, vhdx_writes
from imagekit.formats.base import KiB, MiB
from tests.disks import content, md5, noise
from tests.oracles import need_tool

SIZE = 7 * MiB + 512 * KiB
DEPTH = 5
Writer = Callable[[bytes, int, bytes], bytes]
WRITERS: dict[str, Writer] = {"vhd": vhd_images.write, "vhdx": vhdx_writes.write}


def guest_writes(number: int) -> list[tuple[int, bytes]]:
    """What a guest writes to the disk of that number: at block edges, over what was written below, zeros too."""
    return [
        (number * 512 * 9, noise(512, number)),
        (2 * MiB - 1024 * number, noise(2048 * number, number + 10)),
        (4 * MiB + number * 4096, bytes(4096)),
        (4 * MiB + 64 * KiB - number * 512, noise(512, number + 20)),
        (SIZE - 512 * (DEPTH - number + 1), noise(512, number + 30)),
    ]


def make_chain(folder: Path, fmt: str, sector: int) -> tuple[list[Path], list[bytes]]:
    """The files and what a guest reads of each."""
    paths: list[Path] = []
    contents, disk = [], bytearray(SIZE)
    for number in range(DEPTH):
        path = folder / f"{number}.{fmt}"
        options = {"sector_size": sector} if fmt == "vhdx" else {}
        if number == 0:
            imagekit.create(path, SIZE, sync=False, **options)
        else:
            imagekit.create(path, parent=str(paths[-1]), sync=False, **options)
        image = path.read_bytes()
        for place, written in guest_writes(number):
            at = place // sector * sector
            data = written.ljust(-(-len(written) // sector) * sector, b"\x77")[: SIZE - at]
            image = WRITERS[fmt](image, at, data)
            disk[at : at + len(data)] = data
        path.write_bytes(image)
        paths.append(path)
        contents.append(bytes(disk))
    return paths, contents


@pytest.fixture(params=[("vhd", 512), ("vhdx", 512), ("vhdx", 4096)], ids=["vhd", "vhdx", "vhdx 4096"])
def chain(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[list[Path], list[bytes]]:
    return make_chain(tmp_path, *request.param)


def read(path: Path) -> str:
    with imagekit.open_image(path, follow_references=True) as disk:
        return md5(content(disk))


def test_every_disk_of_the_chain_reads_as_its_guest_left_it(chain: tuple[list[Path], list[bytes]]) -> None:
    paths, contents = chain
    assert [read(path) for path in paths] == [md5(disk) for disk in contents]
    assert all(imagekit.check(path).problems == () for path in paths)
    assert len(set(map(md5, contents))) == DEPTH


@pytest.mark.parametrize("target", ["one.raw", "one.vhd", "one.vhdx", "one.qcow2"])
def test_the_chain_merges_into_one_file(chain: tuple[list[Path], list[bytes]], target: str, tmp_path: Path) -> None:
    paths, contents = chain
    imagekit.merge(paths[-1], tmp_path / target, follow_references=True, verify="content", sync=False)
    assert read(tmp_path / target) == md5(contents[-1])


def test_the_chain_merges_step_by_step_into_its_base(chain: tuple[list[Path], list[bytes]]) -> None:
    paths, contents = chain
    for child in reversed(range(1, DEPTH)):
        imagekit.merge(paths[child], follow_references=True, verify="content")
        paths[child].unlink()
        assert read(paths[child - 1]) == md5(contents[-1])
        assert imagekit.check(paths[child - 1]).problems == ()


def test_the_middle_of_the_chain_merges_and_its_children_are_told(chain: tuple[list[Path], list[bytes]]) -> None:
    """2 into 1; then 3 sits on 1, whose content is now what it knew as 2's."""
    paths, contents = chain
    imagekit.merge(paths[2], follow_references=True, verify="content")
    paths[2].unlink()
    imagekit.rebase(paths[3], paths[1], ignore_parent_id=True)
    assert read(paths[3]) == md5(contents[3])


@pytest.mark.oracle
def test_7zip_reads_the_same_of_the_whole_chain(chain: tuple[list[Path], list[bytes]]) -> None:
    paths, contents = chain
    kind = paths[0].suffix[1:]
    done = subprocess.run([need_tool("7z"), "x", f"-t{kind}", "-so", str(paths[-1])], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert md5(done.stdout) == md5(contents[-1])
