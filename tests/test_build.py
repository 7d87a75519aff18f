"""The guarded construction: nothing outside the table is ever constructed, wherever it stands in the tree."""

import functools
import subprocess
import sys

import pytest
import torch

from ldm.build import build, build_saved, check, resolve, to_saved
from ldm.errors import LdmError

GOOD = "ldm.models.layers.embeddings.TimestepEmbedding"
PAYLOADS = [
    "os.system",
    "os.popen",
    "posix.system",
    "subprocess.run",
    "subprocess.Popen",
    "builtins.eval",
    "builtins.exec",
    "builtins.__import__",
    "eval",
    "shutil.rmtree",
    "pathlib.Path.touch",
    "functools.partial",
    "importlib.import_module",
    "logging.os.system",
    "pickle.loads",
    "torch.load",
    "torch.hub.load",
    "torch.save",
    "torch.optim.swa_utils.torch.load",
    "torch.optim.Optimizer",
    "torch.optim.lr_scheduler.LambdaLR",
    "torch.optim.lr_scheduler.SequentialLR",
    "torch.optim.AdamW.load_state_dict",
    "numpy.load",
    "webdataset.TarWriter",
    "pytorch_lightning.callbacks.LambdaCallback",
    "pytorch_lightning.Trainer",
    "pytorch_lightning.core.saving._load_state",
    "hydra.utils.instantiate",
    "hydra._internal.instantiate._instantiate2.instantiate",
    "ldm.some_module.os.system",
    "ldm.data.shards.os.system",
    "ldm.data.shards.os",
    "ldm.data.shards.Path",
    "ldm.data.shards.ThreadPoolExecutor",
    "ldm.sampling.main.build",
    "ldm.sampling.main.sample",
    "ldm.training.fit.train",
    "ldm.training.run_stage.run_stage",
    "ldm.build.build",
    "ldm.build.resolve",
    "ldm.cli.run",
    "ldm.models.__init__.os",
    "ldm.models._private.Thing",
    "ldm.diffusion.__builtins__.eval",
    "ldm.models",
    "ldm.models.",
    "ldm.models..x",
    "ldm.models.x y",
    "ldm.models/../os.system",
    " os.system",
    "ｏｓ.system",  # full-width letters: Python's own identifiers would fold them to "os"
    "",
    None,
    3,
    ["os.system"],
]
PLACES = {
    "root": lambda evil: evil,
    "argument": lambda evil: {"_target_": GOOD, "channels": evil},
    "partial": lambda evil: {"_target_": GOOD, "_partial_": True, "x": evil},
    "partial itself": lambda evil: {**evil, "_partial_": True},
    "list": lambda evil: [1, [2, evil]],
    "tuple": lambda evil: {"a": (evil,)},
    "plain mapping": lambda evil: {"a": {"b": {"c": [evil]}}},
    "deep": lambda evil: {"_target_": GOOD, "a": [{"_target_": GOOD, "_partial_": True, "b": {"c": evil}}]},
}


