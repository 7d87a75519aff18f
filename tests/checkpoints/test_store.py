"""The store in one process: content, corruption, choice, retention, order of the commit."""

import json
import logging
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from ldm.checkpoints import manifest, store
from ldm.checkpoints.files import json_bytes
from ldm.checkpoints.store import SaveFailed, Store
from ldm.errors import NON_FINITE, TEMPORARY, LdmError
from tests.checkpoints.states import FILES, difference, fingerprint, leftovers, loads_as, state


@pytest.fixture
def ckpt(tmp_path):
    opened = Store(tmp_path / "ckpt")
    opened.claim()
    return opened


def save(ckpt, *steps, **more):
    for step in steps:
        ckpt.save(step, **state(step), **more)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flip": flip,
    "truncate": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "zero": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "empty": lambda path: path.write_bytes(b""),
    "delete": lambda path: path.unlink(),
    "link": lambda path: (path.rename(path.parent.parent / "elsewhere"), path.symlink_to("../elsewhere")),
}


def test_what_was_saved_is_loaded(ckpt):
    path = ckpt.save(7, **state(7), score=0.5)
    assert path.name == "step-000000007" and sorted(p.name for p in path.iterdir()) == FILES
    loads_as(ckpt.newest(), 7)
    assert (
        ckpt.newest().manifest["score"] == 0.5 and ckpt.newest().manifest["files"]["model.safetensors"]["tensors"] == 2
    )
    assert json.loads((ckpt.folder / "LATEST").read_text()) == {"step": 7, "path": "step-000000007"}
    assert leftovers(ckpt.folder) == []


def test_every_file_opens_with_plain_readers(ckpt):
    for path in ckpt.save(1, **state(1)).iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        else:
            with safe_open(path, framework="numpy") as file:
                assert len(file.keys()) > 0


def test_tied_and_aliased_tensors_come_back_as_one(ckpt):
    tied = torch.ones(3)
    ckpt.save(1, tensors={"model": {"embed": tied, "head": tied, "part": tied[1:]}}, trees={}, documents={})
    found = ckpt.newest()
    assert found.manifest["aliases"] == {"model": {"head": "embed"}}
    tensors = found.tensors("model")
    assert tensors["head"] is tensors["embed"] and tensors["part"].tolist() == [1, 1]


def test_what_is_absent_is_named(ckpt):
    save(ckpt, 1)
    with pytest.raises(LdmError, match=r"holds no models.safetensors.*did you mean 'model.safetensors'"):
        ckpt.newest().tensors("models")
    with pytest.raises(LdmError, match=r"no checkpoint of step 5.*have: 1"):
        ckpt.load(5)


@pytest.mark.parametrize("document", [{"a": (1,)}, {1: 2}, {"a": float("nan")}, {"a": torch.ones(1)}])
def test_documents_are_plain_json(ckpt, document):
    with pytest.raises(LdmError, match=r"not plain JSON; state.json"):
        ckpt.save(1, tensors={}, trees={}, documents={"state": document})
    assert ckpt.steps() == []


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.empty(2, device="meta")], ids=["sparse", "meta"])
def test_tensors_that_cannot_be_saved_are_named(ckpt, tensor):
    for what in ({"tensors": {"x": {"odd": tensor}}, "trees": {}}, {"tensors": {}, "trees": {"x": {"odd": tensor}}}):
        with pytest.raises(LdmError, match=r"safetensors cannot hold this tensor .*; odd"):
            ckpt.save(1, **what, documents={})
    assert ckpt.steps() == [] and leftovers(ckpt.folder) == []


@pytest.mark.parametrize("name", ["manifest", "../x", "A", "", "model"])
def test_names_of_files_are_checked(ckpt, name):
    with pytest.raises(ValueError, match="given twice, or is no name"):
        ckpt.save(1, tensors={"model": {}}, trees={}, documents={name: {}})


