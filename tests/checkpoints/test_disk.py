"""A disk that is really full: a small tmpfs in a private mount namespace."""

import re
import shutil
import subprocess
import sys
import textwrap

import pytest


def namespace_works() -> bool:
    if not shutil.which("unshare"):
        return False
    return (
        subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0
    )


needs_mount = pytest.mark.skipif(not namespace_works(), reason="needs unshare -m and mount, so root")


def in_namespace(mount: str, code: str, *arguments: str) -> str:
    """Output of Python code that runs after a mount only it sees; sys.argv[1:] are the arguments."""
    script = f'{mount} && exec "$0" -c "$@"'
    found = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, sys.executable, textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


FULL_DISK = """
    import os, sys
    from pathlib import Path
    import pytest, torch
    from ldm.checkpoints.store import SaveFailed, Store
    from tests.checkpoints.states import fingerprint, leftovers, loads_as, state

    torch.set_num_threads(1)
    disk = Path(sys.argv[1])
    ckpt = Store(disk / "ckpt")
    ckpt.claim()
    N = 60_000  # five tensors of this size and four bytes: 0.72 MB

    def fill(leave):
        found = os.statvfs(disk)
        with open(disk / "ballast", "ab") as file:
            file.write(bytes(max(0, found.f_bavail * found.f_frsize - leave)))

    def save(*steps):
        for step in steps:
            ckpt.save(step, **state(step, N))

    # 1. asked beforehand: refused in words, nothing touched
    save(1)
    before = fingerprint(ckpt.folder)
    fill(leave=100_000)
    with pytest.raises(SaveFailed) as caught:
        save(2)
    assert (caught.value.code, caught.value.exit_code) == ("DISK", 75)
    print(caught.value.line())
    assert fingerprint(ckpt.folder) == before and leftovers(ckpt.folder) == [] and ckpt.steps() == [1]

    # 2. a quota is invisible beforehand: the write itself fails half-way
    ckpt._require_space = lambda size: None
    with pytest.raises(SaveFailed, match="need .*, have .*"):
        save(2)
    assert fingerprint(ckpt.folder) == before and leftovers(ckpt.folder) == [] and ckpt.steps() == [1]
    del ckpt._require_space

    # 3. pruning the own rotation makes room: older ones go, the newest valid one stays until the commit
    (disk / "ballast").unlink()
    save(2, 3)
    fill(leave=200_000)
    for lie in (False, True):
        if lie:
            fill(leave=200_000)
            ckpt._require_space = lambda size: None
        last = ckpt.newest().step
        save(last + 1)
        assert ckpt.steps() == [last, last + 1], ckpt.steps()
        loads_as(ckpt.newest(), last + 1, N)
        loads_as(ckpt.load(last), last, N)
        assert leftovers(ckpt.folder) == []
        if not lie:
            save(last + 2)
    print("done")
"""


@needs_mount
def test_a_full_disk_costs_no_checkpoint(tmp_path):
    shown = in_namespace(f"mount -t tmpfs -o size=5m none {tmp_path}", FULL_DISK, str(tmp_path))
    assert shown.splitlines()[0].startswith(f"error[DISK]: checkpoint not saved; {tmp_path}/ckpt; need 8")
    assert re.search(r"need 8\d\d kB, have \d+(\.\d)? kB; free space and rerun the same command$", shown, re.MULTILINE)
    assert shown.endswith("done\n")


@needs_mount
def test_a_read_only_place_is_refused_at_the_start(tmp_path):
    code = """
        import sys
        from ldm.checkpoints.run import open_run
        try:
            open_run(sys.argv[1], "a")
        except Exception as error:
            print(error)
    """
    shown = in_namespace(
        f"mount --bind {tmp_path} {tmp_path} && mount -o remount,bind,ro {tmp_path}", code, str(tmp_path)
    )
    assert "error[RUN-FOLDER]: the run folder cannot be written: Read-only file system" in shown
    assert f"{tmp_path}/a; uid 0; choose another output_dir=" in shown


@pytest.mark.slow
def test_a_save_needs_little_memory_besides_the_state(tmp_path):
    """Streaming: 300 MB are saved with less than a tenth of that on top."""
    code = """
        import resource, sys, torch
        from ldm.checkpoints.store import Store
        torch.set_num_threads(1)
        store = Store(sys.argv[1])
        store.claim()
        store.save(1, tensors={"model": {"small": torch.ones(1)}}, trees={}, documents={})
        weights = {f"w{i}": torch.ones(2_500_000) for i in range(30)}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        store.save(2, tensors={"model": weights}, trees={}, documents={})
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) < 30
