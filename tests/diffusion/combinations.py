"""What combines with what, from the configurations: `python -m tests.diffusion.combinations` prints the tables of
docs/diffusion.md, with `--write` it puts them there.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from ldm.build import build
from ldm.diffusion.denoiser import check_pair
from ldm.diffusion.weighting import check_finite
from tests.diffusion.tables import main, renewed

ROOT = Path(__file__).parents[2]
SCHEDULER = ROOT / "configs" / "scheduler"
DOCUMENT = ROOT / "docs" / "diffusion.md"


def options(group: str) -> dict[str, Any]:
    """Name -> object, of every file in configs/scheduler/GROUP."""
    return {p.stem: build(yaml.safe_load(p.read_text())) for p in sorted((SCHEDULER / group).glob("*.yaml"))}


def holds(check: Callable[..., None], *parts: Any) -> bool:
    try:
        check(*parts)
    except ValueError:
        return False
    return True


def pairs() -> list[tuple[Any, Any]]:
    """Every (schedule, prediction) that is not refused."""
    every = itertools.product(options("schedule").values(), options("prediction").values())
    return [(schedule, prediction) for schedule, prediction in every if holds(check_pair, schedule, prediction)]


def table(corner: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[corner, *columns], ["---"] * (len(columns) + 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def schedule_by_prediction() -> str:
    schedules, predictions = options("schedule"), options("prediction")
    rows = []
    for name, schedule in schedules.items():
        ends = schedule.at(torch.tensor([0.0, schedule.t_max], dtype=torch.float64))
        steps = str(schedule.num_timesteps or "continuous")
        noise = f"{float(ends.alpha[1] / ends.sigma[1]) ** 2:.1e}" if float(ends.alpha[1]) else "0"
        cells = ["yes" if holds(check_pair, schedule, prediction) else "no" for prediction in predictions.values()]
        rows.append([f"`{name}`", steps, noise, *cells])
    names = [f"`{name}`" for name in predictions]
    return table("`scheduler/schedule=`", ["steps", "SNR of the last", *names], rows)


def weighting_by_prediction() -> str:
    """A cell says for which of the schedules that the prediction goes with the weight stays finite."""
    schedules, predictions = options("schedule").values(), options("prediction")
    rows = []
    for name, weighting in options("weighting").items():
        cells = []
        for prediction in predictions.values():
            fitting = [schedule for schedule in schedules if holds(check_pair, schedule, prediction)]
            finite = [schedule for schedule in fitting if holds(check_finite, weighting, schedule, prediction)]
            above_zero = [s for s in fitting if float(s.at(torch.zeros((), dtype=torch.float64)).sigma) > 0]
            cells.append({len(above_zero): "if sigma > 0", len(fitting): "yes"}[len(finite)])
        rows.append([f"`{name}`", *cells])
    return table("`scheduler/weighting=`", [f"`{name}`" for name in predictions], rows)


def choices() -> dict[str, dict[str, str]]:
    """Name -> the part of each group, of every file in configs/scheduler."""
    found = {}
    for path in sorted(SCHEDULER.glob("*.yaml")):
        defaults = yaml.safe_load(path.read_text())["defaults"]
        found[path.stem] = {group: name for part in defaults if part != "_self_" for group, name in part.items()}
    return found


def named_choices() -> str:
    rows = []
    for name, parts in choices().items():
        comment = (SCHEDULER / f"{name}.yaml").read_text().splitlines()[0].removeprefix("# ").rstrip(".")
        picks = [f"`{parts[group]}`" for group in ("schedule", "prediction", "timesteps", "weighting")]
        rows.append([f"`{name}`", *picks, comment])
    return table("`scheduler=`", ["schedule", "prediction", "timesteps", "weighting", "what it is"], rows)


TABLES = {
    "named choices": named_choices,
    "schedule by prediction": schedule_by_prediction,
    "weighting by prediction": weighting_by_prediction,
}


def generated(text: str) -> str:
    return renewed(text, TABLES)


if __name__ == "__main__":
    main(DOCUMENT, TABLES)
