"""FitNet against the released code, and which maps and regressors a pair gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import PRECISIONS, PROGRESS, Case, batch, features, near, setting
from torch import Tensor, nn

from kdcli.errors import IncompatibleError
from kdcli.methods.fitnet import FitNet, FitNetSpec, Regressor
from kdcli.models import build
from kdcli.models.features import Features

SHAPES = {"same_1x1": (8, 8), "down_3x3": (16, 8), "up_4x4": (4, 8), "crop": (8, 6)}


def one_map(x: Tensor) -> Features:
    """Features whose stem is empty and whose only stage is `x`."""
    return features(x.new_zeros(x.shape[0], 20), maps=(x.new_empty(0), x))


def hint_of(method: FitNet, student: Tensor, teacher: Tensor) -> Tensor:
    """The method's own term."""
    labels = torch.zeros(student.shape[0], dtype=torch.int64)
    return method.loss(batch(labels), one_map(student), one_map(teacher), PROGRESS)["hint"]


def made(teacher: str, student: str, scale: int = 1, **settings: Any) -> FitNet:
    spec = FitNetSpec(**settings)
    return FitNet(spec, setting(100, scale=scale), build(student, 100), build(teacher, 100))


@PRECISIONS
@pytest.mark.parametrize("kind", list(SHAPES))
def test_the_released_loss_and_its_gradients(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """Each rule for the convolution: loss, all gradients, regressor output and running statistics."""
    case = Case(f"fitnet_{kind}")
    s, t = case.input("student", dtype, learns=True), case.input("teacher", dtype)
    method = FitNet(FitNetSpec(weight=1.0, hint=1), setting(20), None, None)
    regressor = Regressor(s.shape[1], t.shape[1], *SHAPES[kind]).to(dtype)
    for name, parameter in regressor.named_parameters():
        parameter.data.copy_(case.weight(name))
    method.regressor = regressor
    seen = []
    regressor.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    loss = hint_of(method, s, t)
    loss.backward()
    assert loss.dtype == dtype
    assert near(loss, case.loss or 0.0, tolerance)
    assert near(seen[0], case.output("regressed"), tolerance)
    assert s.grad is not None
    assert near(s.grad, case.gradient("student"), tolerance)
    for name, parameter in regressor.named_parameters():
        assert parameter.grad is not None
        if name == "conv.bias":  # zero up to rounding: BatchNorm removes it
            assert parameter.grad.abs().max() <= (1e-12 if dtype == torch.float64 else 1e-6)
        else:
            assert near(parameter.grad, case.gradient(name), tolerance), name
    assert near(regressor.bn.running_mean, case.output("bn.running_mean"), tolerance)  # type: ignore[arg-type]
    assert near(regressor.bn.running_var, case.output("bn.running_var"), tolerance)  # type: ignore[arg-type]


@PRECISIONS
def test_the_plain_regressor_of_another_release(dtype: torch.dtype, tolerance: float) -> None:
    """A bare 1x1 convolution."""
    case = Case("fitnet_plain_1x1")
    s, t = case.input("student", dtype, learns=True), case.input("teacher", dtype)
    method = FitNet(FitNetSpec(weight=1.0, hint=1, regressor="plain"), setting(20), None, None)
    method.regressor = convolution = nn.Conv2d(s.shape[1], t.shape[1], 1, bias=False, dtype=dtype)
    convolution.weight.data.copy_(case.weight("weight"))
    loss = hint_of(method, s, t)
    loss.backward()
    assert near(loss, case.loss or 0.0, tolerance)
    assert s.grad is not None
    assert convolution.weight.grad is not None
    assert near(s.grad, case.gradient("student"), tolerance)
    assert near(convolution.weight.grad, case.gradient("weight"), tolerance)


def test_the_number_of_formula_maps_without_a_regressor() -> None:
    """The mean squared error itself, and its weight of 100."""
    n = torch.arange(1536, dtype=torch.float64)
    s, t = torch.sin(0.37 * n).view(4, 6, 8, 8), torch.cos(0.29 * n).view(4, 6, 8, 8)
    method = FitNet(FitNetSpec(hint=1), setting(20), None, None)
    assert hint_of(method, s, t).item() == pytest.approx(100 * 0.9827261798, rel=1e-9)


@pytest.mark.parametrize(
    ("teacher", "student", "parameters", "kernel"),
    [
        ("wrn40_2", "wrn16_2", 4_288, (1, 1)),
        ("resnet32x4", "resnet8x4", 16_768, (1, 1)),
        ("vgg13", "vgg8", 66_304, (1, 1)),
        ("vgg13", "mobilenetv2", 4_864, (1, 1)),
        ("resnet50", "mobilenetv2", 132_608, (4, 4)),
        ("resnet32x4", "shufflenetv1", 983_424, (4, 4)),
        ("wrn40_2", "shufflenetv1", 491_712, (4, 4)),
    ],
)
def test_the_regressor_of_the_published_pairs(
    teacher: str, student: str, parameters: int, kernel: tuple[int, int]
) -> None:
    """Its parameters as counted in the released code, at the second stage."""
    method = made(teacher, student)
    assert sum(p.numel() for p in method.parameters()) == parameters
    assert method.regressor.conv.kernel_size == kernel  # type: ignore[union-attr]


def test_a_teacher_with_images_of_twice_the_size_has_maps_of_twice_the_size() -> None:
    assert isinstance(made("wrn40_2", "wrn16_2", scale=2).regressor.conv, nn.ConvTranspose2d)


@pytest.mark.parametrize("regressor", ["norm", "plain"])
def test_a_much_larger_teacher_map_is_averaged_down(regressor: str) -> None:
    """Four times the height: no rule in the literature, so 1x1 between maps of the student's size."""
    method = made("wrn40_2", "wrn16_2", scale=4, regressor=regressor)
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 64, 4, 4, generator=generator), torch.randn(2, 64, 16, 16, generator=generator)
    method.hint = method.teacher_hint = 1
    found = hint_of(method, s, t).item()
    wanted = F.mse_loss(method.regressor(s), t.unflatten(2, (4, 4)).unflatten(4, (4, 4)).mean((3, 5)))
    assert found == pytest.approx(100 * wanted.item(), rel=1e-5)


