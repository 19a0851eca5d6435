"""NKD against the released code's numbers, and its settings."""

from __future__ import annotations

import pytest
import torch
from golden import PRECISIONS, PROGRESS, Case, batch, features, near, setting
from torch import Tensor

from kdcli.methods.nkd import NKD, NKDSpec


def method(classes: int = 20, **changes: float) -> NKD:
    return NKD(NKDSpec.model_validate(changes), setting(classes), None, None)


def formula() -> tuple[Tensor, Tensor, Tensor]:
    """Small deterministic logits: s [4,5], t [4,5] and labels [4]."""
    b, c = torch.arange(4, dtype=torch.float64)[:, None], torch.arange(5, dtype=torch.float64)
    return 2 * torch.sin(1 + 3 * b + 7 * c), 3 * torch.cos(2 + 5 * b + 3 * c), torch.tensor([0, 2, 4, 1])


@PRECISIONS
@pytest.mark.parametrize("name", ["nkd_T1_g1.5", "nkd_T3_g1"])
def test_the_reference_losses_and_their_gradient(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Target and non-target term, their sum and its gradient."""
    case = Case(name)
    s, t, y = (
        case.input("student_logits", dtype, learns=True),
        case.input("teacher_logits", dtype),
        case.input("target"),
    )
    mine = method(gamma=case.hyper["gamma"], temperature=case.hyper["temp"])
    terms = mine.distil(batch(y), features(s), features(t), PROGRESS)
    total = terms["target"] + terms["non_target"]
    total.backward()
    assert near(terms["target"], case.components["target_part"], tolerance)
    assert near(terms["non_target"], case.components["non_target_part_weighted"], tolerance)
    assert near(total, case.loss or 0.0, tolerance)
    assert s.grad is not None
    assert near(s.grad, case.gradient("student_logits"), tolerance)


def test_numbers_anyone_can_recompute() -> None:
    """3.0239463099 with T = 1, γ = 1.5, and 44.9035053657 with the defaults T = 3, γ = 3.5."""
    s, t, y = formula()
    arguments = batch(y), features(s), features(t), PROGRESS
    imagenet = NKD.for_pair({}, "resnet34", "resnet18", "imagenet")
    found = [sum(method(5, **given).distil(*arguments).values()) for given in (imagenet, {})]
    assert [float(total) for total in found] == pytest.approx([3.0239463099, 44.9035053657], rel=1e-10)
    assert NKD.for_pair({}, "resnet34", "resnet18", "cifar100") == {}


def test_the_loss_of_equal_networks_is_the_teachers_entropy() -> None:
    """Cross-entropies: not zero for equal logits, though no gradient remains in the non-target term."""
    _, t, y = formula()
    s = t.clone().requires_grad_()
    terms = method(5, gamma=1, temperature=1).distil(batch(y), features(s), features(t), PROGRESS)
    others = torch.stack([t[row][torch.arange(5) != y[row]] for row in range(4)]).softmax(1)
    assert terms["non_target"].item() == pytest.approx(-(others * others.log()).sum(1).mean().item(), rel=1e-12)
    terms["non_target"].backward()
    assert s.grad is not None
    assert s.grad.abs().max() < 1e-15


def test_each_weight_multiplies_its_part() -> None:
    """gamma the non-target term, kd_weight both terms, ce_weight the cross-entropy to the labels."""
    s, t, y = formula()
    arguments = batch(y), features(s), features(t), PROGRESS
    base = method(5, gamma=1).loss(*arguments)
    changed = method(5, ce_weight=0.5, kd_weight=2, gamma=3).loss(*arguments)
    factors = {name: changed[name].item() / base[name].item() for name in base}
    assert factors == pytest.approx({"ce": 0.5, "target": 2, "non_target": 6}, rel=1e-12)
