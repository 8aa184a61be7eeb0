"""os-win, OpenStack's library for Windows, asked what it believes about a VHD or VHDX.

Its calls to Windows cannot run elsewhere; what it parses itself (signatures, a VHDX's regions and block size) and the
formulas that compute-hyperv decides by (the largest disk that fits a file of a given size) can.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.oracles import need_venv

VHD, VHDX = 2, 3
"""Device ids as the virtual disk API numbers them."""
FIXED, DYNAMIC = 2, 3

_ASK = """
import json, sys, warnings
warnings.simplefilter("ignore")
from os_win.utils.storage.virtdisk.vhdutils import VHDUtils
utils = VHDUtils()
for path, info, file_size in json.load(sys.stdin):
    utils.get_vhd_info = lambda *_: info
    answer = {
        "signature": utils._get_vhd_format_by_signature(path),
        "format": utils.get_vhd_format(path),
        "internal_size": utils.get_internal_vhd_size_by_file_size(path, file_size),
    }
    if answer["signature"] == "VHDX":
        with open(path, "rb") as file:
            answer["block_size"] = utils._get_vhdx_block_size(file)
            answer["log_size"] = utils._get_vhdx_log_size(file)
            answer["metadata"] = utils._get_vhdx_metadata_size_and_offset(file)
    print(json.dumps(answer))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """About a disk: what Windows would have told os-win of it, and a file size in bytes."""

    path: Path
    device: int
    subtype: int
    file_size: int
    block_size: int = 0
    sector_size: int = 512


@dataclass(frozen=True, slots=True)
class Answer:
    """Sizes in bytes; ``internal_size`` is the largest disk that fits the file size asked about."""

    signature: str | None
    format: str
    internal_size: int
    block_size: int | None = None
    log_size: int | None = None
    metadata: list[int] | None = None
    """Length and offset of the metadata region."""


def ask(*questions: Question) -> list[Answer]:
    """What os-win says to each."""
    told = [
        (
            str(one.path),
            {
                "DeviceId": one.device,
                "ProviderSubtype": one.subtype,
                "BlockSize": one.block_size,
                "SectorSize": one.sector_size,
            },
            one.file_size,
        )
        for one in questions
    ]
    command = [str(need_venv("os_win")), "-c", _ASK]
    done = subprocess.run(command, capture_output=True, text=True, input=json.dumps(told))
    if done.returncode != 0:
        pytest.fail(f"os-win exited {done.returncode}: {done.stderr.strip()}")
    return [Answer(**json.loads(line)) for line in done.stdout.splitlines()]
