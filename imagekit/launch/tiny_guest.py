"""A guest of 2 KiB that boots: the disk of `imagekit demo` and of the fast boot tests.

A boot sector and a second part, machine code for a BIOS machine, that report on COM1 and on the screen. The guest
checks what a conversion could break: it reads sectors that lie far apart and compares them with what belongs there;
then it looks for a config drive in the DVD drive at IDE 1:0, prints its volume identifier and the marker, and
switches the machine off.

The code is written as a listing, bytes with their instructions beside them, and put together by ``assemble``. It
follows the BIOS extensions for drives (EDD 3.0, INT 13h AH=42h), ATA/ATAPI-6 for the PACKET command, ECMA-119 for
the volume descriptor at sector 16, and APM 1.2 for power off. There is no file system and nothing protected-mode.
"""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

from imagekit.launch.evidence import DEFAULT_MARKER

MIB = 1 << 20
SECTOR = 512
TINY_GUEST_SIZE = 64 * MIB
PROGRAM_SECTORS = 4
PARTITION_LBA = 2048
LOAD_ADDRESS = 0x7C00
"""Where a BIOS puts the boot sector; the second part is loaded right behind it, so the program is one piece."""

_PARTITION_TABLE = 446
_PARTITION_TYPE = 0xDA  # data that is no file system

