"""Settings of the optimizer for parts of the model: who gets them, and that a checkpoint does not depend on them."""

import pytest
import torch
from torch import nn

from ldm.config import compose
from ldm.errors import LdmError
from ldm.training.assemble import check_parts
from ldm.training.fingerprint import settings_of
from ldm.training.step import Player, grouped
from tests.integration.tiny import MODEL


def model():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"conditioner": nn.Linear(3, 3), "conditioner_two": nn.Linear(3, 3), "denoiser": nn.Linear(3, 2)}
    )


def test_a_name_stands_for_all_below_it_and_the_first_pattern_that_fits_decides():
    parameters = dict(model().named_parameters())
    names = {id(p): name for name, p in parameters.items()}
    groups = {"denoiser.bias": {"lr": 3.0}, "*.bias": {"weight_decay": 0.0}, "conditioner": {"lr": 2.0}}
    found = [([names[id(p)] for p in g["params"]], g) for g in grouped(parameters, groups)]
    assert [members for members, _ in found] == [
        ["conditioner_two.weight", "denoiser.weight"],
        ["denoiser.bias"],
        ["conditioner.bias", "conditioner_two.bias"],
        ["conditioner.weight"],
    ]
    assert [set(g) - {"params"} for _, g in found] == [set(), {"lr"}, {"weight_decay"}, {"lr"}]


def test_a_group_of_everything_leaves_no_empty_one():
    assert len(grouped(dict(model().named_parameters()), {"*": {"lr": 1.0}})) == 1


def test_a_pattern_that_is_left_with_nothing_is_refused():
    with pytest.raises(LdmError, match=r"nothing that is trained is left for 'conditoner'.*trained: conditioner, "):
        grouped(dict(model().named_parameters()), {"conditoner": {"lr": 1.0}})
    with pytest.raises(LdmError, match=r"'denoiser\.bias'"):
        grouped(dict(model().named_parameters()), {"*.bias": {"lr": 1.0}, "denoiser.bias": {"lr": 2.0}})


def test_each_group_moves_at_its_own_rate_and_one_factor_scales_them_all():
    net = model()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    groups = {"denoiser": {"lr": 0.01}, "conditioner": {"lr": 0.0}}
    player = Player(dict(net.named_parameters()), lambda ps: torch.optim.SGD(ps, lr=0.1), groups=groups)
    assert player.set_lr(0.5) == 0.05
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    player.optimizer.step()
    for name, p in net.named_parameters():
        moved = {"conditioner": 0.0, "conditioner_two": 0.05, "denoiser": 0.005}[name.partition(".")[0]]
        torch.testing.assert_close(before[name] - p.detach(), torch.full_like(p, moved), atol=1e-7, rtol=1e-5)


def steps(player, count, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for p in player.parameters.values():
            p.grad = torch.randn(p.shape, generator=generator)
        player.optimizer.step()


def test_groups_may_change_between_two_lives():
    """State goes by parameter: what was saved with one grouping goes on with another as if it had been its own."""

    def player(groups):
        net = model()
        return net, Player(dict(net.named_parameters()), lambda ps: torch.optim.AdamW(ps, lr=0.1), groups=groups)

    alike = {"denoiser": {"lr": 0.1}, "*.weight": {"weight_decay": 0.01}}  # their settings are the optimizer's own
    whole, undisturbed = player({})
    steps(undisturbed, 3, 1)
    first, saved = player(alike)
    steps(saved, 3, 1)
    second, resumed = player({"*.bias": {"lr": 0.1}})
    second.load_state_dict(first.state_dict())
    resumed.load_state(saved.state())
    assert [len(g["params"]) for g in resumed.optimizer.param_groups] == [3, 3]
    for each in (undisturbed, resumed):
        steps(each, 3, 2)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert saved.state()["state"].keys() == undisturbed.state()["state"].keys() == set(range(6))


def test_a_state_of_other_parameters_is_refused():
    saved = Player(dict(model().named_parameters()), lambda ps: torch.optim.AdamW(ps, lr=0.1))
    fewer = Player(dict(model()["denoiser"].named_parameters()), lambda ps: torch.optim.AdamW(ps, lr=0.1))
    steps(saved, 1, 1)
    with pytest.raises(LdmError, match=r"CKPT-CONTENT.*saved with 6 parameters, and 2 are trained now"):
        fewer.load_state(saved.state())


def test_the_order_of_patterns_is_a_setting():
    first = "stage.diffusion.param_groups={*.bias:{lr:1e-5},conditioner:{lr:1e-6}}"
    second = "stage.diffusion.param_groups={conditioner:{lr:1e-6},*.bias:{lr:1e-5}}"
    plain, one, other = (settings_of(compose("train", words), "diffusion") for words in ([], [first], [second]))
    assert {k for k in one if one[k] != other.get(k)} == {"stage.diffusion.param_groups"}
    assert not any("param_groups" in key for key in plain)  # runs from before go on


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "stage.diffusion.param_groups={unet:{lr:1e-5}}",
            "stage.diffusion.param_groups.*trained: conditioner, denoiser",
        ),
        ("stage.diffusion.param_groups={conditioner:{lrr:1e-5}}", "no setting 'lrr'.*did you mean 'lr'"),
        ("stage.diffusion.param_groups={conditioner:{betas:[2,3]}}", "param_groups.conditioner"),
        ("stage.diffusion.param_groups={conditioner:{betas:[0.9]}}", "param_groups.conditioner"),
        ("stage.diffusion.param_groups.denoiser.network.lr=1e-5", r"={denoiser\.network:{...}}"),
        ("stage.autoencoder.param_groups={encodr:{lr:1e-5}}", "stage.autoencoder.param_groups"),
        ("stage.autoencoder.param_groups={objective.logvar:{lr:1e-5}}", "nothing that is trained"),
    ],
)
def test_mistakes_are_found_before_the_first_stage(word, said):
    with pytest.raises(LdmError, match=said) as refused:
        check_parts(compose("train", [*MODEL, word]))
    assert refused.value.exit_code == 2


def test_parts_are_those_that_are_trained():
    decoder = ["stage.autoencoder.train=decoder", "init_from=somewhere", "stages=[autoencoder]"]
    cfg = compose("train", [*MODEL, *decoder, "stage.autoencoder.param_groups={encoder:{lr:1e-5}}"])
    with pytest.raises(LdmError, match=r"stage\.autoencoder\.param_groups; trained: decoder"):
        check_parts(cfg)
    words = ["stage.autoencoder.objective.learn_logvar=true", "stage.autoencoder.param_groups={objective:{lr:1e-5}}"]
    check_parts(compose("train", [*MODEL, *words]))


@pytest.mark.parametrize(
    "word", ["{conditioner:{lr:-1}}", "{conditioner:{lr:much}}", "{conditioner:1e-5}", "[conditioner]"]
)
def test_values_are_refused_with_their_path(word):
    from ldm.validate import validate

    with pytest.raises(LdmError, match=r"stage.diffusion.param_groups"):
        validate(compose("train", [f"stage.diffusion.param_groups={word}"]))


def test_parts_and_patterns_from_the_command_line():
    words = [
        "stage.diffusion.param_groups={conditioner:{lr:1e-5},denoiser.network.conv_in:{lr:0},*.bias:{weight_decay:0}}"
    ]
    node = compose("train", [*MODEL, *words])["stage"]["diffusion"]["param_groups"]
    assert node == {"conditioner": {"lr": 1e-5}, "denoiser.network.conv_in": {"lr": 0}, "*.bias": {"weight_decay": 0}}
