"""Sample: python sample.py [run=PATH] prompt="a red fox, flat logo" [key=value ...]; --help lists the keys."""

from typing import Any

from ldm.cli import run


def main(cfg: dict[str, Any], trusted: tuple[str, ...]) -> int | None:
    """Makes pictures with a trained model; run=PATH chooses it, by default the run that was trained last."""
    from ldm.sampling.request import read_request

    request = read_request(cfg)
    from ldm.sampling.main import sample  # here: help, and errors of configuration and files, do not wait for torch

    return sample(cfg, request, trusted)


if __name__ == "__main__":
    run(main, "sample")
