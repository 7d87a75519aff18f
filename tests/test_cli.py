"""The command line: texts arrive verbatim, every mistake is one line with exit code 2, and torch is not waited for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.cli import handled, run, usage
from ldm.config import compose, trusted_targets
from ldm.errors import LdmError
from ldm.validate import validate

ROOT = Path(__file__).parents[1]
FILES = {
    "train.yaml": """
defaults:
  - _self_
  - data: toy
  - model/network: unet
  - stage/diffusion: default
  - experiment: null
  - debug: null

name: toy
seed: 0
output_dir: runs
prompt: null
traceback: false
trainer:
  devices: 1
secret: null
""",
    "data/toy.yaml": "path: data/toy\nimage_size: 64\ncolumns: {}\ndrop_prob: 0.1\n",
    "data/folder.yaml": "path: ???\nimage_size: 64\n",
    "model/network/unet.yaml": "_target_: ldm.models.unet.UNet\nwidth: 32\n",
    "optimizer/adamw.yaml": "_target_: torch.optim.AdamW\n_partial_: true\nlr: 1e-4\n",
    "stage/diffusion/default.yaml": """
defaults:
  - /optimizer@optimizer: adamw
  - _self_
batch_size: 8
max_steps: 100
accumulate: 1
precision: 32
""",
    "experiment/demo.yaml": """# @package _global_
# The first run: minutes on a CPU.
name: demo
stage: {diffusion: {max_steps: 5}}
""",
    "debug/fast.yaml": "# @package _global_\nstage: {diffusion: {max_steps: 1}}\n",
}


@pytest.fixture
def tree(tmp_path):
    """A small folder of configurations; `tree(name, text)` replaces one file."""
    folder = tmp_path / "configs"

    def write(name, text):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        return folder

    for name, text in FILES.items():
        write(name, text)
    return write


@pytest.fixture
def configs(tree):
    return tree("train.yaml", FILES["train.yaml"])


def refused(configs, *words):
    with pytest.raises(LdmError) as caught:
        validate(compose("train", words, config_dir=configs))
    assert caught.value.exit_code == 2
    return str(caught.value)


# ---- texts


NASTY = [
    "a red fox, flat logo",
    "",
    " leading and trailing ",
    "null",
    "true",
    "3",
    "1e-4",
    "???",
    "[a, b]",
    "{a: b}",
    "a=b=c",
    "it's",
    'say "hi"',
    """both ' and " """,
    "back\\slash",
    "ends with \\",
    "${seed}",
    "${oc.env:HOME}",
    "\\${seed}",
    "$HOME `id` $(id)",
    "line\nbreak",
    "tab\tand\rreturn",
    "(masterpiece:1.2), [bad]",
    "a # comment",
    "key: value",
    "--help",
    "-m",
    "@package _global_",
    "東京 🦊 é e\u0301 \u202eright to left",
    "a" * 10_000,
    "choice(1,2)",
    "range(1,3)",
    "!!python/object:os.system",
    "~data",
    "+x=1",
    "'",
    '"',
    "%s %d {0}",
]


@pytest.mark.parametrize("text", NASTY, ids=lambda t: repr(t[:20]))
def test_a_prompt_arrives_verbatim(configs, text):
    assert compose("train", [f"prompt={text}"], config_dir=configs)["prompt"] == text


