"""A program between imagekit and an outside one: takes rights away from its own process, then becomes the other.

``python -I -S rights.py SETTINGS COMMAND…``. It is a program of its own because Python code between fork and
exec is not safe where there are threads. SETTINGS is JSON: ``limits`` {RLIMIT_…: value}, ``environment`` {…},
``parent`` (process id), ``sandbox`` (bool), ``reads`` and ``writes`` (paths), ``read_fds`` (open descriptors).

Landlock (Linux 5.13 and later; linux/landlock.h) restricts the process to the paths given: folders and files of
``reads`` to read and run, files of ``writes`` to write. Where the kernel has none, the rest holds all the same.

Only the standard library may be imported here: -I -S leaves nothing else.
"""

from __future__ import annotations

import ctypes
import json
import os
import stat
import struct
import sys
from collections.abc import Iterable
from typing import Any

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, SIGKILL = 1, 38, 9

# The numbers are the same on all architectures but Alpha.
SYS_CREATE_RULESET, SYS_ADD_RULE, SYS_RESTRICT_SELF = 444, 445, 446
RULE_PATH_BENEATH = 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
TRUNCATE = 1 << 14
FIRST_RIGHTS = (1 << 13) - 1
"""Of files, in the first version."""
RIGHTS_BY_VERSION = ((2, 1 << 13), (3, TRUNCATE), (5, 1 << 15))
"""(version, right) added later: to link across folders, to truncate, to use devices' ioctls."""
TCP_RIGHTS, TCP_VERSION = 0b11, 4
SCOPES, SCOPES_VERSION = 0b11, 6
"""Abstract sockets and signals to processes outside."""

CANNOT = 126
"""Exit status when the process could not be confined."""


def landlock_version() -> int:
    """The version of Landlock that this kernel has; 0 where there is none."""
    if sys.platform != "linux":
        return 0
    return max(0, _syscall(SYS_CREATE_RULESET, None, 0, 1))


def _syscall(number: int, *arguments: Any) -> int:
    result: int = ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *arguments)
    return result


def main(arguments: list[str]) -> int:
    settings, command = json.loads(arguments[0]), arguments[1:]
    limit(settings["limits"])
    if sys.platform != "linux" or _confine(settings):
        os.execve(command[0], command, settings["environment"])
    return CANNOT


def limit(limits: dict[str, int]) -> None:
    if sys.platform == "win32":
        return
    import resource

    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (most, most))
        except (OSError, ValueError):
            if sys.platform == "linux":
                raise


def _confine(settings: dict[str, Any]) -> bool:
    """Linux: end with the parent, gain no rights, see no files. False when that is no use any more."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    if os.getppid() != settings["parent"]:
        return False  # it died before we asked to be told
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    if settings["sandbox"] and landlock_version():
        restrict_files(settings["reads"], settings["read_fds"], settings["writes"])
    return True


def restrict_files(reads: Iterable[str] = (), read_fds: Iterable[int] = (), writes: Iterable[str] = ()) -> None:
    """Leave the process no files to open but these, no TCP, and no way to processes outside."""
    version = landlock_version()
    handled = FIRST_RIGHTS
    for since, right in RIGHTS_BY_VERSION:
        handled |= right if version >= since else 0
    attributes = struct.pack(
        "=QQQ",
        handled,
        TCP_RIGHTS if version >= TCP_VERSION else 0,
        SCOPES if version >= SCOPES_VERSION else 0,
    )
    size = 24 if version >= SCOPES_VERSION else 16 if version >= TCP_VERSION else 8
    ruleset = _checked(SYS_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    for path in reads:
        _allow(ruleset, path, (EXECUTE | READ_FILE | READ_DIR) & handled)
    for path in writes:
        _allow(ruleset, path, (READ_FILE | WRITE_FILE | TRUNCATE) & handled)
    for fd in read_fds:
        _rule(ruleset, fd, READ_FILE)
    _checked(SYS_RESTRICT_SELF, ruleset, 0)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, getattr(os, "O_PATH", 0))
    except OSError:
        return  # what is not there needs no right
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        rights &= ~READ_DIR
    _rule(ruleset, fd, rights)
    os.close(fd)


def _rule(ruleset: int, fd: int, rights: int) -> None:
    _checked(SYS_ADD_RULE, ruleset, RULE_PATH_BENEATH, struct.pack("=Qi", rights, fd), 0)


def _checked(number: int, *arguments: Any) -> int:
    result = _syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