# ---- corruption


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_older_one_taken_on_request(ckpt, name, kind, caplog):
    save(ckpt, 300, 400)
    DAMAGE[kind](ckpt.path(400) / name)
    before = fingerprint(ckpt.folder)
    with pytest.raises(LdmError) as caught:
        ckpt.newest()
    error = caught.value
    assert error.code == "CKPT-INVALID" and error.exit_code == 2
    assert error.what.startswith(name) and error.where == str(ckpt.path(400))
    assert error.line().endswith("step-000000400; newest valid is 300; rerun with resume.fallback=true")
    assert fingerprint(ckpt.folder) == before
    with caplog.at_level(logging.WARNING):
        loads_as(ckpt.newest(fallback=True), 300)
    assert (ckpt.folder / "bad-step-000000400").is_dir() and ckpt.steps() == [300]
    assert name in caplog.text and "older step 300" in caplog.text
    loads_as(ckpt.newest(), 300)


def test_without_the_hash_a_flipped_byte_loads_silently(ckpt):
    """Negative control: the corruption is real, and only the hash notices it."""
    save(ckpt, 1)
    flip(ckpt.path(1) / "model.safetensors")
    with pytest.raises(LdmError, match=r"model.safetensors does not match its sha256"):
        ckpt.newest()
    loaded = Store(ckpt.folder, verify="size").newest().tensors("model")
    assert difference(dict(sorted(loaded.items())), dict(sorted(state(1)["tensors"]["model"].items()))) is not None


