"""The drawing of the house (CONTRIBUTING.md): a room imports rooms on lower lines only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = (
    ("types", "random", "errors", "build", "config", "validate"),
    ("diffusion", "data", "models", "reconstruction"),
    ("checkpoints",),
    ("model",),
    ("sampling", "precompute", "distances"),
    ("evaluation",),
    ("training",),
    ("tools", "cli", "__main__", "train", "sample"),
)
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
GROUND, TOP = 0, len(LEVELS) - 1  # within these two, rooms may use each other
HOMES = {  # package -> where it may be imported
    "pytorch_lightning": ("ldm/training/", "ldm/data/datamodule.py"),
    "wandb": ("ldm/training/callbacks/",),
    "hydra": ("ldm/config.py",),
    "omegaconf": ("ldm/config.py",),
}


def sources(root: Path) -> Iterator[tuple[str, ast.Module]]:
    for path in [*sorted((root / "ldm").rglob("*.py")), root / "train.py", root / "sample.py"]:
        if path.is_file():
            yield path.relative_to(root).as_posix(), ast.parse(path.read_text())


def imports(tree: ast.Module, path: str) -> Iterator[str]:
    """Dotted names of everything imported anywhere in the file, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.removesuffix(".py").split("/")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room(name: str) -> str:
    """The room of `ldm.room.file` or `ldm/room/file.py`; empty for the package itself."""
    parts = name.removesuffix(".py").replace("/", ".").split(".")
    parts = parts[1:] if parts[0] == "ldm" else parts
    return parts[0] if parts and parts[0] in LEVEL else ""


def violations(root: Path) -> list[str]:
    found = []
    for path, tree in sources(root):
        here = room(path)
        if not here and path != "ldm/__init__.py":
            found.append(f"{path} is in no room")
            continue
        for name in imports(tree, path):
            top = name.split(".")[0]
            if top in HOMES and not path.startswith(HOMES[top]):
                found.append(f"{path} imports {top}")
            there = room(name) if top == "ldm" else ""
            if there and here and there != here:
                sideways = LEVEL[there] == LEVEL[here] and LEVEL[here] not in (GROUND, TOP)
                if LEVEL[there] > LEVEL[here] or sideways:
                    found.append(f"{path} imports {name}")
    return found


def test_rooms_import_lower_rooms_only():
    assert violations(ROOT) == []


def test_every_folder_is_a_room():
    rooms = {p.name for p in (ROOT / "ldm").iterdir() if p.is_dir() and not p.name.startswith("__")}
    assert rooms <= set(LEVEL)


@pytest.mark.parametrize(
    "path, line",
    [
        ("ldm/data/a.py", "from ldm.models.unet import UNet"),
        ("ldm/diffusion/a.py", "import ldm.data.order"),
        ("ldm/data/a.py", "from ldm import models"),
        ("ldm/data/a.py", "from ..training import step"),
        ("ldm/sampling/a.py", "def f():\n    from ldm.training.step import OptimizerStep"),
        ("ldm/types.py", "from ldm.model import LatentDiffusion"),
        ("ldm/models/a.py", "import pytorch_lightning as pl"),
        ("ldm/data/shards.py", "from pytorch_lightning import Trainer"),
        ("ldm/training/fit.py", "import wandb"),
        ("ldm/build.py", "from hydra.utils import instantiate"),
        ("train.py", "import hydra"),
        ("ldm/helpers/a.py", ""),
    ],
)
def test_a_violation_is_seen(tmp_path, path, line):
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(line)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    "path, line",
    [
        ("ldm/training/fit.py", "import pytorch_lightning\nfrom ldm.model import LatentDiffusion"),
        ("ldm/data/datamodule.py", "import pytorch_lightning\nfrom . import shards\nfrom ..types import Batch"),
        ("ldm/training/callbacks/grids.py", "import wandb\nfrom ldm.sampling import tasks"),
        ("ldm/tools/doctor.py", "from ldm.cli import recognise\nfrom ldm import __version__"),
    ],
)
def test_what_is_allowed_is_not_reported(tmp_path, path, line):
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(line)
    assert violations(tmp_path) == []
