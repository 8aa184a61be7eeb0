"""Writes the ISO 9660 medium a guest reads its metadata from, and checks it by reading it back.

ISO 9660 interchange level 3 (ECMA-119), Rock Ridge 1.09 for the names, modes and owner that Linux shows,
Joliet level 3 for the names that Windows shows. Both carry the exact path; the plain ISO names are made
up here, because ``meta-data`` and ``meta_data`` would be one name under ISO 9660's rules.

This is the only module that knows pycdlib. That library takes duplicate names (and glues their contents
together), names that differ only by case and characters Joliet forbids, so every rule is enforced here first.

Same tree, label and timestamp give the same bytes, in every time zone: pycdlib stamps the current local
time, so all date fields are set to the timestamp afterwards, in UTC.

Not here: UDF, El Torito, empty folders, anything but files held in memory.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone

from imagekit.cloudinit import iso9660
from imagekit.cloudinit.iso9660 import IsoContent, read_iso
from imagekit.cloudinit.medium import DEFAULT_TIMESTAMP, ISO, check_label, check_tree, default_timestamp
from imagekit.errors import ImagekitError, UsageError, VerificationFailed

__all__ = ["DEFAULT_TIMESTAMP", "IsoContent", "read_iso", "verify_iso", "write_iso"]

FILE_MODE = 0o100444
FOLDER_MODE = 0o040555
_PLAIN_NAME = 30  # ECMA-119 7.5: file name and extension together, without "." and ";1"
_PLAIN_EXTENSION = 8
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_LAST_TIMESTAMP = int((datetime(2155, 12, 31, 23, 59, 59, tzinfo=timezone.utc) - _EPOCH).total_seconds())


def write_iso(tree: Mapping[str, bytes], *, label: str = "config-2", timestamp: int | None = None) -> bytes:
    """The medium that holds ``tree`` (path with ``/`` to content); files of equal content share their bytes.

    ``timestamp`` is in seconds since 1970 UTC; by default SOURCE_DATE_EPOCH of the environment, else
    `DEFAULT_TIMESTAMP`. Raises UsageError for names or a label that one of the guests could not read.
    """
    when = default_timestamp() if timestamp is None else timestamp
    if not 0 <= when <= _LAST_TIMESTAMP:
        raise UsageError(f"timestamp {when}: expected seconds since 1970, up to the year 2155")
    check_label(label, ISO)
    folders = check_tree(tree, ISO)
    return _stamp(_master(tree, folders, label), _EPOCH + timedelta(seconds=when))


def verify_iso(data: bytes, tree: Mapping[str, bytes], label: str) -> None:
    """Read ``data`` back; raise VerificationFailed unless both views hold just ``tree`` under ``label``."""
    try:
        content = read_iso(data, max_size=len(data))
    except ImagekitError as error:
        raise VerificationFailed(f"the medium does not read back: {error}") from error
    if not content.rock_ridge or content.joliet is None:
        raise VerificationFailed("the medium lacks its Rock Ridge or its Joliet names")
    views = {"Rock Ridge": (content.label, content.tree), "Joliet": (content.joliet_label, content.joliet)}
    for view, (found_label, found) in views.items():
        if found_label != label:
            raise VerificationFailed(f"{view} label reads back as {found_label!r}, expected {label!r}")
        wrong = sorted(path for path in tree.keys() | found.keys() if tree.get(path) != found.get(path))
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise VerificationFailed(f"{view} view differs in {', '.join(wrong[:3])}{more}")


def _plain_names(tree: Mapping[str, bytes], folders: list[str]) -> dict[str, str]:
    """Path → unique path of A-Z, 0-9 and _ that ISO 9660 level 3 allows, files with ``.EXT;1``."""
    plain = {"": ""}
    used: set[str] = set()
    for path in sorted([*tree, *folders]):
        parent, _, name = path.rpartition("/")
        stem, _, extension = name.rpartition(".") if path in tree else (name, "", "")
        if not stem:
            stem, extension = name, ""
        stem = re.sub("[^A-Z0-9_]", "_", stem.upper())
        extension = re.sub("[^A-Z0-9_]", "_", extension.upper())[:_PLAIN_EXTENSION]
        room = _PLAIN_NAME - len(extension)
        candidate, number = stem[:room], 0
        while (key := f"{plain[parent]}/{candidate}.{extension}") in used:
            number += 1
            candidate = f"{stem[: room - len(str(number)) - 1]}_{number}"
        used.add(key)
        plain[path] = f"{key};1" if path in tree else f"{plain[parent]}/{candidate}"
    return plain


def _master(tree: Mapping[str, bytes], folders: list[str], label: str) -> bytes:
    """Let pycdlib lay the medium out; the dates in it are still those of the clock."""
    import pycdlib  # here, because it costs 25 ms that reading a medium need not pay

    plain = _plain_names(tree, folders)
    iso = pycdlib.PyCdlib()
    iso.new(
        interchange_level=3,
        joliet=3,
        rock_ridge="1.09",
        vol_ident=label,
        sys_ident="LINUX",
        pub_ident_str="IMAGEKIT",
        preparer_ident_str="IMAGEKIT",
        app_ident_str="IMAGEKIT",
    )
    try:
        for path in folders:
            name = path.rpartition("/")[2]
            iso.add_directory(plain[path], rr_name=name, joliet_path=f"/{path}", file_mode=FOLDER_MODE)
        first: dict[bytes, str] = {}
        for path, content in sorted(tree.items()):
            name = path.rpartition("/")[2]
            original = first.setdefault(content, plain[path])
            if original == plain[path]:
                iso.add_fp(
                    io.BytesIO(content),
                    len(content),
                    plain[path],
                    rr_name=name,
                    joliet_path=f"/{path}",
                    file_mode=FILE_MODE,
                )
            else:
                iso.add_hard_link(iso_old_path=original, iso_new_path=plain[path], rr_name=name)
                iso.add_hard_link(iso_old_path=original, joliet_new_path=f"/{path}")
        out = io.BytesIO()
        iso.write_fp(out)
    finally:
        iso.close()
    return out.getvalue()


def _stamp(image: bytes, when: datetime) -> bytes:
    """Set every date on the medium: those of the descriptors, the directory records and Rock Ridge's TF."""
    long_form = when.strftime("%Y%m%d%H%M%S00").encode() + b"\0"  # ECMA-119 8.4.26.1; the last byte is UTC+0
    short_form = struct.pack("<7B", when.year - 1900, when.month, when.day, when.hour, when.minute, when.second, 0)
    stamped = bytearray(image)
    for descriptor in iso9660.volume_descriptors(image):
        for field in (813, 830, 864):  # creation, modification, effective; expiration stays "not specified"
            stamped[descriptor.offset + field : descriptor.offset + field + 17] = long_form
        root = iso9660.root_record(image, descriptor)
        skip = None if descriptor.joliet else iso9660.rock_ridge_skip(image, root)
        for record in _all_records(image, root):
            stamped[record.offset + 18 : record.offset + 25] = short_form
            if skip is None:
                continue
            for entry in iso9660.system_use_entries(image, record, skip=skip):
                if entry.signature == b"TF":  # flags, then one seven-byte date for each flag
                    count = (len(entry.body) - 1) // 7
                    stamped[entry.offset + 5 : entry.offset + 5 + 7 * count] = short_form * count
    return bytes(stamped)


def _all_records(image: bytes, root: iso9660.DirectoryRecord) -> Iterator[iso9660.DirectoryRecord]:
    yield root
    for record in iso9660.folder_records(image, root):
        if record.is_folder and record.identifier not in (b"\0", b"\1"):
            yield from _all_records(image, record)
        else:
            yield record
