"""Caches of latents and texts: what is written is what encoding gives, and nothing else than that is ever read."""

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm.data.cache import Cache, preprocessing_of, row_sums, sources_of, tables_of, text_hash
from ldm.data.captions import Captions
from ldm.data.datamodule import DataModule
from ldm.data.index import MEMBER, Index
from ldm.data.moments import MomentTables
from ldm.data.shards import open_dataset
from ldm.data.transforms import PIXELS, Transform
from ldm.errors import LdmError
from ldm.models.autoencoder.identity import Identity
from ldm.models.autoencoder.kl import AutoencoderKL
from ldm.models.conditioner.class_label import ClassLabel
from ldm.models.conditioner.compose import Compose, condition
from ldm.models.conditioner.open_clip import OpenClipText
from ldm.models.conditioner.text_transformer import TextTransformer
from ldm.precompute.cache import RECORDS, Folder, Settings, cut_rows, identity, moments_pieces, write_cache
from ldm.precompute.text import encoder_ids, remembered, text_encoders, text_pieces, texts_of, unique
from ldm.random import Draws
from tests.data.making import picture, sample, write_shards, write_tar

SMALL = 0.002  # MB a file: several pieces for a shard


def make_autoencoder(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"latent_channels": 2, "block_channels": [8, 8], "layers_per_block": 1, "norm_groups": 4}
    autoencoder = AutoencoderKL(**sizes | options).eval().requires_grad_(False)
    autoencoder.statistics.std.copy_(torch.tensor([0.5, 2.0]))
    return autoencoder


def data_of(folder, **options):
    options = {"image_size": 8, "index_dir": str(folder / "index"), **options}
    return DataModule(str(folder / "data"), **options).open().configure(seed=0, batch_size=4)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """23 samples for training in three shards, 5 for validation, one picture of them broken behind its header."""
    folder = tmp_path_factory.mktemp("cached")
    write_shards(folder / "data", [5, 9])
    members = [m for n in range(14, 23) for m in sample(n, (13, 8))]
    number = next(i for i, (name, _) in enumerate(members) if name == "s00017.png")
    members[number] = ("s00017.png", members[number][1][:60])
    write_tar(folder / "data" / "train-000002.tar", members)
    write_tar(folder / "data" / "val-000000.tar", [m for n in range(90, 95) for m in sample(n)])
    return folder


def write(place, out, autoencoder=None, text=None, encoders=None, data=None, **how):
    """The finished content of cache.json, or None."""
    run = {key: how.pop(key) for key in ("rank", "world_size") if key in how}
    settings = Settings(**{"piece_mb": SMALL, "batch_size": 4, **how})
    data, autoencoder = data or data_of(place), autoencoder or make_autoencoder()
    pieces = list(moments_pieces(data, autoencoder, settings))
    if encoders:
        texts = unique(t for split in ("train", "val") for t in texts_of(data.dataset(split), data.captions))
        pieces += text_pieces(encoders, texts, settings)
    return write_cache(Folder(out, identity(data, autoencoder, pieces, settings, text)), pieces, **run)[0]


@pytest.fixture(scope="module")
def cached(place):
    write(place, place / "cache", flipped=True)
    return place / "cache"


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def take(stream, count):
    return [batch for _, batch in zip(range(count), stream, strict=False)]


# ---- the rows are the moments


