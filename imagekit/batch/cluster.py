"""Who does the items of a batch elsewhere: the workers of a Dask scheduler (extra ``batch``).

What travels is a task, a few hundred bytes, and its result, a few thousand; images stay where they are, so workers
see the same folders under the same names. A task that a lost worker had is given to another one; that is safe, since
a target gets its name when it is complete.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from imagekit.batch.crew import Workforce
from imagekit.batch.manifest import Item
from imagekit.batch.tasks import perform
from imagekit.errors import ToolError
from imagekit.progress import Progress
from imagekit.workers import usable_cores

RETRIES = 2
CONNECT_SECONDS = 20
AHEAD = 2
"""Items that a worker has at hand for each that it does: the next is there when one is done."""


@contextmanager
def cluster(address: str, resources: Mapping[str, float] | None = None) -> Iterator[Workforce]:
    """The workers that a scheduler has, as many as it has now; with ``resources`` only those that offer them."""
    try:
        from distributed import Client
    except ImportError:
        raise ToolError("--scheduler needs distributed", hint="pip install 'imagekit[batch]'") from None
    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:  # TypeError: tls:// without certificates
        raise ToolError(
            f"the scheduler {address} does not answer: {error}", hint="dask scheduler; for tls:// see the README"
        ) from None
    with client:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        if not workers:
            raise ToolError(f"the scheduler {address} has no workers", hint=f"dask worker {address} --nthreads 1")
        slots = sum(int(one["nthreads"]) for one in workers)
        more = {"resources": dict(resources)} if resources else {}
        pool = client.get_executor(retries=RETRIES, pure=False, **more)
        yield Workforce(pool, do_there, slots, ahead=AHEAD * slots)


def do_there(task: Mapping[str, Any], item: Item) -> dict[str, Any]:
    """One item, on a worker: with its share of the computer's cores, dropped when the caller is gone."""
    from distributed import get_worker

    worker = get_worker()
    key = worker.get_current_task()
    cancel = threading.Event()

    def look(step: Progress) -> None:
        # The worker forgets, or marks as cancelled, what nobody waits for any more; it does not stop it.
        state = worker.state.tasks.get(key)
        if state is None or state.state == "cancelled":
            cancel.set()

    threads = max(1, usable_cores() // max(1, worker.state.nthreads))
    options = {"jobs": threads, **task["options"]}
    result = perform({**task, "options": options}, progress=look, cancel=cancel)
    return {**result, "where": str(worker.address)}
