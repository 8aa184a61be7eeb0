"""The spec of one guest: what it is called, who may log in, its network, its machine.

The fields are those of the README ("The spec"). Values are checked as far as they can be without knowing
the guest or the host: syntax, ranges, and that references and addresses fit together. What a particular
guest makes of a legal value is the business of lint, and what is written for it that of the renderers
(`configdrive`).

`load_spec` and `parse_spec` raise InvalidSpec that lists every wrong field; the classes, when called
directly, raise pydantic's ValidationError. Password, keys and user data appear in no message and in no
repr.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, JsonValue, StrictBool, StrictInt, StrictStr, ValidationError, model_validator

from imagekit.cloudinit import fields
from imagekit.cloudinit.netmodel import Link, Network, Route, SpecModel, Subnet
from imagekit.cloudinit.specfile import FieldPath, SpecText, read_regular_file, read_spec_file
from imagekit.errors import InvalidSpec, SourceError

__all__ = ["Link", "Network", "Route", "Spec", "Subnet", "derive_mac", "load_spec", "parse_spec", "spec_schema"]

GuestProfile = Literal["linux", "debian12", "rhel", "windows", "flatcar", "fcos"]
"""What is known of the guest; ``linux`` is any with cloud-init."""
GUEST_PROFILES: tuple[GuestProfile, ...] = get_args(GuestProfile)
MAX_USER_DATA_FILE = 4 << 20
"""Bytes read from a ``user_data_file``; each medium has its own, smaller limit."""


class Machine(SpecModel):
    """The virtual machine. ``memory`` is in bytes here, text such as ``2GiB`` in a spec."""

    generation: fields.Generation = "auto"
    cpus: Annotated[StrictInt, Field(ge=1, le=2048)] = 2
    memory: fields.Memory = 2 << 30
    switch: fields.Text | None = None
    vlan: Annotated[StrictInt, Field(ge=1, le=4094)] | None = None
    secure_boot: Literal["auto", "linux", "windows", "off"] = "auto"


class Part(SpecModel):
    """One part of user data made of several; ``type`` is its MIME type, found out from the content unless given."""

    content: fields.UserData
    type: StrictStr | None = None
    filename: fields.Text | None = None


class File(SpecModel):
    """A file that the guest gets."""

    path: fields.GuestPath
    content: fields.FileContent


class Device(SpecModel):
    """A device with the tags by which software in the guest finds it, as Nova's ``devices``."""

    type: Literal["nic", "disk"]
    bus: Literal["pci", "usb", "scsi", "ide", "xen", "none"] = "none"
    address: fields.Text = "none"
    tags: tuple[fields.Text, ...] = ()
    mac: fields.Mac | None = None
    vlan: fields.VlanId | None = None
    vf_trusted: StrictBool = False
    serial: fields.Text | None = None
    path: fields.Text | None = None

    @model_validator(mode="after")
    def _check(self) -> Device:
        nic, disk = self.mac or self.vlan or self.vf_trusted, self.serial or self.path
        if self.type == "nic" and (disk or not self.mac):
            raise ValueError("a nic has a mac, and neither serial nor path")
        if self.type == "disk" and nic:
            raise ValueError("a disk has no mac, vlan or vf_trusted")
        return self


