"""CRD against RepDistiller's numbers: scores, loss, gradients and banks over two steps; and how negatives are drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden import PRECISIONS, PROGRESS, Case, batch, features, near, setting
from harness import PER_EPOCH, TINY, Died, Kd, outcome
from torch import Tensor

from kdcli.checkpoint import load_state
from kdcli.errors import IncompatibleError
from kdcli.losses import cross_entropy
from kdcli.methods import crd
from kdcli.methods.crd import CRD, CRDSpec

LABELS = torch.tensor([0] * 10 + [1] * 5 + [2] * 25)


def network(width: int) -> Any:
    return SimpleNamespace(pooled_dim=width, outputs=20, arch="toy")


def made(dtype: torch.dtype = torch.float32, s: int = 10, t: int = 14, labels: Tensor = LABELS, **settings: Any) -> CRD:
    torch.manual_seed(0)
    spec = CRDSpec(**({"dim": 16, "negatives": 12, "weight": 1.0, "ce_weight": 0.0} | settings))
    return CRD(spec, setting(20, labels=labels), network(s), network(t)).to(dtype)


def load(method: CRD, case: Case, dtype: torch.dtype) -> None:
    method.memory_s.copy_(case.input("memory_v1", dtype))
    method.memory_t.copy_(case.input("memory_v2", dtype))
    for side in ("v1", "v2"):
        z = case.hyper.get(f"Z_{side}_before", -1.0)
        getattr(method, "z_s" if side == "v1" else "z_t").fill_(z)


@pytest.fixture(params=["whole bank", "rows"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores by a product with the whole bank, or by reading rows."""
    if request.param == "rows":
        monkeypatch.setattr(crd, "_WHOLE_BANK", 0)


@PRECISIONS
@pytest.mark.parametrize("name", ["crd_step1", "crd_step2"])
def test_two_steps_of_the_reference(name: str, dtype: torch.dtype, tolerance: float, path: None) -> None:
    """Loss by side, gradients of both embeddings, Z, and the banks after the update."""
    case = Case(name)
    method = made(dtype)
    load(method, case, dtype)
    s, t = (case.input(f"{who}_embedding", dtype, learns=True) for who in ("student", "teacher"))
    data = batch(torch.zeros(8, dtype=torch.int64), case.input("index"))
    terms = method.contrast(s, t, case.input("contrast_index"), data)
    total = terms["crd_s"] + terms["crd_t"]
    total.backward()
    assert near(total, case.loss or 0.0, tolerance)
    assert near(terms["crd_s"], case.components["loss_s"], tolerance)
    assert near(terms["crd_t"], case.components["loss_t"], tolerance)
    assert s.grad is not None
    assert t.grad is not None
    assert near(s.grad, case.gradient("student_embedding"), tolerance)
    assert near(t.grad, case.gradient("teacher_embedding"), tolerance)
    assert near(method.memory_s, case.output("memory_v1"), tolerance)
    assert near(method.memory_t, case.output("memory_v2"), tolerance)
    assert near(method.z_s, case.hyper["Z_v1_after"], tolerance)
    assert near(method.z_t, case.hyper["Z_v2_after"], tolerance)