def test_hints_are_counted_from_either_end_and_may_differ() -> None:
    """resnet50 has four stages and wrn16_2 three: -1 is the last of each, `teacher_hint` a stage of its own."""
    last, chosen = made("resnet50", "wrn16_2", hint=-1), made("resnet50", "wrn16_2", hint=0, teacher_hint=-4)
    assert (last.regressor.conv.in_channels, last.regressor.conv.out_channels) == (128, 2048)  # type: ignore[union-attr]
    assert (chosen.regressor.conv.in_channels, chosen.regressor.conv.out_channels) == (16, 256)  # type: ignore[union-attr]
    assert chosen.regressor.conv.kernel_size == (1, 1)  # type: ignore[union-attr]
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    s, t = build("wrn16_2", 100).features(images), build("resnet50", 100).features(images)
    for method in (last, chosen):
        assert torch.isfinite(method.loss(batch(torch.tensor([0, 1])), s, t, PROGRESS)["hint"])


def test_without_the_relu_negative_targets_are_reached() -> None:
    """The regressor's output is cut at zero with `hint_relu` only."""
    x = torch.randn(4, 32, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with_relu, without = made("resnet20", "resnet8"), made("resnet20", "resnet8", hint_relu=False)
    without.load_state_dict(with_relu.state_dict())
    assert without.regressor(x).min() < 0
    assert torch.equal(with_relu.regressor(x), without.regressor(x).relu())


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"hint": 4}, "method.hint"), ({"hint": -4}, "method.hint"), ({"teacher_hint": 9}, "method.teacher_hint")],
)
def test_a_stage_that_does_not_exist_is_refused(settings: dict[str, int], field: str) -> None:
    """Before training, with the setting's name."""
    with pytest.raises(IncompatibleError, match="no stage") as problem:
        made("resnet20", "resnet8", **settings)
    assert problem.value.code == 4
    assert problem.value.field == field