# One instruction a line: bytes, then the instruction. =name is an address, >name a 16-bit and ~name an 8-bit distance
# from the end of the instruction; both are the last bytes of it, but for an = that a constant follows.
_LISTING = """
start:
    FA               ; cli
    31 C0            ; xor ax, ax
    8E D8            ; mov ds, ax
    8E C0            ; mov es, ax
    8E D0            ; mov ss, ax
    BC 00 7C         ; mov sp, 0x7c00
    FB               ; sti
    FC               ; cld
    88 16 =drive     ; mov [drive], dl       the BIOS says which drive it booted
    BA FB 03         ; mov dx, 0x3fb         COM1, line control
    B0 80            ; mov al, 0x80          the next two registers are the divisor
    EE               ; out dx, al
    BA F8 03         ; mov dx, 0x3f8
    B0 01            ; mov al, 0x1           115200 baud
    EE               ; out dx, al
    42               ; inc dx
    30 C0            ; xor al, al
    EE               ; out dx, al
    BA FB 03         ; mov dx, 0x3fb
    B0 03            ; mov al, 0x3           8 data bits, no parity, 1 stop bit
    EE               ; out dx, al
    42               ; inc dx                modem control: DTR and RTS
    EE               ; out dx, al
    BE =hello        ; mov si, hello
    E8 >print        ; call print
    BE =rest         ; mov si, rest
    E8 >read         ; call read
    72 ~unread       ; jc unread
    81 3E =second 49 4B ; cmp word [second], 0x4b49
    75 ~unread       ; jne unread
    E9 >check        ; jmp check
unread:
    BE =no_second    ; mov si, no_second
    E8 >print        ; call print
power_off:
    B8 01 53         ; mov ax, 0x5301        APM: connect
    31 DB            ; xor bx, bx
    CD 15            ; int 0x15
    B8 0E 53         ; mov ax, 0x530e        APM: we speak version 1.2
    31 DB            ; xor bx, bx
    B9 02 01         ; mov cx, 0x102
    CD 15            ; int 0x15
    B8 07 53         ; mov ax, 0x5307        APM: set the power state
    BB 01 00         ; mov bx, 0x1           of all devices
    B9 03 00         ; mov cx, 0x3           to off
    CD 15            ; int 0x15
halt:
    F4               ; hlt
    EB ~halt         ; jmp halt
read:
    B4 42            ; mov ah, 0x42          read what the packet at si says; carry: failed
    8A 16 =drive     ; mov dl, [drive]
    CD 13            ; int 0x13
    C3               ; ret
print:
    AC               ; lodsb
    84 C0            ; test al, al
    74 ~printed      ; jz printed
    E8 >put          ; call put
    EB ~print        ; jmp print
printed:
    C3               ; ret
put:
    60               ; pusha
    50               ; push ax
    BA FD 03         ; mov dx, 0x3fd         COM1, line status
put_busy:
    EC               ; in al, dx
    A8 20            ; test al, 0x20         room for a character; a missing port reads as all ones
    74 ~put_busy     ; jz put_busy
    58               ; pop ax
    BA F8 03         ; mov dx, 0x3f8
    EE               ; out dx, al
    B4 0E            ; mov ah, 0xe           and the screen
    BB 07 00         ; mov bx, 0x7
    CD 10            ; int 0x10
    61               ; popa
    C3               ; ret
drive:
    00
rest:
    10 00 03 00 =second 00 00 01 00 00 00 00 00 00 00
hello:
    "imagekit tiny guest: boot sector running\\r\\n"
no_second:
    "imagekit tiny guest: FAILED, its second part cannot be read\\r\\n"
    pad 512
second:
    49 4B
check:
    BF =places       ; mov di, places
next_place:
    8B 75 04         ; mov si, [di + 0x4]    the words for the place; none: done
    85 F6            ; test si, si
    74 ~look         ; jz look
    E8 >print        ; call print
    66 8B 05         ; mov eax, [di]
    66 A3 =sector_lba ; mov [sector_lba], eax
    BE =sector       ; mov si, sector
    E8 >read         ; call read
    72 ~wrong        ; jc wrong
    66 8B 05         ; mov eax, [di]
    66 3B 06 00 90   ; cmp eax, [0x9000]     every sector begins with its own number
    75 ~wrong        ; jne wrong
    BE 00 90         ; mov si, 0x9000
    B9 00 01         ; mov cx, 0x100
    31 D2            ; xor dx, dx
sum:
    AD               ; lodsw
    01 C2            ; add dx, ax
    E2 ~sum          ; loop sum
    85 D2            ; test dx, dx           and its words add up to zero
    75 ~wrong        ; jne wrong
    BE =right_text   ; mov si, right_text
    EB ~say_place    ; jmp say_place
wrong:
    C6 06 =failed 01 ; mov byte [failed], 0x1
    BE =wrong_text   ; mov si, wrong_text
say_place:
    E8 >print        ; call print
    83 C7 06         ; add di, 0x6
    EB ~next_place   ; jmp next_place
look:
    E8 >read_dvd     ; call read_dvd
    72 ~no_dvd       ; jc no_dvd
    BE 01 90         ; mov si, 0x9001
    BF =cd001        ; mov di, cd001
    B9 05 00         ; mov cx, 0x5
    F3 A6            ; repe cmpsb
    75 ~no_dvd       ; jne no_dvd
    BE =dvd_text     ; mov si, dvd_text
    E8 >print        ; call print
    C6 06 48 90 00   ; mov byte [0x9048], 0x0 the identifier has 32 characters, filled up with spaces
    BE 28 90         ; mov si, 0x9028
identifier:
    AC               ; lodsb
    3C 20            ; cmp al, 0x20
    76 ~identified   ; jbe identified
    3C 7F            ; cmp al, 0x7f
    73 ~identified   ; jae identified
    E8 >put          ; call put
    EB ~identifier   ; jmp identifier
identified:
    BE =end_of_line  ; mov si, end_of_line
    EB ~say_dvd      ; jmp say_dvd
no_dvd:
    BE =no_dvd_text  ; mov si, no_dvd_text
say_dvd:
    E8 >print        ; call print
    BE =marker       ; mov si, marker
    80 3E =failed 00 ; cmp byte [failed], 0x0
    74 ~finish       ; je finish
    BE =failed_text  ; mov si, failed_text
finish:
    E8 >print        ; call print
    E9 >power_off    ; jmp power_off
read_dvd:
    C6 06 =tries 04  ; mov byte [tries], 0x4 the first command may only tell that the medium changed
try_dvd:
    BA 76 01         ; mov dx, 0x176         second channel, first drive
    B0 A0            ; mov al, 0xa0
    EE               ; out dx, al
    E8 >wait_dvd     ; call wait_dvd
    72 ~no_answer    ; jc no_answer
    BA 71 01         ; mov dx, 0x171         features: no DMA
    30 C0            ; xor al, al
    EE               ; out dx, al
    BA 74 01         ; mov dx, 0x174         at most 0x800 bytes at a time
    EE               ; out dx, al
    42               ; inc dx
    B0 08            ; mov al, 0x8
    EE               ; out dx, al
    BA 77 01         ; mov dx, 0x177
    B0 A0            ; mov al, 0xa0          PACKET
    EE               ; out dx, al
    E8 >wait_dvd     ; call wait_dvd
    72 ~no_answer    ; jc no_answer
    A8 08            ; test al, 0x8          it asks for the packet
    74 ~retry_dvd    ; jz retry_dvd
    BE =read_10      ; mov si, read_10
    B9 06 00         ; mov cx, 0x6
    BA 70 01         ; mov dx, 0x170
    F3 6F            ; rep outsw
    E8 >wait_dvd     ; call wait_dvd
    72 ~no_answer    ; jc no_answer
    A8 01            ; test al, 0x1          error
    75 ~retry_dvd    ; jnz retry_dvd
    A8 08            ; test al, 0x8          it has data
    74 ~retry_dvd    ; jz retry_dvd
    BF 00 90         ; mov di, 0x9000
    B9 00 04         ; mov cx, 0x400
    BA 70 01         ; mov dx, 0x170
    F3 6D            ; rep insw
    F8               ; clc
    C3               ; ret
retry_dvd:
    FE 0E =tries     ; dec byte [tries]
    75 ~try_dvd      ; jnz try_dvd
no_answer:
    F9               ; stc
    C3               ; ret
wait_dvd:
    BA 76 03         ; mov dx, 0x376         four reads take the 400 ns in which the status may still be old
    EC               ; in al, dx
    EC               ; in al, dx
    EC               ; in al, dx
    EC               ; in al, dx
    BA 77 01         ; mov dx, 0x177
    8B 1E 6C 04      ; mov bx, [0x46c]       the BIOS counts 18.2 ticks a second
poll_dvd:
    EC               ; in al, dx
    A8 80            ; test al, 0x80         busy
    74 ~not_busy     ; jz not_busy
    A1 6C 04         ; mov ax, [0x46c]
    29 D8            ; sub ax, bx
    3D 37 00         ; cmp ax, 0x37          three seconds
    72 ~poll_dvd     ; jb poll_dvd
    F9               ; stc
    C3               ; ret
not_busy:
    3C 01            ; cmp al, 0x1           an empty channel reads as zero: carry
    C3               ; ret
failed:
    00
tries:
    00
sector:
    10 00 01 00 00 90 00 00
sector_lba:
    00 00 00 00 00 00 00 00
read_10:
    28 00 00 00 00 10 00 00 01 00 00 00
cd001:
    43 44 30 30 31
right_text:
    "right\\r\\n"
wrong_text:
    "WRONG\\r\\n"
dvd_text:
    "config drive found: "
no_dvd_text:
    "no config drive\\r\\n"
failed_text:
    "imagekit tiny guest: FAILED, the disk does not hold what it should\\r\\n"
end_of_line:
    "\\r\\n"
"""


