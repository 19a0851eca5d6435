"""TAKD against the released code, and its two reductions."""

from __future__ import annotations

import pytest
import torch
from golden import PRECISIONS, PROGRESS, Case, batch, features, near, setting

from kdcli.methods.kd import KD, KDSpec
from kdcli.methods.takd import TAKD, TAKDSpec


@PRECISIONS
def test_the_released_loss_and_its_gradient(dtype: torch.dtype, tolerance: float) -> None:
    """reduction=mean with the case's T and λ."""
    case = Case("takd")
    lam = case.hyper["lam"]
    spec = TAKDSpec(ce_weight=1 - lam, kd_weight=lam, temperature=case.hyper["T"], reduction="mean")
    s, t, y = (
        case.input("student_logits", dtype, learns=True),
        case.input("teacher_logits", dtype),
        case.input("target"),
    )
    terms = TAKD(spec, setting(20), None, None).loss(batch(y), features(s), features(t), PROGRESS)
    total = terms["ce"] + terms["kd"]
    total.backward()
    assert near(total, case.loss or 0.0, tolerance)
    assert s.grad is not None
    assert near(s.grad, case.gradient("student_logits"), tolerance)


def test_by_default_a_link_is_kd() -> None:
    """The paper's reduction with KD's weights is KD; the released one is smaller by the number of classes."""
    case = Case("takd")
    s, t, y = case.input("student_logits"), case.input("teacher_logits"), case.input("target")
    arguments = batch(y), features(s), features(t), PROGRESS
    mine = TAKD(TAKDSpec(), setting(20), None, None).loss(*arguments)
    plain = KD(KDSpec(), setting(20), None, None).loss(*arguments)
    released = TAKD(TAKDSpec(reduction="mean"), setting(20), None, None).loss(*arguments)
    assert {k: v.item() for k, v in mine.items()} == {k: v.item() for k, v in plain.items()}
    assert released["kd"].item() * 20 == pytest.approx(mine["kd"].item(), rel=1e-12)


def test_every_link_has_the_data_sets_settings_of_kd() -> None:
    pair = ("resnet34", "resnet18", "imagenet")
    assert TAKD.for_pair({}, *pair) == KD.for_pair({}, *pair) != {}