def test_a_prompt_arrives_verbatim_through_a_real_command_line(configs, tmp_path):
    script = tmp_path / "echo.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nfrom ldm.cli import run\n"
        f"run(lambda cfg, trusted: print(cfg['prompt'].encode()), 'train', config_dir=Path({str(configs)!r}))"
    )
    for text in ("a, b = ${x} 'c' \"d\"\n🦊 ", "--cfg"):
        done = subprocess.run([sys.executable, script, f"prompt={text}"], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(text.encode())


def test_the_last_of_two_prompts_counts(configs):
    assert compose("train", ["prompt=a", "prompt=b"], config_dir=configs)["prompt"] == "b"


def test_a_text_where_the_command_has_none_is_an_unknown_key(configs):
    assert "unknown key 'negative_prompt'" in refused(configs, "negative_prompt=x")


# ---- composing


def test_composes_plain_values(configs):
    cfg = compose("train", ["experiment=demo"], config_dir=configs)
    assert (cfg["name"], cfg["stage"]["diffusion"]["max_steps"]) == ("demo", 5)
    assert "hydra" not in cfg
    assert type(cfg["stage"]["diffusion"]["optimizer"]) is dict


@pytest.mark.parametrize("text, value", [("1e-4", 1e-4), ("2E5", 2e5), ("1", 1), ("-1.5e+3", -1500.0)])
def test_numbers_of_yaml_that_look_like_strings_are_numbers(tree, configs, text, value):
    tree("optimizer/adamw.yaml", f"lr: {text}\n")
    for words in ([], [f"stage.diffusion.optimizer.lr={text}"]):
        assert compose("train", words, config_dir=configs)["stage"]["diffusion"]["optimizer"]["lr"] == value


def test_overlays_and_groups(configs):
    steps = {
        words: compose("train", words.split(), config_dir=configs)["stage"]["diffusion"]["max_steps"]
        for words in (
            "",
            "experiment=demo",
            "experiment=demo debug=fast",
            "experiment=null stage.diffusion.max_steps=7",
        )
    }
    assert list(steps.values()) == [100, 5, 1, 7]


def test_added_keys_pass_for_build_to_judge(configs):
    assert compose("train", ["+data.x=3"], config_dir=configs)["data"]["x"] == 3


def test_the_environment_is_read_for_our_own_names_only(tree, configs, monkeypatch):
    monkeypatch.setenv("LDM_LR", "1e-4")
    monkeypatch.setenv("SECRET", "hunter2")
    for text, value in (("${oc.env:LDM_LR}", 1e-4), ("${oc.env:LDM_NONE,5}", 5), ("${oc.env:LDM_NONE,null}", None)):
        tree("train.yaml", FILES["train.yaml"].replace("secret: null", f"secret: {text}"))
        assert compose("train", [], config_dir=configs)["secret"] == value
    for text in ("${oc.env:SECRET}", "${oc.env:LDM_NONE}", "${oc.decode:3}", "${now:%Y}", "${hydra:runtime.cwd}"):
        tree("train.yaml", FILES["train.yaml"].replace("secret: null", f"secret: '{text}'"))
        assert "hunter2" not in refused(configs)


def test_trusted_packages_come_from_the_command_line_only(tree, configs):
    words = ["trusted_targets=[my_pkg, other.pkg]"]
    assert trusted_targets(words) == ("my_pkg", "other.pkg")
    assert "trusted_targets" not in compose("train", words, config_dir=configs)
    assert "not the name of a package" in refused(configs, "trusted_targets=[a b]")
    tree("data/toy.yaml", FILES["data/toy.yaml"] + "trusted_targets: [os]\n")
    assert "only the command line" in refused(configs)
    assert "only the command line" in refused(configs, *words)


# ---- mistakes


@pytest.mark.parametrize(
    "word, says",
    [
        ("batchsize=3", "unknown key 'batchsize'"),
        ("batch_size=3", "did you mean 'stage.diffusion.batch_size'"),
        ("stage.difusion.batch_size=3", "did you mean 'stage.diffusion.batch_size'"),
        ("data.pth=x", "did you mean 'data.path'"),
        ("data.zzzzz=x", "known: data.columns, data.drop_prob, data.image_size, data.path"),
        ("columns.shape=star", "unknown key 'columns.shape'"),  # sample.py's, not this tree's
        ("promt=x", "did you mean 'prompt'"),
        ("experiment=dmeo", "experiment has no option 'dmeo'; did you mean 'demo'"),
        ("model/network=nope", "model/network has no option 'nope'; known: unet"),
        ("optimizer@stage.diffusion.optimizer=adam", "did you mean 'adamw'"),
        ("optimiser@stage.diffusion.optimizer=adamw", "unknown key"),
        ("optimizer=adamw", "unknown key 'optimizer'; train.py; python train.py --help"),
        ("data=folder", "values are missing: data.path; add data.path=..."),
        ("stage.diffusion.optimizer=3", "write optimizer@stage.diffusion.optimizer=NAME"),
        ("++stage.diffusion.optimizer=3", "is a mapping, not a value"),
        ("model.network=unet", "write model/network=NAME or model.network.KEY=VALUE"),
        ("stage=3", "stage is a mapping"),
        ("name=[a", "cannot read 'name=[a'"),
        ("name", "cannot read 'name'; "),
        ("seed=1,2", "add -m"),
        ("seed=${nope}", "nope"),
        (
            "stage.diffusion.batch_size=0",
            "stage.diffusion.batch_size=0 is refused; it must be a whole number of at least 1",
        ),
        ("stage.diffusion.batch_size=2.5", "whole number"),
        ("stage.diffusion.batch_size=true", "whole number"),
        ("stage.diffusion.max_steps=abc", "whole number"),
        ("stage.diffusion.optimizer.lr=0", "a number above 0"),
        ("stage.diffusion.optimizer.lr=inf", "a number above 0"),
        ("stage.diffusion.optimizer.lr=nan", "a number above 0"),
        ("stage.diffusion.accumulate=3", "batch_size=8 is not a multiple of stage.diffusion.accumulate=3"),
        ("stage.diffusion.precision=fp8", "one of auto, 32, bf16-mixed, 16-mixed"),
        ("data.drop_prob=1.5", "at most 1"),
        ("name=../../x", "1 to 64 of"),
        ("name=Logos", "1 to 64 of"),
        ("name=" + "a" * 65, "1 to 64 of"),
        ("+trainer.accumulate_grad_batches=2", "set stage.<name>.accumulate"),
        ("+trainer.gradient_clip_val=1", "set stage.<name>.grad_clip"),
    ],
)
def test_a_mistake_is_one_line_that_helps(configs, word, says):
    line = refused(configs, word)
    assert says in line
    assert len(line.splitlines()) == 1


def test_all_mistakes_are_reported_together(configs):
    lines = refused(configs, "nope=1", "data.pth=x", "stage=3", "prompt=fine").splitlines()
    assert [line.split(";")[0] for line in lines] == [
        "error[CONFIG]: unknown key 'nope'",
        "error[CONFIG]: unknown key 'data.pth'",
        "error[CONFIG]: stage is a mapping, not a value",
    ]
    assert len(refused(configs, "data=nope", "experiment=nope", "a=[").splitlines()) == 3
    assert len(refused(configs, "name=A", "stage.diffusion.batch_size=0", "seed=-1").splitlines()) == 3
    assert "data.path, name; add data.path=... name=..." in refused(configs, "data=folder", "name=???")


@pytest.mark.parametrize("value", ["32", "bf16-mixed", "16-mixed"])
def test_precisions(configs, value):
    validate(compose("train", [f"stage.diffusion.precision={value}"], config_dir=configs))


def test_image_size_must_fit_the_autoencoder():
    model = {"autoencoder": {"block_channels": [32, 64, 64], "patch_size": 2}}
    validate({"data": {"image_size": 64}, "model": model})
    with pytest.raises(LdmError, match=r"image_size=60 is not a multiple of .* downsampling 8; set data.image_size=64"):
        validate({"data": {"image_size": 60}, "model": model})


# ---- files

DEMO = "experiment/demo.yaml"
OVERLAY = "# @package _global_\nname: a\n"


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("data/toy.yaml", "path: a\npath: b\n", "found duplicate key path"),
        ("data/toy.yaml", "path: [a\n", "toy.yaml"),
        ("data/toy.yaml", "path: a\n" * 200_000, "limit 1 MB"),
        ("data/toy.yaml", "x: !!python/object/apply:os.system [true]\n", "python/object"),
        (DEMO, f"{OVERLAY}stage: {{diffusion: {{max_stps: 5}}}}\n", "did you mean 'stage.diffusion.max_steps'"),
        (DEMO, f"{OVERLAY}stage: {{diffusion: 5}}\n", "stage.diffusion is a mapping"),
        (DEMO, f"{OVERLAY}hydra: {{callbacks: {{x: {{_target_: os.system}}}}}}\n", "hydra.callbacks"),
        (DEMO, f"{OVERLAY}hydra: {{launcher: {{_target_: os.system}}}}\n", "hydra.launcher"),
        (DEMO, f"{OVERLAY}hydra: {{job_logging: {{handlers: {{x: {{(): os.system}}}}}}}}\n", "hydra.job_logging"),
        ("data/toy.yaml", "defaults: [nope]\n", "Could not load 'data/nope'"),
    ],
)
def test_a_bad_file_is_refused(tree, configs, name, text, says):
    tree(name, text)
    assert says in refused(configs, "experiment=demo")


