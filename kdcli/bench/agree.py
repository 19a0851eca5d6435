"""Whether both paths train the same: a comparison of speeds means little otherwise."""

from __future__ import annotations

from dataclasses import replace

import torch

from kdcli.bench.images import images_for
from kdcli.bench.naive import Naive, refuse
from kdcli.bench.ours import Ours
from kdcli.bench.parts import architectures, build
from kdcli.data.randomness import mix
from kdcli.engine.device import open_device
from kdcli.output import Story
from kdcli.specs import RunSpec


def agreement(spec: RunSpec, steps: int = 20) -> list[tuple[float, float]]:
    """`(ours, naive)`: the losses of the first steps of both paths on the same batches, at the recipe's own rate.

    In fp32 they are equal to rounding, which grows with every step: the layouts, the folded teacher and the optimiser add
    in another order.

    Args:
        spec: a resolved `distill` spec.
    """
    story = Story(quiet=True)
    refuse(spec)
    spec = architectures(spec)
    device = open_device(spec.system)
    dataset, _ = images_for(spec, story)
    pairs: list[tuple[float, float]] = []
    with device.stream():
        ours = Ours(spec, dataset, build(spec, dataset, device, fold=True), device, story.note)
        plain = replace(device, precision="fp32")
        naive = Naive(spec, dataset, build(spec, dataset, plain, fold=False), plain)
        for _ in range(steps):
            batch = ours.batch()
            torch.manual_seed(mix(spec.seed, "step", ours.training.at, 0))  # as the loop does before each step
            theirs = naive.learn(
                replace(batch, images=batch.images.contiguous(), extra=tuple(x.contiguous() for x in batch.extra))
            )
            pairs.append((ours.loss(batch), theirs))
        ours.close()
    return pairs
