"""What a tar holds, told only when every byte of it is accounted for.

Readers that skip what they do not understand lose samples in silence, or put two halves together. This one gives each
member with its bytes, or says where the file is wrong: header checksums, octal sizes inside the file, zeros where padding is,
two blocks of zeros at the end and nothing after them, regular files and folders only, names in UTF-8 that stay below the root.

Source: POSIX.1-2017 pax (ustar and its extended headers); GNU tar's long names are read too, its base-256 numbers are not.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

BLOCK = 512
ZEROS = bytes(BLOCK)
MAX_MEMBER_BYTES = 128 * 2**20  # our choice: a member is read whole
MAX_HEADER_BYTES = 64 * 2**10  # of a long name or a pax header
MAGICS = (b"ustar\x0000", b"ustar  \x00", b"\x00" * 8)
HARMLESS_PAX = ("atime", "comment", "ctime", "gid", "gname", "mtime", "uid", "uname")
HARMLESS_PAX_VENDORS = ("LIBARCHIVE.", "SCHILY.")


@dataclass(frozen=True, slots=True)
class TarMember:
    """A regular file in a tar: where its bytes begin, and the bytes."""

    name: str
    offset: int
    data: bytes


class TarReader:
    """The regular files of a tar, in order; after the last one `sha256` is that of the whole file.

    Args:
        path: The tar, not compressed.

    Raises:
        ValueError: (while iterating) the file is no tar, is cut off, or holds what a shard may not; names file and offset.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.sha256 = path, ""
        self._digest, self._at, self._num_bytes = hashlib.sha256(), 0, path.stat().st_size

    def __iter__(self) -> Iterator[TarMember]:
        with self.path.open("rb") as file:
            long_name = None
            while (header := self._read(file, BLOCK)) != ZEROS:
                kind, size, name = self._parsed(header)
                if kind in (b"x", b"L"):
                    if long_name is not None or size > MAX_HEADER_BYTES:
                        raise self._wrong("an extended header follows another one or is too large")
                    content = self._content(file, size)
                    long_name = content.rstrip(b"\x00") if kind == b"L" else self._path_in(content)
                    continue
                name, long_name = long_name or name, None
                if kind == b"5":  # a folder: nothing to read
                    if size:
                        raise self._wrong("a folder has a size")
                    continue
                name, offset = self._checked(name), self._at
                yield TarMember(name, offset, self._content(file, size))
            if long_name is not None:
                raise self._wrong("an extended header belongs to no file")
            self._end(file)
        self.sha256 = self._digest.hexdigest()

    def _parsed(self, header: bytes) -> tuple[bytes, int, bytes]:
        """Kind, size and name of a header block."""
        if self._octal(header[148:156]) != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
            raise self._wrong("the checksum of a header is wrong; the file is damaged or no tar (compressed ones are not read)")
        if header[257:265] not in MAGICS:
            raise self._wrong("a header is of no known format")
        kind = header[156:157].replace(b"\x00", b"0")
        if kind not in (b"0", b"5", b"x", b"L"):
            raise self._wrong(f"a member is of type {kind!r}; only regular files are read")
        name = header[:100].rstrip(b"\x00")
        if header[257:263] == b"ustar\x00" and (prefix := header[345:500].rstrip(b"\x00")):
            name = prefix + b"/" + name
        return kind, self._octal(header[124:136]), name

    def _octal(self, field: bytes) -> int:
        digits = field.rstrip(b" \x00").lstrip(b" ")
        if not digits or digits.strip(b"01234567"):
            raise self._wrong(f"a header holds {field!r} where an octal number must be")
        return int(digits, 8)

    def _path_in(self, records: bytes) -> bytes | None:
        """The path that a pax header's records (`<length> <name>=<value>\\n`) give, or None."""
        path, at = None, 0
        while at < len(records):
            digits = records[at : at + 8].partition(b" ")[0]
            length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
            record = records[at + len(digits) + 1 : at + length]
            name, equals, value = record.removesuffix(b"\n").partition(b"=")
            if not len(digits) + 3 < length <= len(records) - at or not equals or not record.endswith(b"\n"):
                raise self._wrong("a pax header is malformed")
            key = name.decode("utf-8", "replace")
            if key == "path":
                path = value
            elif key not in HARMLESS_PAX and not key.startswith(HARMLESS_PAX_VENDORS):
                raise self._wrong(f"a pax header sets {key!r}; only a path is read from it")
            at += length
        return path

    def _checked(self, name: bytes) -> str:
        try:
            text = name.decode("utf-8").removeprefix("./")
        except UnicodeDecodeError:
            raise self._wrong(f"the name {name!r} is not UTF-8") from None
        if any(part in ("", ".", "..") for part in text.split("/")) or not text.isprintable() or "\\" in text:
            raise self._wrong(f"the name {text!r} does not lie below the tar's root or holds what a name may not")
        return text

    def _content(self, file: BinaryIO, size: int) -> bytes:
        padding = -size % BLOCK
        if size > MAX_MEMBER_BYTES or self._at + size + padding > self._num_bytes:
            raise self._wrong(f"a member says it has {size} bytes, which are not there or more than {MAX_MEMBER_BYTES}")
        content = self._read(file, size)
        if self._read(file, padding).strip(b"\x00"):
            raise self._wrong("the padding after a member is not zero")
        return content

    def _end(self, file: BinaryIO) -> None:
        """One more block of zeros, and nothing but zeros in whole blocks after it."""
        if self._read(file, BLOCK) != ZEROS or self._num_bytes % BLOCK:
            raise self._wrong("the two blocks of zeros at the end are not there")
        while self._at < self._num_bytes:
            if self._read(file, min(2**20, self._num_bytes - self._at)).strip(b"\x00"):
                raise self._wrong("something follows the end")

    def _read(self, file: BinaryIO, size: int) -> bytes:
        data = file.read(size)
        if len(data) < size:
            raise self._wrong("the file is cut off")
        self._digest.update(data)
        self._at += size
        return data

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: {what} (at byte {self._at})")
