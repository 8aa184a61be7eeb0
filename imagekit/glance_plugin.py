"""A plugin for Glance's image import: what is imported passes our gate and is stored as a VHDX or dynamic VHD.

Glance finds it by the entry point ``imagekit`` in the group ``glance.image_import.plugins``, and runs it when its
glance-image-import.conf names it::

    [image_import_opts]
    image_import_plugins = ['imagekit']

    [imagekit_conversion]
    output_format = vhdx

It fails closed: whatever is refused, is damaged, takes too long or crashes ends the import, the image goes back to
``queued``, and neither the upload nor a half-written disk is left. Nothing of an image is parsed in Glance's own
process (imagekit.glance.importing).

Plugins run for imports only; what a user uploads without one (``PUT …/file``) does not come here. Needs what Glance
brings: oslo.config, oslo.log and taskflow. This module is imported by nothing but Glance.
"""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from oslo_config import cfg
from oslo_log import log
from taskflow import task
from taskflow.patterns import linear_flow

from imagekit.child import Child
from imagekit.errors import ImagekitError, UnsupportedFeature
from imagekit.glance.client import FORMATS
from imagekit.limits import Limits

GROUP = "imagekit_conversion"
SCHEME = "file://"
FETCHING = ("web-download", "glance-download")
"""Import methods whose own task puts the image back to ``queued``; a second time would be an error of Glance's."""
GRACE = 60.0
"""Seconds a child has beyond its limit."""
LOG = log.getLogger(__name__)
CONF = cfg.CONF

CONF.register_opts(
    [
        cfg.StrOpt(
            "output_format", default="vhdx", choices=("vhdx", "vhd"), help="Format that images are stored in."
        ),
        cfg.ListOpt(
            "pass_through",
            default=[],
            help="disk_formats that are stored as they are, without a look: iso, for example. Others that imagekit "
            "does not read are refused.",
        ),
        cfg.StrOpt(
            "python",
            default="",
            help="Interpreter that has imagekit. Default: [wsgi]python_interpreter, else the one that runs Glance.",
        ),
        cfg.BoolOpt(
            "set_properties",
            default=True,
            help="Set hw_machine_type, os_secure_boot and os_type to what the disk shows, where the user did not.",
        ),
        *(
            cfg.IntOpt(f"limit_{one.name}", min=1, default=one.default, help=f"What an image may take of {one.name}.")
            for one in fields(Limits)
        ),
    ],
    group=GROUP,
)


class ConvertImage(task.Task):  # type: ignore[misc]
    """Judges and converts what lies in the staging area; provides where the result is."""

    default_provides = "file_path"

    def __init__(self, task_id: str, task_type: str, action_wrapper: Any, stores: list[str], method: str) -> None:
        self.action_wrapper = action_wrapper
        self.method = method
        self.stores = stores
        self.made: list[Path] = []
        """What is to be removed when the import fails, here or later."""
        super().__init__(name=f"{task_type}-imagekit-{task_id}")

    def execute(self, file_path: str, **_: Any) -> str:
        if not file_path.startswith(SCHEME):
            raise RuntimeError(f"the staged image is at {file_path!r}: only {SCHEME} is read")
        source = Path(file_path.removeprefix(SCHEME))
        self.made.append(source)
        image = str(self.action_wrapper.image_id)
        with self.action_wrapper as action:
            stated, container = action.image_disk_format, action.image_container_format
        settings = CONF[GROUP]
        if stated in settings.pass_through:
            LOG.info("Image %s is stored as it is: %s is passed through", image, stated)
            return file_path
        target = source.with_name(f"{source.name}.{settings.output_format}")
        self.made.append(target)
        try:
            found = self._converted(source, target, image, stated, container)
        except ImagekitError as error:
            # The message, not where on this server the file lies.
            LOG.error("Image %s is refused, %s: %s", image, type(error).__name__, error.message)
            raise RuntimeError(f"imagekit: {error.message}") from None
        with self.action_wrapper as action:
            action.set_image_attribute(
                disk_format=settings.output_format,
                container_format="bare",
                size=found["size"],
                virtual_size=found["virtual-size"],
            )
            if settings.set_properties:
                said = action.image_extra_properties
                action.set_image_extra_properties(
                    {name: value for name, value in found["properties"].items() if name not in said}
                )
        source.unlink()
        for note in found["notes"]:
            LOG.info("Image %s: %s", image, note)
        LOG.info("Image %s was converted from %s to %s", image, stated, settings.output_format)
        return f"{SCHEME}{target}"

    def _converted(self, source: Path, target: Path, image: str, stated: str, container: str) -> dict[str, Any]:
        settings = CONF[GROUP]
        if container != "bare":
            raise UnsupportedFeature(f"container format {container}: only bare is taken")
        if stated not in FORMATS:
            raise UnsupportedFeature(f"disk format {stated}: only {', '.join(FORMATS)} are converted")
        asked = {
            "source": str(source),
            "target": str(target),
            "stated_format": FORMATS[stated],
            "target_format": settings.output_format,
            "identifier": image,
            "limits": {one.name: settings[f"limit_{one.name}"] for one in fields(Limits)},
        }
        python = settings.python or CONF.wsgi.python_interpreter or sys.executable
        stop = threading.Event()
        # The child stops itself at its limit; should it hang, it is stopped.
        late = threading.Timer(settings.limit_seconds + GRACE, stop.set)
        late.daemon = True
        late.start()
        try:
            return Child(python).run("import_image", asked, cancel=stop)
        finally:
            late.cancel()

    def revert(self, result: Any, **_: Any) -> None:
        """Undo what this task did, whether it failed itself or one after it."""
        for path in self.made:
            path.unlink(missing_ok=True)
        if self.method in FETCHING:
            return
        with suppress(Exception), self.action_wrapper as action:  # the image may be gone meanwhile
            action.set_image_attribute(status="queued")
            if self.stores:
                action.remove_importing_stores(self.stores)
                action.add_failed_stores(self.stores)


def get_flow(**arguments: Any) -> Any:
    """What Glance calls for each import: a flow of one task."""
    made = ConvertImage(
        arguments["task_id"],
        arguments["task_type"],
        arguments["action_wrapper"],
        [store for store in arguments.get("backend") or [] if store],
        str(arguments["import_req"]["method"]["name"]),
    )
    return linear_flow.Flow(arguments["task_type"]).add(made)
