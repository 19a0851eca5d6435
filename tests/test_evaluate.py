"""Metrics against scikit-learn and formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from torch import Tensor, nn

from kdcli.data.dataset import Split
from kdcli.data.loader import Loader
from kdcli.engine.device import Device
from kdcli.engine.evaluate import Tally, evaluate
from kdcli.errors import NotFiniteError
from kdcli.inference import Use

CPU = torch.device("cpu")


def sample(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits [n,k] that are right about half the time, and labels [n] with every class among them."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % k
    logits = 2 * torch.randn(n, k, generator=g)
    logits[torch.arange(n), labels] += 2
    return logits, labels


def tallied(logits: Tensor, labels: Tensor, sizes: list[int], other: Tensor | None = None) -> Tally:
    tally = Tally(CPU)
    for part in torch.arange(len(labels)).split(sizes):
        tally.add(logits[part], labels[part], None if other is None else other[part])
    return tally


def calibration_error(p: np.ndarray, y: np.ndarray) -> float:
    """ECE with 15 equal-width bins: the share-weighted gap between accuracy and confidence."""
    confidence, right = p.max(1), p.argmax(1) == y
    total = 0.0
    for low in range(15):
        inside = (confidence >= low / 15) & ((confidence < (low + 1) / 15) | (low == 14))
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("k", [3, 5, 6, 20])
@pytest.mark.parametrize("sizes", [[300], [128, 128, 44], [1, 299]])
def test_metrics_are_those_of_sklearn_however_the_batches_fall(k: int, sizes: list[int]) -> None:
    """top1, top5, nll and ece, in percent, percent, nats and percent; n counts every image once."""
    logits, labels = sample(300, k)
    p, y = torch.softmax(logits.double(), 1).numpy(), labels.numpy()
    found = tallied(logits, labels, sizes).result()
    assert found["n"] == 300
    assert found["top1"] == pytest.approx(100 * accuracy_score(y, p.argmax(1)), abs=1e-4)
    assert found["nll"] == pytest.approx(log_loss(y, p, labels=range(k)), abs=2e-6)
    assert found["ece"] == pytest.approx(100 * calibration_error(p, y), abs=1e-3)
    if k > 5:
        assert found["top5"] == pytest.approx(100 * top_k_accuracy_score(y, p, k=5, labels=range(k)), abs=1e-4)
    else:
        assert "top5" not in found  # it would be 100 by definition


def test_confident_and_right_or_wrong() -> None:
    """All right with certainty: ece 0; all wrong with certainty: ece 100, and nll is the logit gap."""
    labels = torch.arange(8)
    right = 50 * torch.eye(8)
    assert tallied(right, labels, [8]).result() == {"n": 8, "top1": 100.0, "top5": 100.0, "nll": 0.0, "ece": 0.0}
    wrong = tallied(right.roll(1, 0), labels, [8]).result()
    assert (wrong["top1"], wrong["ece"], wrong["nll"]) == (0.0, 100.0, 50.0)


def test_agreement_counts_equal_predictions_and_not_correct_ones() -> None:
    """The share of images on which two networks predict the same class; only there if asked for."""
    logits, labels = sample(90, 6)
    other = logits.argmax(1).clone()
    other[:30] = (other[:30] + 1) % 6
    tally = tallied(logits, labels, [50, 40], other)
    assert tally.result(agreement=True)["agreement"] == pytest.approx(100 * 60 / 90, abs=1e-4)
    assert "agreement" not in tallied(logits, labels, [90]).result()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    """One such number anywhere, also in an early batch, ends in `NotFiniteError` and in no accuracy."""
    logits, labels = sample(40, 6)
    logits[3, 2] = bad
    with pytest.raises(NotFiniteError):
        tallied(logits, labels, [10, 10, 20]).result()


def test_half_precision_logits_are_measured_in_fp32() -> None:
    """bf16 outputs: the metrics of their values."""
    logits, labels = sample(100, 6)
    low = logits.bfloat16()
    assert tallied(low, labels, [100]).result() == tallied(low.float(), labels, [100]).result()


class Table(nn.Module):
    """Gives image i row i of a table; the index is read from the first pixel. Sees whether it was in training mode."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.rows[(x[:, 0, 0, 0] * 255).round().long()]


def loader(labels: Tensor, batch_size: int) -> Loader:
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    return Loader(
        Split.of(labels, images=images),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        image_size=8,
        batch_size=batch_size,
        seed=0,
        augment="none",
        device="cpu",
        train=False,
    )


@pytest.mark.parametrize("batch_size", [7, 64, 100])
@pytest.mark.parametrize("training", [True, False])
def test_evaluate_sees_every_image_once_in_eval_mode(batch_size: int, training: bool) -> None:
    """Metrics as the tally's, with the partial last batch; the network's mode is put back; progress is told."""
    logits, labels = sample(100, 6)
    theirs, _ = sample(100, 6, seed=1)
    network = Table(logits).train(training)
    told: list[tuple[int, int]] = []
    made = loader(labels, batch_size)
    device = Device(CPU, "fp32", 1)
    teacher = (Table(theirs).eval(), Use())
    found = evaluate(network, Use(), made, device, teacher=teacher, tick=lambda *at: told.append(at))
    other = theirs.argmax(1)
    assert found.modes == {"single": tallied(logits, labels, [100], other).result(agreement=True)}
    assert found.images_per_second > 0
    assert not any(network.modes)
    assert network.training is training
    steps = -(-100 // batch_size)
    assert told == [(step + 1, steps) for step in range(steps)]


def test_evaluate_measures_each_inference_mode_of_a_joint_head() -> None:
    """One entry a mode, each folded in its own way, from one pass over the images."""
    joint, labels = sample(100, 6)
    joint = torch.cat([joint, joint.roll(1, 0)], 1)[:, torch.arange(12).view(2, 6).t().flatten()]  # slices y*2, y*2+1
    found = evaluate(
        Table(joint).eval(), Use("rot2"), loader(labels, 64), Device(CPU, "fp32", 1), ("single", "marginal")
    )
    assert set(found.modes) == {"single", "marginal"}
    assert found.modes["single"] == tallied(joint[:, ::2], labels, [64, 36]).result()
    summed = torch.logsumexp(joint.unflatten(1, (6, 2)), 2)
    assert found.modes["marginal"]["nll"] == pytest.approx(tallied(summed, labels, [100]).result()["nll"], abs=2e-6)
    assert found.modes["marginal"]["nll"] != found.modes["single"]["nll"]