@pytest.mark.parametrize("flip_prob", [0.0, 0.5])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_of_the_cache_is_the_stream_of_pictures_encoded(place, cached, flip_prob, num_workers, monkeypatch):
    """Same slots, keys, captions, replacements; moments are those of each batch's own pictures, mirrored or not."""
    autoencoder = make_autoencoder()
    pictures = data_of(place, flip_prob=flip_prob, max_bad_fraction=1.0)
    online = take(pictures.train_dataloader(), 12)
    data = data_of(place, flip_prob=flip_prob, max_bad_fraction=1.0)
    data.configure(seed=0, batch_size=4, num_workers=num_workers)
    cache = Cache.open(cached)
    cache.check(autoencoder.latent_id(), data.transform)
    data.use_moments(cache.moments(data.dataset("train")), cache.moments(data.dataset("val")))
    monkeypatch.setattr("ldm.data.pipeline.decode_image", None)  # no picture is decoded
    stream = data.train_dataloader()
    for a, b in zip(online, take(stream, 12), strict=True):
        assert (a.keys, a.captions, a.slots.tolist()) == (b.keys, b.captions, b.slots.tolist()) and b.images is None
        torch.testing.assert_close(b.moments, autoencoder.moments(a.images), rtol=1e-5, atol=1e-6)
    stream.close()
    assert data.ledger.counts == pictures.ledger.counts and data.ledger.counts["decode"] > 0
    held_out = take(data.val_dataloader(4), 2)
    assert [b.keys[:4] for b in held_out] == [["s00090", "s00091", "s00092", "s00093"], ["s00094"] * 4]


def test_mirror_images_are_other_rows(cached):
    """Negative control of the test above: what it compares differs by far more than it allows."""
    tensors = load_file(cached / "moments-000000.safetensors")
    apart = (tensors["moments"] - tensors["mirrored_moments"]).abs().flatten(1).amax(1)
    assert apart.min() > 1e-2


def test_any_reader_of_safetensors_reads_it(place, cached):
    autoencoder, data = make_autoencoder(), data_of(place)
    files = sorted(cached.glob("moments-*.safetensors"))
    assert len(files) == len(json.loads((cached / "cache.json").read_bytes())["files"]) > 4
    found = {}
    for file in files:
        tensors = load_file(file)
        keys = json.loads(bytes(tensors["keys"].tolist()))
        found |= dict(zip(keys, zip(tensors["moments"], tensors["usable"], strict=True), strict=True))
    assert sorted(found) == sorted([*data.dataset("train").keys, *data.dataset("val").keys])
    for batch in data.encode_dataloader("train", 3):
        for key, moments, valid in zip(batch.keys, autoencoder.moments(batch.images), batch.valid, strict=True):
            assert found[key][1] == valid
            if valid:
                torch.testing.assert_close(found[key][0], moments, rtol=1e-5, atol=1e-6)
            else:
                assert not found[key][0].any()


def test_pixels_can_be_cached(place, tmp_path):
    about = write(place, tmp_path / "c", Identity())
    assert about["rounding_error"]["mean"] == about["rounding_error"]["std"] == 0 and about["usable"] == 27
    data = data_of(place)
    images = next(iter(data.encode_dataloader("val", 5))).images
    found = Cache.open(tmp_path / "c").moments(data.dataset("val")).take(np.arange(5), np.zeros(5, bool))
    assert torch.equal(found, images)


