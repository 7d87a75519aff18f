"""What the file system refuses to a verb that writes many files, in one line."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.errors import REFUSED, TEMPORARY, LdmError


@contextmanager
def refusals(out: Path, kept: str) -> Iterator[None]:
    """OSError becomes LdmError, `DISK`, of exit code 75 where the disk is full: then the same command goes on.

    out: the folder that is written.   kept: the files in it that stay, in words.
    """
    try:
        yield
    except OSError as error:
        place, exit_code = Path(os.fsdecode(error.filename or out)), REFUSED
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            what, exit_code = "cannot write", TEMPORARY
            hint = f"free space and run the same command again: finished {kept} are kept"
        elif place.is_relative_to(out) or out.is_relative_to(place):
            what, hint = "OUT cannot be used", "choose another OUT"
        else:
            what, hint = "cannot read", "look at its rights and its disk"
        what = f"{what}: {error.strerror}"
        raise LdmError("DISK", what, where=str(place), next=hint, exit_code=exit_code) from error
