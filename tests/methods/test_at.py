"""AT against the released code, and its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import PRECISIONS, PROGRESS, Case, batch, features, near, setting
from torch import Tensor

from kdcli.methods.at import AT, ATSpec


def attention_of(student: list[Tensor], teacher: list[Tensor], **settings: Any) -> Tensor:
    """The method's own term for these stages, behind an empty stem."""
    rows = student[0].shape[0]
    s, t = (features(x[0].new_zeros(rows, 20), maps=(x[0].new_empty(0), *x)) for x in (student, teacher))
    method = AT(ATSpec(**settings), setting(20), None, None)
    return method.loss(batch(torch.zeros(rows, dtype=torch.int64)), s, t, PROGRESS)["at"]


def maps(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


@PRECISIONS
@pytest.mark.parametrize("power", [2, 4])
def test_the_released_loss_and_its_gradients(power: int, dtype: torch.dtype, tolerance: float) -> None:
    """Two stages, the second pooled to the teacher's size; each stage alone and their sum."""
    case = Case(f"at_p{power}")
    s = [case.input(f"student_{i}", dtype, learns=True) for i in range(2)]
    t = [case.input(f"teacher_{i}", dtype) for i in range(2)]
    loss = attention_of(s, t, weight=1.0, power=power)
    loss.backward()
    assert loss.dtype == dtype
    assert near(loss, case.loss or 0.0, tolerance)
    for i in range(2):
        assert near(attention_of([s[i]], [t[i]], weight=1.0, power=power), case.components[f"stage_{i}"], tolerance)
        grad = s[i].grad
        assert grad is not None
        assert near(grad, case.gradient(f"student_{i}"), tolerance)


def test_the_number_of_formula_maps() -> None:
    """One stage of sines and cosines, with the weight of 1000."""
    n = torch.arange(1536, dtype=torch.float64)
    s, t = torch.sin(0.37 * n).view(4, 6, 8, 8), torch.cos(0.29 * n).view(4, 6, 8, 8)
    assert attention_of([s], [t]).item() == pytest.approx(1000 * 0.0024071117, rel=1e-7)


def test_a_larger_teacher_map_is_averaged_down_before_the_power() -> None:
    """Also where the sizes do not divide."""
    (s,), (t,) = maps(0, (3, 4, 4)), maps(1, (5, 7, 7))
    pooled = F.adaptive_avg_pool2d(t, 4)
    assert attention_of([s], [t]).item() == pytest.approx(attention_of([s], [pooled]).item(), rel=1e-12)
    assert attention_of([t], [s]).item() == pytest.approx(attention_of([pooled], [s]).item(), rel=1e-12)


def test_unequal_numbers_of_stages_meet_at_the_last_or_at_the_first() -> None:
    """The network with more stages loses its shallowest, or with `first` its deepest, whichever network it is."""
    s, t = maps(2, (4, 8, 8), (4, 4, 4)), maps(3, (6, 8, 8), (6, 8, 8), (6, 4, 4))
    assert attention_of(s, t).item() == attention_of(s, t[1:]).item()
    assert attention_of(t, s).item() == attention_of(t[1:], s).item()
    assert attention_of(s, t, align="first").item() == attention_of(s, t[:2]).item()
    assert attention_of(s, t).item() != attention_of(s, t, align="first").item()


def test_the_papers_norm_is_not_squared() -> None:
    """Eq. 2: the Euclidean norm of the difference of the normalised attentions, mean over the images."""
    (s,), (t,) = maps(4, (3, 4, 4)), maps(5, (5, 4, 4))
    a, b = (x.square().mean(1).flatten(1) for x in (s, t))
    difference = a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)
    found = attention_of([s], [t], distance="norm", weight=1.0)
    assert found.item() == pytest.approx(difference.norm(dim=1).mean().item(), rel=1e-12)
