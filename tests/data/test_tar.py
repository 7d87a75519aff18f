"""The walk over tar headers: what real writers write, and what nobody should."""

import io
import tarfile

import pytest

from ldm.data import tar
from tests.data.making import sample, write_tar


def archive(*members, form=tarfile.PAX_FORMAT):
    """members: (name, content, pax headers)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as writer:
        for name, content, headers in members:
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(content), headers
            writer.addfile(info, io.BytesIO(content))
    return file.getvalue()


def walk(data):
    return [(m.name, data[m.offset : m.offset + m.size]) for m in tar.members(io.BytesIO(data), len(data)) if m.regular]


def with_checksum(header: bytes) -> bytes:
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_the_standard_library(tmp_path, form):
    path = write_tar(tmp_path / "a.tar", [("a" * 90 + "/" + "b" * 60, b"x" * 700), *sample(0)], form)
    data = path.read_bytes()
    with tarfile.open(path) as reader:
        assert walk(data) == [(m.name, reader.extractfile(m).read()) for m in reader]


@pytest.mark.parametrize("size", ["9" * 5000, "9" * 21, "9" * 20])
def test_a_size_beyond_all_files_is_damage(size):
    """int() refuses more than 4300 digits with an error of its own."""
    good = archive(("a.txt", b"a", {}))
    hostile = archive(("b.txt", b"b", {"size": size}))
    data = good[:1024] + hostile
    with pytest.raises(tar.Damage):
        walk(data)
    assert [name for name, _ in walk(good)] == ["a.txt"]  # the control


def test_header_records_are_bounded():
    long = archive(("a.txt", b"a", {"comment": "x" * tar.MAX_HEADER}))
    with pytest.raises(tar.Damage, match="limit"):
        walk(long)
    assert walk(archive(("a.txt", b"a", {"comment": "x" * (tar.MAX_HEADER // 2)}))) == [("a.txt", b"a")]


@pytest.mark.parametrize(
    "field",
    [
        b"\x80" + b"\xff" * 11,
        b"\xff" * 12,
        b"77777777777\0",
        b"-0000000001\0",
        b"0000000000z\0",
        b"\x80" + bytes(10) + b"\xff",
    ],
    ids=repr,
)
def test_sizes_that_lead_out_of_the_file_are_damage(field):
    data = archive(("a.txt", b"a", {}), form=tarfile.USTAR_FORMAT)[:1024]
    header = with_checksum(data[:124] + field + data[136:512])
    with pytest.raises(tar.Damage):
        walk(header + data[512:])


def test_a_header_with_a_wrong_checksum_is_damage():
    data = bytearray(archive(("a.txt", b"a", {})))
    data[0] ^= 1
    with pytest.raises(tar.Damage, match="invalid header"):
        walk(bytes(data))


def test_the_number_of_members_is_bounded(monkeypatch):
    data = archive(*((f"{n}.txt", b"", {}) for n in range(20)))
    assert len(walk(data)) == 20
    monkeypatch.setattr(tar, "MAX_MEMBERS", 19)
    with pytest.raises(tar.Damage, match="more than 19 members"):
        walk(data)


def test_a_sparse_file_is_never_expanded():
    data = archive(("a.txt", b"a", {"GNU.sparse.major": "1", "GNU.sparse.realsize": "9999999999"}), ("b.txt", b"b", {}))
    assert walk(data) == [("b.txt", b"b")]
