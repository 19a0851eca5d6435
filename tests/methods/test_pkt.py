"""PKT against the released code, and what it is invariant to."""

from __future__ import annotations

import pytest
import torch
from golden import PRECISIONS, PROGRESS, Case, batch, features, near, setting
from torch import Tensor

from kdcli.methods.pkt import PKT, PKTSpec


def divergence_of(student: Tensor, teacher: Tensor, weight: float = 1.0) -> Tensor:
    """The method's own term for these pooled vectors."""
    rows = student.shape[0]
    s, t = (features(x.new_zeros(rows, 20), pooled=x) for x in (student, teacher))
    method = PKT(PKTSpec(weight=weight), setting(20), None, None)
    return method.loss(batch(torch.zeros(rows, dtype=torch.int64)), s, t, PROGRESS)["pkt"]


@PRECISIONS
def test_the_released_loss_and_its_gradient(dtype: torch.dtype, tolerance: float) -> None:
    case = Case("pkt")
    s, t = case.input("student", dtype, learns=True), case.input("teacher", dtype)
    loss = divergence_of(s, t)
    loss.backward()
    assert loss.dtype == dtype
    assert near(loss, case.loss or 0.0, tolerance)
    assert s.grad is not None
    assert near(s.grad, case.gradient("student"), tolerance)


def test_three_images_by_hand() -> None:
    """Teacher vectors at right angles, the student's first two equal; with the default weight of 30000."""
    t = torch.eye(3, dtype=torch.float64)
    s = t[[0, 0, 2]]
    near_, far = 1 / 2, 1 / 4  # the teacher's rows are (2, 1, 1) / 4
    pairs = [(near_, 2 / 5), (far, 2 / 5), (far, 1 / 5)]  # the student's first two rows are (2, 2, 1) / 5
    wanted = 2 * sum(p * torch.log(torch.tensor(p / q, dtype=torch.float64)).item() for p, q in pairs) / 9
    assert divergence_of(s, t, PKTSpec().weight).item() == pytest.approx(30000 * wanted, rel=1e-5)


def test_only_directions_matter_and_a_zero_vector_has_a_gradient() -> None:
    """Scaled and rotated vectors are the same; an image whose features are all 0 gives no NaN."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    assert divergence_of(2 * x @ rotation, x).item() == pytest.approx(0, abs=1e-8)
    s = torch.cat([torch.zeros(1, 4), torch.ones(4, 4)]).double().requires_grad_()
    divergence_of(s, x).backward()
    assert s.grad is not None
    assert torch.isfinite(s.grad).all()
