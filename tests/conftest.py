"""Every test runs offline, on the CPU, on two threads, and leaves nothing behind."""

import os
from pathlib import Path

os.environ.update(WANDB_MODE="disabled", HF_HUB_OFFLINE="1", WANDB_SILENT="true")

import pytest
import torch

torch.set_num_threads(2)
CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(autouse=True)
def _quiet_place(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def configs() -> Path:
    """The folder of the project's configuration."""
    return CONFIGS
