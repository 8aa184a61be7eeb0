"""Bounds on time, on machines that other work slows down."""

from __future__ import annotations

from collections.abc import Callable

TRIES = 5


def assert_within(seconds: float, attempt: Callable[[], float]) -> None:
    """One of a few attempts takes at most so long: a program that is too slow is so each time, a busy machine not."""
    took = []
    for _ in range(TRIES):
        took.append(attempt())
        if took[-1] <= seconds:
            return
    raise AssertionError(f"at most {seconds} s were promised, it took {', '.join(f'{one:.3f}' for one in took)}")
