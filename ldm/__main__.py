"""`python -m ldm VERB [arguments]`: everything that is neither training nor sampling."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from ldm import __version__
from ldm.cli import handled
from ldm.errors import LdmError, nearest


def doctor(argv: Sequence[str]) -> int:
    """What is installed, what the machine has, and whether the configuration and its data can be read."""
    from ldm.tools.doctor import main

    return main(argv)


def prepare(argv: Sequence[str]) -> int:
    """FOLDER OUT: a folder of pictures or a table becomes shards; duplicates are found and never split."""
    from ldm.tools.prepare import main

    return main(argv)


def inspect(argv: Sequence[str]) -> int:
    """PATH: what a data set holds, what is wrong with it, and which key mends it."""
    from ldm.tools.inspect import main

    return main(argv)


def cache(argv: Sequence[str]) -> int:
    """OUT: latents and text embeddings of a run's data, written once; training reads them."""
    from ldm.tools.cache_options import parse

    if parse(argv) is None:  # help and wrong words do not wait for torch
        return 0
    from ldm.tools.cache import main

    return main(argv)


def inspect_autoencoder(argv: Sequence[str]) -> int:
    """CHECKPOINT DATA [CHECKPOINT ...]: is this autoencoder good enough for my images? A page with pictures."""
    from ldm.tools.inspect_autoencoder_options import parse

    if parse(argv) is None:
        return 0
    from ldm.tools.inspect_autoencoder import main

    return main(argv)


def import_(argv: Sequence[str]) -> int:
    """PATH OUT: Stable Diffusion, a folder of diffusers or a single file, becomes a run."""
    from ldm.tools.interchange import import_options

    import_options(argv)  # help and wrong options do not wait for torch
    from ldm.tools.import_model import main

    return main(argv)


def export(argv: Sequence[str]) -> int:
    """RUN OUT --format diffusers|compvis: a run in the layouts of Stable Diffusion."""
    from ldm.tools.interchange import export_options

    export_options(argv)
    from ldm.tools.export_model import main

    return main(argv)


def ema(argv: Sequence[str]) -> int:
    """RUN --length NUMBER: another average of the weights, made of the snapshots of a training, as a run."""
    from ldm.tools.ema_options import parse

    if parse(argv) is None:
        return 0
    from ldm.tools.ema import main

    return main(argv)


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "doctor": doctor,
    "prepare": prepare,
    "inspect": inspect,
    "cache": cache,
    "inspect-autoencoder": inspect_autoencoder,
    "import": import_,
    "export": export,
    "ema": ema,
}


def usage() -> str:
    verbs = [f"  {name:<24}{verb.__doc__}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            f"ldm {__version__}",
            "usage: python -m ldm VERB [key=value ...]",
            "",
            *verbs,
            "",
            "training: python train.py --help",
        ]
    )


def main() -> None:
    argv = sys.argv[1:]

    def action() -> int:
        if not argv or argv[0] in ("-h", "--help"):
            print(usage())
            return 0
        if argv[0] not in VERBS:
            raise LdmError("CONFIG", f"unknown verb {argv[0]!r}", next=nearest(argv[0], VERBS))
        return VERBS[argv[0]](argv[1:])

    sys.exit(handled(action, argv=argv))


if __name__ == "__main__":
    main()
