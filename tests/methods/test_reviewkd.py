"""ReviewKD against the released code, the sizes that pairs of networks get, and its settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from golden import PRECISIONS, PROGRESS, Case, batch, features, near, setting
from torch import Tensor, nn

from kdcli import methods
from kdcli.errors import IncompatibleError
from kdcli.methods.base import Progress
from kdcli.methods.reviewkd import Fusion, ReviewKD, ReviewKDSpec
from kdcli.models import build
from kdcli.models.features import Features
from kdcli.models.network import Network, stage_shapes
from kdcli.specs import RunSpec


class Given(nn.Module):
    """In a fusion's place: predicts what is given instead of fusing anything."""

    def forward(self, x: Tensor, deeper: Tensor | None, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The student's map as it is."""
        return x, x


def with_maps(pooled: Tensor, *maps: Tensor) -> Features:
    """Features with these stages, behind an empty stem."""
    return features(pooled.new_zeros(pooled.shape[0], 20), pooled, (pooled.new_empty(0), *maps))


def term_of(method: ReviewKD, student: Features, teacher: Features, progress: Progress = PROGRESS) -> Tensor:
    labels = torch.zeros(student.logits.shape[0], dtype=torch.int64)
    return method.loss(batch(labels), student, teacher, progress)["review"]


def unfused(stages: int, **settings: Any) -> ReviewKD:
    """The method comparing maps and pooled vectors as they are."""
    method = ReviewKD(ReviewKDSpec(**settings), setting(20), None, None)
    method.fusions.extend(Given() for _ in range(stages + 1))
    return method


def made(teacher: str, student: str, scale: int = 1, **settings: Any) -> ReviewKD:
    return ReviewKD(ReviewKDSpec(**settings), setting(100, scale=scale), build(student, 100), build(teacher, 100))


def stepped(
    method: ReviewKD, student: Network, teacher: Network, scale: int = 1
) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
    """A step on two images: the shapes each fusion predicts and reads, shallow to deep."""
    predicted: list[Tensor] = []
    read: list[tuple[Tensor, ...]] = []

    def watch(_module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        predicted.insert(0, output[0])
        read.insert(0, inputs)

    for fusion in method.fusions:
        fusion.register_forward_hook(watch)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    large = nn.functional.interpolate(images, scale_factor=float(scale))
    taught = method.teacher_features(teacher.eval().requires_grad_(False), large)
    loss = term_of(method, method.student_features(student, images), taught)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in method.parameters())
    return predicted, read


@PRECISIONS
def test_the_released_hierarchical_loss_and_its_gradients(dtype: torch.dtype, tolerance: float) -> None:
    """Maps of 16, 8, 4 and 1 positions per side, summed and one by one."""
    case = Case("reviewkd_hcl")
    s = [case.input(f"student_{i}", dtype, learns=True) for i in range(4)]
    t = [case.input(f"teacher_{i}", dtype) for i in range(4)]
    loss = term_of(unfused(3), with_maps(s[3].flatten(1), *s[:3]), with_maps(t[3].flatten(1), *t[:3]))
    loss.backward()
    assert loss.dtype == dtype
    assert near(loss, case.loss or 0.0, tolerance)
    for i in range(4):
        gradient = s[i].grad
        assert gradient is not None
        assert near(gradient, case.gradient(f"student_{i}"), tolerance), i
    for i in range(3):  # each stage beside a pooled vector that is predicted perfectly
        alone = term_of(unfused(1), with_maps(t[3].flatten(1), s[i]), with_maps(t[3].flatten(1), t[i]))
        assert near(alone, case.components[f"stage_{i}"], tolerance), i


GOLDEN_NAMES = {
    "reduce_conv_1x1": "reduce.0.weight",
    "reduce_bn_gamma": "reduce.1.weight",
    "reduce_bn_beta": "reduce.1.bias",
    "output_conv_3x3": "predict.0.weight",
    "output_bn_gamma": "predict.1.weight",
    "output_bn_beta": "predict.1.bias",
    "attention_conv_1x1": "attention.weight",
    "attention_conv_bias": "attention.bias",
}


@PRECISIONS
def test_the_released_chain_and_its_gradients(dtype: torch.dtype, tolerance: float) -> None:
    """Three stages and the pooled vector: predictions, loss, and all gradients."""
    case = Case("reviewkd_abf_chain")
    names = ["stage0", "stage1", "stage2", "pooled"]
    s = [case.input(f"student_{name}", dtype, learns=True) for name in names]
    t = [case.input(f"teacher_{name}", dtype) for name in names]
    method = ReviewKD(ReviewKDSpec(), setting(20), None, None)
    outputs: list[Tensor] = []
    pairs = zip(case.hyper["in_channels"], case.hyper["out_channels"], names, strict=True)
    for c_s, c_t, name in pairs:
        fusion = Fusion(c_s, case.hyper["mid_channel"], c_t, fuses=name != "pooled").to(dtype)
        fusion.register_forward_hook(lambda _module, _inputs, output: outputs.insert(0, output[0]))
        parameters = dict(fusion.named_parameters())
        for theirs, ours in GOLDEN_NAMES.items():
            if ours in parameters:
                parameters.pop(ours).data.copy_(case.weight(f"{name}.{theirs}"))
        assert not parameters
        method.fusions.append(fusion)
    loss = term_of(method, with_maps(s[3], *s[:3]), with_maps(t[3], *t[:3]))
    loss.backward()
    assert loss.dtype == dtype
    assert near(loss, case.loss or 0.0, tolerance)
    for i, name in enumerate(names):
        gradient = s[i].grad
        assert gradient is not None
        assert near(outputs[i], case.output(f"transformed_{i}"), tolerance), name
        assert near(gradient, case.gradient(f"student_{name}"), tolerance), name
        parameters = dict(method.fusions[i].named_parameters())
        for theirs, ours in GOLDEN_NAMES.items():
            if ours in parameters:
                gradient = parameters[ours].grad
                assert gradient is not None
                assert near(gradient, case.gradient(f"{name}.{theirs}"), tolerance), (name, theirs)


def test_the_numbers_of_formula_maps() -> None:
    """8x8, and 1x1 as the pooled vector."""
    n = torch.arange(1536, dtype=torch.float64)
    s, t = torch.sin(0.37 * n).view(4, 6, 8, 8), torch.cos(0.29 * n).view(4, 6, 8, 8)
    pooled_s, pooled_t = s.mean((2, 3)), t.mean((2, 3))
    alike = term_of(unfused(1), with_maps(pooled_t, s), with_maps(pooled_t, t))
    assert alike.item() == pytest.approx(0.5507389071, rel=1e-9)
    only_pooled = term_of(unfused(1), with_maps(pooled_s, t), with_maps(pooled_t, t))
    assert only_pooled.item() == pytest.approx(0.0017976713, rel=1e-7)


def test_a_map_that_does_not_divide_into_the_regions() -> None:
    """7x7 (ImageNet): against PyTorch's adaptive pooling of either map."""
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 3, 7, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    mse, pool, pooled = nn.functional.mse_loss, nn.functional.adaptive_avg_pool2d, t.mean((2, 3))
    wanted = mse(s, t) + sum(w * mse(pool(s, k), pool(t, k)) for w, k in ((0.5, 4), (0.25, 2), (0.125, 1)))
    found = term_of(unfused(1), with_maps(pooled, s), with_maps(pooled, t))
    assert found.item() == pytest.approx(float(wanted) / 1.875, rel=1e-12)


def test_the_parameters_of_a_published_pair() -> None:
    """wrn40_2 → wrn16_2: 453,830, with 128 channels between and weights drawn as in the released code."""
    method = made("wrn40_2", "wrn16_2")
    assert sum(p.numel() for p in method.parameters()) == 453_830
    fusion = method.fusions[-1]
    assert isinstance(fusion, Fusion)
    assert fusion.attention is None
    weight = fusion.predict[0].weight
    assert weight.shape == (128, 128, 3, 3)
    assert weight.abs().max().item() == pytest.approx((3 / (128 * 9)) ** 0.5, rel=0.01)


TABLE = [
    # teacher, student, the student's channels, sides of its maps; the teacher's, from shallow to deep, the pooled last
    ("resnet56", "resnet20", [16, 32, 64, 64], [32, 16, 8, 1], [16, 32, 64, 64], [32, 16, 8, 1]),
    ("resnet32x4", "resnet8x4", [64, 128, 256, 256], [32, 16, 8, 1], [64, 128, 256, 256], [32, 16, 8, 1]),
    ("wrn40_2", "wrn16_2", [32, 64, 128, 128], [32, 16, 8, 1], [32, 64, 128, 128], [32, 16, 8, 1]),
    ("wrn40_2", "wrn40_1", [16, 32, 64, 64], [32, 16, 8, 1], [32, 64, 128, 128], [32, 16, 8, 1]),
    ("vgg13", "vgg8", [128, 256, 512, 512, 512], [16, 8, 4, 4, 1], [128, 256, 512, 512, 512], [16, 8, 4, 4, 1]),
    ("resnet50", "vgg8", [128, 256, 512, 512, 512], [16, 8, 4, 4, 1], [256, 512, 1024, 2048, 2048], [32, 16, 8, 4, 1]),
    ("resnet50", "mobilenetv2", [12, 16, 48, 160, 1280], [16, 8, 4, 2, 1], [256, 512, 1024, 2048, 2048], [32, 16, 8, 4, 1]),
    ("vgg13", "mobilenetv2", [12, 16, 48, 160, 1280], [16, 8, 4, 2, 1], [128, 256, 512, 512, 512], [16, 8, 4, 4, 1]),
    ("wrn40_2", "shufflenetv1", [240, 480, 960, 960], [16, 8, 4, 1], [32, 64, 128, 128], [32, 16, 8, 1]),
    ("resnet32x4", "shufflenetv1", [240, 480, 960, 960], [16, 8, 4, 1], [64, 128, 256, 256], [32, 16, 8, 1]),
    ("resnet32x4", "shufflenetv2", [116, 232, 464, 1024], [16, 8, 4, 1], [64, 128, 256, 256], [32, 16, 8, 1]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("teacher", "student", "c_s", "sides_s", "c_t", "sides_t"), TABLE, ids=["-".join(row[:2]) for row in TABLE]
)
def test_the_sizes_of_the_published_pairs(
    teacher: str, student: str, c_s: list[int], sides_s: list[int], c_t: list[int], sides_t: list[int]
) -> None:
    """What the released code lists by hand, found from the networks, in one step of the pair."""
    networks = build(student, 100), build(teacher, 100)
    method = ReviewKD(ReviewKDSpec(), setting(100), *networks)
    predicted, read = stepped(method, *networks)
    assert [x[0].shape[1] for x in read] == c_s
    assert [x[0].shape[2] for x in read] == sides_s
    assert [x.shape[1] for x in predicted] == c_t
    assert [x.shape[2] for x in predicted] == sides_t
    assert {f.reduce[0].out_channels for f in method.fusions} == {min(512, c_s[-1])}  # type: ignore[union-attr, index]


def test_a_teacher_with_more_stages_meets_the_student_at_the_last() -> None:
    """resnet50's shallowest stage is left out."""
    networks = build("wrn16_2", 100), build("resnet50", 100)
    predicted, read = stepped(ReviewKD(ReviewKDSpec(), setting(100), *networks), *networks)
    assert [x.shape[1:3] for x in predicted] == [(512, 16), (1024, 8), (2048, 4), (2048, 1)]
    assert [x[0].shape[1] for x in read] == [32, 64, 128, 128]


def test_a_student_with_more_stages_meets_the_teacher_at_the_last() -> None:
    """vgg8's shallowest stage is left out."""
    networks = build("vgg8", 100), build("resnet8", 100)
    _, read = stepped(ReviewKD(ReviewKDSpec(), setting(100), *networks), *networks)
    assert [x[0].shape[1:3] for x in read] == [(256, 8), (512, 4), (512, 4), (512, 1)]


def test_an_enlarged_teacher_is_met_at_its_size() -> None:
    """The student's side is resized to the teacher's maps of twice the side."""
    networks = build("resnet8", 100), build("wrn16_2", 100)
    predicted, _ = stepped(ReviewKD(ReviewKDSpec(), setting(100, scale=2), *networks), *networks, scale=2)
    assert [x.shape[2] for x in predicted] == [64, 32, 16, 1]
    assert [shape[1] for shape in stage_shapes(networks[1], 64)[1:]] == [64, 32, 16]


def test_a_last_batch_of_one_image() -> None:
    """Its pooled vector has no variance: the step is possible, finite, and trains everything."""
    student, teacher = build("resnet8", 100), build("resnet14", 100).eval().requires_grad_(False)
    method = ReviewKD(ReviewKDSpec(), setting(100), student, teacher)
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loss = term_of(method, method.student_features(student, image), method.teacher_features(teacher, image))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())


def test_channels_between_on_request() -> None:
    """By default the width of the student's pooled vector, at most 512."""
    method = made("resnet8", "resnet8", mid_channels=7)
    assert {fusion.reduce[0].out_channels for fusion in method.fusions} == {7}  # type: ignore[union-attr, index]


@pytest.mark.parametrize(
    ("warmup", "epoch", "factor"), [(20, 1, 0.05), (20, 10, 0.5), (20, 20, 1), (20, 21, 1), (1, 1, 1), (0, 1, 1)]
)
def test_the_warm_up(warmup: int, epoch: int, factor: float) -> None:
    """Linear, the first epoch counting as 1, on top of the weight; the cross-entropy has none."""
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    maps = with_maps(s.mean((2, 3)), s), with_maps(t.mean((2, 3)), t)
    full = term_of(unfused(1), *maps).item()
    found = term_of(unfused(1, warmup=warmup, weight=3.0), *maps, replace(PROGRESS, epoch=torch.tensor(float(epoch))))
    assert found.item() == pytest.approx(3 * factor * full, rel=1e-6)


def test_which_maps_of_the_student_are_fused() -> None:
    """feature (default): as they leave the stages; preact: before the closing ReLU."""
    student = build("resnet8", 100).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = made("resnet8", "resnet8").student_features(student, images)
    before = made("resnet8", "resnet8", student_taps="preact").student_features(student, images)
    for activation, preactivation in zip(plain.stages, before.stages, strict=True):
        assert preactivation.min() < 0
        assert torch.equal(activation, preactivation.relu())
    assert torch.equal(plain.pooled, before.pooled)


def test_the_teachers_statistics_are_the_batchs_or_its_own() -> None:
    """batch (default): as in training mode; eval: as in evaluation mode; its maps are those before the ReLU."""
    teacher = build("wrn16_2", 100).eval().requires_grad_(False)
    state = {key: value.clone() for key, value in teacher.state_dict().items()}
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    own = made("wrn16_2", "resnet8", teacher_bn="eval").teacher_features(teacher, images)
    of_batch = made("wrn16_2", "resnet8").teacher_features(teacher, images)
    assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())
    plain = teacher.features(images)
    assert all(torch.equal(read, plain.preact(i)) for i, read in enumerate(own.stages, 1))
    assert torch.equal(own.pooled, plain.pooled)
    wanted = teacher.train().features(images)
    assert all(torch.equal(read, wanted.preact(i)) for i, read in enumerate(of_batch.stages, 1))
    assert torch.equal(of_batch.pooled, wanted.pooled)