def test_a_file_may_set_free_mappings_and_nodes_with_a_target(tree, configs):
    text = OVERLAY + "data: {columns: {score: 1}}\nmodel: {network: {depth: 2}}\n"
    cfg = compose("train", ["experiment=demo"], config_dir=tree(DEMO, text))
    assert (cfg["data"]["columns"], cfg["model"]["network"]["depth"]) == ({"score": 1}, 2)


def test_the_escape_from_hydras_own_list_is_refused(configs, monkeypatch):
    monkeypatch.setenv("HYDRA_INSTANTIATE_ALLOWLIST_OVERRIDE", "os.system")
    assert "HYDRA_INSTANTIATE_ALLOWLIST_OVERRIDE" in refused(configs)


# ---- running


def left(configs, main, *argv):
    with pytest.raises(SystemExit) as caught:
        run(main, "train", argv, config_dir=configs)
    return caught.value.code


@pytest.mark.parametrize("value, code", [(None, 0), (0, 0), (3, 3), (75, 75)])
def test_exit_code_is_what_main_returns(configs, value, code):
    assert left(configs, lambda cfg, trusted: value) == code


def test_main_gets_the_configuration_and_the_trusted_packages(configs):
    seen = []
    assert left(configs, lambda *given: seen.extend(given), "seed=3", "trusted_targets=[my_pkg]") == 0
    assert (seen[0]["seed"], seen[1]) == (3, ("my_pkg",))


