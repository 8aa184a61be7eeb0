"""Targets by the name of what will run them (``--for``): a table, and nothing else.

A profile only fills in what the caller left open. Where the numbers come from: Microsoft's documentation of Hyper-V
and of Azure's image uploads, and XenServer's VHD conventions.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from imagekit.errors import UsageError
from imagekit.formats.base import KiB, MiB
from imagekit.formats.registry import find
from imagekit.plan import ConvertOptions
from imagekit.records import dataclass, replace


@dataclass(frozen=True, slots=True)
class Profile:
    """What one kind of host wants. Sizes in bytes; None leaves a choice to the usual defaults."""

    name: str
    summary: str
    target_format: str
    subformat: str = "dynamic"
    block_size: int | None = None
    creator: str | None = None
    align: int | None = None
    fix_gpt: bool = False
    minimum_size: int | None = 3 * MiB
    """Windows refuses smaller disks (0xC03A0012)."""


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        one.name: one
        for one in (
            Profile("hyperv", "VHDX dynamic, whole 4 KiB sectors", "vhdx", align=4 * KiB),
            Profile("hyperv-2012r2", "VHDX dynamic, whole 4 KiB sectors", "vhdx", align=4 * KiB),
            Profile("hyperv-2008r2", "VHD dynamic, at most 2040 GiB", "vhd"),
            Profile("azure", "VHD fixed, whole MiB, GPT mended", "vhd", "fixed", align=MiB, fix_gpt=True),
            Profile("glance", "VHD dynamic, which image services recognise", "vhd"),
            Profile("cloudstack", "VHDX dynamic", "vhdx"),
            Profile("xenserver", "VHD dynamic of its kind, whole 2 MiB", "vhd", creator="tap", align=2 * MiB),
        )
    }
)


def find_profile(name: str) -> Profile:
    """The profile of that name; UsageError with all names when there is none."""
    try:
        return PROFILES[name]
    except KeyError:
        raise UsageError(f"no profile {name!r}", hint=f"choose one of: {', '.join(PROFILES)}") from None


def apply_profile(name: str, options: ConvertOptions) -> ConvertOptions:
    """``options`` with everything open in them as the profile has it.

    Another format than the profile's leaves the choices that belong to the profile's format open.
    """
    profile = find_profile(name)
    other = options.target_format is not None and find(options.target_format).name != profile.target_format
    return replace(
        options,
        target_format=options.target_format or profile.target_format,
        subformat=options.subformat or (None if other or options.parent else profile.subformat),
        block_size=options.block_size or (None if other else profile.block_size),
        creator=options.creator or (None if other else profile.creator),
        align=options.align or profile.align,
        fix_gpt=options.fix_gpt or profile.fix_gpt,
        minimum_size=options.minimum_size or profile.minimum_size,
    )
