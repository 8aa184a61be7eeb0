"""From a spec to the tree of files that a data source reads: one door to all renderers."""

from __future__ import annotations

from dataclasses import dataclass

from imagekit.cloudinit.cloudstack import cloudstack_tree
from imagekit.cloudinit.configdrive import config_drive_tree
from imagekit.cloudinit.model import Spec
from imagekit.cloudinit.netconfig import Version
from imagekit.cloudinit.nocloud import nocloud_tree
from imagekit.cloudinit.nova import nova_tree
from imagekit.cloudinit.tree import DATASOURCES, Datasource, MetadataTree
from imagekit.errors import UsageError


@dataclass(frozen=True, slots=True)
class Rendering:
    """How metadata is written: for which data source, and in which of its forms."""

    datasource: Datasource = "configdrive"
    nova_compatible: bool = False
    network_config: Version = 1

    def __post_init__(self) -> None:
        if self.datasource not in DATASOURCES:
            raise UsageError(f"data source {self.datasource!r}", hint=f"choose one of {', '.join(DATASOURCES)}")
        if self.network_config not in (1, 2):
            raise UsageError(f"network-config version {self.network_config!r}", hint="choose 1 or 2")
        if self.nova_compatible and self.datasource != "configdrive":
            raise UsageError(
                f"Nova writes no {self.datasource}",
                hint="leave out --nova-compatible, or use --datasource configdrive",
            )

    def render(self, spec: Spec) -> MetadataTree:
        """The tree; raises InvalidSpec when the data source has no place for something of the spec."""
        if self.datasource == "nocloud":
            files = nocloud_tree(spec, version=self.network_config)
        elif self.datasource == "cloudstack":
            files = cloudstack_tree(spec)
        else:
            files = nova_tree(spec) if self.nova_compatible else config_drive_tree(spec)
        return MetadataTree.of(self.datasource, files)
