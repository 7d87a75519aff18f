"""What a codebook needs between optimizer steps: counts of its choices, and new life for codes that have none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ldm.models.autoencoder.vq import AutoencoderVQ
from ldm.random import Purpose, fold
from ldm.training.ranks import of_all_ranks, several
from ldm.training.step import OptimizerStep

WEIGHT = "quantize.embedding.weight"


@torch.no_grad()
def tend_codebook(
    autoencoder: AutoencoderVQ, step: OptimizerStep, codes: Sequence[Mapping[str, Tensor]], key: int
) -> int:
    """After an optimizer step: count its choices and, in the middle of every `revive_every` steps, replace the codes
    without any. So what is measured at a multiple of `revive_every` has learnt its codes for half of that time: right
    after a replacement nearly all codes are in use, and their decoder is not trained on them.

    codes: what the autoencoder said of each micro-batch of this step on this rank, "latents" and "codes".
    key: of the run. Replaced codes lose their moments in the optimizer and their averages with the old values.
    Every rank takes part and does the same: choices are summed, and candidates are all latents of the step in the
    order of its samples, so that the result does not depend on how the batch is cut.
    Returns how many codes were replaced. A codebook that is not trained is left alone.
    """
    book, every = autoencoder.quantize, autoencoder.revive_every
    if every is None or not book.embedding.weight.requires_grad:
        return 0
    book.count(torch.cat([code["codes"].flatten() for code in codes]), _sum_over_ranks)
    if step.train_step % every != every // 2:
        return 0
    mine = torch.cat([code["latents"].detach().float().movedim(1, -1).flatten(0, -2) for code in codes])
    revived = book.revive(of_all_ranks(mine), fold(key, Purpose.CODEBOOK, step.train_step).view(1))
    for moment in step.optimizer.state[book.embedding.weight].values():
        if isinstance(moment, Tensor) and moment.shape == book.embedding.weight.shape:
            moment[revived] = 0
    if step.ema is not None:
        for averages in step.ema.files().values():
            averages[WEIGHT][revived] = book.embedding.weight[revived].to(averages[WEIGHT].dtype)
    return len(revived)


def _sum_over_ranks(counts: Tensor) -> Tensor:
    if several():
        dist.all_reduce(counts)
    return counts
