"""Processes that hold a folder, as other processes see them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.checkpoints import files


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="tells the states of processes by /proc")
def test_a_process_that_ended_and_waits_for_its_parent_is_not_alive():
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, and not collected
    assert not files.is_alive(child.pid)
    child.wait()
    assert files.is_alive(os.getpid())
