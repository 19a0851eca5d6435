"""DGKD against the released code, and which networks teach in a batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden import PRECISIONS, PROGRESS, Case, batch, features, near, setting

from kdcli.losses import divergence
from kdcli.methods.dgkd import DGKD, DGKDSpec
from kdcli.models.features import Features


def panel(case: Case, dtype: torch.dtype) -> Features:
    """What teacher and both assistants of the case say."""
    others = [features(case.input(f"assistant_logits_{i}", dtype)) for i in (1, 2)]
    return replace(features(case.input("teacher_logits", dtype)), assistants=tuple(others))


@PRECISIONS
def test_the_released_loss_and_its_gradient(dtype: torch.dtype, tolerance: float) -> None:
    """All three networks teach (drop_num 0), reduction=mean, the case's T and λ."""
    case = Case("dgkd")
    lam = case.hyper["lam"]
    spec = DGKDSpec(ce_weight=1 - lam, kd_weight=lam, temperature=case.hyper["T"], reduction="mean", drop=0)
    s, y = case.input("student_logits", dtype, learns=True), case.input("target")
    terms = DGKD(spec, setting(20), None, None).loss(batch(y), features(s), panel(case, dtype), PROGRESS)
    total = terms["ce"] + terms["kd"]
    total.backward()
    assert near(total, case.loss or 0.0, tolerance)
    assert s.grad is not None
    assert near(s.grad, case.gradient("student_logits"), tolerance)


def test_one_of_three_is_left_out_at_random() -> None:
    """Each batch keeps two networks; over many batches each is left out about a third of the time; the term is theirs."""
    case = Case("dgkd")
    s, y, everyone = case.input("student_logits"), case.input("target"), panel(case, torch.float64)
    method = DGKD(DGKDSpec(), setting(20), None, None)
    masks = torch.stack([method.kept(3, replace(PROGRESS, seed=seed)) for seed in range(300)])
    assert bool((masks.sum(1) == 2).all())
    assert bool(((masks.mean(0) - 2 / 3).abs() < 0.1).all())
    each = [divergence(s, t.logits, 5.0) for t in (everyone, *everyone.assistants)]
    for seed in range(4):
        now = replace(PROGRESS, seed=seed)
        found = method.loss(batch(y), features(s), everyone, now)["kd"]
        wanted = sum(float(m) * e for m, e in zip(method.kept(3, now), each, strict=True))
        assert found.item() == pytest.approx(float(wanted), rel=1e-12)


def test_somebody_always_teaches() -> None:
    """With one network, or with more to be left out than there are, one stays."""
    method = DGKD(DGKDSpec(drop=5), setting(20), None, None)
    assert method.kept(1, PROGRESS).tolist() == [1]
    assert method.kept(3, PROGRESS).sum() == 1
