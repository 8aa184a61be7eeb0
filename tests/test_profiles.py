"""Profiles fill in what the caller left open, and nothing else."""

from __future__ import annotations

import pytest

from imagekit.errors import UsageError
from imagekit.formats import registry
from imagekit.formats.base import MiB
from imagekit.plan import ConvertOptions
from imagekit.profiles import PROFILES, apply_profile


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_names_a_format_and_subformat_that_are_written(name: str) -> None:
    made = apply_profile(name, ConvertOptions())
    assert made.target_format is not None
    assert made.subformat in registry.find(made.target_format).subformats


def test_azure_is_a_fixed_vhd_of_whole_mib_with_its_gpt_mended() -> None:
    made = apply_profile("azure", ConvertOptions())
    assert (made.target_format, made.subformat, made.align, made.fix_gpt) == ("vhd", "fixed", MiB, True)


def test_what_the_caller_says_wins() -> None:
    asked = ConvertOptions(subformat="dynamic", align=4096, block_size=512 * 1024)
    made = apply_profile("azure", asked)
    assert (made.subformat, made.align, made.block_size) == ("dynamic", 4096, 512 * 1024)


@pytest.mark.parametrize("target", ["raw", "vhdx"])
def test_another_format_than_the_profiles_leaves_what_belongs_to_that_open(target: str) -> None:
    made = apply_profile("xenserver", ConvertOptions(target_format=target))
    assert (made.target_format, made.subformat, made.creator) == (target, None, None)


def test_an_alias_is_the_same_format() -> None:
    assert apply_profile("xenserver", ConvertOptions(target_format="vpc")).creator == "tap"


def test_a_parent_makes_the_subformat_differencing_whatever_the_profile() -> None:
    assert apply_profile("hyperv", ConvertOptions(parent="p.vhdx")).subformat is None


def test_an_unknown_profile_is_a_usage_error_that_names_all() -> None:
    with pytest.raises(UsageError, match="no profile 'aws'") as caught:
        apply_profile("aws", ConvertOptions())
    assert all(name in str(caught.value.hint) for name in PROFILES)
