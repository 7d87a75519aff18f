"""The ledger of bad samples: counted by class, the first ten of each written down, all under a budget."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ldm.errors import BAD_SAMPLES, LdmError

_SHOWN = 10  # of each class in the file
_MIN_WINDOW = 10_000


class Bad(NamedTuple):
    """One failed attempt to fill a slot. Travels from the worker that met it to the main process."""

    slot: int
    kind: str
    shard: str
    key: str
    reason: str


class BadSamples:
    """Counts what the stream reports and stops the run when too much of it is bad.

    max_fraction: of bad attempts in a sliding window of max(10 000 samples, one epoch).   max_consecutive: attempts.
    num_samples: samples of an epoch.   rank, world_size: which of the ranks that share the stream; each keeps a ledger
    of its part, and `merged` makes one of them.
    file: `bad_samples.jsonl` of the run, to which every rank appends, or None.
    strict: the first bad sample stops the run.

    counts: by kind, of this rank, upon those of `before`, which all ranks had when this life of the run began.
    """

    def __init__(
        self,
        *,
        max_fraction: float = 0.01,
        max_consecutive: int = 1000,
        num_samples: int = 0,
        rank: int = 0,
        world_size: int = 1,
        file: str | Path | None = None,
        strict: bool = False,
    ) -> None:
        self.max_fraction = 0.0 if strict else max_fraction
        self.max_consecutive = 0 if strict else max_consecutive
        self.window = max(_MIN_WINDOW, num_samples)  # in samples of all ranks, as slots are
        self.file = Path(file) if file else None
        self.rank, self.world_size = rank, world_size
        self.counts: Counter[str] = Counter()
        self.before: Counter[str] = Counter()
        self._of_slot: Counter[int] = Counter()
        self._recent: deque[Bad] = deque()  # of the slots in the window
        self._next_slot = 0
        self._consecutive = 0
        self._written = _written_before(self.file)

    def update(self, slots: Iterable[int], reports: Iterable[Bad]) -> None:
        """Take in one micro-batch: its slots in order and the failed attempts of any of them."""
        by_slot: dict[int, list[Bad]] = {}
        for report in reports:
            by_slot.setdefault(report.slot, []).append(Bad(*report))
        for slot in slots:
            self._next_slot = int(slot) + 1
            for report in by_slot.get(int(slot), ()):
                self.record(report)
            self._consecutive = 0

    def record(self, report: Bad) -> None:
        self.counts[report.kind] += 1
        self._of_slot[report.slot] += 1
        self._consecutive += 1
        self._recent.append(report)
        while self._recent[0].slot < self._next_slot - self.window:
            self._recent.popleft()
        self.write(report)
        allowed = self.max_fraction * self.window / self.world_size
        if self._consecutive > self.max_consecutive or len(self._recent) > allowed:
            raise self._exceeded()

    def taken(self, slots: Iterable[int]) -> int:
        """How many attempts failed for these slots, each told once: unlike `counts`, no further than training is."""
        return sum(self._of_slot.pop(int(slot), 0) for slot in slots)

    def write(self, report: Bad) -> None:
        """One line for the first ten of a class, each once over all lives of the run. A full disk stops nothing."""
        line = {k: v for k, v in report._asdict().items() if k != "slot"}
        seen = self._written.setdefault(report.kind, set())
        if self.file is None or len(seen) >= _SHOWN or (report.shard, report.key) in seen:
            return
        seen.add((report.shard, report.key))
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError:
            self.file = None

    def _exceeded(self) -> LdmError:
        if self._consecutive > self.max_consecutive:
            reports = list(self._recent)[-self._consecutive :]
            what, limit = f"{self._consecutive} bad samples in a row", f"limit {self.max_consecutive}"
            setting = "data.max_consecutive_bad"
        else:
            reports = list(self._recent)
            share = len(reports) * self.world_size / max(1, min(self._next_slot, self.window))
            what, limit = f"{100 * min(share, 1):.1f} % bad samples", f"limit {100 * self.max_fraction:.1f} %"
            setting = "data.max_bad_fraction"
        return budget_error(what, limit, Counter((r.kind, r.shard) for r in reports), self.file, setting)

    def state_dict(self, next_slot: int | None = None) -> dict[str, Any]:
        """What a checkpoint keeps. next_slot: first slot not trained on yet; reports from there on are left out."""
        kept = [report for report in self._recent if next_slot is None or report.slot < next_slot]
        ahead = Counter(report.kind for report in self._recent) - Counter(report.kind for report in kept)
        return {"counts": dict(self.counts - ahead), "recent": [list(report) for report in kept]}

    def merged(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One state of those of all ranks."""
        counts = Counter(self.before)
        for state in states:
            counts += Counter(state["counts"]) - self.before
        recent = sorted((report for state in states for report in state["recent"]), key=lambda report: report[0])
        return {"counts": dict(counts), "recent": recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up this rank's part of a merged state."""
        self.counts, self.before = Counter(state["counts"]), Counter(state["counts"])
        mine = state["recent"][self.rank :: self.world_size]
        self._recent = deque(Bad(*row[-len(Bad._fields) :]) for row in mine)  # earlier versions began a row with an age
        self._of_slot.clear()
        self._next_slot = self._consecutive = 0  # the next slot tells


def in_words(counts: Mapping[str, int]) -> str:
    """ "10 decode, 2 caption_encoding": the most frequent kind first."""
    return ", ".join(f"{count} {kind}" for kind, count in Counter(counts).most_common())


def budget_error(what: str, limit: str, reasons: Counter[tuple[str, str]], file: Path | None, setting: str) -> LdmError:
    """The sentence that ends a run over its bad samples. reasons: how often each (class, shard) occurred."""
    kinds: Counter[str] = Counter()
    for (kind, _), count in reasons.items():
        kinds[kind] += count
    kind = kinds.most_common(1)[0][0]
    shard = max((count, shard) for (k, shard), count in reasons.items() if k == kind)[1]
    return LdmError(
        "DATA-BUDGET",
        what,
        where=f"mostly {kind} in {shard}",
        limit=limit,
        next=f"read {file} or set {setting}" if file else f"set {setting}",
        exit_code=BAD_SAMPLES,
    )


def _written_before(file: Path | None) -> dict[str, set[tuple[str, str]]]:
    written: dict[str, set[tuple[str, str]]] = {}
    if file is not None and file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                written.setdefault(row["kind"], set()).add((row["shard"], row["key"]))
            except (ValueError, KeyError, TypeError):  # a line cut by a crash
                continue
    return written