def boom(cfg, trusted):
    raise RuntimeError("two\nlines")


def test_an_unknown_failure_is_one_line_and_a_file(configs, tmp_path, capsys):
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    assert left(configs, boom, f"output_dir={tmp_path}/runs") == 1
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1
    assert text.startswith("error[UNCLASSIFIED]: RuntimeError: two\\nlines; test_cli.py:")
    assert f"read {tmp_path}/runs/toy/errors/rank0.txt, or rerun with traceback=true" in text
    assert "in boom" in (tmp_path / "runs" / "toy" / "errors" / "rank0.txt").read_text()


def test_without_a_run_folder_none_is_made(configs, tmp_path, capsys):
    assert left(configs, boom, f"output_dir={tmp_path}/runs") == 1
    assert not (tmp_path / "runs").exists()
    text = capsys.readouterr().err
    assert "Traceback" not in text and "rank0.txt" not in text and "rerun with traceback=true" in text
    assert left(configs, boom, f"output_dir={tmp_path}/runs", "traceback=true") == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, code, says",
    [
        (LdmError("DATA-BUDGET", "too many", exit_code=3), 3, "error[DATA-BUDGET]: too many"),
        (KeyboardInterrupt(), 130, "stopped"),
        (
            RuntimeError("operator torchvision::nms does not exist"),
            2,
            "different builds; pip install --force-reinstall",
        ),
        (ModuleNotFoundError("No module named 'diffusers'"), 2, "the package 'diffusers' is missing"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), 1, "error[MEMORY]"),
        (MemoryError(), 1, "error[MEMORY]"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), 1, "error[MEMORY]"),
        (OSError(12, "Cannot allocate memory"), 1, "error[MEMORY]"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), 1, "error[MEMORY]"),
        (ValueError("x"), 1, "error[UNCLASSIFIED]: ValueError: x"),
    ],
)
def test_failures_become_codes(error, code, says, capsys):
    def action():
        raise error

    assert handled(action) == code
    assert says in capsys.readouterr().err


def test_help_lists_experiments_and_groups(configs):
    text = usage("train", "Trains.", configs)
    assert "demo                    The first run: minutes on a CPU." in text
    assert "model/network           unet" in text
    assert "  seed: 0" in text
    assert "optimizer@" not in text


def test_cfg_prints_what_would_run(configs, capsys):
    assert left(configs, boom, "--cfg", "job", "seed=5") == 0
    assert "seed: 5" in capsys.readouterr().out


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} train.py --cfg job | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (len(done.stdout.splitlines()), done.stderr) == (1, "")


def test_an_unknown_option_is_refused(configs, capsys):
    assert left(configs, boom, "--multi-run") == 2
    assert "did you mean '--multirun'" in capsys.readouterr().err


def test_multirun_runs_every_combination(configs, tmp_path):
    script = tmp_path / "t.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nfrom ldm.cli import run\n"
        "def main(cfg, trusted):\n    print(cfg['name'], cfg['seed'], cfg['prompt'])\n    return cfg['seed']\n"
        f"run(main, 'train', config_dir=Path({str(configs)!r}))"
    )
    done = subprocess.run([sys.executable, script, "-m", "seed=0,4", "prompt=a,b"], capture_output=True, text=True)
    assert [line for line in done.stdout.splitlines() if line[0] != "["] == ["toy-1 0 a,b", "toy-2 4 a,b"]
    assert done.returncode == 4


WATCH = """
import atexit, sys
atexit.register(lambda: print("HEAVY", sorted({"torch", "pytorch_lightning", "wandb", "numpy"} & set(sys.modules))))
sys.argv = ["train.py", *sys.argv[1:]]
exec(compile(open("train.py").read(), "train.py", "exec"), {"__name__": "__main__"})
"""


