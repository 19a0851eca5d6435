"""What OFD and ReviewKD have in common: they read stages before their closing ReLU, and normalise."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Literal

from torch import Tensor

from kdcli.methods.pairing import backbone
from kdcli.models.batch_statistics import batch_statistics
from kdcli.models.features import Features
from kdcli.models.heads import Headed
from kdcli.models.network import Network
from kdcli.models.panel import Panel

Statistics = Literal["batch", "eval"]


def preactivated(features: Features) -> Features:
    """The same features, F1..FL [B,C,H,W] being what the stages were before their closing ReLU."""
    stages = (features.preact(i) for i in range(1, len(features.maps)))
    return replace(features, maps=(*features.maps[:1], *stages))


def teacher_preactivations(teacher: Network | Headed | Panel, views: Tensor, statistics: Statistics) -> Features:
    """One pass of the frozen teacher over [B,C,H,W], its stages before their closing ReLU.

    Args:
        statistics: whether its BatchNorms use the batch's statistics or (`eval`) those of its training. They stay as
            they are with either. A single image (an epoch's last) has no batch: those of the training stand in.
    """
    network = backbone(teacher)
    of_batch = statistics == "batch" and views.shape[0] > 1  # one value, in a map of one position, has no variance
    # A wide residual network's pre-activation is a BatchNorm's output, so it has to be computed in here too.
    with batch_statistics(network) if of_batch else nullcontext():
        return preactivated(network.features(views))
