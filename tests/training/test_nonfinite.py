"""The first module that is not finite is named, and looking for it leaves nothing behind."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm.training.nonfinite import OUTSIDE, Origin, find_origin, unchanged
from ldm.types import Conditioning


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


class Root(nn.Module):
    """sqrt(|x|): its gradient at 0 is infinite."""

    def forward(self, x):
        return x.abs().sqrt()


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.act = inner, nn.ReLU(inplace=True)

    def forward(self, x, scale=1.0):
        return self.act(x + self.inner(x)) * scale


def net(*middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), Residual(nn.Sequential(nn.Linear(4, 4), *middle)), nn.Linear(4, 2))


def origin(model, x=None, loss=lambda y: y.square().mean()):
    x = torch.randn(5, 3, generator=torch.manual_seed(1)) if x is None else x
    return find_origin(model, {"batch.images": x}, lambda: loss(model(x)))


def test_finite_steps_have_no_origin():
    assert origin(net()) is None


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_data(value):
    x = torch.zeros(5, 3)
    x[2, 1] = value
    assert origin(net(), x) == Origin("batch.images", "input")


def test_weights():
    model = net()
    model[1].inner[0].weight.data[0, 0] = torch.nan
    assert origin(model) == Origin("1.inner.0.weight", "weights")


def test_the_deepest_module_whose_own_output_is_not_finite():
    assert origin(net(Times(1e38), Times(1e38))) == Origin("1.inner.2", "forward")


def test_what_a_module_does_around_its_children_is_its_own():
    model = net()
    forward = model[1].forward
    model[1].forward = lambda x: forward(x, torch.inf)
    assert origin(model) == Origin("1", "forward")
    model[1].forward = lambda x: forward(x + torch.inf)  # before its first child
    assert origin(model) == Origin("1", "forward")


def test_what_is_outside_of_all_modules():
    assert origin(net(), loss=lambda y: (y / 0).mean()) == Origin(OUTSIDE, "forward")
    assert origin(net(), loss=lambda y: (y * 0).abs().sqrt().mean()) == Origin(OUTSIDE, "backward")


def test_a_finite_loss_whose_gradient_is_not():
    """Two branches meet at the input of the residual: the one that is to blame is named, not what comes before it."""
    assert origin(net(Times(0.0), Root())) == Origin("1.inner.2", "backward")


def test_a_module_that_hands_on_what_it_was_given_is_not_to_blame():
    model = net(Times(0.0), nn.Identity(), Root(), nn.Identity(), nn.Dropout(0.0))
    assert origin(model) == Origin("1.inner.3", "backward")


def test_gradients_that_are_finite_with_a_norm_that_is_not():
    model, x = net(), torch.randn(5, 3, generator=torch.manual_seed(1))
    found = origin(model, x, loss=lambda y: (y * 1e20).mean())
    (model(x) * 1e20).mean().backward()
    largest = {name: float(p.grad.abs().max()) for name, p in model.named_parameters()}
    assert all(value < 1e30 for value in largest.values())
    assert found == Origin(max(largest, key=largest.get).rpartition(".")[0], "backward")


def test_masks_may_be_infinite():
    class Masked(nn.Module):
        def forward(self, x, mask):
            return (x + mask).softmax(-1)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.masked, self.large, self.larger = nn.Linear(3, 3), Masked(), Times(1e38), Times(1e38)

        def forward(self, x):
            mask = torch.tensor([0.0, 0.0, -torch.inf])
            return self.larger(self.large(self.masked(self.first(x), mask=mask)))

    assert origin(Outer()) == Origin("larger", "forward")


def test_tensors_inside_of_containers():
    class Reads(nn.Module):
        def forward(self, x, cond):
            return x * cond.tokens.abs().sqrt()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.reads = nn.Linear(3, 3), Reads()

        def forward(self, x):
            return self.reads(x, cond=Conditioning(tokens=self.text(x) * 0))

    assert origin(Outer()) == Origin("reads", "backward")


def test_lists_that_a_module_takes_from_and_adds_to():
    class Down(nn.Linear):
        def forward(self, x, skips):
            skips.append(x)
            return super().forward(x)

    class Up(nn.Linear):
        def forward(self, x, skips):
            return super().forward(x) * skips.pop().abs().sqrt()

    class Outer(nn.Module):
        def __init__(self, up):
            super().__init__()
            self.first, self.down, self.up = nn.Linear(3, 3), Down(3, 3), up

        def forward(self, x):
            skips = []
            y = self.up(self.down(self.first(x) * 0, skips), skips)
            assert not skips
            return y

    assert origin(Outer(Up(3, 3))).where == "backward"


def test_checkpointed_layers():
    class Recomputed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.root = nn.Linear(3, 3), Root()

        def forward(self, x):
            return checkpoint(lambda x: self.root(self.first(x) * 0), x, use_reentrant=False)

    assert origin(Recomputed()) == Origin("root", "backward")


def test_nothing_is_left_behind():
    """Gradients, hooks, buffers and random state are as before; without `unchanged` the buffers are not."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[0].weight.grad = torch.ones(4, 3)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    generator = torch.get_rng_state()
    with unchanged(model, torch.device("cpu")):
        assert origin(model) is None
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(model[0].weight.grad, torch.ones(4, 3)) and model[3].weight.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    origin(model)
    assert int(model[1].num_batches_tracked) == 1 and not torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("dtype, weight", [(torch.float16, 1e6), (torch.bfloat16, 3.4e38)])
def test_lower_precision_overflows_where_float32_does_not(dtype, weight):
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(weight)
    x = torch.full((1, 1), 1e-30)

    def value():
        return model(x).float().sum()

    with torch.autocast("cpu", dtype=dtype):
        assert not torch.isfinite(value() / 1e10)
        with torch.autocast("cpu", enabled=False):
            assert find_origin(model, {}, value) is None
