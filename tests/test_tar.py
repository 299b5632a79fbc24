"""Promises of the strict tar reader: whole tars of every common writer are read, anything else is refused with its reason."""

import hashlib
import io
import random
import tarfile
from pathlib import Path

import pytest

from datamodules.tar import BLOCK, TarReader

LONG = "folder/" + "n" * 150 + ".txt"


def tar_of(path: Path, files: dict[str, bytes], *, format: int = tarfile.PAX_FORMAT, **changes) -> Path:
    """A tar written by the standard library; `changes` are set on the last member."""
    with tarfile.open(path, "w", format=format) as tar:
        for number, (name, data) in enumerate(files.items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if number == len(files) - 1:
                for attribute, value in changes.items():
                    setattr(info, attribute, value)
            tar.addfile(info, io.BytesIO(data))
    return path


def rewritten(path: Path, change) -> Path:
    """The tar with its first header changed and that header's checksum made right again."""
    data = bytearray(path.read_bytes())
    change(data)
    data[148:156] = b"        "
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_every_common_format_are_read(tmp_path, format):
    long = "a/" * 60 + "b.txt" if format == tarfile.USTAR_FORMAT else LONG
    files = {"a.txt": b"one", "a.jpg": b"", "ü.txt" if format != tarfile.USTAR_FORMAT else "u.txt": b"x" * 1000, long: b"long"}
    path = tar_of(tmp_path / "t.tar", files, format=format)
    reader = TarReader(path)
    found = list(reader)
    assert {member.name: member.data for member in found} == files
    whole = path.read_bytes()
    assert all(whole[member.offset : member.offset + len(member.data)] == member.data for member in found)
    assert reader.sha256 == hashlib.sha256(whole).hexdigest()


def test_folders_are_passed_over_and_a_leading_dot_is_taken_off(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        folder = tarfile.TarInfo("./images")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        tar.addfile(tarfile.TarInfo("./images/a.txt"), io.BytesIO())
    assert [member.name for member in TarReader(tmp_path / "t.tar")] == ["images/a.txt"]


@pytest.mark.parametrize(
    ("files", "changes", "message"),
    [
        ({"../a.txt": b"x"}, {}, "does not lie below"),
        ({"/a.txt": b"x"}, {}, "does not lie below"),
        ({"a/../../b.txt": b"x"}, {}, "does not lie below"),
        ({"a\\b.txt": b"x"}, {}, "does not lie below"),
        ({"a\nb.txt": b"x"}, {}, "does not lie below"),
        ({"a.txt": b""}, {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "only regular files"),
        ({"a.txt": b""}, {"type": tarfile.LNKTYPE, "linkname": "b"}, "only regular files"),
        ({"a.txt": b""}, {"type": tarfile.FIFOTYPE}, "only regular files"),
        ({"a.txt": b""}, {"type": tarfile.CHRTYPE}, "only regular files"),
        ({"a.txt": b"x"}, {"pax_headers": {"GNU.sparse.major": "1"}}, "sets 'GNU.sparse.major'"),
        ({"a.txt": b"x"}, {"pax_headers": {"size": "1"}}, "sets 'size'"),
        ({"a.txt": b"x"}, {"pax_headers": {"comment": "c" * 70_000}}, "too large"),
    ],
)
def test_what_a_shard_may_not_hold_is_refused(tmp_path, files, changes, message):
    with pytest.raises(ValueError, match=message):
        list(TarReader(tar_of(tmp_path / "t.tar", files, **changes)))


def put(where: slice, value: bytes):
    def change(data: bytearray) -> None:
        data[where] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(slice(124, 136), b"77777777777\0"), "not there or more than"),
        (put(slice(124, 136), b"-0000000001\0"), "octal number"),
        (put(slice(124, 136), b"\x80" + b"\0" * 10 + b"\x01"), "octal number"),
        (put(slice(0, 2), b"\xff\xfe"), "not UTF-8"),
        (put(slice(257, 265), b"notatar\0"), "no known format"),
    ],
)
def test_a_header_with_a_right_checksum_is_not_trusted(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        list(TarReader(rewritten(tar_of(tmp_path / "t.tar", {"a.txt": b"hello"}), change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-10240], "cut off"),
        (lambda data: data[:700], "not there or more than"),
        (lambda data: b"", "cut off"),
        (lambda data: data[: 2 * BLOCK] + bytes(BLOCK), "cut off"),
        (lambda data: data[: 2 * BLOCK] + bytes(2 * BLOCK) + b"x" * BLOCK, "something follows"),
        (lambda data: data + b"\0", "two blocks of zeros"),
        (lambda data: data[:520] + b"x" + data[521:], "padding"),
        (lambda data: b"\x1f\x8b" + data[2:], "no tar"),
        (lambda data: data[:10] + b"\x01" + data[11:], "checksum"),
    ],
)
def test_every_byte_is_accounted_for(tmp_path, change, message):
    path = tar_of(tmp_path / "t.tar", {"a.txt": b"hello"})
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        list(TarReader(path))


def test_mutated_tars_are_refused_or_read_and_nothing_else(tmp_path):
    whole = tar_of(
        tmp_path / "t.tar", {f"{n:03d}.{e}": bytes([n]) * 300 for n in range(5) for e in ("txt", "jpg")}
    ).read_bytes()
    content = 5120 + 10 * 512  # the last two blocks and the record's padding come after it
    chance = random.Random(0)
    num_refused = 0
    for _ in range(1500):
        data = bytearray(whole)
        at = chance.randrange(content)
        match chance.randrange(4):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at : at + 512] = bytes(chance.randrange(256) for _ in range(512))
            case 3:
                del data[at - at % 512 : at - at % 512 + 512]
        (tmp_path / "m.tar").write_bytes(data)
        reader = TarReader(tmp_path / "m.tar")
        try:
            members = list(reader)
        except ValueError:
            num_refused += 1
            continue
        assert all(data[m.offset : m.offset + len(m.data)] == m.data for m in members)
        assert reader.sha256 == hashlib.sha256(data).hexdigest()
    assert num_refused > 500
