"""From the words of a command line to a checked configuration, and from any failure to one line and an exit code.

`run` is what the entry points call. `compose` uses Hydra's compose API, because Hydra's own entry point constructs
what a file names and prints its own errors before ours can. Nothing heavy is imported: help and configuration
errors do not wait for torch.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from ldm.config import CONFIGS, compose, key_of, sweep_axes, trusted_targets
from ldm.errors import INTERRUPTED, REFUSED, TERMINATED, LdmError, classified, nearest
from ldm.validate import validate

Main = Callable[[dict[str, Any], tuple[str, ...]], int | None]
"""(configuration, trusted packages) -> exit code; None is 0."""


def run(main: Main, config_name: str, argv: Sequence[str] | None = None, *, config_dir: Path = CONFIGS) -> NoReturn:
    """Compose, validate, call `main(cfg, trusted)` and leave with its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cfg: dict[str, Any] = {}

    def action() -> int | None:
        options, words = _options(argv)
        if options.help:
            return _show(usage(config_name, main.__doc__ or "", config_dir))
        if options.multirun:
            return _multirun(config_name, words, config_dir)
        cfg.update(compose(config_name, words, config_dir=config_dir))
        if options.cfg:
            return _show(_as_yaml(cfg))
        validate(cfg)
        return main(cfg, trusted_targets(words))

    sys.exit(handled(action, argv=argv, folder=lambda: run_folder(cfg)))


def run_folder(cfg: Mapping[str, Any]) -> Path | None:
    """Where the run of this configuration lives: `output_dir`/`name`."""
    return Path(cfg.get("output_dir") or "runs") / str(cfg["name"]) if cfg.get("name") else None


def handled(
    action: Callable[[], int | None], *, argv: Sequence[str] = (), folder: Callable[[], Path | None] = lambda: None
) -> int:
    """The exit code of `action`; every failure prints one line (per problem) on stderr.

    The traceback goes to `errors/rank<k>.txt` of the run folder if that exists, to the terminal with traceback=true.
    """
    try:
        return int(action() or 0)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    except LdmError as error:
        failure = error
    except Exception as error:  # the only one in the package: here errors become exit codes
        failure = classified(error)
        failure.__cause__ = error
    text = "".join(traceback.format_exception(failure.__cause__ or failure))
    home = folder()
    wanted = failure.exit_code not in (REFUSED, INTERRUPTED, TERMINATED)
    if wanted and home and home.is_dir() and not failure.recorded:
        from ldm.checkpoints.run import write_error

        rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
        with suppress(OSError):  # a full disk must not hide the line below
            write_error(home, rank, text)
            if failure.code == "UNCLASSIFIED":
                failure.next = f"read {home / 'errors' / f'rank{rank}.txt'}, or " + failure.next
    if "traceback=true" in (word.lower() for word in argv):
        print(text, file=sys.stderr)
    print(failure.line(), file=sys.stderr, flush=True)
    return failure.exit_code


def _options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the `key=value` words in their order."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--cfg", choices=["job"])
    try:
        options, words = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise LdmError("CONFIG", str(error), next="--help shows the options") from error
    for word in words:
        if word.startswith("-"):
            raise LdmError("CONFIG", f"unknown option {word!r}", next=nearest(word, ("--help", "--multirun", "--cfg")))
    return options, words


def usage(config_name: str, purpose: str, config_dir: Path = CONFIGS) -> str:
    """The text of --help, read off the files of `config_dir`."""
    defaults, _, keys = (config_dir / f"{config_name}.yaml").read_text().partition("\n\n")
    groups: dict[str, list[str]] = {}
    for path in sorted(config_dir.rglob("*.yaml")):
        group = path.parent.relative_to(config_dir).as_posix()
        if re.search(rf"\b{group}[:@]", defaults):
            groups.setdefault(group, []).append(path.stem)
    lines = [f"usage: python {config_name}.py [group=OPTION ...] [key=value ...]", "", purpose.strip().split("\n")[0]]
    if names := groups.pop("experiment", []):
        lines += ["", "experiments, chosen by experiment=NAME"]
        lines += [f"  {name:<24}{_headline(config_dir / 'experiment' / f'{name}.yaml')}" for name in names]
    lines += ["", "groups and their options"]
    lines += [f"  {group:<24}{', '.join(options)}" for group, options in groups.items()]
    lines += ["", "keys; --cfg job shows those of the groups too"]
    lines += [f"  {line}".rstrip() for line in keys.strip().splitlines()]
    lines += ["", "options", "  --cfg job               print the composed configuration and leave"]
    lines += ["  -m, --multirun          one run after another for every combination of key=1,2"]
    return "\n".join([*lines, "", "exit codes: docs/errors.md"])


def _headline(path: Path) -> str:
    comments = (line.lstrip("# ").rstrip() for line in path.read_text().splitlines() if line.startswith("#"))
    return next((c for c in comments if c and not c.startswith("@package")), "")


def _multirun(config_name: str, words: Sequence[str], config_dir: Path) -> int:
    """Run every combination of `key=1,2` in a process of its own; the first failure's exit code, else 0."""
    combinations = list(itertools.product(*sweep_axes(words)))
    codes = []
    for number, combination in enumerate(combinations, 1):
        base = compose(config_name, combination, config_dir=config_dir).get("name")
        named = not base or any(key_of(word) == "name" for word in combination)
        command = [*combination] if named else [*combination, f"name={base}-{number}"]  # one folder for each
        print(f"[{number}/{len(combinations)}]", *command, flush=True)
        codes.append(subprocess.run([sys.executable, sys.argv[0], *command]).returncode)
    return next((code for code in codes if code), 0)


def _show(text: str) -> int:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has seen enough; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _as_yaml(cfg: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(cfg), sort_keys=False, allow_unicode=True).rstrip()
