"""A Dask cluster on this computer for tests: a scheduler and workers, each a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

SECONDS = 60.0


@dataclass
class Cluster:
    """The scheduler's address, and the workers' processes."""

    address: str
    scheduler: subprocess.Popen[bytes]
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def busy_with(self, folder: Path) -> subprocess.Popen[bytes]:
        """A worker in the middle of an item: a process of its holds a target without a name open."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            for worker in self.workers:
                if any(_writes_into(pid, folder) for pid in (worker.pid, *_children(worker.pid))):
                    return worker
            time.sleep(0.005)
        raise AssertionError("no worker has begun")


def _children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(one) for task in tasks for one in (task / "children").read_text().split()]
    except OSError:
        return []


def _writes_into(pid: int, folder: Path) -> bool:
    try:
        return any(str(one.readlink()).startswith(f"{folder}/#") for one in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


@contextmanager
def cluster(
    folder: Path,
    *,
    workers: Sequence[Sequence[str]] = ((), ()),
    scheduler: Sequence[str] = (),
    host: str = "127.0.0.1",
    options: Sequence[str] = (),
    offers: Sequence[Sequence[str]] = ((), ()),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Cluster]:
    """``workers`` and ``scheduler`` are what each command begins with, such as a network namespace; ``offers``
    are options of each worker."""
    about = folder / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    env = {**os.environ, "DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH": "0", **(environment or {})}
    processes: list[subprocess.Popen[bytes]] = []

    def start(command: Sequence[str], name: str) -> subprocess.Popen[bytes]:
        with (folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd=folder)
        processes.append(process)
        return process

    try:
        there = ["--host", host, "--port", "0", "--no-dashboard", "--scheduler-file", str(about), *options]
        made = Cluster("", start([*scheduler, *dask, "scheduler", *there], "scheduler"))
        made.address = address = _address(about)
        for number, before in enumerate(workers):
            here = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--death-timeout", "60", *options]
            here += ["--local-directory", str(folder / f"worker-{number}"), *offers[number]]
            made.workers.append(start([*before, *dask, "worker", address, *here], f"worker-{number}"))
        _wait_for(folder, len(workers))
        yield made
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(about: Path) -> str:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            return str(json.loads(about.read_text())["address"])
        except (OSError, ValueError):
            time.sleep(0.05)
    raise AssertionError("the scheduler does not start: " + (about.parent / "scheduler.log").read_text()[-2000:])


def _wait_for(folder: Path, workers: int) -> None:
    deadline = time.monotonic() + SECONDS
    logs = [folder / f"worker-{number}.log" for number in range(workers)]
    while not all(b"Registered to" in log.read_bytes() for log in logs):
        if time.monotonic() > deadline:
            raise AssertionError("a worker does not start: " + "".join(log.read_text()[-2000:] for log in logs))
        time.sleep(0.05)
