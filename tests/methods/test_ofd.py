"""OFD against the released code, its margins, and which statistics and stages it reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden import PRECISIONS, PROGRESS, Case, batch, features, near, setting
from torch import Tensor, nn

from kdcli import methods
from kdcli.errors import IncompatibleError
from kdcli.methods.ofd import OFD, Connector, OFDSpec, margins
from kdcli.models import build
from kdcli.models.features import Features
from kdcli.specs import RunSpec


def with_maps(*maps: Tensor) -> Features:
    """Features with these stages, behind an empty stem."""
    return features(maps[0].new_zeros(maps[0].shape[0], 20), maps=(maps[0].new_empty(0), *maps))


def term_of(method: OFD, student: Features, teacher: Features) -> Tensor:
    labels = torch.zeros(student.logits.shape[0], dtype=torch.int64)
    return method.loss(batch(labels), student, teacher, PROGRESS)["ofd"]


def made(teacher: str, student: str, scale: int = 1, **settings: Any) -> OFD:
    return OFD(OFDSpec(**settings), setting(100, scale=scale), build(student, 100), build(teacher, 100))


def bare(weight: float, *margins_: Tensor) -> OFD:
    """The method with one connector per margin that changes nothing."""
    method = OFD(OFDSpec(weight=weight), setting(20), None, None)
    for margin in margins_:
        stage = Connector(margin.shape[0], margin)
        stage.connect = nn.Sequential()
        method.stages.append(stage)
    return method


def ramps(*shape: int) -> tuple[Tensor, Tensor]:
    """The two formula maps of the number tests."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(0.37 * n).view(shape), torch.cos(0.29 * n).view(shape)


@PRECISIONS
def test_the_released_loss_and_its_gradients(dtype: torch.dtype, tolerance: float) -> None:
    """Two stages with their connectors; a weight of the batch's size undoes its mean, for the released sum."""
    case = Case("ofd_loss")
    s = [case.input(f"student_{i}", dtype, learns=True) for i in range(2)]
    t = [case.input(f"teacher_{i}", dtype) for i in range(2)]
    method = OFD(OFDSpec(weight=case.hyper["batch"]), setting(20), None, None)
    outputs: list[Tensor] = []
    for i in range(2):
        stage = Connector(s[i].shape[1], case.input(f"margin_{i}", dtype)).to(dtype)
        stage.connect.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        names = ("conv_1x1", "bn_gamma", "bn_beta")
        for name, parameter in zip(names, stage.parameters(), strict=True):
            parameter.data.copy_(case.weight(f"connector{i}.{name}"))
        method.stages.append(stage)
    loss = term_of(method, with_maps(*s), with_maps(*t))
    loss.backward()
    assert loss.dtype == dtype
    assert near(loss, case.loss or 0.0, tolerance)
    assert near(loss / case.hyper["batch"], case.components["mean_over_batch"], tolerance)
    for i, stage in enumerate(method.stages):
        assert near(outputs[i], case.output(f"connected_{i}"), tolerance)
        gradient = s[i].grad
        assert gradient is not None
        assert near(gradient, case.gradient(f"student_{i}"), tolerance)
        for name, parameter in zip(("conv_1x1", "bn_gamma", "bn_beta"), stage.parameters(), strict=True):
            assert parameter.grad is not None
            assert near(parameter.grad, case.gradient(f"connector{i}.{name}"), tolerance), name


@PRECISIONS
def test_the_released_distance_of_one_map(dtype: torch.dtype, tolerance: float) -> None:
    """Without connector."""
    case = Case("ofd_one_map")
    s, t = case.input("student", dtype, learns=True), case.input("teacher", dtype)
    loss = term_of(bare(case.hyper["batch"], case.input("margin", dtype)), with_maps(s), with_maps(t))
    loss.backward()
    assert near(loss, case.loss or 0.0, tolerance)
    assert s.grad is not None
    assert near(s.grad, case.gradient("student"), tolerance)


@pytest.mark.parametrize("i", [0, 1])
def test_the_released_margins(i: int) -> None:
    """From BatchNorm weights of either sign, in float64 and as the released code rounds them."""
    case = Case("ofd_margin")
    found = margins(case.input(f"bn_gamma_{i}"), case.input(f"bn_beta_{i}"))
    assert found.dtype == torch.float64
    assert near(found, case.output(f"margin_{i}"), 1e-10)
    assert near(found.float(), case.output(f"margin_float32_{i}").double(), 1e-6)


