"""Threads over one iterator: every task once, the first error out, nothing left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from imagekit.errors import Cancelled, CorruptImage
from imagekit.progress import Control
from imagekit.workers import run
from tests.timing import assert_within


def at_once(work: Callable[[int], None]) -> Callable[[], Callable[[int], None]]:
    return lambda: work


def nothing() -> None:
    pass


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("imagekit-")]


@pytest.mark.parametrize("jobs", [1, 2, 7])
def test_every_task_is_done_once(jobs: int) -> None:
    done: list[int] = []
    run(range(1000), at_once(done.append), jobs=jobs, control=Control(), tick=nothing)
    assert sorted(done) == list(range(1000))


def test_the_first_error_stops_the_rest_and_comes_out() -> None:
    done: list[int] = []

    def work(task: int) -> None:
        if task == 10:
            raise CorruptImage("tenth")
        time.sleep(0.001)
        done.append(task)

    with pytest.raises(CorruptImage, match="tenth"):
        run(range(100000), at_once(work), jobs=4, control=Control(), tick=nothing)
    assert len(done) < 1000
    assert not ours()


def test_an_error_of_the_iterator_comes_out() -> None:
    def tasks() -> Iterator[int]:
        yield 1
        raise CorruptImage("no more")

    with pytest.raises(CorruptImage, match="no more"):
        run(tasks(), at_once(lambda task: None), jobs=3, control=Control(), tick=nothing)


def test_cancel_is_heard_within_a_quarter_of_a_second() -> None:
    def stopped() -> float:
        cancel = threading.Event()
        threading.Timer(0.2, cancel.set).start()
        started = time.monotonic()
        with pytest.raises(Cancelled):
            run(
                range(10**9),
                at_once(lambda task: time.sleep(0.01)),
                jobs=2,
                control=Control(cancel=cancel),
                tick=nothing,
            )
        assert not ours()
        return time.monotonic() - started

    assert_within(0.2 + 0.25, stopped)


def test_ticks_come_from_the_caller_s_thread_and_last_after_the_work() -> None:
    done: list[int] = []
    seen: list[tuple[int, threading.Thread]] = []

    def work(task: int) -> None:
        time.sleep(0.05)
        done.append(task)

    run(
        range(10),
        at_once(work),
        jobs=2,
        control=Control(),
        tick=lambda: seen.append((len(done), threading.current_thread())),
    )
    assert seen[-1] == (10, threading.current_thread())
    assert {thread for _, thread in seen} == {threading.current_thread()}


def test_no_more_tasks_are_taken_than_threads_work_on() -> None:
    """The bound on memory: a task is only fetched by the thread that does it."""
    taken: list[int] = []
    running = threading.Semaphore(0)
    most = 0

    def tasks() -> Iterator[int]:
        for number in range(50):
            taken.append(number)
            yield number

    finished: list[int] = []

    def work(task: int) -> None:
        nonlocal most
        most = max(most, len(taken) - len(finished))
        time.sleep(0.002)
        finished.append(task)
        running.release()

    run(tasks(), at_once(work), jobs=3, control=Control(), tick=nothing)
    assert most <= 3
