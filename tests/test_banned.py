"""Names that must not occur in the package: a second clock, a second generator, code in data, a hidden failure."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ATTRIBUTES = {  # name -> why
    "global_step": "counts every optimizer; the clock is train_step",
    "estimated_stepping_batches": "needs Lightning's clock",
    "load_from_checkpoint": "unpickles",
    "save_hyperparameters": "stores a live object",
    "save_checkpoint": "not atomic; the store saves",
    "unsafe_load": "yaml: constructs",
    "full_load": "yaml: constructs",
}
MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}
DOTTED = {
    "torch.save": "pickle",
    "torch.load": "pickle; the import command is the one exception",
    "torch.Generator": "draws are counter-based: ldm/random.py",
    "torch.hub.load": "downloads code",
    "yaml.load": "constructs",
    "os.system": "shell",
    "os.popen": "shell",
    "wandb.log": "go through the callback",
    "hydra.utils.instantiate": "build.py",
    "hydra.utils.call": "build.py",
    "hydra.utils.get_class": "build.py",
    "hydra.utils.get_method": "build.py",
    "hydra.utils.get_object": "build.py",
    "importlib.import_module": "build.py",
    "importlib.__import__": "build.py",
}
BUILTINS = {"eval", "exec", "__import__"}
KEYWORDS = {("weights_only", False), ("allow_pickle", True), ("shell", True), ("trust_remote_code", True)}
EXEMPT = {
    ("ldm/build.py", "importlib.import_module"),
    ("ldm/cli.py", "except Exception"),
    ("ldm/checkpoints/formats/reading.py", "torch.load"),  # weights_only=True, which the keyword check keeps true
}


def banned(source: str) -> Iterator[str]:
    """Names of everything in `source` that must not be there."""
    tree = ast.parse(source)
    full = {}  # local name -> dotted origin
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full |= {a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names}
            yield from (a.name for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            full |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            yield from (f"{node.module}" for _ in node.names[:1] if str(node.module).split(".")[0] in MODULES)

    def dotted(node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            base = dotted(node.value)
            return f"{base}.{node.attr}" if base else ""
        return full.get(node.id, node.id) if isinstance(node, ast.Name) else ""

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
            yield node.attr
        if isinstance(node, ast.Attribute | ast.Name) and dotted(node) in DOTTED:
            yield dotted(node)
        if isinstance(node, ast.Constant) and node.value in ("global_step", "estimated_stepping_batches"):
            yield str(node.value)  # getattr(trainer, "global_step")
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
                yield node.func.id
            # webdataset's default decoders execute members; bytes.decode names an encoding
            if isinstance(node.func, ast.Attribute) and node.func.attr == "decode" and not (node.args or node.keywords):
                yield "bare .decode()"
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if (keyword.arg, value) in KEYWORDS:
                    yield f"{keyword.arg}={value}"
        if isinstance(node, ast.ExceptHandler):
            cleans_up = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None  # hides nothing
            types = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if not cleans_up and any(
                t is None or (isinstance(t, ast.Name) and t.id in ("Exception", "BaseException")) for t in types
            ):
                yield "except Exception"


def test_the_package_is_free_of_them():
    files = [*(ROOT / "ldm").rglob("*.py"), ROOT / "train.py", ROOT / "sample.py"]
    found = {(p.relative_to(ROOT).as_posix(), name) for p in files for name in banned(p.read_text())}
    assert sorted(found - EXEMPT) == []


def test_the_one_broad_except_is_in_cli():
    assert list(banned((ROOT / "ldm" / "cli.py").read_text())) == ["except Exception"]


@pytest.mark.parametrize(
    "source",
    [
        "x = trainer.global_step",
        "x = getattr(trainer, 'global_step')",
        "trainer.estimated_stepping_batches",
        "import pickle",
        "from pickle import loads",
        "import marshal as m",
        "def f():\n    import shelve",
        "import torch\ntorch.load(p, weights_only=True)",
        "from torch import load as read\nread(p)",
        "import torch as t\nt.save(x, p)",
        "f(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
        "import yaml\nyaml.load(t)",
        "yaml.unsafe_load(t)",
        "eval('1')",
        "exec(code)",
        "__import__('os')",
        "import importlib\nimportlib.import_module(n)",
        "from importlib import import_module\nimport_module(n)",
        "from hydra.utils import instantiate\ninstantiate(c)",
        "import hydra\nhydra.utils.get_class(n)",
        "import torch\ng = torch.Generator()",
        "from torch import Generator\ndef f(g: Generator): ...",
        "Module.load_from_checkpoint(p)",
        "self.save_hyperparameters()",
        "pipeline.decode()",
        "subprocess.run(c, shell=True)",
        "import os\nos.system(c)",
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept:\n    pass",
        "try:\n    f()\nexcept (ValueError, BaseException):\n    pass",
        "import wandb\nwandb.log(x)",
    ],
)
def test_each_is_seen(source):
    assert list(banned(source))


@pytest.mark.parametrize(
    "source",
    [
        "raw.decode('utf-8')",
        "model.eval()",
        "checkpoint.load(path)",
        "store.save(state)",
        "np.load(p, allow_pickle=False)",
        "try:\n    f()\nexcept (OSError, ValueError):\n    pass",
        "try:\n    f()\nexcept BaseException:\n    undo()\n    raise",
        "from importlib import metadata\nmetadata.version('torch')",
    ],
)
def test_what_is_allowed_is_not_reported(source):
    assert list(banned(source)) == []
