"""What reading a set holds in memory: no more in the third epoch than in the first."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.making import picture, write_tar

LOGOS = Path(__file__).parents[2].parent / "shared" / "data" / "logos"

_EPOCHS = """
import json, os, sys
from pathlib import Path
from ldm.data.datamodule import DataModule

def resident():
    "MiB of this process and its children, shared pages counted once each; without files, which others map as well."
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in [os.getpid(), *children]]
    lines = [line for text in rollups for line in text.splitlines() if line.startswith(("Pss_Anon:", "Pss_Shmem:"))]
    return sum(int(line.split()[1]) for line in lines) / 1024

if __name__ == "__main__":
    path, index_dir, leak = sys.argv[1], sys.argv[2], sys.argv[3] == "leak"
    data = DataModule(path, image_size=128, crop="random", flip_prob=0.5, index_dir=index_dir).open()
    data.configure(seed=0, batch_size=32, num_workers=2)
    steps, found, kept = data.num_train // 32, [], []
    for step, batch in enumerate(data.train_dataloader()):
        if leak:
            kept.append(batch.images[:8].clone())
        if step % steps == steps - 1:
            found.append(resident())
        if len(found) == 4:
            break
    print(json.dumps({"samples": data.num_train, "resident": found}))
"""


def epochs_of(path, tmp_path, leak=""):
    """MiB after the first, second, third and fourth epoch."""
    (tmp_path / "epochs.py").write_text(_EPOCHS)
    command = [sys.executable, str(tmp_path / "epochs.py"), str(path), str(tmp_path / "index"), leak]
    # what is held, not what glibc keeps for later, which differs by 100 MiB from epoch to epoch
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    said = subprocess.run(command, capture_output=True, text=True, timeout=250, check=True, env=env).stdout
    return json.loads(said)["resident"]


def growth(resident):
    """Of three epochs, after one in which caches, handles and the allocator's arenas come to be."""
    return resident[-1] - resident[0]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's smaps_rollup")
def test_three_epochs_need_no_more_memory_than_one(tmp_path):
    path = LOGOS
    if not LOGOS.is_dir():
        path = tmp_path / "shards"
        path.mkdir()
        for shard in range(3):
            members = [(f"{shard}-{n}.png", picture(n, (140, 130))) for n in range(200)]
            members += [(f"{shard}-{n}.txt", b"a square") for n in range(200)]
            write_tar(path / f"{shard}.tar", sorted(members))
    assert growth(epochs_of(path, tmp_path)) < 12  # MiB
    assert growth(epochs_of(path, tmp_path, "leak")) > 24  # the control: a quarter of the pictures is kept
