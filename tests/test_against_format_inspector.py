"""oslo.utils' own tests of its image inspector, with imagekit in its place: those that use what is public of it.

OpenStack decides by that inspector which images it takes. Its other tests look into its own parts, and judge nobody
else. Where imagekit differs, the difference is named here, and that it is still there is tested too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.oracles import format_inspector, need_tool, need_venv

FORMATS = "TestFormatInspectors.test_"
AGREE = [
    *(f"{FORMATS}format_{number}_{name}" for number, name in enumerate(("qcow2", "vhd", "vhdx", "vmdk", "gpt"), 1)),
    f"{FORMATS}subformat_1___iso____iso9660__",
    f"{FORMATS}subformat_2___iso____udf__",
    f"{FORMATS}subformat_3___vmdk____streamOptimized__",
    f"{FORMATS}vdi",
    f"{FORMATS}bad_iso_qcow2",
    f"{FORMATS}bad_iso_qcow2_multiple_matches",
    f"{FORMATS}from_file_reads_minimum",
    f"{FORMATS}qed_always_unsafe",
    f"{FORMATS}qcow2_safety_checks",
    f"{FORMATS}vmdk_bad_descriptor_offset",
    f"{FORMATS}vmdk_bad_descriptor_offset_stream_optimized",
    f"{FORMATS}invalid_data",
    f"{FORMATS}invalid_data_without_raw",
    "TestFormatInspectorInfra.test_get_inspector",
]

DIFFER = {
    # Stricter: a descriptor of 2 MiB would lie on the tables behind it.
    f"{FORMATS}vmdk_bad_descriptor_mem_limit": "the descriptor and the redundant grain directory overlap",
    f"{FORMATS}vmdk_bad_descriptor_mem_limit_stream_optimized": "the descriptor and the redundant grain directory",
    # Refused as well, but by the rule extent-file: the test asks for a reason called "descriptor".
    f"{FORMATS}vmdk_non_sparse_unsafe": "KeyError: 'descriptor'",
    # Asks for a region of the inspector's own before it comes to the point.
    f"{FORMATS}vmdk_with_footer": "no attribute 'region'",
    # LUKS is known by name and refused: what is in it is not looked for, and no passphrase is taken.
    f"{FORMATS}format_6_luks": "Failed to calculate size for luks",
    "TestLUKSInspector.test_luks_no_passphrase_passes_safety": "AssertionError",
    "TestLUKSInspector.test_luks_decrypt_detects_inner_format": "unexpected keyword argument 'params'",
    "TestLUKSInspector.test_luks_wrong_passphrase_errors": "takes no arguments",
}


@pytest.mark.slow
@pytest.mark.oracle
def test_openstack_s_tests_of_its_inspector_pass_or_differ_as_said(tmp_path: Path) -> None:
    for tool in ("qemu-img", "mkisofs"):
        need_tool(tool)
    python = need_venv("oslo_utils")
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    program = [sys.executable, format_inspector.__file__, site, *AGREE, *DIFFER]
    done = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    became = json.loads(done.stdout)
    assert {name: one["wrong"] for name, one in became.items() if name in AGREE and one["wrong"]} == {}
    for name, words in DIFFER.items():
        assert len(became[name]["wrong"]) == 1, name
        assert words in became[name]["wrong"][0], name
    assert {(one["ran"], one["skipped"]) for one in became.values()} == {(1, 0)}
