"""The values that fields of a spec may have, as annotated types for `imagekit.cloudinit.model`.

Each check raises ValueError with what was expected; the model adds what was found, where it may be shown.
"""

from __future__ import annotations

import base64
import binascii
import re
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, StrictInt, StrictStr

MIB = 1 << 20
TIB = 1 << 40

IpAddress = IPv4Address | IPv6Address
IpInterface = IPv4Interface | IPv6Interface
IpNetwork = IPv4Network | IPv6Network

_UUID = re.compile(r"(?:urn:uuid:)?([0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12})")  # RFC 4122 section 3
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HOST_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")  # RFC 1123 section 2.1
_LINK_ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ._-]{0,30}[A-Za-z0-9])?")
_MAC = re.compile(r"[0-9a-f]{12}|[0-9a-f]{2}([:-])(?:[0-9a-f]{2}\1){4}[0-9a-f]{2}")
_META_KEY = re.compile(r"[A-Za-z0-9_:. -]{1,255}")  # as Nova's API has it
_MEMORY = re.compile(r"([0-9]{1,15})(?:\.([0-9]{1,6}))? ?([kmgt])(?:ib)?")
_INTERFACE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,14}")  # Linux: IFNAMSIZ is 16, with the final zero
_HASH = re.compile(r"\$(?:1|2[aby]|5|6|y|gy|7)\$[ -9;-~]{8,300}")  # crypt(5), without colon
_KEY_TYPE = re.compile(r"[a-z0-9][a-z0-9@.-]{2,63}")
_PREFIX = re.compile(r"[^%]+/[0-9]{1,3}")  # a prefix length, not a netmask, and no zone

MEMORY_STEP = 2 * MIB  # Hyper-V gives memory in steps of 2 MiB
MIN_MEMORY, MAX_MEMORY = 32 * MIB, 240 * TIB  # Hyper-V's limits


def _check_uuid(text: str) -> str:
    match = _UUID.fullmatch(text.lower())
    if match is None or set(match[1]) in ({"-", "0"}, {"-", "f"}):
        raise ValueError("a UUID such as 8f2a6d5c-9d3e-4a54-8d4e-0f9b8d1f1c11, not all zeros or ones")
    return match[1]


def _check_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError("up to 64 letters, digits, dots, hyphens and underscores, a letter or digit first")
    return text


def _check_hostname(text: str) -> str:
    labels = text.split(".")
    like_an_address = len(labels) > 1 and labels[-1].isdigit()
    if len(text) > 253 or like_an_address or not all(_HOST_LABEL.fullmatch(label) for label in labels):
        raise ValueError(
            "a host name such as web1 or web1.example: letters, digits and hyphens, up to 63 between dots"
        )
    return text


def _check_link_id(text: str) -> str:
    if not _LINK_ID.fullmatch(text):
        raise ValueError("a name such as eth0: up to 32 letters, digits, spaces, dots, hyphens, underscores")
    return text


def _check_mac(text: str) -> str:
    if not _MAC.fullmatch(text.lower()):
        raise ValueError("a MAC address such as 02:15:5d:00:00:01")
    digits = re.sub("[:-]", "", text.lower())
    if int(digits[:2], 16) & 1 or not int(digits, 16):
        raise ValueError("the MAC address of one adapter, neither multicast nor zero")
    return ":".join(re.findall("..", digits))


def _check_interface(text: str) -> str:
    if not _INTERFACE.fullmatch(text):
        raise ValueError(
            "a name that Linux takes, such as eth0: up to 15 letters, digits, dots, hyphens, underscores"
        )
    return text


def _check_hash(secret: SecretStr) -> SecretStr:
    if not _HASH.fullmatch(secret.get_secret_value()):
        raise ValueError("a hash as in /etc/shadow, such as $6$SALT$…; `openssl passwd -6` makes one")
    return secret


def _check_guest_path(text: str) -> str:
    parts = text.split("/")
    if not text.startswith("/") or len(text) > 255 or not text.isprintable() or {"", ".", ".."} & {*parts[1:]}:
        raise ValueError("the absolute path of a file in the guest, up to 255 characters, such as /etc/motd")
    return text


def _check_seed(text: str) -> str:
    """Base64, or ``random``, which whoever completes the spec replaces."""
    if text != "random":
        try:
            base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            raise ValueError("'random', or base64 text") from None
    return "".join(text.split())


def _check_ssh_key(text: str) -> str:
    """One line of authorized_keys without options: type, base64 body, comment (RFC 4253 section 6.6)."""
    key = text.strip()
    words = key.split(None, 2)
    if len(words) < 2 or not _KEY_TYPE.fullmatch(words[0]) or not key.isprintable():
        raise ValueError("one public key on one line, as in a .pub file: type, base64 text, comment")
    try:
        body = base64.b64decode(words[1], validate=True)
    except binascii.Error:
        raise ValueError(f"whole base64 text after {words[0]}; this is cut short or damaged") from None
    strings = _ssh_strings(body)
    if not strings or strings[0] != words[0].encode():
        raise ValueError(f"a key body that is of the type named before it, {words[0]}")
    # Certificates hold integers between their strings; any other key is strings to its last byte.
    if "-cert-" not in words[0] and (len(strings) < 2 or sum(4 + len(s) for s in strings) != len(body)):
        raise ValueError("a whole key; this one is cut short")
    return key