def test_margins_are_what_a_sample_of_the_distribution_says() -> None:
    """The mean of the negative part, and three deviations below zero where there is almost none."""
    weight, bias = torch.tensor([1.0, -2.0, 0.5, 0.1]), torch.tensor([0.0, 1.0, -1.0, 5.0])
    sample = torch.randn(1_000_000, 3, generator=torch.Generator().manual_seed(0)) * weight[:3] + bias[:3]
    negative = (sample * (sample < 0)).sum(0) / (sample < 0).sum(0)
    found = margins(weight, bias)
    assert found[:3].tolist() == pytest.approx(negative.tolist(), rel=5e-3)
    assert found[3].item() == pytest.approx(-0.3)


def test_margins_of_channels_that_do_not_vary() -> None:
    """A weight of 0 gives the bias where it is negative and 0 otherwise, never a NaN."""
    assert margins(torch.zeros(3), torch.tensor([-1.0, 0.0, 1.0])).tolist() == [-1, 0, 0]


def test_the_number_of_formula_maps() -> None:
    """Margin -0.5, summed over C, H, W, mean over B, and the default weight of 0.001."""
    s, t = ramps(4, 6, 8, 8)
    margin = torch.full((6,), -0.5, dtype=torch.float64)
    found = term_of(bare(OFDSpec().weight, margin), with_maps(s), with_maps(t))
    assert found.item() == pytest.approx(306.9813983951e-3, rel=1e-10)


def test_what_is_below_the_margin_costs_nothing() -> None:
    """A negative teacher is a bound from above, no lower than the margin; a positive one is a target."""
    teacher = torch.tensor([-3.0, -3.0, -0.5, -0.5, 2.0]).view(1, 1, 1, 5)
    student = torch.tensor([-1.5, 0.0, -2.0, 1.0, -1.0]).view(1, 1, 1, 5)
    method = bare(1.0, torch.tensor([-1.0]))
    costs = [
        term_of(method, with_maps(student[..., k : k + 1]), with_maps(teacher[..., k : k + 1])).item() for k in range(5)
    ]
    assert costs == [0, 1, 0, 2.25, 9]


def test_each_stage_counts_half_of_the_next() -> None:
    """The last one fully."""
    s, t = ramps(2, 3, 4, 4)
    margin = torch.full((3,), -0.5, dtype=torch.float64)
    one = term_of(bare(1.0, margin), with_maps(s), with_maps(t)).item()
    maps = with_maps(s, s, s), with_maps(t, t, t)
    assert term_of(bare(1.0, margin, margin, margin), *maps).item() == pytest.approx(1.75 * one, rel=1e-12)


def test_the_larger_map_is_averaged() -> None:
    """The teacher's where it is larger, the student's where it is."""
    s, t = ramps(2, 3, 8, 8)
    small_s, small_t = (x.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5)) for x in (s, t))
    method = bare(1.0, torch.full((3,), -0.5, dtype=torch.float64))
    wanted = term_of(method, with_maps(small_s), with_maps(small_t)).item()
    assert term_of(method, with_maps(small_s), with_maps(t)).item() == pytest.approx(wanted, rel=1e-12)
    assert term_of(method, with_maps(s), with_maps(small_t)).item() == pytest.approx(wanted, rel=1e-12)


def test_the_parameters_of_a_published_pair() -> None:
    """wrn40_2 → wrn16_2: 21,952, and weights as spread as the released code draws them."""
    method = made("wrn40_2", "wrn16_2")
    assert sum(p.numel() for p in method.parameters()) == 21_952
    weights = method.stages[-1].connect[0].weight  # type: ignore[index, union-attr]
    assert weights.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.05)


def test_margins_come_from_the_teachers_norms_and_are_kept() -> None:
    """Of a wide residual network: the BatchNorm behind each stage; they are state, not parameters."""
    teacher = build("wrn16_2", 100)
    norms = [teacher.block2.layer[0].bn1, teacher.block3.layer[0].bn1, teacher.bn1]  # type: ignore[index, union-attr]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.2, 2)
        nn.init.uniform_(norm.bias, -1, 1)
    method = OFD(OFDSpec(), setting(100), build("resnet8", 100), teacher)
    for stage, norm in zip(method.stages, norms, strict=True):
        assert torch.equal(stage.margin, margins(norm.weight, norm.bias).float())  # type: ignore[arg-type]
    assert {key for key in method.state_dict() if "margin" in key} == {f"stages.{i}.margin" for i in range(3)}


