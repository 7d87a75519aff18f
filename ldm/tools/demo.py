"""What `make demo` runs: the plain commands of the README, one after the other, in plain words.

Run again it does what is left: made shards, finished stages and drawn pictures are kept.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PROMPTS = (
    "a red star on a white ground",
    "a blue ring on a yellow ground",
    "a green heart on a black ground",
    "a white crescent on a purple ground",
    "a yellow arrow on a blue ground",
    "a purple hexagon on a green ground",
    "an orange square to the left of a blue disc on a white ground",
    "a pink triangle above a green cross on a black ground",
)
RUN = Path("runs/demo")
PICTURES = RUN / "pictures"


@dataclass(frozen=True)
class Station:
    """words: what happens.   minutes: what it took on two CPU cores.   command: the plain command."""

    words: str
    minutes: str
    command: tuple[str, ...]


STATIONS = (
    Station("make 8400 captioned toy logos", "10 seconds", ("data/toy_logos/make.py",)),
    Station(
        "train the autoencoder: pictures to small latents and back",
        "3 minutes",
        ("train.py", "experiment=demo", "stages=[autoencoder]"),
    ),
    Station(
        "train the denoiser: from noise to the latents that a caption asks for",
        "10 minutes",
        ("train.py", "experiment=demo", "stages=[diffusion]"),
    ),
    Station(
        "draw a grid of pictures that were asked for in words",
        "15 seconds",
        (
            "sample.py",
            f"run={RUN}",
            f"prompts_file={PICTURES / 'prompts.txt'}",
            f"output_dir={PICTURES}",
            "count=4",
            "batch_size=32",
        ),
    ),
)


def main() -> int:
    print("The plan, with the times seen on two CPU cores:")
    for number, station in enumerate(STATIONS, 1):
        print(f"  {number}. {station.words}: about {station.minutes}")
    began = time.monotonic()
    grid = PICTURES / "grid.png"
    for number, station in enumerate(STATIONS, 1):
        print(f"\n[{number}/{len(STATIONS)}] {station.words}\n    python {' '.join(station.command)}", flush=True)
        if station.command[0] == "sample.py":
            if grid.exists():
                print("the grid is there already")
                continue
            PICTURES.mkdir(parents=True, exist_ok=True)
            (PICTURES / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
        code = subprocess.run([sys.executable, *station.command]).returncode
        if code:
            print(f"\nstopped at station {number} with exit code {code}; make demo continues from here")
            return code
    minutes = (time.monotonic() - began) / 60
    print(f"\nDone in {minutes:.1f} minutes.\n  pictures: {grid}\n  the run:  {RUN}/")
    print('Try next:\n  .venv/bin/python sample.py prompt="a green star on a pink ground" trajectory=true')
    print('  .venv/bin/python sample.py prompt="a red heart inside a white ring on blue" sampler.guidance_scale=5')
    return 0


if __name__ == "__main__":
    sys.exit(main())
