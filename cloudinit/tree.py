"""The seam between what metadata says and what it lies on: a tree of files, and how guests find it.

Renderers make a `MetadataTree` of a spec, readers make one of a medium, lint judges it, writers of media put it
on a file system. It knows no format of either side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Datasource = Literal["configdrive", "nocloud", "cloudstack"]
DATASOURCES: tuple[Datasource, ...] = get_args(Datasource)
LABELS: dict[Datasource, str] = {"configdrive": "config-2", "nocloud": "cidata", "cloudstack": "config-2"}
"""The volume label that every reader of a data source looks for; in another case some would miss it."""


@dataclass(frozen=True, slots=True)
class MetadataTree:
    """Path (with ``/``) to content of every file, for one data source, to lie under one volume label."""

    datasource: Datasource
    label: str
    files: Mapping[str, bytes]

    @classmethod
    def of(cls, datasource: Datasource, files: Mapping[str, bytes]) -> MetadataTree:
        """A tree under the label that its data source has."""
        return cls(datasource, LABELS[datasource], files)

    @classmethod
    def recognise(cls, label: str, files: Mapping[str, bytes]) -> MetadataTree | None:
        """What was read from a medium, by its files; None when no data source has files like these."""
        folders = {path.split("/", 1)[0] for path in files if "/" in path}
        if "cloudstack" in folders:
            return cls("cloudstack", label, files)
        if "openstack" in folders or "ec2" in folders:
            return cls("configdrive", label, files)
        if label.lower() == "cidata" or {"meta-data", "user-data"} & files.keys():
            return cls("nocloud", label, files)
        return cls("configdrive", label, files) if label.lower() == "config-2" else None
