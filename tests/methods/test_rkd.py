"""RKD against the released code, its weights, and its memory-saving way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden import PRECISIONS, PROGRESS, Case, batch, features, near, setting
from torch import Tensor

from kdcli.methods import rkd
from kdcli.methods.rkd import RKD, RKDSpec


def relations_of(student: Tensor, teacher: Tensor, **settings: Any) -> dict[str, Tensor]:
    """The method's own terms for these pooled vectors."""
    rows = student.shape[0]
    s, t = (features(x.new_zeros(rows, 20), pooled=x) for x in (student, teacher))
    method = RKD(RKDSpec(**settings), setting(20), None, None)
    terms = method.loss(batch(torch.zeros(rows, dtype=torch.int64)), s, t, PROGRESS)
    del terms["ce"]
    return terms


def vectors(seed: int, rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@PRECISIONS
@pytest.mark.parametrize("name", ["rkd", "rkd_distance", "rkd_angle"])
@pytest.mark.parametrize("entries", [2**24, 8 * 32 * 3], ids=["at_once", "in_parts"])
def test_the_released_loss_and_its_gradient(
    name: str, entries: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both terms and each alone, also with the angles of three images at a time."""
    monkeypatch.setattr(rkd, "_ENTRIES", entries)
    case = Case(name)
    s, t = case.input("student", dtype, learns=True), case.input("teacher", dtype)
    weights = {key: case.hyper[key] for key in ("distance_weight", "angle_weight")}
    terms = relations_of(s, t, **weights)
    assert set(terms) == {key.removesuffix("_weight") for key, weight in weights.items() if weight}
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    assert loss.dtype == dtype
    assert near(loss, case.loss or 0.0, tolerance)
    assert s.grad is not None
    assert near(s.grad, case.gradient("student"), tolerance)


def test_the_numbers_of_formula_maps() -> None:
    """Means of sines and cosines over 8x8 positions, with the default weights 25 and 50."""
    n = torch.arange(1536, dtype=torch.float64)
    s, t = (x.view(4, 6, 8, 8).mean((2, 3)) for x in (torch.sin(0.37 * n), torch.cos(0.29 * n)))
    terms = relations_of(s, t)
    assert terms["distance"].item() == pytest.approx(25 * 0.0374669686, rel=1e-7)
    assert terms["angle"].item() == pytest.approx(50 * 0.0783112494, rel=1e-7)
    assert sum(terms.values()).item() == pytest.approx(4.8522366881, rel=1e-9)  # type: ignore[union-attr]


def test_parts_of_the_angles_are_as_many_as_the_limit_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """No intermediate tensor has more anchors than the limit allows; the last part is smaller."""
    sizes = []
    original = rkd._cosines

    def counted(anchors: Tensor, x: Tensor) -> Tensor:
        sizes.append(anchors.shape[0])
        return original(anchors, x)

    monkeypatch.setattr(rkd, "_cosines", counted)
    monkeypatch.setattr(rkd, "_ENTRIES", 7 * (7 + 6) * 3)
    relations_of(vectors(0, 7, 4), vectors(1, 7, 6))
    assert sizes == [3, 3, 3, 3, 1, 1]


def test_rotated_and_scaled_vectors_have_the_same_relations() -> None:
    """Both terms are 0: distances are divided by their mean, angles have no scale."""
    x = vectors(0, 6, 5)
    rotation = torch.linalg.qr(vectors(1, 5, 5)).Q
    terms = relations_of(3 * x @ rotation, x)
    assert all(abs(term.item()) < 1e-20 for term in terms.values())


@pytest.mark.parametrize("rows", [[0, 1, 1, 2], [0]], ids=["equal_images", "one_image"])
def test_degenerate_batches_give_finite_losses_and_gradients(rows: list[int]) -> None:
    """Images with equal vectors, and a last batch of one image, which has no relation."""
    s, t = vectors(2, 3, 4)[rows].requires_grad_(), vectors(3, 3, 4)[rows]
    total = torch.stack(list(relations_of(s, t).values())).sum()
    total.backward()
    assert s.grad is not None
    assert torch.isfinite(s.grad).all()
    assert torch.isfinite(total)
    if len(rows) == 1:
        assert total.item() == 0


def test_distances_of_close_vectors_far_from_zero_are_exact_in_single_precision() -> None:
    """Pooled vectors before much training: the gradient is that of double precision, not of rounding errors."""
    s, t = (1e-3 * vectors(0, 15, 64) + vectors(4, 1, 64)), vectors(5, 15, 32)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        x = s.float().to(dtype).requires_grad_()
        relations_of(x, t.to(dtype), angle_weight=0)["distance"].backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert near(gradients[1], gradients[0], 1e-4)
