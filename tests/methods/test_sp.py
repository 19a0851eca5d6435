"""SP against the released code, and what it is invariant to."""

from __future__ import annotations

import pytest
import torch
from golden import PRECISIONS, PROGRESS, Case, batch, features, near, setting
from torch import Tensor

from kdcli.methods.sp import SP, SPSpec


def similarity_of(student: Tensor, teacher: Tensor, weight: float = 1.0) -> Tensor:
    """The method's own term for these last maps; shallower ones are not read."""
    rows = student.shape[0]
    s, t = (features(x.new_zeros(rows, 20), maps=(x.new_empty(0), x.new_empty(0), x)) for x in (student, teacher))
    method = SP(SPSpec(weight=weight), setting(20), None, None)
    return method.loss(batch(torch.zeros(rows, dtype=torch.int64)), s, t, PROGRESS)["sp"]


@PRECISIONS
def test_the_released_loss_and_its_gradient(dtype: torch.dtype, tolerance: float) -> None:
    case = Case("sp")
    s, t = case.input("student", dtype, learns=True), case.input("teacher", dtype)
    loss = similarity_of(s, t)
    loss.backward()
    assert loss.dtype == dtype
    assert near(loss, case.loss or 0.0, tolerance)
    assert s.grad is not None
    assert near(s.grad, case.gradient("student"), tolerance)


def test_the_number_of_formula_maps() -> None:
    """Sines and cosines, with the weight of 3000."""
    n = torch.arange(1536, dtype=torch.float64)
    s, t = torch.sin(0.37 * n).view(4, 6, 8, 8), torch.cos(0.29 * n).view(4, 6, 8, 8)
    assert similarity_of(s, t, SPSpec().weight).item() == pytest.approx(3000 * 0.2135352208, rel=1e-9)


def test_maps_of_any_size_are_compared_and_their_scale_does_not_matter() -> None:
    """Equal maps repeated over more positions have equal similarities."""
    s = torch.rand(4, 6, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    larger = 3 * s.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert similarity_of(s, larger).item() == pytest.approx(0, abs=1e-20)
    assert similarity_of(s, larger.square()).item() > 1e-6
