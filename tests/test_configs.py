"""Every YAML composes and builds; every YAML shows all that its constructor takes, with the true defaults."""

import inspect

import pytest
import torch
import yaml

from ldm.build import build, resolve
from ldm.cli import compose
from ldm.validate import validate
from tests.conftest import CONFIGS

EXPERIMENTS = sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml"))
GROUPS = sorted(p.relative_to(CONFIGS) for p in CONFIGS.rglob("*.yaml") if p.parent != CONFIGS)
# values that an experiment or the command line must bring
NEEDED = ["data.path=somewhere", "init_from=somewhere"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_compose_and_build(experiment):
    cfg = compose("train", [f"experiment={experiment}", *NEEDED])
    validate(cfg)
    with torch.device("meta"):
        autoencoder = build(cfg["model"]["autoencoder"], where="model.autoencoder")
        build(cfg["model"]["network"], where="model.network")
        build(cfg["model"]["conditioner"], where="model.conditioner")
    assert cfg["data"]["image_size"] % autoencoder.downsampling == 0
    for key in ("schedule", "prediction", "timesteps", "weighting", "noise", "loss"):
        build(cfg["scheduler"][key], where=f"scheduler.{key}")
    build(cfg["sampler"], where="sampler")
    build(cfg["data"], where="data")
    for stage in cfg["stages"]:
        optimizer = build(cfg["stage"][stage]["optimizer"])
        optimizer([torch.nn.Parameter(torch.zeros(1))])
        factor = build(cfg["stage"][stage]["lr_schedule"])
        assert 0 < factor(cfg["stage"][stage]["max_steps"] // 2) <= 1


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_say_what_they_are(experiment):
    text = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text()
    for word in ("# @package _global_", "# command:", "# hardware:", "# result:"):
        assert word in text


def choices():
    """Words that choose every file of every group at least once, one of each group at a time: composing takes long."""
    options: dict[str, list[str]] = {}
    for path in GROUPS:
        group = str(path.parent)
        if group == "experiment" or path.stem == "from_run":  # composed above; sample.py's own
            continue
        group = f"{group}@stage.diffusion.{group}" if group in ("optimizer", "lr_schedule") else group
        options.setdefault(group, []).append(path.stem)
    for number in range(max(map(len, options.values()))):
        yield [f"{group}={names[number % len(names)]}" for group, names in options.items()]


@pytest.mark.parametrize("words", choices())
def test_every_group_file_is_reachable(words):
    compose("train", [*words, *NEEDED, "+stage.autoencoder.objective.perceptual.run=somewhere"])


def test_sampling_takes_the_sampler_of_the_run():
    compose("sample", ["sampler=from_run"])


def nodes(tree, path=""):
    if isinstance(tree, dict):
        if tree.get("_target_"):
            yield path, tree
        for key, value in tree.items():
            yield from nodes(value, f"{path}.{key}")


@pytest.mark.parametrize("path", GROUPS, ids=str)
def test_yaml_shows_every_argument(path):
    """Hydra can only override what stands in the file."""
    for where, node in nodes(yaml.safe_load((CONFIGS / path).read_text())):
        target = resolve(node["_target_"])
        if target.__module__.startswith("torch."):
            continue  # the library's own options, of which we show the ones that people turn
        parameters = inspect.signature(target).parameters
        given_at_run_time = {"denoise", "x", "levels", "noise", "on_step"}
        missing = [name for name in parameters if name not in node and name not in given_at_run_time]
        assert missing == [], f"{path}{where}: {target.__name__} also takes {missing}"


def test_a_hidden_argument_would_be_noticed(monkeypatch):
    def fewer(text):
        return {k: v for k, v in original(text).items() if k != "crop"}

    original = yaml.safe_load
    monkeypatch.setattr(yaml, "safe_load", fewer)
    with pytest.raises(AssertionError, match="crop"):
        test_yaml_shows_every_argument((CONFIGS / "data" / "folder.yaml").relative_to(CONFIGS))


def test_stable_diffusion_size():
    cfg = compose("train", ["experiment=sd", *NEEDED])
    with torch.device("meta"):
        network = build(cfg["model"]["network"])
        autoencoder = build(cfg["model"]["autoencoder"])
    assert sum(p.numel() for p in network.parameters()) == 865_910_724
    assert sum(p.numel() for p in autoencoder.parameters()) == 83_653_863