def write_tiny_guest(path: str | os.PathLike[str], *, size: int = TINY_GUEST_SIZE) -> None:
    """Write the guest's disk as a sparse raw image of ``size`` bytes: whole MiB, from 64 MiB to 2 TiB."""
    if size % MIB or not TINY_GUEST_SIZE <= size <= 1 << 41:
        raise ValueError(f"{size} bytes: the tiny guest's disk has whole MiB, from 64 MiB to 2 TiB")
    with Path(path).open("wb") as file:
        file.truncate(size)
        for offset, data in disk_pieces(size).items():
            file.seek(offset)
            file.write(data)


def disk_pieces(size: int) -> dict[int, bytes]:
    """All of the disk that is not zero: offset in bytes → content."""
    places = {"3 MiB": 3 * MIB, "37 MiB": 37 * MIB, "the end": size - SECTOR}
    lbas = {name: offset // SECTOR for name, offset in places.items()}
    program = bytearray(assemble(_LISTING + _places_listing(lbas), origin=LOAD_ADDRESS))
    if len(program) > PROGRAM_SECTORS * SECTOR:
        raise AssertionError(f"the program has {len(program)} bytes, {PROGRAM_SECTORS} sectors are loaded")
    _add_partition(program, size // SECTOR)
    return {0: bytes(program), **{lba * SECTOR: marked_sector(lba) for lba in lbas.values()}}


def marked_sector(lba: int) -> bytes:
    """A sector that the guest recognises: its number first, noise, and a last word that makes the sum zero."""
    noise = random.Random(lba).randbytes(SECTOR - 6)
    start = struct.pack("<I", lba) + noise
    total = sum(struct.unpack(f"<{len(start) // 2}H", start))
    return start + struct.pack("<H", -total & 0xFFFF)


def assemble(listing: str, *, origin: int) -> bytes:
    """The bytes of ``listing``, whose first one will lie at the address ``origin``.

    A line is a label, bytes in hexadecimal with references to labels, a text (a zero byte is added) or ``pad N``.
    """
    code = bytearray()
    labels: dict[str, int] = {}
    references: list[tuple[int, str]] = []
    for line in listing.splitlines():
        source = line.strip() if '"' in line else line.partition(";")[0].strip()
        if source.endswith(":"):
            labels[source[:-1]] = origin + len(code)
        elif source.startswith('"'):
            code += source[1:-1].encode("ascii").decode("unicode_escape").encode("ascii") + b"\0"
        elif source.startswith("pad "):
            code += bytes(int(source[4:]) - len(code))
        else:
            for token in source.split():
                if token[0] in "=>~":
                    references.append((len(code), token))
                    code += bytes(1 if token[0] == "~" else 2)
                else:
                    code.append(int(token, 16))
    for at, reference in references:
        _resolve(code, at, reference[0], labels[reference[1:]], origin)
    return bytes(code)


def _resolve(code: bytearray, at: int, kind: str, address: int, origin: int) -> None:
    if kind == "=":
        struct.pack_into("<H", code, at, address)
    elif kind == ">":
        struct.pack_into("<h", code, at, address - (origin + at + 2))
    else:
        struct.pack_into("<b", code, at, address - (origin + at + 1))


def _places_listing(lbas: dict[str, int]) -> str:
    """The table of sectors to check, with the words for each, and the marker."""
    table = ["places:"]
    texts = ["marker:", f'"{DEFAULT_MARKER}\\r\\n"']
    for number, (name, lba) in enumerate(lbas.items()):
        table.append(f"{struct.pack('<I', lba).hex(' ')} =place{number}")
        texts += [f"place{number}:", f'"sector at {name}: "']
    return "\n".join([*table, "00 00 00 00 00 00", *texts])


def _add_partition(program: bytearray, sectors: int) -> None:
    # One active partition that covers the disk; cylinders, heads and sectors say "see the LBA".
    beyond = b"\xfe\xff\xff"
    length = min(sectors - PARTITION_LBA, 0xFFFFFFFF)
    entry = struct.pack("<B3sB3sII", 0x80, beyond, _PARTITION_TYPE, beyond, PARTITION_LBA, length)
    if any(program[_PARTITION_TABLE:SECTOR]):
        raise AssertionError("the boot sector's code reaches into the partition table")
    program[_PARTITION_TABLE : _PARTITION_TABLE + len(entry)] = entry
    program[SECTOR - 2 : SECTOR] = b"\x55\xaa"
