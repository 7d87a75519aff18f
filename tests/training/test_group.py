"""Where a process stands, and what the failures of a group mean. Groups of real processes: tests/integration."""

import os

import pytest
import torch.distributed as dist

from ldm.errors import LdmError
from ldm.training import group
from ldm.training.group import check_agreement, loss_of, losses_named
from ldm.training.place import Place, first_host

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


@pytest.fixture
def environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM", "MASTER", "RANK", "LOCAL_", "WORLD_")):
            monkeypatch.delenv(name)

    def put(values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


def test_without_a_launcher_there_is_no_outer_place(environment):
    assert Place.outer() is None
    environment({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"})
    assert Place.outer() is None  # a batch script, of which there is one, whatever the job has asked for
    environment({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"})
    assert Place.outer() is None


def test_torchrun_and_slurm_say_where(environment):
    environment(STEP)
    place = Place.outer()
    assert place == Place(rank=5, local_rank=1, world_size=8, nodes=2)
    assert place.environment() == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(15000 + 3456),
    }
    environment({"MASTER_ADDR": "here", "MASTER_PORT": "1"})
    assert place.environment().keys() == {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
    environment(TORCHRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"})
    assert Place.outer() == Place(5, 1, 8, 2)  # srun torchrun: the inner one counts


@pytest.mark.parametrize(
    "nodes,host",
    [
        ("n1", "n1"),
        ("gpu[007-009,12],login", "gpu007"),
        ("a,b[1-2]", "a"),
        ("r[1-2]n[03-04]", "r1n03"),
        ("c[3]-ib", "c3-ib"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


def test_the_launcher_knows_the_nodes():
    assert Place(0, 0, 8, nodes=2).nodes_or(1) == Place(0, 0, 8, nodes=2).nodes_or(2) == 2
    assert Place(0, 0, 8).nodes_or(4) == 4
    with pytest.raises(LdmError, match=r"trainer\.nodes; 2 started, 4 configured"):
        Place(0, 0, 8, nodes=2).nodes_or(4)


@pytest.mark.parametrize(
    "error,code,words",
    [
        (RuntimeError("[gloo/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"), "PEER", "ended"),
        (RuntimeError("[gloo/tcp/buffer.cc:72] Timed out waiting 3000ms for recv"), "PEER", "did not answer"),
        (dist.DistBackendError("NCCL error: remote process exited"), "PEER", "ended"),
        (dist.DistNetworkError("failed to listen. port: 29500, code: -98, name: EADDRINUSE"), "LAUNCH", "port 29500"),
        (
            dist.DistStoreError("Timed out after 5 seconds waiting for clients. 1/2 clients joined."),
            "LAUNCH",
            "arrived",
        ),
    ],
)
def test_failures_of_the_group_have_words(error, code, words):
    with pytest.raises(LdmError, match=words) as named, losses_named():
        raise error
    assert named.value.code == code


def test_other_failures_stay_what_they_are():
    assert loss_of(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    with pytest.raises(RuntimeError, match="shapes"), losses_named():
        raise RuntimeError("shapes")


def test_what_differs_between_the_ranks_is_named(monkeypatch):
    def ranks(theirs):
        monkeypatch.setattr(group, "gathered", lambda mine: [mine, mine, mine | theirs])

    ranks({})
    check_agreement(settings={"seed": 0, "name": "a"}, versions={"torch": "1"})
    ranks({"settings.seed": "1", "versions.ldm": '"2"'})
    with pytest.raises(LdmError, match=r"settings\.seed, versions\.ldm; settings\.seed; rank 0: 0, rank 2: 1"):
        check_agreement(settings={"seed": 0, "name": "a"}, versions={"torch": "1"})


def test_the_short_limit_begins_behind_the_first_step(monkeypatch):
    """Compiling, or workers that start, may make the first one long."""
    limits, clock = [], [0.0]
    monkeypatch.setattr(group, "set_timeout", limits.append)
    monkeypatch.setattr(group.time, "monotonic", lambda: clock[0])
    timeouts = group.Timeouts()
    for pause, work in ((0, 900), (1, 900), (400, 1), (1, 1)):
        clock[0] += pause
        timeouts.on_train_batch_start(None, None)
        clock[0] += work
        timeouts.on_train_batch_end(None, None)
    timeouts.on_train_end(None, None)
    assert [limit.total_seconds() for limit in limits] == [600, 1600, 1800]
