"""`python -m ldm doctor [key=value ...]`: one line for everything a run depends on.

torch is imported in a process of its own, so that a broken installation is a line and not a traceback.
"""

from __future__ import annotations

import json
import netrc
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from ldm.checkpoints.run import find_run
from ldm.config import CONFIGS, compose, trusted_targets
from ldm.data.splits import check_data, problems_of
from ldm.errors import REFUSED, LdmError, recognise
from ldm.validate import validate

Finding = tuple[str, str, str]
"""(ok | warn | FAIL, subject, words)"""

_WITHDRAWN = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}  # stole credentials on import
_LOW_DISK_GB = 5
_PROBE = """
import json, torch, torchvision
cuda = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__, "torchvision": torchvision.__version__, "built_for_cuda": torch.version.cuda,
    "gpus": [[p.name, p.total_memory] for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))]
    if cuda else [],
    "bf16": cuda and torch.cuda.is_bf16_supported(), "mps": torch.backends.mps.is_available(),
    "threads": torch.get_num_threads(),
}))
"""
_PARTS = """
import json, sys
from ldm.cli import handled

def action():
    from ldm.training.assemble import check_parts
    check_parts(*json.load(sys.stdin))

sys.exit(handled(action))
"""
_USAGE = """usage: python -m ldm doctor [group=OPTION ...] [key=value ...]

One line for everything that a run depends on: packages, devices, and the configuration and data that train.py would
have with the same words. ok, warn or FAIL; exit code 2 if one of them is FAIL. Nothing is trained.
python train.py --help lists groups and keys."""


def main(argv: Sequence[str]) -> int:
    """Print the findings; exit code 2 if one of them is FAIL."""
    if {"-h", "--help"} & set(argv):
        print(_USAGE)
        return 0
    failed = False
    for mark, subject, words in chain(_system(), _packages(), _devices(), _configuration(argv), _logging()):
        failed |= mark == "FAIL"
        print(f"{mark:<5}{subject:<20}{words}", flush=True)
    return REFUSED if failed else 0


def _system() -> Iterator[Finding]:
    yield "ok", "python", f"{platform.python_version()} at {sys.executable}"
    yield "ok", "platform", f"{platform.system()} {platform.release()} {platform.machine()}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield "ok", "cores, memory", f"{cores} cores, {memory:.0f} GB"
    free = shutil.disk_usage(".").free / 2**30
    enough = free >= _LOW_DISK_GB
    yield "ok" if enough else "warn", "free disk", f"{free:.0f} GB" + ("" if enough else "; checkpoints need room")


def _packages() -> Iterator[Finding]:
    for requirement in _requirements():
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield "FAIL", requirement.name, f'not installed; pip install "{requirement}" -c constraints.txt'
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        bounds = str(requirement.specifier) or "any"
        yield "ok" if fits else "FAIL", requirement.name, f"{version} (allowed: {bounds})"
    for name, versions in _WITHDRAWN.items():
        if (found := _version(name)) in versions:
            yield "FAIL", name, f"{found} was withdrawn as malicious; uninstall it and change your credentials"


def _requirements() -> list[Requirement]:
    """The core dependencies, from the repository if we are in it, else from the installed package."""
    project = CONFIGS.parent / "pyproject.toml"
    if project.is_file():
        lines = tomllib.loads(project.read_text())["project"]["dependencies"]
    else:
        lines = [line for line in metadata.requires("ldm") or [] if "extra ==" not in line]
    return [Requirement(line) for line in lines]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Finding]:
    probe = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
    if probe.returncode:
        last = probe.stderr.strip().splitlines()[-1:] or [f"exit code {probe.returncode}"]
        known = recognise(probe.stderr)
        both = f"torch {_version('torch')}, torchvision {_version('torchvision')}: "
        yield "FAIL", "import torch", both + (f"{known.what}; {known.next}" if known else last[0])
        return
    facts: dict[str, Any] = json.loads(probe.stdout.splitlines()[-1])
    yield "ok", "import torch", f"torch {facts['torch']} and torchvision {facts['torchvision']} fit together"
    for name, memory in facts["gpus"]:
        yield "ok", "device cuda", f"{name}, {memory / 2**30:.0f} GB, bf16 {'yes' if facts['bf16'] else 'no'}"
    if facts["mps"]:
        yield "ok", "device mps", "Apple GPU"
    if not facts["gpus"] and not facts["mps"]:
        yield "warn", "device cpu", f"{facts['threads']} threads; no GPU found: toy sizes only"


def _configuration(argv: Sequence[str]) -> Iterator[Finding]:
    """What train.py checks before it trains. What needs torch is checked in a process of its own."""
    try:
        cfg = compose("train", argv)
        validate(cfg)
    except LdmError as error:
        yield from (("FAIL", "configuration", line) for line in error.line().splitlines())
        return
    given = json.dumps([cfg, trusted_targets(argv)])
    parts = subprocess.run([sys.executable, "-c", _PARTS], input=given, capture_output=True, text=True)
    if parts.returncode:
        lines = [line for line in parts.stderr.splitlines() if line.startswith("error[")]
        last = parts.stderr.strip().splitlines()[-1:] or [f"exit code {parts.returncode}"]
        yield from (("FAIL", "configuration", line) for line in lines or last)
    else:
        yield "ok", "configuration", f"composes and fits together; run folder {cfg['output_dir']}/{cfg['name']}"
    try:
        if cfg["init_from"]:
            yield "ok", "init_from", str(find_run(cfg["init_from"], where="init_from"))
    except LdmError as error:
        yield "FAIL", "init_from", error.line()
    yield _dataset(cfg["data"])


def _dataset(node: Mapping[str, Any]) -> Finding:
    path = node.get("path")
    if "toy_logos" in str(path) and not Path(str(path)).exists():
        return "warn", "data", f"{path} does not exist yet; run python data/toy_logos/make.py"
    try:
        opened = check_data(node)
    except LdmError as error:
        return "FAIL", "data", error.line()
    if not opened:
        return "warn", "data", f"of your own, not looked at: {node.get('_target_')}"
    train, held_out = opened[0], sum(dataset.num_samples for dataset in opened[1:])
    problems = ", ".join(f"{count} {kind}" for kind, count in problems_of(opened).items())
    words = f"{train.num_samples} samples to train on, {held_out} held out, in {len(train.shards)} shards at {path}"
    return "warn" if problems else "ok", "data", words + (f"; left out: {problems}" if problems else "")


def _logging() -> Iterator[Finding]:
    key = "WANDB_API_KEY" in os.environ or _in_netrc()
    yield "ok", "wandb", "a key is configured: online" if key else "no key is configured: offline"


def _in_netrc() -> bool:
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
