"""Evaluation: top-1, top-5, NLL, ECE and agreement, summed on the device and read once at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.data.loader import Loader
from kdcli.engine import distributed
from kdcli.engine.device import Device
from kdcli.errors import NotFiniteError
from kdcli.inference import Use, class_logits

_BINS = 15


class Tally:
    """Running sums of one inference mode over a data set; a few device tensors, whatever the data set's size."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)  # n, top-1, top-5, NLL, agreement
        self.bins = torch.zeros(3, _BINS, dtype=torch.float64, device=device)  # count, confidence, correct
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.width = 0

    def add(self, logits: Tensor, labels: Tensor, other: Tensor | None = None) -> None:
        """Add a batch: logits [B,K], labels [B], and the teacher's predicted classes [B] to count agreement with."""
        self.width = logits.shape[1]
        self.finite &= torch.isfinite(logits).all()
        log_p = F.log_softmax(logits.float(), 1)
        confidence, predicted = log_p.max(1)
        correct = predicted == labels
        top = log_p.topk(min(5, self.width), 1).indices
        self.sums[0] += labels.numel()
        self.sums[1] += correct.sum()
        self.sums[2] += (top == labels[:, None]).any(1).sum()
        self.sums[3] += F.nll_loss(log_p, labels, reduction="sum").double()
        if other is not None:
            self.sums[4] += (predicted == other).sum()
        confidence = confidence.exp().double()
        index = (confidence * _BINS).long().clamp(0, _BINS - 1)
        self.bins[0].index_add_(0, index, torch.ones_like(confidence))
        self.bins[1].index_add_(0, index, confidence)
        self.bins[2].index_add_(0, index, correct.double())

    def result(self, *, agreement: bool = False) -> dict[str, Any]:
        """top1, top5 (absent up to five classes), nll (nats), ece (15 equal-width bins), n. Accuracies in percent.

        Raises:
            NotFiniteError: a logit was NaN or infinite; argmax would still have given a number.
        """
        distributed.sum_(self.sums)
        distributed.sum_(self.bins)
        if not bool(distributed.all_true(self.finite)):
            raise NotFiniteError("the network's outputs are not finite on the evaluation images")
        n, top1, top5, nll, agreed = self.sums.tolist()
        confidence, correct = self.bins.cpu()[1:]
        gap = (confidence - correct).abs().sum().item() / n
        result: dict[str, Any] = {"n": int(n), "top1": _percent(top1, n)}
        if self.width > 5:
            result["top5"] = _percent(top5, n)
        result |= {"nll": round(nll / n, 6), "ece": round(gap * 100, 4)}
        if agreement:
            result["agreement"] = _percent(agreed, n)
        return result


def _percent(part: float, whole: float) -> float:
    return round(100 * part / whole, 4)


@dataclass
class Evaluated:
    """Metrics per inference mode, and how fast they were made."""

    modes: dict[str, dict[str, Any]]
    images_per_second: float


@torch.no_grad()
def evaluate(
    network: nn.Module,
    use: Use,
    loader: Loader,
    device: Device,
    modes: tuple[str, ...] = ("single",),
    teacher: tuple[nn.Module, Use] | None = None,
    tick: Callable[[int, int], None] | None = None,
) -> Evaluated:
    """Evaluate `network` (put in eval mode, and back) on every image of `loader`, in the given inference modes.

    Args:
        teacher: a network, and how it is used, to count agreement with (`single` inference).
        tick: called with (batches done, batches).
    """
    before = [(module, module.training) for module in network.modules()]  # parts may be in different modes
    network.eval()
    tallies = {mode: Tally(device.torch) for mode in modes}
    images, started = 0, time.monotonic()
    for done, batch in enumerate(loader.epoch(0)):
        with device.autocast():
            logits = class_logits(network, batch.images, use, modes)
            other = None
            if teacher is not None:
                other = class_logits(teacher[0], batch.images, teacher[1], ("single",))["single"].argmax(1)
        for mode, tally in tallies.items():
            tally.add(logits[mode], batch.labels, other)
        images += batch.labels.numel()
        if tick is not None:
            tick(done + 1, loader.steps)
    for module, training in before:
        module.training = training
    results = {mode: tally.result(agreement=teacher is not None) for mode, tally in tallies.items()}
    return Evaluated(results, images / max(time.monotonic() - started, 1e-9))
