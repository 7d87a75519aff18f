"""One-line errors and their exit codes. Imports nothing heavy: errors must appear at once.

Every failure that a user can meet is an `LdmError`; `ldm/cli.py` prints it as
`error[CODE]: what; where; limit and actual; what to do next` and leaves with `exit_code`.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

OK = 0
UNCLASSIFIED = 1
REFUSED = 2
BAD_SAMPLES = 3
NON_FINITE = 4
TEMPORARY = 75
INTERRUPTED = 130
TERMINATED = 143


class LdmError(Exception):
    """A failure with words for the user.

    code: short upper-case name, e.g. "CONFIG".   what: what is wrong.   where: key, file or place.
    limit: what was allowed and what came.   next: what to do now.   exit_code: see the table in docs/errors.md.
    recorded: its traceback stands in the run's errors/ already.
    """

    recorded = False

    def __init__(
        self, code: str, what: str, *, where: str = "", limit: str = "", next: str = "", exit_code: int = REFUSED
    ) -> None:
        self.code, self.what, self.where, self.limit, self.next = code, what, where, limit, next
        self.exit_code = exit_code
        super().__init__(self.line())

    def __reduce__(self):  # crosses process borders: keyword-only arguments need a hand
        return _rebuild, (self.code, self.what, self.where, self.limit, self.next, self.exit_code)

    def line(self) -> str:
        parts = (self.what, self.where, self.limit, self.next)
        return f"error[{self.code}]: " + "; ".join(one_line(part) for part in parts if part)


def _rebuild(code: str, what: str, where: str, limit: str, next: str, exit_code: int) -> LdmError:
    return LdmError(code, what, where=where, limit=limit, next=next, exit_code=exit_code)


class LdmErrors(LdmError):
    """Several failures of one kind of check, reported together: one line each."""

    def __init__(self, errors: Sequence[LdmError]) -> None:
        self.errors = tuple(errors)
        first = errors[0]
        words = {"where": first.where, "limit": first.limit, "next": first.next}
        super().__init__(first.code, first.what, **words, exit_code=first.exit_code)

    def __reduce__(self):
        return LdmErrors, (self.errors,)

    def line(self) -> str:
        return "\n".join(error.line() for error in self.errors)


def raise_all(errors: Sequence[LdmError]) -> None:
    """Raise what was found: nothing, the one error, or all of them together."""
    if errors:
        raise errors[0] if len(errors) == 1 else LdmErrors(errors)


def one_line(text: str) -> str:
    """Control characters escaped, so that a caption or a path can never fake a second line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def nearest(name: str, known: Iterable[str]) -> str:
    """Words for a typo: did you mean 'x'? Or the list of what exists when nothing is near."""
    names = sorted(str(k) for k in known)
    close = get_close_matches(str(name), names, n=2, cutoff=0.55)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"known: {shown or 'none'}"


def check(condition: bool, code: str, what: str, **words: str) -> None:
    """Raise `LdmError` unless `condition` holds: for checks at the border (config, file, user's tensor)."""
    if not condition:
        raise LdmError(code, what, **words)  # type: ignore[arg-type]


def pick(table: Mapping[str, object], name: str, *, kind: str, where: str = "") -> object:
    """`table[name]`, or an error that names the nearest entry."""
    if name not in table:
        raise LdmError("CONFIG", f"unknown {kind} {name!r}", where=where, next=nearest(name, table))
    return table[name]


def classified(error: BaseException) -> LdmError:
    """The words for a failure that is none of ours."""
    what = f"{type(error).__name__}: {error}"
    if (known := recognise(what)) is not None:
        return known
    frames = traceback.extract_tb(error.__traceback__)
    home = Path(__file__).resolve().parents[1]
    ours = [f for f in frames if Path(f.filename).is_relative_to(home) and "site-packages" not in f.filename] or frames
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    return LdmError("UNCLASSIFIED", what, where=where, next="rerun with traceback=true", exit_code=UNCLASSIFIED)


_KNOWN_FAILURES = (  # what the text says, code, what it means, what to do
    (
        r"torchvision::nms|_extension.*torchvision|compiled with different CUDA",
        "INSTALL",
        "torch and torchvision come from different builds",
        "pip install --force-reinstall torch torchvision -c constraints.txt; python -m ldm doctor shows both",
    ),
    (
        r"OutOfMemoryError|CUDA out of memory|STATUS_ALLOC_FAILED|MemoryError: |[cC]an(no|')t allocate memory",
        "MEMORY",
        "the device, or on a CPU the machine, has not enough memory",
        "raise stage.<name>.accumulate, or lower stage.<name>.batch_size or data.image_size",
    ),
    (r"No module named '(?!ldm)([\w.]+)'", "INSTALL", r"the package '\1' is missing", 'pip install -e ".[dev]"'),
)


def recognise(text: str) -> LdmError | None:
    """The words for a failure of other software that users meet, or None."""
    for pattern, code, what, hint in _KNOWN_FAILURES:
        if match := re.search(pattern, text):
            exit_code = REFUSED if code == "INSTALL" else UNCLASSIFIED
            return LdmError(code, match.expand(what), next=hint, exit_code=exit_code)
    return None