@pytest.mark.parametrize("dtype, error", [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_the_bits_and_a_measured_error(place, cached, tmp_path, dtype, error):
    about = write(place, tmp_path / "c", dtype=dtype)
    exact, data = Cache.open(cached), data_of(place)
    good = np.flatnonzero(exact.moments(data.dataset("train")).usable)
    rows = [c.moments(data.dataset("train")).take(good, good < 0) for c in (exact, Cache.open(tmp_path / "c"))]
    assert rows[1].dtype == getattr(torch, dtype)
    a, b = (row.double() for row in rows)
    assert ((a - b).abs() <= 1.01 * error * a.abs() + 1e-6).all() and not torch.equal(a, b)
    val = [c.moments(data.dataset("val")).take(np.arange(5), np.zeros(5, bool)).double() for c in
           (exact, Cache.open(tmp_path / "c"))]  # fmt: skip
    means = [torch.cat([a[:, :2], val[0][:, :2]]), torch.cat([b[:, :2], val[1][:, :2]])]
    expected = ((means[0] - means[1]) / torch.tensor([0.5, 2.0]).view(2, 1, 1)).square().mean().sqrt()
    assert about["rounding_error"]["mean"] == pytest.approx(float(expected), rel=0.01)  # other batches, other rounding
    assert 0 < about["rounding_error"]["std"] < 0.1


def test_buckets_have_files_of_their_own(tmp_path):
    members = [m for n in range(12) for m in sample(n, [(64, 64), (96, 48), (48, 96)][n % 3])]
    (tmp_path / "data").mkdir()
    write_tar(tmp_path / "data" / "train-000000.tar", members)
    sizes = {"enable_bucket": True, "bucket_reso_steps": 16, "min_bucket_reso": 32, "max_bucket_reso": 128}
    autoencoder = make_autoencoder()

    def data():
        return data_of(tmp_path, image_size=64, bucket=sizes)

    write(tmp_path, tmp_path / "c", autoencoder, data=data(), piece_mb=100)
    cache, found = Cache.open(tmp_path / "c"), data()
    cache.check(autoencoder.latent_id(), found.transform, found.buckets)
    with pytest.raises(LdmError, match=r"data\.bucket was"):
        cache.check(autoencoder.latent_id(), found.transform)
    shapes = {tuple(entry["shape"][1:]) for entry in cache.about["files"].values()}
    assert len(shapes) == len(cache.about["files"]) == 3
    found.use_moments(cache.moments(found.dataset("train")))
    online = take(data().train_dataloader(), 6)
    for a, b in zip(online, take(found.train_dataloader(), 6), strict=True):
        assert a.keys == b.keys
        torch.testing.assert_close(b.moments, autoencoder.moments(a.images), rtol=1e-5, atol=1e-6)
    assert len({batch.images.shape for batch in online}) == 3
    with pytest.raises(ValueError, match="several sizes"):
        cache.moments(found.dataset("train")).take(np.arange(3), np.zeros(3, bool))


def test_200_000_samples_are_found_by_arrays(tmp_path):
    """Nothing but arrays is kept, 25 bytes a sample."""
    count = 200_000

    class Many:
        num_samples = count
        shard_lengths = np.array([count])
        manifest = (("a.tar", "a" * 64),)
        indexes = (Index(members=np.zeros((count, 3), MEMBER)),)
        digests = np.random.default_rng(0).permutation(count).astype(np.uint64)
        keys = range(count)

    folder = tmp_path / "c"
    folder.mkdir()
    from ldm.checkpoints.tensorfile import write_tensors
    from ldm.data.cache import seal

    rows = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1)
    tensors = {
        "moments": rows,
        "usable": torch.ones(count, dtype=torch.bool),
        "sums": row_sums(rows),
        "digests": torch.arange(count),
    }
    with open(folder / "moments-000000.safetensors", "wb") as file:
        from ldm.checkpoints.files import Digesting

        write_tensors(Digesting(file), tensors)
    size = os.path.getsize(folder / "moments-000000.safetensors")
    entry = {"kind": "moments", "source": sources_of(Many())[0][1], "bytes": size}
    about = {"format": 1, "finite": True, "flipped": False, "files": {"moments-000000.safetensors": entry}}
    (folder / "cache.json").write_text(json.dumps(seal(about)))
    moments = Cache.open(folder).moments(Many())
    ids = np.array([5, 199_999, 0, 77])
    assert moments.take(ids, ids < 0).flatten().tolist() == Many.digests[ids].astype(float).tolist()
    kept = [value for value in vars(moments).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in kept) <= 25 * count


# ---- written once, by any number of processes


def test_any_number_of_processes_writes_the_same_bytes(place, cached, tmp_path):
    assert write(place, tmp_path / "c", flipped=True, rank=1, world_size=2) is None
    with pytest.raises(LdmError, match="not finished"):
        Cache.open(tmp_path / "c")
    assert write(place, tmp_path / "c", flipped=True, rank=0, world_size=2) is not None
    assert content(tmp_path / "c") == content(cached)


@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_a_stopped_command_goes_on(place, cached, tmp_path, monkeypatch, after):
    """Stopped in the middle of writing a file and between a file and its record: finished pieces are not made again."""

    class Stop(BaseException):
        pass

    original, calls = os.replace, []

    def stopping(source, target):
        calls.append(target)
        if len(calls) > 2 * after + 1 + after % 2:  # plan.json, then file and record of each piece
            raise Stop
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        with pytest.raises(Stop):
            write(place, tmp_path / "c", flipped=True)
    made = []
    encode = AutoencoderKL.moments
    monkeypatch.setattr(AutoencoderKL, "moments", lambda self, x: made.append(len(x)) or encode(self, x))
    write(place, tmp_path / "c", flipped=True)
    assert content(tmp_path / "c") == content(cached)
    assert (sum(made) < 2 * 28) is (after > 0)  # pictures and mirror images
    assert not list((tmp_path / "c").rglob(".tmp-*"))


def flip_byte(path, at=-9):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-7])


