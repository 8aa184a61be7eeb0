"""What an image's properties in Glance say about the machine it is for, and what becomes of that.

Read are those that Nova and its Hyper-V drivers read: hw_machine_type (hyperv-gen1, hyperv-gen2), hw_firmware_type,
os_secure_boot, os_type, img_config_drive, min_disk, min_ram, hypervisor_type, architecture, os_vtpm, os_shielded_vm.

A property is a wish or a demand. Where the caller decided otherwise a wish gives way, and that is said; a demand
(what is required or mandatory, the least of disk and memory) does not. All of it is decided from what Glance states,
before a byte of the image is fetched. Whoever uploaded the image said it: nothing here is believed about the content.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Literal

from imagekit.contents.firmware import Choice, SecureBoot
from imagekit.conversion import access_to
from imagekit.errors import InvalidImage, UnsupportedFeature, UsageError
from imagekit.formats.base import GiB, MiB, round_up
from imagekit.glance.client import PREFIX, GlanceImage
from imagekit.guest import Guest
from imagekit.machine import MEMORY_STEP
from imagekit.plan import ConvertOptions
from imagekit.records import dataclass, replace

IGNORE = "--ignore-properties takes nothing from them"
GENERATIONS: dict[tuple[str, str], Literal[1, 2]] = {
    ("hw_machine_type", "hyperv-gen1"): 1,
    ("hw_machine_type", "hyperv-gen2"): 2,
    ("hw_firmware_type", "bios"): 1,
    ("hw_firmware_type", "uefi"): 2,
}
TEMPLATES: dict[str, SecureBoot] = {"linux": "linux", "windows": "windows"}
"""By os_type."""
OURS = ("x86_64", "amd64", "i686", "i386")
NOT_MADE = ("os_vtpm", "os_shielded_vm")


@dataclass(frozen=True, slots=True)
class Decision:
    """A guest and a conversion as the properties want them, why, and what to tell the user."""

    guest: Guest
    options: ConvertOptions
    notes: tuple[str, ...]
    generation_reason: str = ""
    secure_boot_reason: str = ""

    def explained(self, choice: Choice) -> Choice:
        """The choice, with the property that made it where one did."""
        return replace(
            choice,
            generation_reason=self.generation_reason or choice.generation_reason,
            secure_boot_reason=self.secure_boot_reason or choice.secure_boot_reason,
        )


def look_up(image: str | os.PathLike[str], options: ConvertOptions) -> GlanceImage:
    """What Glance states of an image that can be fetched and read."""
    found = access_to(options).glance().find(os.fspath(image)[len(PREFIX) :])
    found.check_readable()
    return found


def default_guest(image: GlanceImage) -> Literal["windows"] | None:
    """The kind of guest it is for, where that is not the usual one."""
    return "windows" if _stated(image, "os_type") == "windows" else None


def decide(image: GlanceImage, guest: Guest, options: ConvertOptions, *, config_drive: bool) -> Decision:
    """Apply the properties to what the caller asked for.

    Raises UsageError where the caller contradicts a demand, InvalidImage where the properties contradict each other,
    UnsupportedFeature where they demand what is not made here.
    """
    _check_made(image)
    if _stated(image, "img_config_drive") == "mandatory" and not config_drive:
        raise _against("img_config_drive=mandatory", "no config drive was asked for", "leave out --media none", image)
    generation, why, notes = _generation(image, guest)
    secure_boot, secure_why, more = _secure_boot(image, guest, generation, why)
    if generation == "auto" and _stated(image, "os_secure_boot") == "required":
        generation, why = 2, "os_secure_boot=required"
    changes = {"generation": generation, "secure_boot": secure_boot, "memory": _memory(image, guest)}
    machine = guest.spec.machine.model_copy(update=changes)
    spec = guest.spec.model_copy(update={"machine": machine})
    return Decision(
        replace(guest, spec=spec),
        _options(image, options),
        (*notes, *more, *_remarks(image, guest)),
        f"Glance states {why}" if why else "",
        f"Glance states {secure_why}" if secure_why else "",
    )


def _stated(image: GlanceImage, name: str) -> str:
    return image.properties.get(name, "").strip().lower()


def _against(what: str, asked: str, hint: str, image: GlanceImage) -> UsageError:
    return UsageError(f"Glance states {what}, and {asked}", hint=f"{hint}; {IGNORE}", path=image.label)


def _contradiction(what: str, hint: str, image: GlanceImage) -> InvalidImage:
    return InvalidImage(
        f"its properties in Glance contradict each other: {what}", hint=f"{hint}; {IGNORE}", path=image.label
    )


def _check_made(image: GlanceImage) -> None:
    for name in NOT_MADE:
        if _stated(image, name) == "required":
            raise UnsupportedFeature(f"Glance states {name}=required: not made here", hint=IGNORE, path=image.label)
    machine, architecture = _stated(image, "hw_machine_type"), _stated(image, "architecture")
    if machine.startswith("hyperv-") and ("hw_machine_type", machine) not in GENERATIONS:
        known = "known are hyperv-gen1 and hyperv-gen2"
        raise UnsupportedFeature(f"Glance states hw_machine_type={machine}; {known}", hint=IGNORE, path=image.label)
    if architecture and architecture not in OURS:
        raise UnsupportedFeature(
            f"Glance states architecture={architecture}; machines are made for x86_64", hint=IGNORE, path=image.label
        )


def _generation(image: GlanceImage, guest: Guest) -> tuple[Literal["auto", 1, 2], str, list[str]]:
    """The generation, the property that says so, and what was not followed."""
    names = dict.fromkeys(name for name, _ in GENERATIONS)
    found = {name: GENERATIONS.get((name, _stated(image, name))) for name in names}
    said = {name: number for name, number in found.items() if number is not None}
    asked = guest.spec.machine.generation
    texts = {name: f"{name}={_stated(image, name)}" for name in said}
    if asked != "auto":
        other = [texts[name] for name, number in said.items() if number != asked]
        return asked, "", [f"Glance states {one}; generation {asked} was asked for" for one in other]
    if len(set(said.values())) > 1:
        raise _contradiction(" and ".join(texts.values()), "decide with --generation 1 or 2", image)
    for name, number in said.items():
        return number, texts[name], []
    return "auto", "", []


def _secure_boot(
    image: GlanceImage, guest: Guest, generation: Literal["auto", 1, 2], why: str
) -> tuple[Literal["auto", "linux", "windows", "off"], str, list[str]]:
    """The template, the property that says so, and what was not followed."""
    stated, asked = _stated(image, "os_secure_boot"), guest.spec.machine.secure_boot
    text = f"os_secure_boot={stated}"
    if stated == "disabled":
        if asked in ("auto", "off"):
            return "off", text, []
        return asked, "", [f"Glance states {text}; --secure-boot {asked} was asked for"]
    if stated != "required":
        odd = [] if stated in ("", "optional") else [f"Glance states {text}, which nobody knows: left out"]
        return asked, "", odd
    if generation == 1 and why:
        raise _contradiction(f"{text} and {why}, which has no Secure Boot", "decide with --generation 2", image)
    if generation == 1:
        raise _against(text, "generation 1 was asked for, which has none", "leave out --generation", image)
    if asked == "off":
        raise _against(text, "--secure-boot off was asked for", "leave out --secure-boot", image)
    if asked != "auto":
        return asked, "", []
    template = TEMPLATES.get(_stated(image, "os_type"))
    if template is None:
        raise _contradiction(
            f"{text} without os_type, which chooses the template", "decide with --secure-boot linux or windows", image
        )
    return template, f"{text} and os_type={template}", []


def _memory(image: GlanceImage, guest: Guest) -> int:
    asked, least = guest.spec.machine.memory, image.min_ram * MiB
    if asked >= least:
        return asked
    if "memory" in guest.spec.machine.model_fields_set:
        text = f"{asked} bytes of memory were asked for"
        raise _against(f"min_ram={image.min_ram} MiB", text, f"--memory {image.min_ram}M or more", image)
    return round_up(least, MEMORY_STEP)


def _options(image: GlanceImage, options: ConvertOptions) -> ConvertOptions:
    least = image.min_disk * GiB
    if options.size is not None and options.size < least:
        text = f"a disk of {options.size} bytes was asked for"
        raise _against(f"min_disk={image.min_disk} GiB", text, f"--size {image.min_disk}G or more", image)
    return replace(options, minimum_size=max(least, options.minimum_size or 0) or None)


def _remarks(image: GlanceImage, guest: Guest) -> Iterator[str]:
    """What is no conflict, but worth knowing."""
    hypervisor = _stated(image, "hypervisor_type") or _stated(image, "img_hv_type")
    if hypervisor not in ("", "hyperv"):
        yield f"Glance states that the image is for {hypervisor}: its drivers for Hyper-V may be missing"
    os_type = _stated(image, "os_type")
    if os_type and (os_type == "windows") != (guest.spec.guest == "windows"):
        yield f"Glance states os_type={os_type}; the guest is {guest.spec.guest}"