def test_sizes_are_checked_before_reading_whatever_the_mode(ckpt):
    save(ckpt, 1)
    found = Store(ckpt.folder, verify="size").newest()
    (found.path / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(LdmError, match=r"model.safetensors has 2 bytes instead of"):
        found.tensors("model")


def test_nothing_valid_is_never_a_fresh_start(ckpt):
    save(ckpt, 1, 2)
    for step in (1, 2):
        flip(ckpt.path(step) / "state.json")
    for fallback in (False, True):
        with pytest.raises(LdmError, match=r"state.json .*no other checkpoint is valid"):
            ckpt.newest(fallback=fallback)
    assert ckpt.steps() == [1, 2]
    assert Store(ckpt.folder.parent / "empty").newest() is None


def test_a_second_bad_one_gets_its_own_name(ckpt):
    for _ in range(2):
        save(ckpt, *([] if ckpt.steps() else [1]), 2)
        flip(ckpt.path(2) / "state.json")
        ckpt.newest(fallback=True)
    assert {"bad-step-000000002", "bad-step-000000002-2"} <= {p.name for p in ckpt.folder.iterdir()}


def test_a_renamed_folder_is_refused(ckpt):
    save(ckpt, 1)
    ckpt.path(1).rename(ckpt.path(9))
    with pytest.raises(LdmError, match=r"manifest\.json is of step 1"):
        ckpt.newest()


def test_a_newer_schema_is_refused_with_both_versions_and_left_alone(ckpt):
    save(ckpt, 1, 2)
    path = ckpt.path(2) / manifest.FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(LdmError, match="schema_version 99, this ldm reads up to 1") as caught:
        ckpt.newest(fallback=True)
    assert caught.value.exit_code == 2 and ckpt.steps() == [1, 2]


@pytest.mark.parametrize("name", ["../../secret.json", "/etc/passwd", "a/b.json", "manifest.json", "x.pkl"])
def test_a_manifest_cannot_name_other_files(ckpt, name):
    folder = ckpt.path(1)
    folder.mkdir()
    about = {"step": 1, "score": None, "aliases": {}, "files": {name: {"size": 0, "sha256": ""}}}
    (folder / manifest.FILE).write_bytes(json_bytes(manifest.seal(about)))
    with pytest.raises(LdmError, match="is not the name of a checkpoint's file"):
        ckpt.newest()


def test_a_broken_checkpoint_is_reported_at_once_and_without_torch(ckpt):
    save(ckpt, 1, 2)
    flip(ckpt.path(2) / "model.safetensors")
    code = f"""
import sys
from ldm.checkpoints import codec, drift, run, tensorfile
from ldm.checkpoints.files import json_bytes
from ldm.checkpoints.store import Store
try:
    Store({str(ckpt.folder)!r}).newest()
except Exception as error:
    print(error, sorted({{'torch', 'safetensors', 'numpy'}} & set(sys.modules)))
"""
    start = os.times()
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "error[CKPT-INVALID]: model.safetensors" in shown and shown.endswith("[]\n")
    now = os.times()  # of the child's own work: this machine may be busy
    assert now.children_user + now.children_system - start.children_user - start.children_system < 2


# ---- choice


def test_neither_mtime_nor_latest_decides(ckpt):
    save(ckpt, 1, 2, 3)
    os.utime(ckpt.path(1), (2e9, 2e9))
    for content in (b'{"step": 1, "path": "step-000000001"}', b"torn", None):
        (ckpt.folder / "LATEST").unlink()
        if content:
            (ckpt.folder / "LATEST").write_bytes(content)
        assert ckpt.newest().step == 3
        (ckpt.folder / "LATEST").touch()


def test_truncate_sets_the_newer_ones_aside(ckpt):
    save(ckpt, 1, 2, 3)
    assert ckpt.truncate(1) == [2, 3] and ckpt.steps() == [1]
    assert (ckpt.folder / "abandoned-step-000000003" / manifest.FILE).is_file()
    save(ckpt, 2)
    assert ckpt.newest().step == 2


def test_truncate_keeps_everything_when_its_target_is_bad(ckpt):
    save(ckpt, 1, 2)
    flip(ckpt.path(1) / "state.json")
    for step in (1, 7):
        with pytest.raises(LdmError):
            ckpt.truncate(step)
    assert ckpt.steps() == [1, 2]


# ---- writing


def test_a_committed_step_is_never_overwritten(ckpt):
    save(ckpt, 1)
    before = fingerprint(ckpt.folder)
    with pytest.raises(LdmError, match="step 1 is already committed"):
        ckpt.save(1, **state(2))
    assert fingerprint(ckpt.folder) == before


@pytest.mark.parametrize("where", ["model", "ema", "optim"])
def test_non_finite_is_refused_by_name(ckpt, where):
    save(ckpt, 1)
    before, bad = fingerprint(ckpt.folder), state(2)
    tensor = bad["trees"]["optim"]["state"][0]["exp_avg"] if where == "optim" else bad["tensors"][where]["weight"]
    tensor[3] = float("nan")
    with pytest.raises(LdmError, match=f"NaN or infinity.*{where}.safetensors") as caught:
        ckpt.save(2, **bad)
    assert (caught.value.code, caught.value.exit_code) == ("NON-FINITE", NON_FINITE)
    assert ("state.0.exp_avg" if where == "optim" else "weight") in caught.value.what
    assert fingerprint(ckpt.folder) == before


def test_order_of_the_commit(ckpt, monkeypatch):
    """Files and folder are synced before the rename, its parent before LATEST; deletions come last."""
    save(ckpt, 1, 2)
    events = []

    def record(name, show):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, **k: (events.append((name, *map(show, a))), real(*a, **k))[1])

    record("fsync", lambda handle: os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
    record("rename", os.path.basename)
    record("replace", os.path.basename)
    ckpt.keep_last = 2
    save(ckpt, 3)
    ours, final = f"@{os.uname().nodename}-{os.getpid()}", "step-000000003"
    temp, hint = f".tmp-step-000000003{ours}", f".tmp-LATEST{ours}"
    *written, last_file = [e[1] for e in events[: len(FILES)]]
    assert sorted([*written, last_file]) == FILES and last_file == manifest.FILE
    assert events[len(FILES) :] == [
        ("fsync", temp),
        ("rename", temp, final),
        ("fsync", "ckpt"),
        ("fsync", hint),
        ("replace", hint, "LATEST"),
        ("fsync", "ckpt"),
        ("rename", "step-000000001", f".tmp-step-000000001{ours}"),
    ]


def test_a_file_size_limit_fails_the_save_and_nothing_else(ckpt):
    save(ckpt, 1)
    before, limits = fingerprint(ckpt.folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(SaveFailed, match="File too large") as caught:
            ckpt.save(2, **state(2, numel=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (caught.value.code, caught.value.exit_code) == ("DISK", TEMPORARY)
    assert fingerprint(ckpt.folder) == before and leftovers(ckpt.folder) == []
    save(ckpt, 2)


def test_a_vanished_folder_fails_the_save(ckpt):
    save(ckpt, 1)
    shutil.rmtree(ckpt.folder)
    with pytest.raises(SaveFailed, match="No such file or directory"):
        save(ckpt, 2)


def test_space_and_time_are_estimated_at_the_start(ckpt, monkeypatch):
    assert 0 < ckpt.expect(2**20) < 10
    monkeypatch.setattr(ckpt, "_probe", lambda size: 0.05 + size * 1e-9)  # once, and for each byte
    assert ckpt.expect(2**33) == pytest.approx(0.05 + 2**33 * 1e-9)
    with pytest.raises(SaveFailed, match=r"need 1200000000.0 GB, have .* GB; free space and rerun"):
        ckpt.expect(10**18)
    assert [entry.name for entry in ckpt.folder.iterdir() if "probe" in entry.name] == []


def test_without_space_no_byte_is_written(ckpt, monkeypatch):
    save(ckpt, 1)
    monkeypatch.setattr(ckpt, "_free", lambda: 9_000)
    monkeypatch.setattr(store, "_write", lambda *_: pytest.fail("written all the same"))
    with pytest.raises(SaveFailed, match=r"need 1\d\.\d kB, have 9 kB"):
        save(ckpt, 2)


def test_leftovers_of_the_dead_are_removed(ckpt):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid(), os.getppid()):
        (ckpt.folder / f".tmp-step-000000009-{pid}").mkdir()
    (ckpt.folder / f".tmp-LATEST-{dead.pid}").touch()
    ckpt.claim()
    assert leftovers(ckpt.folder) == [f".tmp-step-000000009-{os.getppid()}"]


# ---- retention


def test_last_and_best_rotate_apart(tmp_path):
    ckpt = Store(tmp_path / "ckpt", keep_last=2, keep_every=4, keep_best=2)
    ckpt.claim()
    for step, score in enumerate([5.0, 1.0, 2.0, 3.0, None, float("nan"), 4.0, 4.0, 9.0], start=1):
        save(ckpt, step, score=score)
    assert ckpt.steps() == [2, 3, 4, 8, 9]  # best: 2 and 3; every fourth: 4 and 8; last: 8 and 9


def test_without_scores_the_last_ones_stay(ckpt):
    save(ckpt, *range(1, 7))
    assert ckpt.steps() == [4, 5, 6]


def test_the_newest_valid_one_is_never_deleted(ckpt, monkeypatch):
    """Newer ones that are broken push the only good one out of the rotation; it stays."""
    ckpt.keep_last = 6
    save(ckpt, *range(1, 7))
    for step in (3, 4, 5, 6):
        flip(ckpt.path(step) / "model.safetensors")
    assert ckpt._prune(keep_last=2) == [1, 3, 4] and ckpt.steps() == [2, 5, 6]


def test_nothing_is_deleted_while_nothing_is_valid(ckpt):
    save(ckpt, 1, 2, 3)
    for step in ckpt.steps():
        flip(ckpt.path(step) / "model.safetensors")
    assert ckpt._prune(keep_last=1) == [] and ckpt.steps() == [1, 2, 3]


def test_a_failed_save_deletes_nothing(ckpt, monkeypatch):
    save(ckpt, 1, 2, 3)
    monkeypatch.setattr(store, "_write", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(SaveFailed, match="Input/output error"):
        save(ckpt, 4)
    assert ckpt.steps() == [1, 2, 3]


def test_deletion_follows_no_symlink_and_leaves_strangers_alone(ckpt, tmp_path):
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "file").touch()
    save(ckpt, 1)
    (ckpt.path(1) / "inside").symlink_to(treasure)
    ckpt.path(0).symlink_to(treasure)  # looks like the oldest step
    (ckpt.folder / "notes.txt").write_text("mine")
    (ckpt.folder / "step-best").mkdir()
    (ckpt.folder / f".tmp-step-000000008-{os.getpid()}").symlink_to(treasure)
    save(ckpt, 2, 3, 4, 5)
    ckpt.claim()
    assert ckpt.steps() == [3, 4, 5] and (treasure / "file").exists()
    names = {entry.name for entry in ckpt.folder.iterdir()}
    assert {"step-000000000", "notes.txt", "step-best"} <= names and leftovers(ckpt.folder) == []


def test_the_store_refuses_careless_settings(tmp_path):
    for bad in ({"keep_last": 1}, {"keep_every": 0}, {"keep_best": -1}, {"verify": "no"}):
        with pytest.raises(LdmError, match=f"checkpoint.{next(iter(bad))}"):
            Store(tmp_path, **bad)