def replace_in(path, old, new):
    assert path.read_bytes().count(old) == 1
    path.write_bytes(path.read_bytes().replace(old, new))


RECORD = f"{RECORDS}/moments-000001.safetensors.json"
DAMAGE = {
    "file deleted": lambda c: (c / "moments-000001.safetensors").unlink(),
    "file cut off": lambda c: cut_off(c / "moments-000001.safetensors"),
    "cache.json deleted": lambda c: (c / "cache.json").unlink(),
    "cache.json changed": lambda c: replace_in(c / "cache.json", b'"finite": true', b'"finite": 1'),
    "cache.json no longer JSON": lambda c: (c / "cache.json").write_text("{"),
    "cache.json of another program": lambda c: (c / "cache.json").write_text("[1]"),
    "cache.json says another type": lambda c: replace_in(c / "cache.json", b'"float32"', b'"float33"'),
    "cache.json and a file": lambda c: ((c / "cache.json").unlink(), cut_off(c / "moments-000001.safetensors")),
    "cache.json and a record": lambda c: ((c / "cache.json").unlink(), (c / RECORD).write_text("[]")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_is_named_and_mended(place, cached, tmp_path, name, monkeypatch):
    """By the command that the message names, which encodes nothing but the file that is damaged."""
    folder = shutil.copytree(cached, tmp_path / "c")
    DAMAGE[name](folder)
    with pytest.raises(LdmError, match="CACHE") as refused:
        Cache.open(folder)
    assert refused.value.exit_code == 2 and "command" in refused.value.next
    assert ("moments-000001" in refused.value.line()) is ("cache.json" not in name)
    written = []
    original = Folder.write
    monkeypatch.setattr(Folder, "write", lambda self, piece: written.append(piece.name) or original(self, piece))
    write(place, folder, flipped=True)
    assert content(folder) == content(cached)
    assert written == ["moments-000001.safetensors"] * ("file" in name or "record" in name)


def test_a_damaged_cache_is_not_mended_by_another_command(place, cached, tmp_path):
    folder = shutil.copytree(cached, tmp_path / "c")
    (folder / "cache.json").unlink()
    before = content(folder)
    with pytest.raises(LdmError, match="OUT holds another cache: dtype was"):
        write(place, folder, flipped=True, dtype="float16")
    shutil.rmtree(folder / RECORDS)  # now nothing says what the files are
    with pytest.raises(LdmError, match="OUT is not empty: moments-000000"):
        write(place, folder, flipped=True)
    assert content(folder) == {name: data for name, data in before.items() if RECORDS not in name}


def test_files_in_the_making_on_other_hosts_are_left_alone(place, cached, tmp_path):
    """No process here has the number of one that was killed here, or that writes on another host."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    write(place, tmp_path / "c", flipped=True, rank=1, world_size=2)
    names = [f".tmp-moments-000000.safetensors@{host}-{dead.pid}" for host in (os.uname().nodename, "another-node-7")]
    for name in names:
        (tmp_path / "c" / name).touch()
        (tmp_path / "c" / RECORDS / name).touch()
    write(place, tmp_path / "c", flipped=True, rank=0, world_size=2)
    left = {name for name in content(tmp_path / "c") if ".tmp" in name}
    assert left == {names[1], f"{RECORDS}/{names[1]}"}
    for name in left:
        (tmp_path / "c" / name).unlink()
    assert content(tmp_path / "c") == content(cached)


def test_a_row_that_is_larger_than_a_file_may_be_has_one_of_its_own(place, tmp_path):
    about = write(place, tmp_path / "c", piece_mb=0.0001)
    assert [entry["count"] for entry in about["files"].values()] == [1] * 28
    assert [rows.tolist() for rows in cut_rows(np.arange(3), 2**30, 256)] == [[0], [1], [2]]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_byte_that_turned_is_noticed_where_it_is_read(place, cached, tmp_path, num_workers):
    """Sizes are right, so opening succeeds; the row's sum is not, and the run stops with the file's name."""
    folder = shutil.copytree(cached, tmp_path / "c")
    about = json.loads((folder / "cache.json").read_bytes())
    for file in folder.glob("moments-*"):
        start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        header = json.loads(file.read_bytes()[8:start])
        flip_byte(file, start + header["moments"]["data_offsets"][0] + 5)
    data = data_of(place, max_bad_fraction=1.0)
    data.configure(seed=0, batch_size=4, num_workers=num_workers)
    data.use_moments(Cache.open(folder).moments(data.dataset("train")))
    stream = data.train_dataloader()
    with pytest.raises(LdmError, match="row 0 is not what was written") as stopped:
        take(stream, 12)
    stream.close()
    assert stopped.value.exit_code == 1 and "moments-" in stopped.value.where
    write(place, folder, flipped=True)  # compares hashes, so it finds and mends them
    assert content(folder) == content(cached) and about["finite"]


def test_a_file_that_shrinks_while_it_is_read(place, cached, tmp_path):
    folder = shutil.copytree(cached, tmp_path / "c")
    moments = Cache.open(folder).moments(data_of(place).dataset("val"))
    for file in folder.glob("moments-*"):
        os.truncate(file, 200)
    with pytest.raises(LdmError, match="bytes are left"):
        moments.take(np.arange(5), np.zeros(5, bool))


@pytest.mark.parametrize("key, value", [("shape", [10**12, 4, 4, 4]), ("data_offsets", [-900, 0]), ("dtype", "F9")])
def test_a_header_that_lies_is_refused(cached, tmp_path, key, value):
    data = (cached / "moments-000000.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    for changed in (False, True):
        header["sums"] |= {key: value} if changed else {}
        text = json.dumps(header).encode()
        (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
        if not changed:
            assert set(tables_of(tmp_path / "file")) == set(header) - {"__metadata__"}
    with pytest.raises(LdmError, match="the cache is damaged"):
        tables_of(tmp_path / "file")


# ---- refused


def differences(cache, *check):
    with pytest.raises(LdmError) as refused:
        cache.check(*check)
    return refused.value.line().splitlines()


def test_a_cache_made_by_something_else_is_refused_line_by_line(cached):
    cache, ours = Cache.open(cached), make_autoencoder().latent_id()
    transform = Transform(8)
    cache.check(ours, replace(transform, flip_prob=0.5, key=99))  # these two are the run's own
    lines = differences(cache, make_autoencoder(1).latent_id(), replace(transform, crop="pad", background=(0, 0, 0)))
    assert len(lines) == 3 and all(line.startswith("error[CACHE]") for line in lines)
    for words in (
        "latent_id was",
        "data.crop was center, now pad",
        "data.background was [255, 255, 255], now [0, 0, 0]",
    ):
        assert sum(words in line for line in lines) == 1
    assert len(differences(cache, ours, replace(transform, image_size=16))) == 1
    assert "random crops cannot be cached" in differences(cache, ours, replace(transform, crop="random"))[0]


def test_without_mirror_images_no_flip(place, tmp_path):
    write(place, tmp_path / "c")
    cache = Cache.open(tmp_path / "c")
    assert "flipped" in differences(cache, make_autoencoder().latent_id(), Transform(8, flip_prob=0.1))[0]
    with pytest.raises(ValueError, match="no mirror images"):
        cache.moments(data_of(place).dataset("val")).take(np.arange(2), np.array([True, False]))
    with pytest.raises(ValueError, match="no mirror images"):
        MomentTables.of(torch.zeros(2, 4, 1, 1)).take(np.arange(2), np.array([True, False]))


def test_other_data_are_refused_shard_by_shard(place, cached, tmp_path):
    """Another version of a shard, one that is new, and samples that the cache was made without."""
    folder = tmp_path / "data"
    shutil.copytree(place / "data", folder)
    write_tar(folder / "train-000001.tar", [m for n in range(40, 44) for m in sample(n)])
    write_tar(folder / "train-000007.tar", sample(50))
    with pytest.raises(LdmError) as refused:
        Cache.open(cached).moments(open_dataset(str(folder), split="train", index_dir=str(tmp_path / "i")))
    lines = refused.value.line().splitlines()
    assert len(lines) == 2
    assert "train-000001.tar is not in the cache: the cache was made of another version of it" in lines[0]
    assert "train-000007.tar is not in the cache: the cache was made without it" in lines[1]
    (folder / "train-000007.tar").unlink()
    shutil.copy(place / "data" / "train-000001.tar", folder / "renamed.tar")  # by content, whatever its name
    few = data_of(place, max_train_samples=9)
    write(place, tmp_path / "few", data=few)
    cache = Cache.open(tmp_path / "few")
    assert len(cache.moments(few.dataset("train")).rows) == 9
    with pytest.raises(LdmError, match=r"of 5 samples of train-000000.tar are not in the cache, the first is s0000"):
        cache.moments(data_of(place).dataset("train"))
    renamed = open_dataset(str(folder / "renamed.tar"), index_dir=str(tmp_path / "i"))
    assert (Cache.open(cached).moments(renamed).rows >= 0).all()


def test_a_place_that_holds_something_else_is_left_alone(place, cached, tmp_path):
    before = content(cached)
    with pytest.raises(LdmError, match="EXISTS") as refused:
        write(place, cached, make_autoencoder(1), flipped=False, dtype="float16")
    lines = refused.value.line().splitlines()
    assert {line.split(": ")[2].split(" was")[0] for line in lines} == {"latent_id", "dtype", "flipped"}
    assert content(cached) == before
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(LdmError, match=r"OUT is not empty: mine\.txt"):
        write(place, tmp_path)
    unfinished = tmp_path / "half"
    write(place, unfinished, rank=1, world_size=2)
    with pytest.raises(LdmError, match="dtype was"):
        write(place, unfinished, dtype="float16")


def test_random_crops_are_refused_before_anything_is_written(place, tmp_path):
    with pytest.raises(LdmError, match="random crops cannot be cached"):
        write(place, tmp_path / "c", data=data_of(place, crop="random"))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("weight, dtype, hint", [(float("nan"), "float32", "anew"), (1e6, "float16", "bfloat16")])
def test_latents_that_are_not_finite_are_never_written(place, tmp_path, weight, dtype, hint):
    autoencoder = make_autoencoder()
    autoencoder.quant_conv.bias[0] = weight
    with pytest.raises(LdmError, match="not finite") as refused:
        write(place, tmp_path / "c", autoencoder, dtype=dtype)
    assert hint in refused.value.next and "s00000" in refused.value.where
    assert not list((tmp_path / "c").glob("moments*"))


def test_a_manifest_that_admits_it_is_refused(cached, tmp_path):
    from ldm.data.cache import seal

    folder = shutil.copytree(cached, tmp_path / "c")
    about = json.loads((folder / "cache.json").read_bytes())
    about = {key: value for key, value in about.items() if key != "digest"}
    outside = {"../moments-000000.safetensors": about["files"]["moments-000000.safetensors"]}
    cases = [({"finite": False}, "not finite"), ({"format": 9}, "its format is 9"), ({"files": outside}, "no name")]
    for changed, words in cases:
        (folder / "cache.json").write_text(json.dumps(seal({**about, **changed})))
        with pytest.raises(LdmError, match=words):
            Cache.open(folder)


def test_what_the_rows_depend_on_is_compared():
    """Every setting of a Transform but the two that belong to a run: a new one cannot be forgotten."""
    assert set(preprocessing_of(Transform(8))) == {*vars(Transform(8)), "bucket", "pixels"} - {"flip_prob", "key"}


def test_other_pixels_have_another_number(cached, monkeypatch):
    """What a picture becomes today. Where this fails, raise PIXELS, and write down the new numbers."""
    image = Image.open(io.BytesIO(picture(0, (13, 9)))).convert("RGB")
    wanted = np.array([[174, 122, 108], [133, 135, 105], [161, 99, 158], [98, 102, 162]])
    found = Transform(4)(image, np.full(3, 0.5, dtype=np.float32))[1].astype(int)
    assert PIXELS == 2 and np.abs(found - wanted).max() <= 1  # processors round differently
    monkeypatch.setattr("ldm.data.cache.PIXELS", PIXELS + 1)
    lines = differences(Cache.open(cached), make_autoencoder().latent_id(), Transform(8))
    assert len(lines) == 1 and "the version of decoding and resizing was 2, now 3" in lines[0]


def test_a_text_that_changes_leaves_the_latents_valid(place, tmp_path):
    """A folder is one shard; only its pictures count. One of them that changes is refused, whatever its time says."""
    folder = tmp_path / "data"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.png").write_bytes(picture(n))
        (folder / f"{n}.txt").write_text("before")
    write(tmp_path, tmp_path / "c", data=data_of(tmp_path))
    (folder / "1.txt").write_text("another text")
    assert (Cache.open(tmp_path / "c").moments(data_of(tmp_path).dataset("train")).rows >= 0).all()
    assert write(tmp_path, tmp_path / "c", data=data_of(tmp_path)) is not None  # nor is the same command refused
    (folder / "1.png").write_bytes(picture(9))
    with pytest.raises(LdmError, match="data is not in the cache: the cache was made of another version of it"):
        Cache.open(tmp_path / "c").moments(data_of(tmp_path).dataset("train"))


# ---- texts

TOWER = {"embed_dim": 6, "text_cfg": {"width": 8, "heads": 2, "layers": 2}}


def tower(seed=0, **options):
    torch.manual_seed(seed)
    return OpenClipText(**{"config": TOWER, "width": 8, "pooled": True, "drop_prob": 0.3, **options})


def node_of(**options):
    args = {"config": TOWER, "width": 8, "pooled": True, **options}
    return {"class": "ldm.models.conditioner.open_clip.OpenClipText", "args": args}


def with_text(place, out, conditioner, node, captions=None, **how):
    encoders = text_encoders(conditioner)
    text = {
        "ids": encoder_ids(conditioner, node),
        "captions": vars(captions or Captions()),
        "fields": [f"{name}.{field}" for name in encoders for field in ("tokens", "vector")],
    }
    write(place, out, text=text, encoders=encoders, piece_mb=0.02, **how)
    return Cache.open(out)


def test_texts_come_back_with_dropout_and_null(place, tmp_path):
    conditioner = tower()
    cache = with_text(place, tmp_path / "c", conditioner, node_of())
    assert len(list((tmp_path / "c").glob("text-*"))) > 1
    instead = remembered(text_encoders(conditioner), cache.text())
    captions = [f"caption {n}" for n in (3, 19, 92, 3)] * 8
    draws = Draws(7, torch.arange(32))
    found, wanted = (condition(conditioner, {"caption": captions}, 32, draws, i) for i in (instead, {}))
    torch.testing.assert_close(found.tokens, wanted.tokens, rtol=1e-4, atol=1e-5)  # other batches, other rounding
    torch.testing.assert_close(found.vector, wanted.vector, rtol=1e-4, atol=1e-5)
    null = conditioner([""]).tokens[0]
    dropped = [torch.allclose(row, null, atol=1e-5) for row in found.tokens]
    assert 3 < sum(dropped) < 20 and found.mask is None
    calls = []
    conditioner.register_forward_hook(lambda *_: calls.append(1))
    condition(conditioner, {"caption": captions}, 32, draws, instead)
    assert not calls
    condition(conditioner, {"caption": ["another prompt"]}, 1, None, instead)  # of a sample, not of the data
    assert calls


def test_two_towers_and_a_part_that_is_trained(place, tmp_path):
    parts = {"one": tower(), "two": tower(1, pooled=False), "label": ClassLabel("shape", ["a", "b"], 8)}
    conditioner = Compose(parts, tokens=["one", "two"], join="channels", vector=["one", "label"])
    nodes = {"one": node_of(), "two": node_of(pooled=False), "label": {"class": "x", "args": {}}}
    node = {"class": "ldm.models.conditioner.compose.Compose", "args": {"parts": nodes}}
    encoders = text_encoders(conditioner)
    assert list(encoders) == ["one", "two"]
    text = {"ids": encoder_ids(conditioner, node), "captions": vars(Captions())}
    text["fields"] = ["one.tokens", "one.vector", "two.tokens"]
    write(place, tmp_path / "c", text=text, encoders=encoders, piece_mb=1)
    columns = {"caption": ["caption 3", "caption 4"], "shape": ["a", "b"]}
    instead = remembered(encoders, Cache.open(tmp_path / "c").text())
    found, wanted = (condition(conditioner, columns, 2, None, i) for i in (instead, {}))
    torch.testing.assert_close(found.tokens, wanted.tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.vector, wanted.vector, rtol=1e-4, atol=1e-5)
    assert found.vector.requires_grad and not found.tokens.requires_grad


def test_embeddings_by_another_tower_or_of_other_captions_are_refused(place, tmp_path):
    conditioner = tower()
    cache = with_text(place, tmp_path / "c", conditioner, node_of())
    same = encoder_ids(conditioner, node_of(drop_prob=0.9, weights="elsewhere", pad_id=0))  # given or by default
    cache.check_text(same, Captions())
    for ids in (encoder_ids(tower(1), node_of()), encoder_ids(tower(layer=-1), node_of(layer=-1))):
        with pytest.raises(LdmError, match="text encoder"):
            cache.check_text(ids, Captions())
    with pytest.raises(LdmError, match=r"data\.caption_prefix was , now logo of"):
        cache.check_text(same, Captions(caption_prefix="logo of "))


def test_what_has_no_fixed_embedding_is_refused(place):
    with pytest.raises(LdmError, match="trained along"):
        text_encoders(TextTransformer(16, 1, 2, 4, trim=False))
    with pytest.raises(LdmError, match="as many tokens as its batch"):
        text_encoders(TextTransformer(16, 1, 2, 4).requires_grad_(False))
    with pytest.raises(LdmError, match="reads no text"):
        text_encoders(ClassLabel("shape", ["a"], 8))
    with pytest.raises(LdmError, match="shuffled tags"):
        list(texts_of(data_of(place).dataset("train"), Captions(shuffle_caption=True)))


def test_every_caption_that_training_may_choose(tmp_path):
    (tmp_path / "data").mkdir()
    members = [("a.png", picture()), ("a.txt", b"one\ntwo"), ("b.png", picture(1)), ("b.txt", b"one")]
    write_tar(tmp_path / "data" / "a.tar", members)
    dataset = data_of(tmp_path).dataset("train")
    several = Captions(caption_lines=True, caption_choice="random", caption_suffix="!")
    assert sorted(unique(texts_of(dataset, several))) == ["", "one!", "two!"]
    assert sorted(unique(texts_of(dataset, replace(several, caption_choice="first")))) == ["", "one!"]
    assert [text_hash(t) for t in unique(texts_of(dataset, several))] == sorted(map(text_hash, ["", "one!", "two!"]))
