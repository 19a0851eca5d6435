"""DIST against the released code's numbers, and its settings."""

from __future__ import annotations

import pytest
import torch
from golden import PRECISIONS, PROGRESS, Case, batch, features, near, setting
from torch import Tensor

from kdcli.methods import dist
from kdcli.methods.dist import DIST, DISTSpec


def method(classes: int = 20, **changes: float) -> DIST:
    return DIST(DISTSpec.model_validate(changes), setting(classes), None, None)


def formula() -> tuple[Tensor, Tensor, Tensor]:
    """Small deterministic logits: s [4,5], t [4,5] and labels [4]."""
    b, c = torch.arange(4, dtype=torch.float64)[:, None], torch.arange(5, dtype=torch.float64)
    return 2 * torch.sin(1 + 3 * b + 7 * c), 3 * torch.cos(2 + 5 * b + 3 * c), torch.tensor([0, 2, 4, 1])


@PRECISIONS
@pytest.mark.parametrize("name", ["dist_b1_g1_tau1", "dist_b1_g1_tau4"])
def test_the_reference_losses_and_their_gradient(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Both correlations (T² included), their sum and its gradient, unweighted."""
    case = Case(name)
    s, t = case.input("student_logits", dtype, learns=True), case.input("teacher_logits", dtype)
    mine = method(kd_weight=1, temperature=case.hyper["tau"])
    terms = mine.distil(batch(torch.zeros(8).long()), features(s), features(t), PROGRESS)
    total = terms["inter"] + terms["intra"]
    total.backward()
    assert near(terms["inter"], case.components["inter"], tolerance)
    assert near(terms["intra"], case.components["intra"], tolerance)
    assert near(total, case.loss or 0.0, tolerance)
    assert s.grad is not None
    assert near(s.grad, case.gradient("student_logits"), tolerance)


def test_numbers_anyone_can_recompute() -> None:
    """inter + intra with the default weight 2: 1.7304780062 at ImageNet's T, 33.8148721687 at the default T = 4."""
    s, t, y = formula()
    arguments = batch(y), features(s), features(t), PROGRESS
    imagenet = DIST.for_pair({}, "resnet34", "resnet18", "imagenet")
    found = [sum(method(5, **given).distil(*arguments).values()) / 2 for given in (imagenet, {})]
    assert [float(total) for total in found] == pytest.approx([1.7304780062, 33.8148721687], abs=1e-10)
    assert DIST.for_pair({}, "resnet34", "resnet18", "cifar100") == {}


def test_each_weight_multiplies_its_part() -> None:
    """beta the rows' term, gamma the columns', kd_weight both, ce_weight the cross-entropy to the labels."""
    s, t, y = formula()
    arguments = batch(y), features(s), features(t), PROGRESS
    base = method(5).loss(*arguments)
    changed = method(5, ce_weight=0.5, kd_weight=4, beta=3, gamma=5).loss(*arguments)
    factors = {name: changed[name].item() / base[name].item() for name in base}
    assert factors == pytest.approx({"ce": 0.5, "inter": 6, "intra": 10}, rel=1e-12)


def test_the_correlations_span_the_batch_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank with half of the images computes the loss of the whole batch, from the rows that all ranks give."""
    s, t, y = formula()
    whole = method(5).distil(batch(y), features(s), features(t), PROGRESS)
    rest = {tuple(x[:2].flatten().tolist()): x for x in (s, t)}
    monkeypatch.setattr(dist, "gathered", lambda x, batch: rest[tuple(x.flatten().tolist())])
    half = method(5).distil(batch(y[:2]), features(s[:2]), features(t[:2]), PROGRESS)
    assert {k: v.item() for k, v in half.items()} == {k: v.item() for k, v in whole.items()}


def test_a_single_image_has_no_correlation_over_the_batch() -> None:
    """A batch of one has constant columns: the intra term is 1 (times its weight) and its gradient zero, not NaN."""
    s, t, y = formula()
    s = s[:1].clone().requires_grad_()
    terms = method(5, temperature=1).distil(batch(y[:1]), features(s), features(t[:1]), PROGRESS)
    terms["intra"].backward()
    assert terms["intra"].item() == 2
    assert s.grad is not None
    assert s.grad.abs().max() == 0
