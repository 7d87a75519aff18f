"""Every named choice composes from the command line, what cannot work is refused there, and the tables are current."""

import pytest

from ldm.cli import compose
from ldm.diffusion.objective import Objective
from ldm.errors import LdmError
from ldm.training.assemble import build_objective
from ldm.training.fit import train
from tests.diffusion.combinations import DOCUMENT, TABLES, choices, generated, options


def composed(*words):
    return compose("train", ["experiment=demo", *words])


def test_named_choices_fit_together():
    """That they compose is the work of tests/test_configs.py."""
    built = {group: options(group) for group in ("schedule", "prediction", "timesteps", "weighting", "noise", "loss")}
    for parts in choices().values():
        schedule, prediction, *others = (built[group][name] for group, name in parts.items())
        Objective(*others).check(schedule, prediction)


def test_parts_are_chosen_one_by_one():
    objective = build_objective(
        composed(
            *("scheduler=cosine", "scheduler/prediction=velocity", "scheduler/timesteps=log_normal_sigma"),
            *("scheduler/weighting=min_snr", "scheduler.weighting.gamma=3", "scheduler/noise=offset"),
            *("scheduler.noise.strength=0.1", "scheduler/loss=huber", "scheduler.masked=true"),
        )
    )
    names = [type(p).__name__ for p in (objective.timesteps, objective.weighting, objective.noise, objective.distance)]
    assert names == ["LogNormalSigma", "MinSNR", "Offset", "Huber"]
    assert objective.weighting.gamma == 3 and objective.noise.strength == 0.1 and objective.masked


@pytest.mark.parametrize(
    "words,sides",
    [
        (["scheduler=sd_zero_snr", "scheduler/prediction=epsilon"], ("Epsilon", "ZeroTerminalSNR")),
        (["scheduler=flow", "scheduler/prediction=epsilon"], ("Epsilon", "RectifiedFlow")),
        (["scheduler=sd", "scheduler/prediction=edm"], ("EDM", "DiscreteVP")),
        (["scheduler=flow", "scheduler/prediction=x0", "scheduler/weighting=snr"], ("SNR", "X0", "RectifiedFlow")),
        (["scheduler=sd", "scheduler.schedule.beta_end=2"], ("beta_end",)),
        (["scheduler.masked=true"], ("'mask'", "given: caption")),
        (["scheduler.masked=true", "data.columns.mask=mask.png"], ("'mask', a picture", "data.columns.mask=.mask.png")),
        (["scheduler.masked=true", "data.columns.mask=.mask.png", "scheduler.unmasked_weight=2"], ("unmasked_weight",)),
    ],
    ids=str,
)
def test_training_refuses_before_anything_runs(tmp_path, words, sides):
    with pytest.raises(LdmError) as caught:
        train(composed(*words, f"output_dir={tmp_path}"))
    assert caught.value.exit_code == 2 and "scheduler" in caught.value.where
    for side in sides:
        assert side in caught.value.line()
    assert list(tmp_path.iterdir()) == []


def test_a_part_is_no_whole_choice():
    with pytest.raises(LdmError, match="no option 'weighting/edm'"):
        composed("scheduler=weighting/edm")


def test_tables_of_the_document_are_current():
    """After a change: python -m tests.diffusion.combinations --write"""
    text = DOCUMENT.read_text()
    assert generated(text) == text


@pytest.mark.parametrize("name", TABLES)
def test_a_stale_table_would_be_noticed(name):
    text = DOCUMENT.read_text()
    start = text.index(f"<!-- generated: {name} -->\n")
    stale = text[:start] + text[start:].replace("yes", "no", 1).replace("sd_zero_snr", "sd_snr", 1)
    assert generated(stale) == text != stale