@pytest.fixture
def marker(tmp_path):
    """A file that exists only if a payload has run."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists()


def evil_node(name, marker):
    return {"_target_": name, "command": f"touch {marker}", "args": [f"touch {marker}"], "f": str(marker)}


@pytest.mark.parametrize("name", PAYLOADS, ids=repr)
def test_payload_is_refused_before_anything_is_constructed(name, marker, monkeypatch):
    monkeypatch.setattr("ldm.build._call", lambda *a, **k: pytest.fail("something was constructed first"))
    for place in PLACES.values():
        with pytest.raises(LdmError) as caught:
            build(place(evil_node(name, marker)), where="model.network")
        assert caught.value.exit_code == 2
        assert "model.network" in str(caught.value)


def test_a_payload_that_is_not_refused_would_leave_its_marker(tmp_path):
    marker = tmp_path / "marker"
    subprocess.run([sys.executable, "-c", f"open({str(marker)!r}, 'w')"], check=True)
    assert marker.exists()


@pytest.mark.parametrize("key", ["_args_", "_recursive_", "_convert_", "__class__", "_mode_"])
def test_other_underscore_keys_are_refused(key):
    with pytest.raises(LdmError, match=key):
        check({"a": [{"_target_": GOOD, key: [{"_target_": GOOD}]}]})


@pytest.mark.parametrize("name", ["test_build", "json.loads", "ldmx.models.A", "torch.nn.Linear", "torch.optim.AdamX"])
def test_any_name_outside_the_table_is_refused(name):
    with pytest.raises(LdmError, match="may not be constructed"):
        resolve(name)


def test_only_the_caller_may_extend_and_only_by_what_the_package_defines(tmp_path, monkeypatch, marker):
    (tmp_path / "my_pkg.py").write_text(
        "from os import system\nclass Net:\n    def __init__(self, width): self.width = width"
    )
    monkeypatch.syspath_prepend(tmp_path)
    node = {"_target_": "my_pkg.Net", "width": 3}
    with pytest.raises(LdmError):
        build(node)
    assert build(node, trusted=("my_pkg",)).width == 3
    for name in ("my_pkg.system", "my_pkg2.Net", "os.system"):
        with pytest.raises(LdmError):
            build({"_target_": name, "command": f"touch {marker}"}, trusted=("my_pkg",))


def test_the_nearest_allowed_name_is_given():
    with pytest.raises(LdmError, match=r"torch\.optim\.AdamW"):
        check({"optimizer": {"_target_": "torch.optim.AdamWW"}}, where="stage.diffusion")
    with pytest.raises(LdmError, match=r"did you mean ldm\.models\.layers\.embeddings\.TimestepEmbedding"):
        resolve("ldm.models.layers.embeddings.TimestepEmbeding")
    with pytest.raises(LdmError, match=r"there is no module ldm\.models\.layers\.embeding"):
        resolve("ldm.models.layers.embeding.TimestepEmbedding")


def test_builds_nested_nodes_lists_and_partials():
    parameter = torch.nn.Parameter(torch.ones(2))
    make = build({"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.1, "betas": [0.9, 0.95]})
    assert isinstance(make, functools.partial)
    assert make([parameter]).defaults["lr"] == 0.1
    assert isinstance(build({"_target_": "torch.optim.SGD", "lr": 1.0}, params=[parameter]), torch.optim.SGD)
    assert build({"a": [1, {"b": None}], "c": "x"}) == {"a": [1, {"b": None}], "c": "x"}


def test_arguments_are_compared_with_the_constructor():
    with pytest.raises(LdmError, match=r"AdamW takes no argument 'lrr'; optimizer.lrr; did you mean 'lr'"):
        build({"_target_": "torch.optim.AdamW", "_partial_": True, "lrr": 1}, where="optimizer")
    with pytest.raises(LdmError, match="AdamW needs params; optimizer"):
        build({"_target_": "torch.optim.AdamW"}, where="optimizer")
    with pytest.raises(LdmError, match="Invalid learning rate"):
        build({"_target_": "torch.optim.AdamW", "lr": -1.0}, params=[torch.nn.Parameter(torch.ones(1))])


@pytest.mark.parametrize(
    "node",
    [
        {"class": "os.system", "args": {"command": "true"}},
        {"class": "torch.optim.AdamW", "args": {}},
        {"class": "ldm.data.shards.open_dataset", "args": {"path": "/"}},
        {"class": "ldm.training.step.OptimizerStep", "args": {}},
        {"class": GOOD, "args": {"a": {"class": "os.system", "args": {}}}},
        {"class": GOOD, "args": {"a": [{"_target_": "os.system"}]}},
        {"class": GOOD, "args": {"_partial_": True}},
        {"class": GOOD, "args": {"_args_": []}},
        {"class": GOOD, "args": []},
        {"class": GOOD},
        {"class": GOOD, "args": {}, "more": 1},
        {"_target_": GOOD},
        {"__class__": GOOD, "args": {}},
    ],
)
def test_a_checkpoint_names_model_classes_only(node):
    with pytest.raises(LdmError):
        build_saved({"network": node})


def test_saved_form_builds_the_same():
    args = {"in_size": 4, "out_size": 8}
    saved = to_saved({"a": [{"_target_": GOOD, **args}], "b": 1})
    assert saved == {"a": [{"class": GOOD, "args": args}], "b": 1}
    assert build_saved(saved)["a"][0].linear_1.out_features == 8


def test_the_module_imports_neither_torch_nor_hydra():
    code = "import sys, ldm.build; sys.exit(bool({'torch', 'hydra', 'omegaconf'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