class Spec(SpecModel):
    """One guest. ``uuid`` and ``network`` may be None until whoever builds the guest fills them in.

    ``password`` is given to Windows as it is and to Linux as a hash; ``hyperv_tools`` asks for the daemons that tell
    the host the guest's address. The last group of fields is OpenStack's.
    """

    name: fields.Name
    uuid: fields.Uuid | None = None
    hostname: fields.Hostname | None = None
    ssh_keys: Annotated[tuple[fields.SshKey, ...], Field(repr=False)] = ()
    password: fields.Password | None = None
    password_hash: fields.PasswordHash | None = None
    user_data: Annotated[fields.UserData | None, Field(repr=False)] = None
    user_data_parts: Annotated[tuple[Part, ...], Field(repr=False)] = ()
    hyperv_tools: StrictBool = False
    network: Network | None = None
    machine: Machine = Machine()
    guest: GuestProfile = "linux"
    files: Annotated[tuple[File, ...], Field(repr=False)] = ()
    meta: dict[fields.MetaKey, fields.MetaValue] = Field(default_factory=dict)

    availability_zone: fields.Text | None = None
    launch_index: Annotated[StrictInt, Field(ge=0)] = 0
    project_id: fields.Text | None = None
    devices: tuple[Device, ...] = ()
    dedicated_cpus: tuple[Annotated[StrictInt, Field(ge=0)], ...] = ()
    vendor_data: dict[str, JsonValue] | None = None
    vendor_data2: dict[str, JsonValue] | None = None
    random_seed: Annotated[fields.RandomSeed | None, Field(repr=False)] = None

    @model_validator(mode="after")
    def _check(self) -> Spec:
        if self.user_data is not None and self.user_data_parts:
            raise ValueError("user_data and user_data_parts: give one of them")
        if self.password is not None and self.password_hash is not None:
            raise ValueError("password and password_hash: give one of them")
        paths = [file.path for file in self.files]
        if len(set(paths)) < len(paths):
            raise ValueError("files: a path is given twice")
        return self

    @property
    def guest_hostname(self) -> str:
        """``hostname``, else ``name`` as Nova would: lower case, hyphens for what a host name cannot hold."""
        if self.hostname is not None:
            return self.hostname
        return re.sub("[^a-z0-9-]+", "-", self.name.lower())[:63].strip("-")


def derive_mac(uuid: str, index: int = 0) -> str:
    """The MAC address of a guest's adapter ``index``: locally administered, always the same for one UUID."""
    digest = hashlib.sha256(f"{uuid.lower()}/{index}".encode()).digest()
    return ":".join(f"{byte:02x}" for byte in (0x02, *digest[:5]))


