"""The samplers and spacings of configs/sampler on every schedule: `python -m tests.diffusion.sampler_table` prints the
tables of docs/samplers.md, with `--write` it puts them there. The tests take their samplers from here.
"""

from pathlib import Path

import torch
import yaml

from ldm.build import build
from ldm.diffusion.levels import SPACINGS, noise_ratio, sampling_levels
from ldm.errors import LdmError
from ldm.sampling.tasks import Sampling
from tests.diffusion.combinations import ROOT, options, table
from tests.diffusion.tables import main, renewed

DOCUMENT = ROOT / "docs" / "samplers.md"
SHOWN = ("sd", "sd_zero_snr", "edm", "flow")


def samplers_in(folder: Path, trusted: tuple[str, ...] = ()) -> dict[str, Sampling]:
    """Name -> settings of every file in a folder like configs/sampler."""
    nodes = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*.yaml"))}
    return {name: build(node, trusted=trusted) for name, node in nodes.items() if node["function"] is not None}


def fits(sampling: Sampling, schedule: object) -> bool:
    try:
        sampling.check(schedule)
    except LdmError:
        return False
    return True


def counts(sampling: Sampling, num_steps: int) -> tuple[int, int]:
    """Network calls and draws of noise, on the first schedule that the sampler takes."""
    schedule = next((s for s in options("schedule").values() if fits(sampling, s)), None)
    assert schedule is not None, f"the sampler {sampling.name} fits no schedule of configs/scheduler/schedule"
    calls, draws = [], []
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def denoise(x, level):
        calls.append(level)
        return one

    def noise(step, shape):
        draws.append(step)
        return one

    sampling.function(denoise, one, sampling_levels(schedule, num_steps), noise=noise)
    return len(calls), len(draws)


def sampler_by_schedule() -> str:
    rows = []
    for name, sampling in samplers_in(ROOT / "configs" / "sampler").items():
        (few, draws), (many, _) = counts(sampling, 10), counts(sampling, 20)
        slope, rest = (many - few) // 10, few - (many - few)
        calls = ("" if slope == 1 else str(slope)) + "N" + (f" {'+-'[rest < 0]} {abs(rest)}" if rest else "")
        taken = {key: fits(sampling, schedule) for key, schedule in options("schedule").items()}
        works = "every one" if all(taken.values()) else ", ".join(f"`{key}`" for key, yes in taken.items() if yes)
        rows.append([f"`{name}`", calls, "yes" if draws else "no", str(sampling.steps), works])
    return table("`sampler=`", ["calls for `steps=N`", "draws noise", "its default steps", "schedules"], rows)


def spacing_by_schedule() -> str:
    rows = []
    schedules = options("schedule")
    for spacing in SPACINGS:
        cells = []
        for name in SHOWN:
            try:
                levels = sampling_levels(schedules[name], 5, spacing=spacing)
                cells.append(" ".join(f"{float(noise_ratio(level)):.2g}" for level in levels))
            except ValueError:
                cells.append("refused")
        rows.append([f"`{spacing}`", *cells])
    return table("`sampler.spacing=`", [f"`{name}`" for name in SHOWN], rows)


TABLES = {"sampler by schedule": sampler_by_schedule, "spacing by schedule": spacing_by_schedule}


def generated(text: str) -> str:
    return renewed(text, TABLES)


if __name__ == "__main__":
    main(DOCUMENT, TABLES)