@PRECISIONS
def test_the_whole_method(dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings, contrast and update from pooled vectors, through `loss`; gradients of the embeddings' parameters."""
    case = Case("crd_full")
    method = made(dtype)
    load(method, case, dtype)
    for side in ("s", "t"):
        layer = getattr(method, f"embed_{side}")
        layer.weight.data.copy_(case.weight(f"embed_{side}.linear.weight", dtype))
        layer.bias.data.copy_(case.weight(f"embed_{side}.linear.bias", dtype))
    monkeypatch.setattr(method, "contrast_index", lambda *_: case.input("contrast_index"))
    pooled = case.input("student", dtype, learns=True)
    logits = torch.zeros(8, 20, dtype=dtype)
    data = batch(torch.zeros(8, dtype=torch.int64), case.input("index"))
    seen = features(logits, pooled), features(logits, case.input("teacher", dtype))
    total = torch.stack(list(method.loss(data, *seen, PROGRESS).values())).sum()
    total.backward()
    assert near(total, case.loss or 0.0, tolerance)
    assert pooled.grad is not None
    assert near(pooled.grad, case.gradient("student"), tolerance)
    for side in ("s", "t"):
        layer = getattr(method, f"embed_{side}")
        assert near(layer.weight.grad, case.gradient(f"embed_{side}.linear.weight"), tolerance)
        assert near(layer.bias.grad, case.gradient(f"embed_{side}.linear.bias"), tolerance)
    assert near(method.memory_s, case.output("memory_v1"), tolerance)
    assert near(method.memory_t, case.output("memory_v2"), tolerance)


def test_the_number_of_the_fact_sheet() -> None:
    """n = 100, scores (9b+k+1)/40 of 4 x 9, the first column positive: 14.8797326331."""
    method = made(torch.float64, negatives=8, labels=torch.arange(100) % 2)
    scores = (torch.arange(36, dtype=torch.float64) + 1).view(4, 9) / 40
    assert method._loss(scores).item() == pytest.approx(14.8797326331, abs=1e-10)


def test_the_wrn_pair_has_the_literatures_size_and_start() -> None:
    """33,024 parameters for 128-wide pooled vectors; banks uniform in ±0.153; Z not known yet."""
    method = made(s=128, t=128, dim=128, labels=torch.arange(5000) % 20)
    assert sum(p.numel() for p in method.parameters()) == 33_024
    assert method.memory_s.shape == (5000, 128)
    assert method.memory_s.abs().max().item() == pytest.approx((3 / 128) ** 0.5, rel=1e-3)
    assert method.z_s.item() == -1
    assert {"memory_s", "memory_t", "z_s", "z_t"} <= set(method.state_dict())
    assert not {"by_class", "start", "size"} & set(method.state_dict())


@pytest.mark.parametrize("settings", [{}, {"replacement": False}, {"replacement": False, "negatives": 30}])
def test_negatives_are_of_other_classes_and_cover_them_evenly(settings: dict[str, Any]) -> None:
    """For each class every image of the others is drawn about equally often, and none of its own; the positive is itself."""
    method = made(**settings)
    index = torch.tensor([3, 12, 30])
    data = batch(LABELS[index], index)
    drawn = [method.contrast_index(data, replace(PROGRESS, seed=seed)) for seed in range(300)]
    chosen = torch.stack(drawn)
    assert chosen.shape == (300, 3, 1 + method.spec.negatives)
    assert bool((chosen[:, :, 0] == index).all())
    for row, at in enumerate(index.tolist()):
        often = torch.bincount(chosen[:, row, 1:].flatten(), minlength=40).double()
        others = LABELS[at] != LABELS
        assert often[~others].sum() == 0
        expected = 300 * method.spec.negatives / others.sum()
        assert bool(((often[others] - expected).abs() < 6 * expected.sqrt()).all())
    if settings == {"replacement": False}:
        assert all(len(set(row.tolist())) == 12 for row in chosen[:, :, 1:].flatten(0, 1))


def test_draws_depend_on_the_steps_seed_alone() -> None:
    """The same step draws the same whatever torch's generator did; another step draws others."""
    method, data = made(), batch(LABELS[:4], torch.arange(4))
    first = method.contrast_index(data, PROGRESS)
    torch.manual_seed(99)
    assert torch.equal(method.contrast_index(data, PROGRESS), first)
    assert not torch.equal(method.contrast_index(data, replace(PROGRESS, seed=1)), first)


def test_relax_takes_another_image_of_the_class() -> None:
    """Positives are of the image's own class, all of them in turn."""
    method = made(mode="relax")
    index = torch.tensor([3, 12])
    data = batch(LABELS[index], index)
    positives = torch.stack([method.contrast_index(data, replace(PROGRESS, seed=seed))[:, 0] for seed in range(200)])
    assert set(positives[:, 0].tolist()) == set(range(10))
    assert set(positives[:, 1].tolist()) == set(range(10, 15))


def test_more_negatives_than_images_and_a_subset_of_the_data() -> None:
    """On a few-shot fraction n and positions are the fraction's; K may exceed it."""
    labels = torch.tensor([0, 0, 1, 1, 2])
    method = made(labels=labels, negatives=50)
    data = batch(labels[[4, 0]], torch.tensor([4, 0]))
    torch.manual_seed(0)
    seen = features(torch.zeros(2, 20), torch.randn(2, 10)), features(torch.zeros(2, 20), torch.randn(2, 14))
    before = method.memory_s.clone()
    assert torch.isfinite(torch.stack(list(method.loss(data, *seen, PROGRESS).values())).sum())
    assert [i for i in range(5) if not torch.equal(method.memory_s[i], before[i])] == [0, 4]
    assert method.memory_s[[0, 4]].norm(dim=1).tolist() == pytest.approx([1, 1])


def test_kd_weight_adds_the_divergence_and_the_weights_weigh() -> None:
    """CRD+KD of the tables: CE 1, KD 1, contrast 0.8."""
    method = made(weight=0.8, ce_weight=1.0, kd_weight=1.0)
    torch.manual_seed(1)
    s, t = features(torch.randn(4, 20), torch.randn(4, 10)), features(torch.randn(4, 20), torch.randn(4, 14))
    data = batch(LABELS[:4], torch.arange(4))
    terms = method.loss(data, s, t, PROGRESS)
    assert set(terms) == {"ce", "kd", "crd_s", "crd_t"}
    assert terms["ce"].item() == pytest.approx(cross_entropy(s.logits, data.labels).item())
    half = made(weight=0.4, ce_weight=1.0)
    again = half.loss(data, s, t, PROGRESS)
    assert again["crd_s"].item() * 2 == pytest.approx(terms["crd_s"].item(), rel=1e-6)


def test_one_class_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="one class"):
        made(labels=torch.zeros(10, dtype=torch.int64))


def test_whether_all_draw_with_replacement_is_one_decision_for_the_data_set() -> None:
    """The largest class leaves 15 others: up to 15 negatives can be told apart, for every image."""
    assert made().replacement
    assert not made(replacement=False, negatives=15).replacement
    assert made(replacement=False, negatives=16).replacement


def test_a_killed_run_ends_in_the_bits_of_one_that_was_not(kd: Kd, die_at: Any, teachers: Path, tmp_path: Path) -> None:
    """Banks, Z and what is drawn: deaths in the first epoch and the second, on a tenth of digits."""
    words = ["distill", "--method", "crd", "--teacher", teachers / "kd", "--student", "resnet8", *TINY]
    words += ["--set", "method.negatives=40", "--set", "method.dim=16"]
    assert kd(*words, "--out", "whole").code == 0
    again = [*words, "--out", "broken", "--checkpoint-every", "3"]
    for step in (4, PER_EPOCH + 5):
        die_at(step)
        with pytest.raises(Died):
            kd(*again)
        saved, _, _ = load_state(tmp_path / "broken/state") or ({}, {}, [])
        assert saved["model.method.z_s"] > 0
        taken_up = (saved["model.method.memory_s"].norm(dim=1) - 1).abs() < 1e-5
        assert 40 <= taken_up.sum() <= 15 * (step - step % 3)
    die_at(-1)
    result = kd(*again)
    assert result.code == 0
    assert "going on at step 15" in result.err
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
