"""What the file system refuses to the verbs that write many files."""

import errno
import os

import pytest

from ldm.errors import LdmError
from ldm.tools.disk import refusals


@pytest.mark.parametrize(
    "number, name, words, code",
    [
        (errno.ENOSPC, "out/train-000000.tar", "cannot write: No space left on device", 75),
        (errno.EDQUOT, None, "cannot write: Disk quota exceeded", 75),
        (errno.EROFS, "out/train-000000.tar", "OUT cannot be used: Read-only file system", 2),
        (errno.EACCES, "", "OUT cannot be used: Permission denied", 2),
        (errno.ENOENT, "weights/tower.safetensors", "cannot read: No such file or directory", 2),
        (errno.EIO, "data/a.tar", "cannot read: Input/output error", 2),
    ],
)
def test_reading_and_writing_are_told_apart(tmp_path, number, name, words, code):
    out = tmp_path / "out"
    place = None if name is None else str(tmp_path / name)
    with pytest.raises(LdmError) as refused, refusals(out, "shards"):
        raise OSError(number, os.strerror(number), place)
    assert refused.value.line().startswith(f"error[DISK]: {words}") and refused.value.exit_code == code
    assert refused.value.where == (place or str(out)).rstrip("/")
    assert ("finished shards are kept" in refused.value.next) is (code == 75)
    assert ("OUT" in refused.value.next) is ("OUT" in words)
