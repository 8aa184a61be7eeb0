"""A list of the system calls that this process may still make; all others fail with EPERM. Linux only.

The filter is a program for the kernel's small machine (linux/bpf_common.h, linux/seccomp.h; seccomp(2)): load a
word of the call, compare, jump, return a verdict. What is left is enough for Python threads that compute, read and
write files that are open already, and talk over a socket that is open already. There is no open, no socket, no exec,
no new process, no memory that is both written and run, no signal to another process.

The tables are for x86-64 and AArch64; *the one for AArch64 was not run*. Elsewhere there is no filter, and
:func:`restrict_calls` says so.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

# linux/bpf_common.h: load a word at an absolute offset, jump if equal / if any bit is set, return a constant.
LOAD, JUMP_EQUAL, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
# struct seccomp_data: the call's number, the architecture, the arguments from 16 on, 8 bytes each.
NUMBER_AT, ARCHITECTURE_AT, ARGUMENTS_AT = 0, 4, 16
ALLOW, FAIL, KILL = 0x7FFF0000, 0x00050000, 0x80000000
SET_MODE_FILTER, ALL_THREADS = 1, 1
X32_BIT = 0x40000000

CLONE_THREAD = 0x00010000
PROT_EXEC = 0x4
AT_EMPTY_PATH = 0x1000
FCNTL_COMMANDS = (1, 2, 3, 4, 36, 37, 1030)
"""F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_OFD_GETLK, F_OFD_SETLK, F_DUPFD_CLOEXEC."""

# name: (x86-64, AArch64); asm/unistd_64.h, asm-generic/unistd.h
ALWAYS: dict[str, tuple[int, int]] = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "poll": (7, -1),
    "lseek": (8, 62),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "select": (23, -1),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "dup": (32, 23),
    "nanosleep": (35, 101),
    "getpid": (39, 172),
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "sendmsg": (46, 211),
    "recvmsg": (47, 212),
    "exit": (60, 93),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "ftruncate": (77, 46),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),
    "sigaltstack": (131, 132),
    "fstatfs": (138, 44),
    "gettid": (186, 178),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "restart_syscall": (219, 128),
    "fadvise64": (221, 223),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "pselect6": (270, 72),
    "ppoll": (271, 73),
    "set_robust_list": (273, 99),
    "preadv": (295, 69),
    "pwritev": (296, 70),
    "getrandom": (318, 278),
    "membarrier": (324, 283),
    "copy_file_range": (326, 285),
    "preadv2": (327, 286),
    "pwritev2": (328, 287),
    "rseq": (334, 293),
}
MMAP, MPROTECT, CLONE = (9, 222), (10, 226), (56, 220)
FCNTL, PRLIMIT, TGKILL, NEWFSTATAT = (72, 25), (302, 261), (234, 131), (262, 79)
CLONE3 = (435, 435)
"""Its flags lie in memory, where a filter cannot look: it "does not exist", and the C library takes clone."""

SECCOMP = (317, 277)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine: the place in the tuples above, and what the kernel calls it (AUDIT_ARCH_…)."""


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _argument(number: int) -> bytes:
    """Load the lower half of an argument: none of those that are looked at has more."""
    return _instruction(LOAD, ARGUMENTS_AT + 8 * number)


def _call(number: int, body: bytes) -> bytes:
    """``body``, which ends with a verdict, for the call of that number."""
    return _instruction(LOAD, NUMBER_AT) + _instruction(JUMP_EQUAL, number, 0, len(body) // 8) + body


def _if_equal(argument: int, *values: int) -> bytes:
    """Allow when an argument has one of the values, else fail."""
    allow = b"".join(_instruction(JUMP_EQUAL, value, 0, 1) + _instruction(RETURN, ALLOW) for value in values)
    return _argument(argument) + allow + _instruction(RETURN, FAIL | errno.EPERM)


def _if_bits(argument: int, bits: int, *, wanted: bool) -> bytes:
    """Allow when any of the bits is set (or, not ``wanted``, when none is), else fail."""
    yes, no = _instruction(RETURN, ALLOW), _instruction(RETURN, FAIL | errno.EPERM)
    return _argument(argument) + _instruction(JUMP_ANY_BIT, bits, 0, 1) + (yes + no if wanted else no + yes)


def build_filter(machine: str, process: int) -> bytes:
    """The filter for one kind of machine and the process of that id."""
    place, architecture = ARCHITECTURES[machine]
    parts = [
        _instruction(LOAD, ARCHITECTURE_AT),
        _instruction(JUMP_EQUAL, architecture, 1, 0),
        _instruction(RETURN, KILL),  # numbers mean other calls there
        _instruction(LOAD, NUMBER_AT),
    ]
    if machine == "x86_64":
        parts += [_instruction(JUMP_ANY_BIT, X32_BIT, 0, 1), _instruction(RETURN, KILL)]
    for numbers in ALWAYS.values():
        if numbers[place] >= 0:
            parts += [_instruction(JUMP_EQUAL, numbers[place], 0, 1), _instruction(RETURN, ALLOW)]
    parts += [
        _call(MMAP[place], _if_bits(2, PROT_EXEC, wanted=False)),
        _call(MPROTECT[place], _if_bits(2, PROT_EXEC, wanted=False)),
        _call(CLONE[place], _if_bits(0, CLONE_THREAD, wanted=True)),
        _call(CLONE3[place], _instruction(RETURN, FAIL | errno.ENOSYS)),
        _call(FCNTL[place], _if_equal(1, *FCNTL_COMMANDS)),
        _call(PRLIMIT[place], _if_equal(0, 0)),  # limits of its own, which only get lower
        _call(TGKILL[place], _if_equal(0, process)),  # abort()
        _call(NEWFSTATAT[place], _if_equal(3, AT_EMPTY_PATH)),  # how newer C libraries do fstat
        _instruction(RETURN, FAIL | errno.EPERM),
    ]
    return b"".join(parts)


def restrict_calls() -> bool:
    """Install the filter in all threads; False where the kernel, or this module, has none for this machine.

    The process must have given up gaining rights (PR_SET_NO_NEW_PRIVS).
    """
    if sys.platform != "linux":
        return False
    machine = os.uname().machine
    if machine not in ARCHITECTURES or struct.calcsize("P") != 8:
        return False
    program = build_filter(machine, os.getpid())
    wrapped = _FilterProgram(len(program) // 8, program)
    libc = ctypes.CDLL(None, use_errno=True)
    number = SECCOMP[ARCHITECTURES[machine][0]]
    result = libc.syscall(
        ctypes.c_long(number), ctypes.c_uint(SET_MODE_FILTER), ctypes.c_uint(ALL_THREADS), ctypes.byref(wrapped)
    )
    return int(result) == 0
