"""Changes in place: in order, with everything before a barrier on the medium before anything after it."""

from __future__ import annotations

from imagekit import changes
from imagekit.formats.base import Barrier, Change, Write
from imagekit.formats.files import MemoryFile


class Recorder(MemoryFile):
    """Remembers what the file was at each flush."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.flushed: list[bytes] = []

    def flush(self) -> None:
        self.flushed.append(bytes(self.data))


def test_steps_are_taken_in_order_and_barriers_flush() -> None:
    file = Recorder(b"------")
    changes.apply([Write(0, b"ab"), Write(1, b"cd"), Barrier(), Write(5, b"ef"), Barrier()], file)
    assert file.flushed == [b"acd---", b"acd--ef"]


def test_nothing_to_do_touches_nothing() -> None:
    file = Recorder(b"abc")
    changes.apply([], file)
    assert (bytes(file.data), file.flushed) == (b"abc", [])


def test_steps_may_come_one_by_one() -> None:
    file = Recorder(b"ab")
    steps: list[Change] = [Write(0, b"x"), Barrier()]
    changes.apply(iter(steps), file)
    assert file.flushed == [b"xb"]
