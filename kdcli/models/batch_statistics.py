"""A frozen network that normalises by the statistics of the batch it sees, and stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """Within it every BatchNorm of `network` uses the batch's mean and variance, in evaluation mode too.

    Running statistics, `num_batches_tracked` and every other kind of layer stay as they are, bit for bit. On several
    ranks each normalises its own part of the batch, as the student does.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    flags = [(norm.training, norm.track_running_stats) for norm in norms]
    try:
        for norm in norms:
            # In training mode a layer that tracks nothing is handed no running statistics, so it cannot change them.
            norm.training, norm.track_running_stats = True, False
        yield
    finally:
        for norm, (training, tracks) in zip(norms, flags, strict=True):
            norm.training, norm.track_running_stats = training, tracks
