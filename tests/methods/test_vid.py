"""VID against the released code, its side modules, and its variances."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden import PRECISIONS, PROGRESS, Case, batch, features, near, setting
from torch import Tensor, nn

from kdcli.methods.vid import VID, Gaussian, VIDSpec
from kdcli.models import build
from kdcli.models.features import Features


def with_maps(*maps: Tensor) -> Features:
    """Features with these stages, behind an empty stem."""
    return features(maps[0].new_zeros(maps[0].shape[0], 20), maps=(maps[0].new_empty(0), *maps))


def term_of(method: VID, student: Features, teacher: Features) -> Tensor:
    labels = torch.zeros(student.logits.shape[0], dtype=torch.int64)
    return method.loss(batch(labels), student, teacher, PROGRESS)["vid"]


def made(teacher: str, student: str, scale: int = 1, **settings: Any) -> VID:
    return VID(VIDSpec(**settings), setting(100, scale=scale), build(student, 100), build(teacher, 100))


@PRECISIONS
@pytest.mark.parametrize("name", ["vid", "vid_pool"])
def test_the_released_loss_and_its_gradients(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Equal sizes and a pooled student; gradients of the maps, the convolutions and the variances."""
    case = Case(name)
    s, t = case.input("student", dtype, learns=True), case.input("teacher", dtype)
    method = VID(VIDSpec(), setting(20), None, None)
    stage = Gaussian(s.shape[1], t.shape[1], 5.0, learn=True).to(dtype)
    for key, parameter in stage.named_parameters():
        parameter.data.copy_(case.weight(key))
    method.stages.append(stage)
    loss = term_of(method, with_maps(s), with_maps(t))
    loss.backward()
    assert loss.dtype == dtype
    assert near(loss, case.loss or 0.0, tolerance)
    assert s.grad is not None
    assert near(s.grad, case.gradient("student"), tolerance)
    for key, parameter in stage.named_parameters():
        assert parameter.grad is not None
        assert near(parameter.grad, case.gradient(key), tolerance), key


def test_the_number_of_formula_maps_with_an_identity_mean() -> None:
    """At the initial variance of 5."""
    n = torch.arange(1536, dtype=torch.float64)
    s, t = torch.sin(0.37 * n).view(4, 6, 8, 8), torch.cos(0.29 * n).view(4, 6, 8, 8)
    method = VID(VIDSpec(), setting(20), None, None)
    stage = Gaussian(6, 6, 5.0, learn=True).double()
    stage.regressor = nn.Sequential()
    method.stages.append(stage)
    assert term_of(method, with_maps(s), with_maps(t)).item() == pytest.approx(0.9029915742, rel=1e-7)


def test_where_the_variances_start() -> None:
    """The released initial value for 5, and any other on request."""
    wanted = Case("vid").hyper["log_scale_at_init"]
    assert Gaussian(3, 4, 5.0, learn=True).log_scale.tolist() == pytest.approx([wanted] * 4, rel=1e-6)
    for stage in made("resnet20", "resnet8", init_variance=0.5).stages:
        assert isinstance(stage, Gaussian)
        variance = nn.functional.softplus(stage.log_scale) + 1e-5
        assert variance.tolist() == pytest.approx([0.5] * len(variance), rel=1e-6)


def test_the_parameters_of_a_published_pair() -> None:
    """wrn40_2 → wrn16_2: 64,512 of the convolutions, and a variance for each of the teacher's channels."""
    sizes = {name: p.numel() for name, p in made("wrn40_2", "wrn16_2").named_parameters()}
    variances = {name: size for name, size in sizes.items() if name.endswith("log_scale")}
    assert list(variances.values()) == [32, 64, 128]
    assert sum(sizes.values()) - sum(variances.values()) == 64_512


def test_frozen_variances_are_kept_but_not_trained() -> None:
    """They stay in the state, so a run resumes with what it began with; the first loss is the same."""
    torch.manual_seed(0)
    learns = made("resnet20", "resnet8")
    torch.manual_seed(0)
    frozen = made("resnet20", "resnet8", learn_variance=False)
    assert learns.state_dict().keys() == frozen.state_dict().keys()
    assert not [name for name, _ in frozen.named_parameters() if "log_scale" in name]
    shapes = [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    generator = torch.Generator().manual_seed(0)
    s, t = (with_maps(*(torch.randn(2, *shape, generator=generator) for shape in shapes)) for _ in range(2))
    assert torch.equal(term_of(learns, s, t), term_of(frozen, s, t))


def test_a_small_variance_makes_the_term_negative() -> None:
    """The logarithm of the variance is part of a likelihood; a perfect prediction is rewarded with ½ ln σ²."""
    method = VID(VIDSpec(weight=2.0), setting(20), None, None)
    stage = Gaussian(3, 3, 0.1, learn=True).double()
    stage.regressor = nn.Sequential()
    method.stages.append(stage)
    x = torch.ones(2, 3, 4, 4, dtype=torch.float64)
    assert term_of(method, with_maps(x), with_maps(x)).item() == pytest.approx(math.log(0.1), rel=1e-6)


@pytest.mark.parametrize(("align", "widths"), [("last", [512, 1024, 2048]), ("first", [256, 512, 1024])])
def test_unequal_numbers_of_stages(align: str, widths: list[int]) -> None:
    """resnet50's four stages and wrn16_2's three meet at the last, or at the first; a step is possible with either."""
    method = made("resnet50", "wrn16_2", align=align)
    assert [stage.log_scale.numel() for stage in method.stages] == widths  # type: ignore[union-attr]
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    student, teacher = build("wrn16_2", 100), build("resnet50", 100)
    assert torch.isfinite(term_of(method, student.features(images), teacher.features(images)))


def test_an_enlarged_teacher_needs_no_other_modules() -> None:
    """Twice the image size: its maps are averaged down."""
    method = made("wrn16_2", "wrn16_2", scale=2)
    generator = torch.Generator().manual_seed(0)
    shapes = [(32, 16, 16), (64, 8, 8), (128, 4, 4)]
    s = with_maps(*(torch.randn(2, *shape, generator=generator) for shape in shapes))
    t = with_maps(*(torch.randn(2, c, 2 * h, 2 * w, generator=generator) for c, h, w in shapes))
    pooled = with_maps(*(x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5)) for x in t.stages))
    assert term_of(method, s, t).item() == pytest.approx(term_of(method, s, pooled).item(), rel=1e-6)
