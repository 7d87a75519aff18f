"""`python -m ldm inspect-autoencoder`: pages of real runs, commands that work, and bad input by hand."""

import errno
import json
import os

import pytest
import torch
import yaml

from ldm.checkpoints.run import open_run, write_config
from ldm.checkpoints.store import Store
from ldm.cli import handled
from ldm.config import CONFIGS, compose
from ldm.models.autoencoder.kl import AutoencoderKL
from ldm.tools.inspect_autoencoder import architecture, main
from ldm.tools.inspect_autoencoder_options import PAGE, VERB, Options
from tests.tools.making import write_folder

SETTINGS = {"in_channels": 3, "latent_channels": 4, "block_channels": [8, 8], "layers_per_block": 1, "patch_size": 2,
            "mid_attention": False, "quant_conv": True, "norm_groups": 4}  # fmt: skip
NODE = {"class": "ldm.models.autoencoder.kl.AutoencoderKL", "args": SETTINGS}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """SSIM is tested where it is written, and takes most of the time here; tiny tensors are quicker in one thread."""
    monkeypatch.setattr("ldm.evaluation.fitness.ssim", lambda a, b: torch.ones(len(a)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_run(place, image_size=16, steps=(5,), finished=True, **settings):
    """A run with an autoencoder that was never trained."""
    torch.manual_seed(len(place.name))
    args = {**SETTINGS, **settings}
    model = AutoencoderKL(**args)
    model.statistics.std.fill_(0.5)
    with open_run(place.parent, place.name) as run:
        write_config(run.folder, f"data: {{image_size: {image_size}}}")
        for step in steps:
            documents = {
                "state": {"finished": finished, "train_step": step},
                "config": {"autoencoder": {**NODE, "args": args}},
            }
            Store(run.stage("autoencoder").ckpt).save(
                step, tensors={"model": model.state_dict()}, trees={}, documents=documents
            )
    return place


@pytest.fixture
def made(tmp_path):
    """(run, folder of pictures)"""
    return write_run(tmp_path / "runs" / "one"), write_folder(tmp_path / "in", 6)


def command(capsys, tmp_path, *words):
    """(exit code, standard output, standard error)"""
    code = handled(lambda: main([*map(str, words), f"index_dir={tmp_path / 'index'}", "device=cpu"]))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_run_gets_a_page_beside_it_and_a_table(made, capsys, tmp_path):
    run, folder = made
    files = sorted(folder.iterdir())
    code, out, err = command(capsys, tmp_path, run, folder, "pictures=2")
    assert code == 0, err
    page = (run / PAGE).read_text()
    assert page.count("<img") == 2 * 4 + 2 * 2
    assert "6 of 6, train, 16x16" in page and "f4, 4 channels" in page and "p000" in page
    assert "not held out" in page  # a folder without validation pictures
    assert "Not for these pictures" in out and f"page: {run / PAGE}\n" in out
    lines = [line for line in out.splitlines() if "python train.py" in line]
    assert [line.count("stage.autoencoder.train=decoder") for line in lines] == [1, 0]
    for line in lines:
        assert f"init_from={run} name=one-tuned " in line and line.endswith("data.crop=center data.image_size=16")
    assert sorted(folder.iterdir()) == files  # with index_dir=, nothing is written into somebody's data
    assert command(capsys, tmp_path, run, folder, "pictures=2")[0] == 0  # and a page of ours is replaced
    assert (run / PAGE).read_text() == page


def test_several_are_compared_and_told_apart(made, capsys, tmp_path):
    run, folder = made
    other = write_run(tmp_path / "elsewhere" / "one", steps=(5, 9), latent_channels=8)
    code, out, err = command(capsys, tmp_path, run, folder, other, "pictures=1", f"out={tmp_path / 'p.html'}")
    assert code == 0, err
    assert "one 5" in out and "one 9" in out and "f4, 8" in out
    step = other / "autoencoder" / "ckpt" / "step-000000005"
    code, out, err = command(capsys, tmp_path, other, folder, step, "pictures=0", f"out={tmp_path / 'p.html'}")
    assert code == 0 and "one 5" in out and "one 9" in out, err
    assert not (other / PAGE).exists()


def test_held_out_pictures_and_a_share_of_the_data(made, capsys, tmp_path):
    run, _ = made
    folder = write_folder(tmp_path / "more", 30)
    words = ("pictures=0", "split=val", "val_fraction=0.3", "max_samples=5")
    code, _, err = command(capsys, tmp_path, run, folder, *words)
    page = (run / PAGE).read_text()
    assert code == 0 and "pictures <b>5 of" in page and "val, 16x16" in page and "not held out" not in page, err
    code, _, err = command(capsys, tmp_path, run, folder, "split=val")
    assert code == 2 and "error[DATA]: there is no validation data; " in err


def test_an_autoencoder_that_is_not_finished_is_said_to_be(made, capsys, tmp_path):
    _, folder = made
    run = write_run(tmp_path / "runs" / "two", finished=False)
    assert command(capsys, tmp_path, run, folder, "pictures=0")[0] == 0
    assert "did not finish" in (run / PAGE).read_text()


def test_the_command_for_fine_tuning_composes_to_the_same_architecture():
    for name, args in (("kl_sd", {"norm_groups": 16}), ("kl_toy", {}), ("vq_toy", {"codebook_size": 9})):
        known = yaml.safe_load((CONFIGS / "model" / "autoencoder" / f"{name}.yaml").read_text())
        words = architecture({"class": known.pop("_target_"), "args": {**known, **args}}).split()
        assert words == [f"model/autoencoder={name}", *(f"model.autoencoder.{k}={v}" for k, v in args.items())]
    words = architecture(NODE).split()  # of no file of ours
    again = compose("train", ["experiment=finetune_autoencoder", "init_from=x", *words])["model"]["autoencoder"]
    assert again.pop("_target_") == NODE["class"] and {k: again[k] for k in SETTINGS} == SETTINGS
    assert architecture({"class": "my_pkg.Net", "args": {}}) == "model.autoencoder._target_=my_pkg.Net"


REFUSED = {
    "no run": ("{runs}/ome", "{in}", "error[RUN]: there is no such run; CHECKPOINT={runs}/ome; did you mean 'one'?"),
    "empty run": ("{empty}", "{in}", "error[NO-CHECKPOINT]: the stage 'autoencoder' of this run has no"),
    "pixels": ("{pixels}", "{in}", "error[NO-AUTOENCODER]: this run works on pixels: it has no autoencoder"),
    "foreign": ("{foreign}", "{in}", "error[RUN]: this is no run; {foreign}; import it first: python -m ldm import"),
    "no data": ("{one}", "{runs}/nothing", "error[DATA]: "),
    "empty data": ("{one}", "{none}", "error[DATA]: "),
    "indivisible": ("{one}", "{runs}/nothing", "error[SIZE]: pictures of 18x18 do not fit the autoencoder; one; "
                    "multiples of 4 of at least 16; image_size=16", "image_size=18"),
    "sizes": ("{one}", "{runs}/nothing", "error[SIZE]: the checkpoints were trained on pictures of different sizes; "
              "image_size; {one} 16, {large} 32; say which: image_size=32", "{large}"),
    "twice": ("{one}", "{in}", "error[CONFIG]: a checkpoint is given twice; {one}; name each once", "{one}"),
    "place": ("{one}", "{in}", "error[DISK]: there is no such folder", "out={runs}/no/p.html"),
    "folder": ("{one}", "{in}", "error[DISK]: this is a folder; {in}; out={in}/" + PAGE, "out={in}"),
    "file": ("{one}", "{in}", "error[EXISTS]: there is another file already; {in}/p000.txt", "out={in}/p000.txt"),
    "features": ("{one}", "{in}", "error[NO-CHECKPOINT]: the stage 'features' of this run has no", "features={one}"),
    "lpips": ("{one}", "{in}", "error[WEIGHTS]: the perceptual distance needs the weights of", "lpips={in}/x.pth"),
    "both": ("{one}", "{in}", "error[CONFIG]: features and lpips are both given", "features=a", "lpips=b"),
    "range": ("{one}", "{in}", "error[CONFIG]: pictures=99; pictures; 0 to 64", "pictures=99"),
    "step": ("{denoiser}", "{in}", "error[NO-AUTOENCODER]: this is a checkpoint of the stage 'diffusion'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line(case, made, capsys, tmp_path):
    run, folder = made
    first, data, says, *more = REFUSED[case]
    places = {"runs": run.parent, "one": run, "in": folder, "empty": tmp_path / "e" / "empty",
              "none": tmp_path / "none", "foreign": tmp_path / "foreign", "pixels": tmp_path / "p" / "pixels",
              "large": tmp_path / "l" / "large",
              "denoiser": tmp_path / "p" / "pixels" / "diffusion" / "ckpt" / "step-000000001"}  # fmt: skip
    for name in ("none", "foreign"):
        places[name].mkdir()
    (places["foreign"] / "model_index.json").write_text(json.dumps({}))
    open_run(places["empty"].parent, "empty").close()
    if case == "sizes":
        write_run(places["large"], 32)
    if case in ("pixels", "step"):
        with open_run(places["pixels"].parent, "pixels") as pixels:
            node = {"class": "ldm.models.autoencoder.identity.Identity", "args": {}}
            documents = {"state": {"finished": True}, "config": {"autoencoder": node}}
            Store(pixels.stage("diffusion").ckpt).save(1, tensors={"model": {}}, trees={}, documents=documents)
    words = [word.format(**places) for word in (first, data, *more)]
    code, out, err = command(capsys, tmp_path, *words)
    lines = [line for line in err.splitlines() if not line.startswith("indexed")]
    assert (code, out, len(lines)) == (2, "", 1), err
    assert lines[0].startswith(says.format(**places))
    assert not list(run.glob("*.html"))


def test_weights_that_give_no_numbers_are_refused_with_the_picture(made, capsys, tmp_path, monkeypatch):
    run, folder = made
    moments = AutoencoderKL.moments
    monkeypatch.setattr(AutoencoderKL, "moments", lambda self, x: moments(self, x) * float("inf"))
    code, _, err = command(capsys, tmp_path, run, folder)
    assert code == 2
    assert "error[LATENTS]: the autoencoder gives latents that are not finite; one; of the picture 'p000'" in err


def test_the_words_need_two_places_and_take_more(capsys):
    assert VERB.parse(["run", "data"], Options)[0] == ["run", "data"]
    assert VERB.parse(["run", "data", "a", "b"], Options)[0] == ["run", "data", "a", "b"]
    with pytest.raises(Exception, match=r"expected CHECKPOINT DATA \[CHECKPOINT ...\], got 'run'"):
        VERB.parse(["run"], Options)


def test_a_page_that_cannot_be_written_is_one_line(made, capsys, tmp_path, monkeypatch):
    def refuse(path, data):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    run, folder = made
    monkeypatch.setattr("ldm.checkpoints.files.replace_file", refuse)
    code, _, err = command(capsys, tmp_path, run, folder, "pictures=0")
    assert code == 2
    assert f"error[DISK]: cannot write the page: Permission denied; {run / PAGE}; choose another place: out=" in err
