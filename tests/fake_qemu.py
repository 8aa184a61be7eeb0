"""A program that behaves like QEMU on its control channel, for what a real QEMU does not do when asked.

Run as ``fake_qemu.py SCENE ARGUMENTS…``; the scenes are the functions below. It speaks just enough QMP: the
greeting, the capabilities, one command at a time, events.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import time


class Qmp:
    """The server's side of QMP, on the descriptor that the arguments name."""

    def __init__(self, arguments: list[str]) -> None:
        match = re.search(r"socket,fd=(\d+)", " ".join(arguments))
        assert match is not None
        self._socket = socket.socket(fileno=int(match[1]))
        self.send({"QMP": {"version": {"qemu": {"major": 9, "minor": 8, "micro": 7}}, "capabilities": []}})

    def send(self, message: dict[str, object]) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\r\n")

    def event(self, name: str, **data: object) -> None:
        self.send({"event": name, "data": data, "timestamp": {"seconds": 0, "microseconds": 0}})

    def serve(self, **answers: object) -> None:
        """Answer commands until the other side goes; anything not in ``answers`` is an error."""
        # The other side sends one command, waits for its answer, and ends none with a newline.
        while data := self._socket.recv(1 << 16):
            command = json.loads(data)
            name = command["execute"].replace("-", "_")
            if name == "qmp_capabilities" or name in answers:
                self.send({"return": answers.get(name, {}), "id": command.get("id")})
            else:
                error = {"class": "CommandNotFound", "desc": "not in this scene"}
                self.send({"error": error, "id": command.get("id")})
            if name == "qmp_capabilities":
                self.event("STOP")


def internal_error(arguments: list[str]) -> None:
    """KVM gives up on the guest."""
    print("SeaBIOS (version fake)", flush=True)
    Qmp(arguments).serve(query_status={"status": "internal-error", "running": False})


def full_disk(arguments: list[str]) -> None:
    """The overlay cannot grow any more."""
    Qmp(arguments).serve(query_status={"status": "io-error", "running": False})


def dies_at_once(arguments: list[str]) -> None:
    """QEMU refuses its arguments."""
    sys.exit("qemu: Invalid \x1b[31mparameter")


def dies_later(arguments: list[str]) -> None:
    """QEMU crashes while the guest runs."""
    Qmp(arguments)
    time.sleep(0.3)
    sys.exit("qemu: assertion failed")


def no_sandbox(arguments: list[str]) -> None:
    """A QEMU built without seccomp."""
    if "-sandbox" in arguments:
        sys.exit("qemu: -sandbox support is not enabled in this QEMU binary")
    print("IMAGEKIT-BOOT-OK", flush=True)
    Qmp(arguments).serve(query_status={"status": "shutdown", "running": False})


def endless_noise(arguments: list[str]) -> None:
    """A guest that prints without end."""
    qmp = Qmp(arguments)
    for _ in range(64):
        sys.stdout.write("noise " * 10_000)
    print("\nIMAGEKIT-BOOT-OK", flush=True)
    qmp.serve(query_status={"status": "running", "running": True})


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2:])
