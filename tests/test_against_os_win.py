"""Our files through os-win, the library by which OpenStack's Hyper-V driver decides whether a disk fits a flavor."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

import imagekit
from imagekit.formats import registry
from imagekit.formats.base import GiB, MiB
from tests.disks import OPTIONS
from tests.oracles.os_win import DYNAMIC, FIXED, VHD, VHDX, Answer, Question, ask

pytestmark = pytest.mark.oracle

BLOCK_SIZES = [size * MiB for size in (1, 2, 8, 32, 256)]
FILE_SIZES = [100 * MiB, GiB, 20 * GiB, 100 * GiB + 5 * MiB]


def test_os_win_finds_our_vhdx_block_size_log_and_metadata(tmp_path: Path) -> None:
    questions = []
    for block_size, sector_size in itertools.product(BLOCK_SIZES, (512, 4096)):
        path = tmp_path / f"nameless-{block_size}-{sector_size}"
        imagekit.create(path, GiB, target_format="vhdx", block_size=block_size, sector_size=sector_size, sync=False)
        questions.append(
            Question(
                path=path,
                device=VHDX,
                subtype=DYNAMIC,
                file_size=GiB,
                block_size=block_size,
                sector_size=sector_size,
            )
        )
    for question, said in zip(questions, ask(*questions), strict=True):
        assert (said.signature, said.format) == ("VHDX", "VHDX")
        assert said.block_size == question.block_size
        assert (said.log_size, said.metadata) == (MiB, [MiB, 2 * MiB])


def test_the_disk_that_os_win_lets_grow_to_a_file_size_never_outgrows_it(tmp_path: Path) -> None:
    """compute-hyperv gives a flavor's size to this formula and makes the disk that large."""
    questions = []
    for block_size in BLOCK_SIZES[:4]:
        path = tmp_path / f"{block_size}.vhdx"
        imagekit.create(path, GiB, block_size=block_size, sync=False)
        questions += [
            Question(path=path, device=VHDX, subtype=DYNAMIC, file_size=size, block_size=block_size)
            for size in FILE_SIZES
        ]
    for question, said in zip(questions, ask(*questions), strict=True):
        options = replace(OPTIONS, block_size=question.block_size)
        writer = registry.find("vhdx").writer(said.internal_size, options)
        full = writer.layout(((0, said.internal_size // question.block_size),)).file_size
        assert question.file_size - 2 * question.block_size - 2 * MiB < full <= question.file_size + MiB


def test_os_win_knows_our_vhds_by_their_signature_and_a_fixed_ones_size(tmp_path: Path) -> None:
    fixed, dynamic = tmp_path / "fixed", tmp_path / "dynamic"
    imagekit.create(fixed, 64 * MiB, target_format="vhd", subformat="fixed", sync=False)
    imagekit.create(dynamic, 64 * MiB, target_format="vhd", sync=False)
    said = ask(
        Question(path=fixed, device=VHD, subtype=FIXED, file_size=fixed.stat().st_size),
        Question(path=dynamic, device=VHD, subtype=DYNAMIC, file_size=66 * MiB, block_size=2 * MiB),
    )
    assert said[0] == Answer("VHD", "VHD", 64 * MiB)
    assert (said[1].signature, said[1].format) == ("VHD", "VHD")
    assert 65 * MiB < said[1].internal_size <= 66 * MiB