@pytest.mark.parametrize(
    "words, code, heavy",
    [
        (["--help"], 0, []),
        (["stage.difusion.max_steps=3", "nope=1"], 2, []),
        (["a=["], 2, []),
        (["data.path=/no/such"], 2, ["numpy"]),
    ],
)
def test_help_and_the_errors_of_configuration_and_data_are_quick_and_without_torch(words, code, heavy):
    before = os.times()
    done = subprocess.run([sys.executable, "-c", WATCH, *words], cwd=ROOT, capture_output=True, text=True)
    after = os.times()  # processor time: the machine of the tests may be busy
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2
    assert done.returncode == code, done.stderr
    assert f"HEAVY {heavy}" in done.stdout
    assert all(line.startswith(("error[CONFIG]: ", "error[DATA]: ")) for line in done.stderr.splitlines())


# ---- python -m ldm

HELP = """
import runpy, sys
for module, *words in {commands!r}:
    sys.argv = [module, *words, "--help"]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as left:
        code = left.code or 0
    print("LEFT", code, sorted({{"torch", "pytorch_lightning"}} & set(sys.modules)))
"""


def test_help_of_every_verb_and_benchmark_is_text_and_does_not_wait_for_torch():
    from ldm.__main__ import VERBS

    benchmarks = sorted(p.stem for p in (ROOT / "benchmarks").glob("[a-z]*.py"))
    commands = [["ldm", verb] for verb in VERBS] + [[f"benchmarks.{name}"] for name in benchmarks]
    program = HELP.format(commands=commands)
    before = os.times()
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2
    *texts, rest = done.stdout.split("LEFT 0 []\n")
    assert len(texts) == len(commands) and rest == "", done.stdout + done.stderr
    for text, (module, *words) in zip(texts, commands, strict=True):
        assert f"python -m {' '.join([module, *words])} " in text


@pytest.mark.parametrize(
    "words, code, says", [([], 0, "doctor"), (["--help"], 0, "doctor"), (["docter"], 2, "'doctor'")]
)
def test_verbs(words, code, says):
    command = [sys.executable, "-m", "ldm", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code
    assert says in done.stdout + done.stderr


def test_doctor_reports_packages_devices_and_no_secret(monkeypatch):
    command = [sys.executable, "-m", "ldm", "doctor"]
    env = {**os.environ, "WANDB_API_KEY": "s3cr3t"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode in (0, 2)
    assert all(line.split()[0] in ("ok", "warn", "FAIL") for line in done.stdout.splitlines())
    assert "fit together" in done.stdout
    assert "a key is configured" in done.stdout
    assert "s3cr3t" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "words, says",
    [
        (["stage.diffusion.batch_size=0"], "a whole number of at least 1"),
        (["data.image_size=50"], "set data.image_size=48"),
        (["nope=1"], "unknown key 'nope'"),
    ],
)
def test_doctor_refuses_the_values_that_training_refuses(words, says):
    from ldm.tools import doctor

    [(mark, subject, line)] = doctor._configuration(words)
    assert (mark, subject) == ("FAIL", "configuration") and says in line


def test_doctor_checks_what_needs_torch_and_what_needs_files():
    from ldm.tools import doctor

    words = ["sampler=edm", "init_from=/nowhere", "data=folder", "data.path=/nowhere"]
    found = {subject: (mark, line) for mark, subject, line in doctor._configuration(words)}
    assert found["configuration"][0] == "FAIL" and "the sampler edm does not fit" in found["configuration"][1]
    assert found["init_from"][0] == "FAIL" and "init_from=/nowhere" in found["init_from"][1]
    assert found["data"][0] == "FAIL" and "there is no /nowhere" in found["data"][1]


def test_doctor_notices_packages_that_do_not_fit(monkeypatch):
    from packaging.requirements import Requirement

    from ldm.tools import doctor

    monkeypatch.setattr(doctor, "_requirements", lambda: [Requirement("pytest<1"), Requirement("not-there>=1")])
    assert [mark for mark, _, _ in doctor._packages()] == ["FAIL", "FAIL"]
    monkeypatch.setattr(doctor, "_PROBE", "raise RuntimeError('operator torchvision::nms does not exist')")
    [(mark, _, words)] = doctor._devices()
    assert mark == "FAIL"
    assert "different builds" in words
    assert "torchvision " in words
