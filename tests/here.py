"""The tasks of imagekit.child_main in this process: what is tested is what callers make of them, not the process."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from imagekit import child_main
from imagekit.child import Child
from imagekit.progress import Callback


@dataclass(frozen=True, slots=True)
class Here(Child):
    """Does the task at once; the arguments and the result go through JSON, as they do on the way to a child."""

    tasks: list[str] = field(default_factory=list)

    def run(
        self,
        task: str,
        arguments: Mapping[str, Any],
        *,
        progress: Callback | None = None,
        cancel: threading.Event | None = None,
    ) -> dict[str, Any]:
        self.tasks.append(task)
        given = json.loads(json.dumps(dict(arguments)))
        more = {"progress": progress, "cancel": cancel} if task in child_main.LONG else {}
        found = json.loads(json.dumps(child_main.run(task, **given, **more)))
        assert isinstance(found, dict)
        return found
