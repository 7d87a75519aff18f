"""The fitness report for a terminal. Names and paths are shown, never obeyed: no markup, no control codes."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ldm.evaluation.fitness_page import Report, comparison, figure, measures
from ldm.evaluation.fitness_verdict import BY_KEY
from ldm.tools.samples import plain

MARKS = {"good": ("✓", "green"), "usable": ("!", "yellow"), "unfit": ("✗", "bold red")}


def show_report(report: Report, place: str, console: Console | None = None) -> None:
    """place: of the page."""
    console = console or Console(highlight=False, soft_wrap=False)
    chosen = report.best
    facts = "  ·  ".join(f"{name} {words}" for name, words in report.data)
    console.print(Rule(Text(plain(report.candidates[chosen].name), style="bold"), style="dim", align="left"))
    console.print(Padding(Text(plain(facts), style="dim"), (0, 2, 1, 2)))
    if len(report.candidates) > 1:
        console.print(Padding(_side_by_side(report), (0, 2, 1, 2)))
    console.print(_verdict(report, chosen))
    if len(report.candidates) == 1:
        console.print(Padding(_measures(report), (0, 2, 1, 2)))
    for text, command in report.verdicts[chosen].steps:
        console.print(Padding(Text(f"→ {plain(text)}"), (0, 2)))
        if command:  # on one line, so that it can be copied
            console.print(Text(f"  {plain(command)}", style="dim"), soft_wrap=True)
        console.print()
    console.print(Text(f"  page: {plain(place)}"), soft_wrap=True)


def _side_by_side(report: Report) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for candidate in report.candidates:
        table.add_column(Text(plain(candidate.name)), justify="right", overflow="fold")
    levels = [Text(verdict.level, style=MARKS[verdict.level][1]) for verdict in report.verdicts]
    table.add_row(Text("Verdict", style="dim"), *levels)
    for name, values, top in comparison(report):
        cells = [Text(value, style="bold" if i == top else "") for i, value in enumerate(values)]
        table.add_row(Text(name, style="dim"), *cells)
    return table


def _measures(report: Report) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in ("", "median", "worst twentieth", "mean"):
        table.add_column(Text(head, style="dim"), justify="right" if head else "left")
    for name, values in measures(report.fitness[0]):
        table.add_row(Text(name, style="dim"), *values)
    return table


def _verdict(report: Report, index: int) -> RenderableType:
    verdict, table = report.verdicts[index], Table.grid(padding=(0, 2))
    table.add_column(width=1)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for finding in [*verdict.findings, *verdict.notes]:
        mark, style = MARKS[finding.level]
        value = figure(BY_KEY[finding.key], finding.value) if finding.value is not None else ""
        table.add_row(Text(mark, style=style), Text(value), Text(plain(finding.text)))
    return Padding(Group(Text(verdict.headline, style=MARKS[verdict.level][1]), table), (0, 2, 1, 2))