def _ssh_strings(body: bytes) -> list[bytes]:
    """The length-prefixed strings (RFC 4251 section 5) that ``body`` starts with."""
    strings: list[bytes] = []
    position = 0
    while position + 4 <= len(body):
        end = position + 4 + int.from_bytes(body[position : position + 4], "big")
        if end > len(body):
            break
        strings.append(body[position + 4 : end])
        position = end
    return strings


def _check_text(text: str) -> str:
    if not text.isprintable():
        raise ValueError("text without control characters")
    return text


def _check_meta_key(text: str) -> str:
    if not _META_KEY.fullmatch(text):
        raise ValueError("up to 255 letters, digits, spaces and - _ : .")
    return text


def _check_password(secret: SecretStr) -> SecretStr:
    text = secret.get_secret_value()
    if not 1 <= len(text) <= 127 or not text.isprintable():  # Windows takes no more
        raise ValueError("1 to 127 characters without control characters")
    return secret


def _read_memory(value: object) -> object:
    """Bytes as a number, or text such as ``2GiB``, ``2G`` or ``1.5 GiB``."""
    if isinstance(value, str):
        match = _MEMORY.fullmatch(value.strip().lower())
        if match is None:
            raise ValueError("a size such as 2GiB or 512MiB")
        fraction = match[2] or ""
        unit = 1024 ** (1 + "kmgt".index(match[3]))
        value, remainder = divmod(int(match[1] + fraction) * unit, 10 ** len(fraction))
        if remainder:
            raise ValueError("a whole number of bytes")
    return value


def _check_memory(size: int) -> int:
    if not MIN_MEMORY <= size <= MAX_MEMORY or size % MEMORY_STEP:
        raise ValueError("a multiple of 2MiB from 32MiB to 240TiB; a number without unit counts bytes")
    return size


def _read_bytes(value: object) -> object:
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError:
            raise ValueError("text that UTF-8 can express") from None
    return value


def _read_user_data(value: object) -> object:
    value = _read_bytes(value)
    if value == b"":
        raise ValueError("at least one character; without user data leave the field out")
    return value


def _read_generation(value: object) -> object:
    if isinstance(value, bool | float):  # which equal 1 and 2, and would pass for them
        raise ValueError("'auto', 1 or 2")  # noqa: TRY004 - pydantic collects only ValueError
    return value


def _check_not_empty(values: tuple[object, ...]) -> tuple[object, ...]:
    # Not Field(min_length=1), which also counts entries that are wrong as missing.
    if not values:
        raise ValueError("at least one entry")
    return values


def _read_address(value: object) -> IpAddress:
    expected = "the IP address of one host, such as 192.0.2.1 or 2001:db8::1"
    if isinstance(value, str) and "%" not in value:
        try:
            value = ip_address(value)
        except ValueError:
            raise ValueError(expected) from None
    if not isinstance(value, IPv4Address | IPv6Address) or value.is_multicast or value.is_unspecified:
        raise ValueError(expected)
    return value


def _read_interface(value: object) -> IpInterface:
    if isinstance(value, str) and _PREFIX.fullmatch(value):
        try:
            return ip_interface(value)
        except ValueError:
            pass
    elif isinstance(value, IPv4Interface | IPv6Interface):
        return value
    raise ValueError("an address with its prefix length, such as 192.0.2.10/24 or 2001:db8::10/64")


def _read_network(value: object) -> IpNetwork:
    if isinstance(value, str) and _PREFIX.fullmatch(value):
        try:
            return ip_network(value)
        except ValueError:
            pass
    elif isinstance(value, IPv4Network | IPv6Network):
        return value
    raise ValueError("a network with its prefix length and no host bits, such as 198.51.100.0/24")


Uuid = Annotated[StrictStr, AfterValidator(_check_uuid)]
Name = Annotated[StrictStr, AfterValidator(_check_name)]
Hostname = Annotated[StrictStr, AfterValidator(_check_hostname)]
LinkId = Annotated[StrictStr, AfterValidator(_check_link_id)]
Mac = Annotated[StrictStr, AfterValidator(_check_mac)]
InterfaceName = Annotated[StrictStr, AfterValidator(_check_interface)]
VlanId = Annotated[StrictInt, Field(ge=1, le=4094)]
PasswordHash = Annotated[SecretStr, AfterValidator(_check_hash)]
GuestPath = Annotated[StrictStr, AfterValidator(_check_guest_path)]
RandomSeed = Annotated[StrictStr, Field(min_length=1, max_length=16384), AfterValidator(_check_seed)]
Mtu = Annotated[StrictInt, Field(ge=576, le=65535)]
SshKey = Annotated[StrictStr, AfterValidator(_check_ssh_key)]
Text = Annotated[StrictStr, Field(min_length=1, max_length=255), AfterValidator(_check_text)]
MetaKey = Annotated[StrictStr, AfterValidator(_check_meta_key)]
MetaValue = Annotated[StrictStr, Field(max_length=255)]
Password = Annotated[SecretStr, AfterValidator(_check_password)]
Memory = Annotated[StrictInt, BeforeValidator(_read_memory), AfterValidator(_check_memory)]
UserData = Annotated[bytes, Field(strict=True), BeforeValidator(_read_user_data)]
FileContent = Annotated[bytes, Field(strict=True), BeforeValidator(_read_bytes)]
Generation = Annotated[Literal["auto", 1, 2], BeforeValidator(_read_generation)]
NOT_EMPTY = AfterValidator(_check_not_empty)
Address = Annotated[IpAddress, BeforeValidator(_read_address)]
Interface = Annotated[IpInterface, BeforeValidator(_read_interface)]
RouteTarget = Annotated[IpNetwork, BeforeValidator(_read_network)]