@pytest.mark.parametrize(
    ("teacher", "student", "weight"),
    [
        ("wrn40_2", "wrn16_2", 5),
        ("resnet32x4", "shufflenetv2", 8),
        ("resnet56", "resnet20", 0.6),
        ("resnet110", "resnet32", 1),
        ("resnet50", "mobilenetv2", 30),
        ("resnet50", "wrn16_2", 1),
    ],
)
def test_the_weight_of_a_pair(teacher: str, student: str, weight: float) -> None:
    """Published, 1 where none is, and the user's own wins."""
    assert resolved(teacher, student, "cifar100")["weight"] == weight
    assert resolved(teacher, student, "cifar100", weight=2.5)["weight"] == 2.5


def resolved(teacher: str, student: str, dataset: str, **given: Any) -> dict[str, Any]:
    """The method's settings for a pair on a data set."""
    values = {
        "command": "distill",
        "method": {"name": "reviewkd", **given},
        "teacher": teacher,
        "student": student,
        "data": {"dataset": dataset},
    }
    return methods.resolve(RunSpec.model_validate(values)).method


def test_imagenet_has_settings_of_its_own() -> None:
    """One epoch of warm-up, maps of the student before the ReLU, a teacher in evaluation mode, λ by student."""
    wanted = {"weight": 1.0, "warmup": 1, "student_taps": "preact", "teacher_bn": "eval"}
    found = resolved("resnet34", "resnet18", "imagenet")
    assert {key: found[key] for key in wanted} == wanted
    light = resolved("torchvision:resnet50", "mobilenetv1", "imagenet")
    assert (light["weight"], light["mid_channels"]) == (8, 256)
    cifar = resolved("resnet34", "resnet18", "cifar100")
    assert [cifar[key] for key in wanted] == [1, 20, "feature", "batch"]


def test_networks_without_maps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library's network in which no map was found has nothing to fuse."""
    student = build("resnet8", 100)
    monkeypatch.setattr(student, "features", lambda x: features(x.new_empty(2, 100), x.new_empty(2, 64)))
    with pytest.raises(IncompatibleError, match="no stages") as problem:
        ReviewKD(ReviewKDSpec(), setting(100), student, build("resnet8", 100))
    assert problem.value.code == 4
