"""The report of `inspect` for a terminal. Captions and paths are shown, never obeyed: no markup, no control codes."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ldm.tools.samples import plain

MARKS = {
    "ok": ("✓", "green"),
    "note": ("·", "cyan"),
    "mend": ("!", "yellow"),
    "stop": ("✗", "bold red"),
}
_BAR = 18
_SIDE_BY_SIDE = 80  # columns of a screen
_SHARDS = 10  # listed
_EIGHTHS = " ▏▎▍▌▋▊▉"


def show(report: dict[str, Any], console: Console | None = None) -> None:
    console = console or Console(highlight=False, soft_wrap=False)
    console.print(Rule(Text(plain(report["path"]), style="bold"), style="dim", align="left"))
    console.print(_facts(report))
    if report["samples"]["good"]:
        console.print(_histograms(report["pictures"], console.width))
    if refused := report["shards"]["unusable"] + report["shards"]["truncated"]:
        console.print(_shards(refused))
    for title, part in (
        ("bad samples", report["bad"]["kinds"]),
        ("remarks", report["remarks"]["kinds"]),
    ):
        if part:
            console.print(_kinds(title, part))
    if any(found["groups"] for found in report["duplicates"].values()):
        console.print(_duplicates(report["duplicates"]))
    for sentence in report["remarks"]["sentences"]:
        console.print(Padding(Text(plain(sentence), style="dim"), (0, 2)))
    console.print(_verdict(report["verdict"]))


def _grid(*widths: int | None) -> Table:
    table = Table.grid(padding=(0, 2))
    for width in widths:
        table.add_column(min_width=width, max_width=width, overflow="fold" if width is None else "ellipsis")
    return table


def _facts(report: dict[str, Any]) -> RenderableType:
    samples, pictures, captions = report["samples"], report["pictures"], report["captions"]
    table = _grid(10, None)

    def row(name: str, *words: str) -> None:
        table.add_row(Text(name, style="dim"), Text(plain("  ·  ".join(words))))

    split = [f"{samples['train']:,} train", f"{samples['val']:,} val"] if samples["val"] else []
    home = [f"{report['shards']['count']} shards"] if report["kind"] == "shards" else [report["kind"]]
    row("samples", f"{samples['good']:,} good", *split, *home, _bytes(samples["bytes"]))
    if samples["good"]:
        forms = [f"{name} {_percent(count, samples['good'])}" for name, count in pictures["formats"].items()]
        clear = [f"{pictures['transparent']:,} with transparency"] if pictures["transparent"] else []
        row("pictures", *forms, *clear)
        common = captions["most_common"]
        often = (
            [f"most often ({common['count']}): {_short(common['caption'], 40)}"]
            if common and common["count"] > 1
            else []
        )
        have = f"{captions['with']:,} of {samples['good']:,} ({_percent(captions['with'], samples['good'])})"
        row("captions", have, f"{captions['distinct']:,} different", *often)
    if tokens := captions["tokens"]:
        spread = f"{tokens['min']:.0f} to {tokens['max']:.0f}, half have {tokens['median']:.0f} or fewer"
        row("tokens", spread, f"{tokens['truncated']:,} longer than {tokens['limit']}")
    return Padding(table, (1, 2))


def _histograms(pictures: dict[str, Any], width: int) -> RenderableType:
    sides, aspects = pictures["short_side"]["histogram"], pictures["aspect"]["histogram"]
    one = _histogram("short side, pixels", [(_from_to(b, "{:.0f}"), b["count"]) for b in sides])
    other = _histogram("width : height", [(_from_to(b, "{:g}"), b["count"]) for b in aspects])
    if width < _SIDE_BY_SIDE:
        return Padding(Group(one, "", other), (0, 2, 1, 2))
    table = Table.grid(padding=(0, 5))
    table.add_row(one, other)
    return Padding(table, (0, 2, 1, 2))


def _histogram(title: str, rows: list[tuple[str, int]]) -> RenderableType:
    full = [i for i, (_, count) in enumerate(rows) if count]
    rows = rows[full[0] : full[-1] + 1] if full else rows[:1]
    most = max(count for _, count in rows) or 1
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    for name, count in rows:
        table.add_row(Text(name, style="dim"), Text(_bar(count / most), style="blue"), f"{count:,}")
    return Group(Text(title, style="bold"), table)


def _bar(share: float) -> str:
    eighths = max(round(share * _BAR * 8), 1 if share else 0)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()).ljust(_BAR)


def _from_to(bin_: dict[str, Any], form: str) -> str:
    low, high = bin_["from"], bin_["to"]
    if high is None:
        return f"{form.format(low)} and more"
    return f"under {form.format(high)}" if not low else f"{form.format(low)} to {form.format(high)}"


def _shards(refused: list[dict[str, str]]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for about in refused[:_SHARDS]:
        name = _short(about["path"].rpartition("/")[2], 40)
        table.add_row(Text(name, style="yellow"), Text(_short(about["reason"], 120), style="dim", overflow="fold"))
    if len(refused) > _SHARDS:
        table.add_row(Text(f"and {len(refused) - _SHARDS} more"))
    return Padding(Group(Text("shards that cannot be used as they are", style="bold"), table), (0, 2, 1, 2))


def _kinds(title: str, kinds: dict[str, Any]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for kind, about in kinds.items():
        first = about["first"]
        words = Text(_short(first["path"], 60), overflow="fold")
        if first["reason"]:
            words.append(f"\n{_short(first['reason'], 120)}", style="dim")
        table.add_row(Text(f"{about['count']:,}", style="yellow", justify="right"), Text(kind), words)
    return Padding(Group(Text(f"{title}, with the first of each kind", style="bold"), table), (0, 2, 1, 2))


def _duplicates(duplicates: dict[str, Any]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    words = {"exact": "the same", "near": "nearly the same", "train_val": "in both train and val"}
    for kind, found in duplicates.items():
        if found["groups"]:
            first = "\n= ".join(_short(name, 60) for name in found["first"][0][:2])
            table.add_row(
                Text(f"{found['pictures']:,}", style="yellow", justify="right"),
                Text(words[kind]),
                Text(f"{found['groups']:,} groups" if found["groups"] > 1 else "1 group"),
                Text(first, style="dim", overflow="fold"),
            )
    return Padding(Group(Text("equal pictures", style="bold"), table), (0, 2, 1, 2))


def _verdict(verdict: dict[str, Any]) -> RenderableType:
    table = _grid(1, None)
    for finding in verdict["findings"]:
        mark, style = MARKS[finding["level"]]
        text = Text(plain(finding["text"]))
        if finding["key"]:
            text.append(f"\n→ {plain(finding['key'])}", style="dim")
        table.add_row(Text(mark, style=style), text)
    words = "ready for training" if verdict["usable"] else "training would refuse this"
    style = "bold green" if verdict["usable"] else "bold red"
    return Padding(Group(Text(words, style=style), table), (0, 2, 1, 2))


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.0f} %" if share in (0, 100) or 1 <= share <= 99 else f"{share:.1f} %"


def _bytes(number: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e3:.0f} kB"


def _short(text: str, length: int) -> str:
    text = plain(text)
    return text if len(text) <= length else text[: length - 1] + "…"
