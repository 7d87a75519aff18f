"""A network from a package of the user's own: trained, and sampled from, where the command line trusts the package."""

import pytest

from ldm.errors import LdmError
from ldm.model import LatentDiffusion
from ldm.training.fit import train
from tests.integration.tiny import command, config

PACKAGE = """
from torch import nn


class Net(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, time, cond):
        return self.conv(x)
"""


@pytest.mark.slow
def test_sampling_builds_what_the_command_line_trusts_and_nothing_else(shards, tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    cfg = config(shards, tmp_path / "runs", steps=4)
    cfg["model"]["network"] = {"_target_": "my_networks.Net", "channels": 4}
    with pytest.raises(LdmError, match=r"'my_networks\.Net' may not be constructed"):
        train(cfg)
    train(cfg, ("my_networks",))
    run = tmp_path / "runs" / "tiny"
    with pytest.raises(LdmError, match=r"'my_networks\.Net' may not be constructed.*trusted_targets"):
        LatentDiffusion.load(run)
    words = [f"run={run}", "prompt=a red disc", "count=1", f"output_dir={tmp_path / 'pictures'}"]
    code, output = command([*words, "trusted_targets=[my_networks]"], "sample.py", PYTHONPATH=str(tmp_path))
    assert code == 0, output
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1
