"""Headers of plain tar files (ustar, pax, GNU), read by hand: nothing is extracted, followed or decompressed.

The standard library's reader ends silently where a header is cut; this walk names the byte. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
MAX_HEADER = 2**20  # bytes of one pax or GNU long-name record
MAX_MEMBERS = 4_000_000
MAX_DIGITS = 20  # of a member's size; int() refuses thousands with an error of its own
_ZERO = bytes(BLOCK)
_REGULAR = b"0\0" + b"7"


class Damage(Exception):
    """The archive ends or breaks at `byte`; members before it are intact."""

    def __init__(self, byte: int, reason: str) -> None:
        self.byte, self.reason = byte, reason
        super().__init__(byte, reason)


@dataclass(frozen=True)
class Member:
    """name: as stored.   regular: a file with plain content at [offset, offset + size); else a link, device, ..."""

    name: str
    offset: int
    size: int
    regular: bool
    directory: bool = False


def members(file: BinaryIO, size: int) -> Iterator[Member]:
    """Members in file order. Raises `Damage` at a cut, an invalid header, or where the two closing blocks miss."""
    position, count = 0, 0
    name, sparse, long_size = "", False, -1
    while True:
        header = _read(file, position, BLOCK)
        if len(header) < BLOCK:
            where = "no end-of-archive blocks" if not header else "cut inside a header"
            raise Damage(size, where)
        if header == _ZERO:
            if _read(file, position + BLOCK, BLOCK) != _ZERO:
                raise Damage(min(position + BLOCK, size), "end-of-archive blocks incomplete")
            return
        kind, length, own_name = _parse(header, position)
        payload = position + BLOCK
        if kind == b"S":  # the map of a sparse file may continue in further blocks
            extended = header[482]
            while extended and payload < size:
                extended = (_read(file, payload, BLOCK) + _ZERO)[504]
                payload += BLOCK
        if kind in b"xgLK":
            if length > MAX_HEADER:
                raise Damage(position, f"header record of {length} bytes, limit {MAX_HEADER}")
            record = _read(file, payload, length)
            if len(record) < length:
                raise Damage(size, "cut inside a header")
            if kind == b"L":
                name = _text(record)
            elif kind == b"x":
                fields = _pax(record, position)
                name, sparse = fields.get("path", name), any(key.startswith("GNU.sparse") for key in fields)
                if (digits := fields.get("size", "")).isdecimal():
                    if len(digits) > MAX_DIGITS:
                        raise Damage(position, "invalid extended header")
                    long_size = int(digits)
        else:
            count += 1
            if count > MAX_MEMBERS:
                raise Damage(position, f"more than {MAX_MEMBERS} members")
            if long_size >= 0:
                length = long_size
            has_payload = kind in _REGULAR or kind == b"S"  # links and devices store none, whatever their size says
            length = length if has_payload else 0
            if payload + length > size:
                raise Damage(size, f"cut inside {(name or own_name)!r}")
            member_name = name or own_name
            directory = kind == b"5" or (kind in b"0\0" and member_name.endswith("/"))
            yield Member(member_name, payload, length, kind in _REGULAR and not sparse and not directory, directory)
            name, sparse, long_size = "", False, -1
        position = payload + -(-length // BLOCK) * BLOCK


def has_trailing_data(file: BinaryIO, end: int) -> bool:
    """Whether anything but zeros follows byte `end`: a second archive was appended, which readers ignore."""
    file.seek(end)
    return any(chunk.strip(b"\0") for chunk in iter(lambda: file.read(2**20), b""))


def describe(head: bytes) -> str:
    """What a file that is not a tar seems to be."""
    if not head:
        return "empty file, 0 bytes"
    if head.startswith(b"\x1f\x8b"):
        return "gzip-compressed: unpack it first with gunzip"
    if head.startswith((b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ", b"PK\x03\x04")):
        return "compressed: only plain tar files are read"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "an HTML or XML page, not a tar: the download failed"
    return f"not a tar; starts with {head[:12]!r}"


def _read(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(count)


def _parse(header: bytes, position: int) -> tuple[bytes, int, str]:
    """Type, size and name of a header block whose checksum holds."""
    try:
        stored = int(header[148:156].strip(b" \0") or b"-1", 8)
        length = _number(header[124:136])
    except ValueError as error:
        raise Damage(position, "invalid header") from error
    if stored != sum(header[:148]) + 8 * 0x20 + sum(header[156:]) or length < 0:
        raise Damage(position, "invalid header")
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345] != 0:
        name = f"{_text(header[345:500])}/{name}"
    return header[156:157], length, name


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU base 256
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _pax(record: bytes, position: int) -> dict[str, str]:
    fields, at = {}, 0
    while at < len(record) and record[at : at + 1] != b"\0":
        digits, _, rest = record[at : at + 20].partition(b" ")
        if not digits.isdigit() or not rest or int(digits) < len(digits) + 3:
            raise Damage(position, "invalid extended header")
        key, _, value = record[at + len(digits) + 1 : at + int(digits) - 1].partition(b"=")
        fields[_text(key)] = _text(value)
        at += int(digits)
    return fields
