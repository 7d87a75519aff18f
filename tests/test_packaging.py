"""What is installed and committed: bounds, no hosts, no lock files, one version."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ldm

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()]


def test_versions_agree():
    assert PROJECT["version"] == ldm.__version__
    assert ldm.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_requirements_are_safe_and_bounded():
    assert not CORE["pytorch-lightning"].specifier.contains("2.6.3")
    assert "lightning" not in CORE
    assert "img2dataset" not in CORE
    assert not CORE["open-clip-torch"].extras
    assert "<" in PROJECT["requires-python"]
    for name in ("pytorch-lightning", "hydra-core", "omegaconf", "webdataset", "wandb"):
        assert any(s.operator == "<" for s in CORE[name].specifier), f"{name} has no upper bound"


def test_constraints_are_plain_pins_that_fit():
    names = {canonicalize_name(pin.name) for pin in PINS}
    wanted = [Requirement(r) for r in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
    assert {canonicalize_name(r.name) for r in wanted} <= names
    for pin in PINS:
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), pin
        assert pin.url is None
    for requirement in wanted:
        [pin] = [p for p in PINS if canonicalize_name(p.name) == canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(str(pin.specifier).removeprefix("=="))


def test_no_hosts_and_no_options_in_what_installs():
    for name in ("constraints.txt", "pyproject.toml", "Makefile"):
        text = (ROOT / name).read_text()
        assert not re.search(r"\w://|--(extra-)?index-url|--find-links|--trusted-host", text), name


@pytest.mark.skipif(not shutil.which("git") or not (ROOT / ".git").exists(), reason="needs git and a checkout")
def test_no_lock_files_and_no_weights_are_tracked():
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    suffixes = (".ckpt", ".pt", ".pth", ".pkl", ".safetensors", ".tar")
    bad = [f for f in files if Path(f).name in ("uv.lock", "pylock.toml", "poetry.lock") or f.endswith(suffixes)]
    golden = [f for f in bad if f.startswith("tests/checkpoints/golden/")]
    assert golden == bad and sum((ROOT / f).stat().st_size for f in golden) < 400_000


def test_entry_points_are_short():
    for name in ("train.py", "sample.py"):
        assert len((ROOT / name).read_text().splitlines()) < 40
