"""Ids derived without OpenSSL are those of uuid.uuid5."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from imagekit.formats.vhdx_ids import uuid5


@given(namespace=st.uuids(), name=st.text())
def test_an_id_is_that_of_the_standard_library(namespace: uuid.UUID, name: str) -> None:
    assert uuid5(namespace, name) == uuid.uuid5(namespace, name)


def test_a_vhdx_is_written_without_loading_openssl(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    code = "from imagekit.cli.app import run; code = run(['convert', 'disk.raw', 'disk.vhdx', '--no-sync'])\n"
    code += "print(code, *sorted({'hashlib', '_hashlib', 'subprocess'} & (set(sys.modules) - loaded)))"
    code = f"import sys, typer; loaded = set(sys.modules)\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
    assert done.stdout.splitlines()[-1] == b"0"