def load_spec(
    path: str | os.PathLike[str],
    *,
    defaults: Mapping[str, object] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Spec:
    """Read a spec file, YAML or (``.json``) JSON; ``user_data_file`` is relative to its folder.

    ``overrides`` win over fields of the file and ``defaults`` lose to them, ``machine`` and ``meta`` key by
    key. Raises SourceError when the file cannot be read, InvalidSpec for what is in it.
    """
    path = Path(path)
    text = read_spec_file(path)
    values = _merge(_merge(defaults or {}, text.values), overrides or {})
    return _parse(SpecText(values, text.lines), path.parent, path)


def parse_spec(values: Mapping[str, object], *, folder: Path | None = None) -> Spec:
    """Make a spec of plain values; ``user_data_file`` is relative to ``folder``, by default the current one.

    Raises InvalidSpec that lists every wrong field.
    """
    return _parse(SpecText(values), folder or Path(), None)


def _merge(low: Mapping[str, object], high: Mapping[str, object]) -> dict[str, object]:
    result = dict(low)
    user_data = {"user_data", "user_data_file", "user_data_parts"}
    if user_data & high.keys():
        result = {key: value for key, value in result.items() if key not in user_data}
    for key, value in high.items():
        old = result.get(key)
        both = key in ("machine", "meta") and isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = {**old, **value} if both else value  # type: ignore[dict-item]
    return result


def _parse(text: SpecText, folder: Path, path: Path | None) -> Spec:
    values = dict(text.values)
    problems: list[str] = []
    if (name := values.pop("user_data_file", None)) is not None:
        try:
            values["user_data"] = _read_named(name, folder, "user_data" if "user_data" in values else None)
        except (ValueError, SourceError) as error:
            problems.append(_located(("user_data_file",), str(error), text.lines))
    for field in ("user_data_parts", "files"):
        problems += _read_files(values, field, folder, text.lines)
    try:
        spec = Spec.model_validate(values)
    except ValidationError as error:
        problems += [_located(*_describe(item), text.lines) for item in error.errors(include_url=False)]
    if not problems:
        return spec
    count = "a wrong field" if len(problems) == 1 else f"{len(problems)} wrong fields"
    raise InvalidSpec(f"the spec has {count}:\n" + "\n".join(f"  {p}" for p in problems), path=path)


def _read_named(name: object, folder: Path, also: str | None) -> bytes:
    if also is not None:
        raise ValueError(f"{also} is given too: give one of them")
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError("expected the name of a file")
    return read_regular_file(folder / name, limit=MAX_USER_DATA_FILE)


def _read_files(values: dict[str, object], field: str, folder: Path, lines: Mapping[FieldPath, int]) -> Iterator[str]:
    """Put the content of the files that entries of a list name into ``values``; yield what is wrong."""
    entries = values.get(field)
    if not isinstance(entries, list):
        return
    read = list(entries)
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or "file" not in entry:
            continue
        try:
            content = _read_named(entry["file"], folder, "content" if "content" in entry else None)
        except (ValueError, SourceError) as error:
            yield _located((field, index, "file"), str(error), lines)
            content = b"?"  # the only complaint about this entry shall be the one above
        read[index] = {**{key: value for key, value in entry.items() if key != "file"}, "content": content}
    values[field] = read


_MODELS: dict[FieldPath, type[SpecModel]] = {
    (): Spec,
    ("machine",): Machine,
    ("network",): Network,
    ("network", "links"): Link,
    ("network", "networks"): Subnet,
    ("network", "networks", "routes"): Route,
    ("user_data_parts",): Part,
    ("files",): File,
    ("devices",): Device,
}
_ALSO: dict[FieldPath, tuple[str, ...]] = {
    (): ("user_data_file",),
    ("user_data_parts",): ("file",),
    ("files",): ("file",),
}
"""Fields of a spec that are read before there is a model."""
_EXPECTED = {
    "string_type": "text (a number or true/false needs quotes to be text)",
    "int_type": "a whole number",
    "bytes_type": "text",
    "tuple_type": "a list",
    "dict_type": "fields such as 'role: web'",
    "model_type": "fields, each with its value",
    "string_too_short": "at least one character",
    "invalid_key": "the name of a field",
    "string_unicode": "text that UTF-8 can express",
}
_SECRET = ("password", "password_hash", "user_data", "user_data_parts", "files", "ssh_keys", "random_seed")


def _describe(error: Any) -> tuple[FieldPath, str]:
    """One of pydantic's errors as the field's path and a sentence: what was found, what was expected."""
    # "[key]" is pydantic's mark for a wrong key of a mapping, not a part of the path.
    path: FieldPath = tuple(part for part in error["loc"] if part != "[key]")
    if error["type"] == "missing":
        return path, "missing"
    if error["type"] == "extra_forbidden":
        place = tuple(part for part in path[:-1] if isinstance(part, str))
        known = [*_MODELS[place].model_fields, *_ALSO.get(place, ())]
        return path, f"unknown field; the fields here are {', '.join(known)}"
    value = error["input"]
    if error["type"] == "value_error":
        expected = str(error["ctx"]["error"])
        if isinstance(value, Mapping | SpecModel):  # the fields are right, but not together
            return path, expected
    else:
        expected = _EXPECTED.get(error["type"], error["msg"].removeprefix("Input should be "))
    return path, f"found {_found(value, hidden=path[0] in _SECRET)}, expected {expected}"


def _found(value: object, *, hidden: bool) -> str:
    """A short name for a value of a spec, for messages; ``hidden`` values are named by their type only."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "fields"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    if hidden:
        return "text" if isinstance(value, str | bytes) else "something that is not text"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."


def _located(path: FieldPath, problem: str, lines: Mapping[FieldPath, int]) -> str:
    names = [part if isinstance(part, str) and part.isprintable() else [part] for part in path]
    name = "".join(f".{part}" if isinstance(part, str) else str(part) for part in names).removeprefix(".")
    known = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    return f"{name}: {problem}" if known is None else f"{name} (line {known}): {problem}"


def spec_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a spec as it stands in a file, with the fields that name files."""
    schema = Spec.model_json_schema(mode="validation")
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    text = {"type": "string", "minLength": 1, "description": "A file, relative to the folder of the spec."}
    schema["properties"]["user_data_file"] = text
    for name in ("Part", "File"):
        definition = schema["$defs"][name]
        definition["properties"]["file"] = text
        definition["required"].remove("content")
        definition["oneOf"] = [{"required": ["content"]}, {"required": ["file"]}]
    schema["$defs"]["Machine"]["properties"]["memory"] = {
        "anyOf": [{"type": "integer"}, {"type": "string"}],
        "description": "Bytes, or text such as 2GiB.",
    }
    return schema