@pytest.mark.parametrize(
    ("teacher", "student", "widths"),
    [
        ("resnet50", "wrn16_2", [512, 1024, 2048]),
        ("wrn16_2", "vgg8", [32, 64, 128]),
        ("mobilenetv2", "shufflenetv2", [16, 48, 160]),
        ("resnet32x4", "shufflenetv1", [64, 128, 256]),
    ],
)
def test_stages_meet_at_the_last(teacher: str, student: str, widths: list[int]) -> None:
    """Also where the public code has no rule (MobileNetV2's linear stages, ShuffleNetV1); a step is possible."""
    networks = build(student, 100), build(teacher, 100).eval().requires_grad_(False)
    method = OFD(OFDSpec(), setting(100), *networks)
    assert [stage.margin.numel() for stage in method.stages] == widths  # type: ignore[union-attr, operator]
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    taught = method.teacher_features(networks[1], images)
    loss = term_of(method, method.student_features(networks[0], images), taught)
    loss.backward()
    assert loss.item() > 0
    assert all(p.grad is not None for p in method.parameters())


def test_both_networks_are_read_before_the_relu() -> None:
    """The stages handed to the loss are the pre-activations, whose ReLU is the ordinary map."""
    method, network = made("resnet8", "resnet8", teacher_bn="eval"), build("resnet8", 100).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = network.features(images)
    for read in (method.student_features(network, images), method.teacher_features(network, images)):
        for preactivation, activation in zip(read.stages, plain.stages, strict=True):
            assert preactivation.min() < 0
            assert torch.equal(preactivation.relu(), activation)


def test_the_teachers_statistics_are_the_batchs_or_its_own() -> None:
    """batch (default): as in training mode; eval: as in evaluation mode; the teacher is unchanged by either."""
    teacher = build("wrn16_2", 100).eval().requires_grad_(False)
    state = {key: value.clone() for key, value in teacher.state_dict().items()}
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    own = made("wrn16_2", "resnet8", teacher_bn="eval").teacher_features(teacher, images)
    of_batch = made("wrn16_2", "resnet8").teacher_features(teacher, images)
    assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())
    assert not any(module.training for module in teacher.modules())
    plain = teacher.features(images)
    assert all(torch.equal(read, plain.preact(i)) for i, read in enumerate(own.stages, 1))
    for preactivation in of_batch.stages:  # the output of a BatchNorm of weight 1 and bias 0
        assert preactivation.mean((0, 2, 3)).abs().max() < 1e-4
    assert not torch.allclose(own.logits, of_batch.logits)


def test_a_last_batch_of_one_image() -> None:
    """Its statistics would be none where a map has one position: the teacher's own stand in."""
    teacher = build("torchvision:resnet18", 100).eval().requires_grad_(False)
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    student = build("resnet8", 100)
    method = OFD(OFDSpec(), setting(100), student, teacher)
    taught, plain = method.teacher_features(teacher, image), teacher.features(image)
    assert taught.stages[-1].shape[2:] == (1, 1)
    assert all(torch.equal(read, plain.preact(i)) for i, read in enumerate(taught.stages, 1))
    loss = term_of(method, method.student_features(student, image), taught)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in method.parameters())


@pytest.mark.parametrize("teacher", ["shufflenetv1", "shufflenetv2", "timm:vit_tiny_patch16_224"])
def test_a_teacher_without_a_norm_before_its_relu_is_refused(teacher: str) -> None:
    """There is nothing to read the margins from."""
    with pytest.raises(IncompatibleError, match="no BatchNorm") as problem:
        made(teacher, "resnet8")
    assert problem.value.code == 4
    assert problem.value.field == "--teacher"


def test_imagenet_has_a_weight_of_its_own() -> None:
    """A tenth of CIFAR's, unless the user says otherwise."""

    def weight(dataset: str, **given: float) -> float:
        spec = RunSpec.model_validate(
            {
                "command": "distill",
                "method": {"name": "ofd", **given},
                "teacher": "resnet34",
                "student": "resnet18",
                "data": {"dataset": dataset},
            }
        )
        return methods.resolve(spec).method["weight"]

    assert weight("cifar100") == 1e-3
    assert weight("imagenet") == 1e-4
    assert weight("imagenet", weight=0.5) == 0.5
