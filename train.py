"""Train: python train.py [experiment=NAME] [key=value ...]; --help lists both."""

from typing import Any

from ldm.cli import run


def main(cfg: dict[str, Any], trusted: tuple[str, ...]) -> int | None:
    """Trains the stages that are left of a run; the same command again continues it."""
    from ldm.checkpoints.run import find_run
    from ldm.data.splits import check_data

    check_data(cfg["data"])
    if cfg["init_from"]:
        find_run(cfg["init_from"], where="init_from")
    from ldm.training.fit import train  # here: help, and errors of configuration and data, do not wait for torch

    return train(cfg, trusted)


if __name__ == "__main__":
    run(main, "train")
