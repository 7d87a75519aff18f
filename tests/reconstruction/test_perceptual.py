"""The perceptual distance: equal to LPIPS, with a gradient, frozen, labelled, never silently something else."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.build import build
from ldm.cli import compose
from ldm.distances import VGG16_FILE, vgg16
from ldm.errors import LdmError
from ldm.random import normal, uniform
from ldm.reconstruction.perceptual import FeatureDistance, weights_sha256
from ldm.reconstruction.vgg16 import VGG16

KEYS = torch.arange(2)
KEY = "stage.autoencoder.objective"


def pictures(side=24, seed=0):
    return uniform(KEYS + 10 * seed, (3, side, side)) * 2 - 1


class TwoMaps(nn.Module):
    """A network of a user: a few channels at two resolutions, with dropout, which must never act."""

    min_size = 4

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 7, 3, stride=2, padding=1)
        self.dropout = nn.Dropout(0.5)
        for number, parameter in enumerate(self.parameters()):
            parameter.data = normal(torch.tensor([number]), parameter.shape)[0] * 0.3

    def forward(self, images):
        h = torch.relu(self.first(images))
        return [h, self.second(self.dropout(h))]


@pytest.fixture(scope="module")
def torchvisions():
    """torchvision's VGG16, random weights of He's scale, as a state dict without the classifier."""
    from torchvision.models import vgg16 as reference

    with torch.device("meta"):
        shapes = {name: value.shape for name, value in reference().features.state_dict().items()}
    torch.manual_seed(0)
    scale = {name: (2 / shape[1:].numel()) ** 0.5 if len(shape) > 1 else 0.1 for name, shape in shapes.items()}
    return {f"features.{name}": torch.randn(shape) * scale[name] for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def weights(torchvisions, tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / "vgg.pth"
    torch.save({**torchvisions, "classifier.6.bias": torch.zeros(1000)}, path)
    return str(path)


def test_vgg16_is_torchvisions(torchvisions):
    from torchvision.models import vgg16 as reference

    with torch.device("meta"):
        theirs = reference().features
    theirs.load_state_dict({k.removeprefix("features."): v for k, v in torchvisions.items()}, assign=True)
    ours = VGG16()
    ours.load_state_dict({k: v for k, v in torchvisions.items() if k in ours.state_dict()})  # strict: names and shapes
    x = pictures()
    maps, h, found = ours(x), (x - ours.shift) / ours.scale, []
    for number, layer in enumerate(theirs[:30]):
        h = layer(h)
        if number in (3, 8, 15, 22, 29):  # the ReLU of conv1_2, conv2_2, conv3_3, conv4_3, conv5_3
            found.append(h.clone())
    assert [m.shape[1] for m in maps] == [64, 128, 256, 512, 512]
    for a, b in zip(maps, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_distance_and_gradient_are_those_of_torchmetrics(torchvisions, weights):
    lpips = pytest.importorskip("torchmetrics.functional.image.lpips")
    with torch.device("meta"):  # torchvision would first draw a classifier of 124 M parameters
        reference = lpips._LPIPS(net="vgg", pnet_rand=True, pretrained=False)
    reference.scaling_layer = lpips.ScalingLayer()
    heads = Path(lpips.__file__).parent / "lpips_models" / "vgg.pth"
    reference.load_state_dict(torch.load(heads, map_location="cpu", weights_only=True), strict=False, assign=True)
    names = {k.partition(".")[2]: k for k in reference.net.state_dict()}  # slice2.5.weight -> 5.weight
    backbone = {names[k.removeprefix("features.")]: v for k, v in torchvisions.items()}
    reference.net.load_state_dict(backbone, assign=True)
    ours = vgg16(weights=weights)
    a, b = pictures()[:1], pictures(seed=1)[:1]
    gradients, values = [], []
    for distance in (ours, lambda x, y: reference(x, y).flatten()):
        x = a.clone().requires_grad_()
        value = distance(x, b)
        value.sum().backward()
        values.append(value.detach())
        gradients.append(x.grad)
    torch.testing.assert_close(*values, rtol=1e-5, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4 * float(gradients[1].abs().max()))
    assert ours.label.startswith("lpips-vgg16-")  # not the original weights: digits say which
    plain = vgg16(weights=weights, heads=None)
    assert plain.label.startswith("vgg16-") and not torch.allclose(plain(a, b), values[0], rtol=0.1)  # negative control


def test_the_original_weights_are_called_by_their_name(weights, monkeypatch, tmp_path):
    from ldm.checkpoints.files import sha256_of

    digits = sha256_of(weights)[:8]
    monkeypatch.setattr("ldm.distances.VGG16_FILE", f"vgg16-{digits}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / f"vgg16-{digits}.pth").symlink_to(weights)
    assert vgg16().label == "lpips-vgg16" and vgg16(heads=None).label == "vgg16"
    assert vgg16(weights="IMAGENET1K_V1").label == "lpips-vgg16"


@pytest.mark.parametrize("given", [{}, {"weights": f"nowhere/{VGG16_FILE}"}, {"heads": "nowhere.pth"}])
def test_a_missing_file_says_where_it_was_looked_for_and_what_else_there_is(given, weights, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    more = {"weights": weights} if "heads" in given else {}
    with pytest.raises(LdmError) as missing:
        build({"_target_": "ldm.distances.vgg16", **given, **more}, where="perceptual")
    line = missing.value.line()
    place = next(iter(given.values()), str(tmp_path / "hub" / "checkpoints" / VGG16_FILE))
    assert missing.value.code == "WEIGHTS" and missing.value.exit_code == 2 and f"looked for {place}" in line
    assert "perceptual=features" in line and "perceptual=none" in line and "=FILE" in line


def test_heads_of_another_network_are_refused(weights, tmp_path):
    torch.save({"lin0.model.1.weight": torch.ones(1, 64, 1, 1)}, tmp_path / "alex.pth")
    with pytest.raises(LdmError, match="no channel weights of LPIPS"):
        vgg16(weights=weights, heads=str(tmp_path / "alex.pth"))


def test_the_formula():
    """Equation 1 of arXiv:1801.03924, written out place by place."""
    network, channel_weights = TwoMaps(), [torch.arange(5.0), torch.ones(7)]
    distance = FeatureDistance(network, "mine", channel_weights)
    a, b = pictures(8), pictures(8, seed=1)
    expected = torch.zeros(2)
    for weight, f, g in zip(channel_weights, network(a), network(b), strict=True):
        for y in range(f.shape[2]):
            for x in range(f.shape[3]):
                p, q = f[:, :, y, x], g[:, :, y, x]
                u, v = (z / (1e-8 + z.square().sum(1, keepdim=True)).sqrt() for z in (p, q))
                expected += (weight * (u - v) ** 2).sum(1) / (f.shape[2] * f.shape[3])
    torch.testing.assert_close(distance(a, b), expected, rtol=1e-5, atol=0)
    assert torch.equal(distance(a, a), torch.zeros(2))
    torch.testing.assert_close(distance(a, b), distance(b, a), rtol=1e-6, atol=0)
    torch.testing.assert_close(distance.embed(a), network(a)[1].mean((2, 3)))


def test_the_gradient_reaches_the_first_picture_and_nothing_else():
    distance = FeatureDistance(TwoMaps(), "mine")
    a, b = pictures(8).requires_grad_(), pictures(8, seed=1).requires_grad_()
    distance(a, b).sum().backward()
    assert a.grad.abs().sum(dim=(1, 2, 3)).gt(0).all() and b.grad is None
    assert all(p.grad is None and not p.requires_grad for p in distance.parameters())
    flat = torch.zeros(1, 3, 8, 8).requires_grad_()
    network = TwoMaps()
    network.first.bias.data.fill_(-1)  # no feature is active anywhere in a black picture
    network.first.weight.data.zero_()
    FeatureDistance(network, "mine")(flat, torch.ones(1, 3, 8, 8)).backward()
    assert flat.grad.isfinite().all()


def test_it_stays_frozen_inside_a_module_that_trains():
    whole = nn.ModuleDict({"distance": FeatureDistance(TwoMaps(), "mine")}).train()
    distance = whole["distance"]
    assert not any(part.training for part in distance.modules())
    a, b = pictures(8), pictures(8, seed=1)
    assert torch.equal(distance(a, b), distance(a, b))  # dropout would differ
    live = copy.deepcopy(distance)
    live.network.dropout.training = True
    assert not torch.equal(live(a, b), live(a, b))  # negative control


def test_it_computes_in_float32_whatever_surrounds_it():
    a, b = pictures(8), pictures(8, seed=1)
    exact, rough = FeatureDistance(TwoMaps(), "mine"), FeatureDistance(TwoMaps(), "mine", bf16=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = exact(a, b)
    assert torch.equal(inside, exact(a, b)) and inside.dtype == torch.float32
    error = (rough(a, b) - inside).abs() / inside
    assert 1e-6 < error.max() < 3e-2 and rough(a, b).dtype == torch.float32


def test_small_pictures_are_refused_in_words():
    with pytest.raises(LdmError, match="at least 16 pixels, not 15x32"):
        FeatureDistance(VGG16(), "vgg16")(torch.zeros(1, 3, 32, 15), torch.zeros(1, 3, 32, 15))
    with torch.no_grad():
        assert FeatureDistance(VGG16(), "vgg16").embed(torch.zeros(1, 3, 16, 17)).shape == (1, 512)


def test_label_and_identity_say_what_it_is():
    one, same, other = (FeatureDistance(TwoMaps(), "mine") for _ in range(3))
    other.network.first.weight.data[0, 0, 0, 0] += 1e-3
    assert one.identity == same.identity == f"mine:{weights_sha256(one)}" and one.identity != other.identity
    assert one.identity != FeatureDistance(TwoMaps(), "mine", [torch.ones(5), torch.ones(7)]).identity
    for label in ("", "FID", "a b", "x/y"):
        with pytest.raises(ValueError, match="label must be"):
            FeatureDistance(TwoMaps(), label)
    with pytest.raises(ValueError, match="layer 1"):
        FeatureDistance(TwoMaps(), "mine", [torch.ones(5), -torch.ones(7)])


def test_a_network_of_the_user_needs_no_file_of_ours():
    target, network = "ldm.reconstruction.perceptual.FeatureDistance", f"{__name__}.TwoMaps"
    word = f"{KEY}.perceptual={{_target_: {target}, label: mine, network: {{_target_: {network}}}}}"
    node = compose("train", [word])["stage"]["autoencoder"]["objective"]["perceptual"]
    with pytest.raises(LdmError, match="trusted_targets"):
        build(node, where="perceptual")
    assert build(node, where="perceptual", trusted=("tests",)).label == "mine"


def test_the_command_line_chooses():
    cfg = compose("train", ["perceptual=features", f"{KEY}.perceptual.run=a"])
    node = cfg["stage"]["autoencoder"]["objective"]["perceptual"]
    assert node == {"_target_": "ldm.distances.trained_features", "run": "a", "bf16": False}
    with pytest.raises(LdmError, match=rf"{KEY}.perceptual.run"):
        compose("train", ["perceptual=features"])
