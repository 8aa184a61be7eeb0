"""Specs that the tests of guest metadata share."""

from __future__ import annotations

import base64
from typing import Any

UUID = "8f2a6d5c-9d3e-4a54-8d4e-0f9b8d1f1c11"
MAC = "02:15:5d:00:00:01"


def ssh_key(*strings: bytes, comment: str = "me") -> str:
    """A public key line made of the strings of its body, the type first (RFC 4253 section 6.6)."""
    body = b"".join(len(string).to_bytes(4, "big") + string for string in strings)
    return f"{strings[0].decode()} {base64.b64encode(body).decode()} {comment}".strip()


KEY = ssh_key(b"ssh-ed25519", bytes(range(32)))

FULL: dict[str, Any] = {
    "uuid": UUID,
    "name": "web1",
    "hostname": "web1.example",
    "ssh_keys": [KEY],
    "password": "correct horse",
    "user_data": "#cloud-config\npackages: [nginx]\n",
    "network": {
        "links": [{"id": "eth0", "mac": MAC, "mtu": 1400}],
        "networks": [
            {
                "link": "eth0",
                "type": "ipv4",
                "address": "192.0.2.10/24",
                "gateway": "192.0.2.1",
                "routes": [{"network": "198.51.100.0/24", "gateway": "192.0.2.254"}],
            },
            {"link": "eth0", "type": "ipv6", "address": "2001:db8::10/64", "gateway": "fe80::1"},
        ],
        "dns": ["192.0.2.53", "2001:db8::53"],
    },
    "machine": {"generation": 1, "cpus": 4, "memory": "4GiB", "switch": "LAN", "vlan": 100},
    "meta": {"role": "web"},
}
"""Every field of a spec, each with a value of its own."""
