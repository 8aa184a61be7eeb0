"""How a program of ours ends: without the clean-up of an interpreter whose memory is gone anyway."""

from __future__ import annotations

import atexit
import os
import sys


def leave(code: object) -> None:
    """End the process; returns when something is left that the interpreter has to wait for, or to complain about."""
    threading = sys.modules.get("threading")
    if not isinstance(code, int) or (threading is not None and threading.active_count() > 1):
        return
    if _is_measured():
        return
    try:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):
        return
    os._exit(code)


def _is_measured() -> bool:
    """Whether a profiler or tracer is at work, which wants to write down what it saw."""
    monitoring = getattr(sys, "monitoring", None)  # Python 3.12
    tools = [monitoring.get_tool(number) for number in range(6)] if monitoring is not None else []
    return any([*tools, sys.gettrace(), sys.getprofile()])
