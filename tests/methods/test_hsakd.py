"""HSAKD: losses and gradients of the released code, its relation to VSD, its two teachers and every setting."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import FOLDER, PRECISIONS, PROGRESS, Case, batch, near, setting
from torch import Tensor

from kdcli.data.loader import Batch
from kdcli.errors import IncompatibleError, UsageError
from kdcli.methods.hsakd import HSAKD, HSAKDSpec
from kdcli.methods.vsd import VSD, VSDSpec
from kdcli.models import build
from kdcli.models.features import Features
from kdcli.models.heads import Headed, build_projection
from kdcli.models.network import parameters_of
from kdcli.specs import TrainSpec
from kdcli.transforms import expand, joint_labels

K = 10
NAMES = ["logits", *(f"aux_logits_{j}" for j in range(3))]


def images(size: int = 2) -> Batch:
    pixels = torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return Batch(pixels, torch.arange(size) * 3 % K, torch.arange(size), 1.0)


def outputs(logits: Tensor, heads: tuple[Tensor, ...] = ()) -> Features:
    return Features(logits, torch.empty(len(logits), 0), (), heads)


def random(*shape: int, seed: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Made:
    """HSAKD with its two networks, built as the commands build them."""

    def __init__(self, student: str = "resnet8", teacher: str = "resnet14", smoothing: float = 0.0, **settings: Any):
        torch.manual_seed(0)
        self.spec = HSAKDSpec(**settings)
        HSAKD.check(self.spec)
        fixed = HSAKD.fixed_stride
        self.student, backbone = build(student, K, fixed_stride=fixed), build(teacher, K, fixed_stride=fixed)
        heads = HSAKD.teacher_heads(self.spec, backbone, K)
        self.teacher = Headed(backbone, heads).eval().requires_grad_(False)
        made = setting(K, scale=self.spec.teacher_scale, label_smoothing=smoothing)
        self.method = HSAKD(self.spec, made, self.student, self.teacher)

    def features(self, data: Batch) -> tuple[Features, Features]:
        with torch.no_grad():
            taught = self.method.teacher_features(self.teacher, self.method.teacher_views(data, PROGRESS))
        return self.method.student_features(self.student, self.method.student_views(data, PROGRESS)), taught

    def terms(self, data: Batch) -> dict[str, Tensor]:
        return self.method.loss(data, *self.features(data), PROGRESS)


# ---------------------------------------------------------------------------------------------------- golden numbers


@PRECISIONS
def test_the_released_loss_of_the_student_and_its_gradients(dtype: torch.dtype, tolerance: float) -> None:
    """With the default settings: views, total, every term and all gradients."""
    case = Case("hsakd_student")
    student = {n: case.input(n, dtype, learns=True) for n in NAMES}
    teacher = {n: case.input(f"teacher_{n}", dtype) for n in NAMES}
    data = Batch(case.input("image"), case.input("target"), torch.arange(8), 1.0)
    method = HSAKD(HSAKDSpec(), setting(K), None, None)
    assert method.spec.temperature == case.hyper["T"]
    assert torch.equal(method.student_views(data, PROGRESS), case.output("rotated_images"))
    learned, taught = (outputs(f["logits"], tuple(f[n] for n in NAMES[1:])) for f in (student, teacher))
    terms = method.loss(data, learned, taught, PROGRESS)
    assert near(terms["ce"], case.components["loss_ce_rotation0"], tolerance)
    assert near(terms["kd"], case.components["kl_main"], tolerance)
    assert near(terms["heads"], sum(case.components[f"kl_aux_{j}"] for j in range(3)), tolerance)
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    assert near(total, case.loss or 0.0, tolerance)
    for name in NAMES:
        grad = student[name].grad
        assert grad is not None
        assert near(grad, case.gradient(name), tolerance), name


@PRECISIONS
def test_the_released_loss_of_the_joint_teacher_and_its_gradients(dtype: torch.dtype, tolerance: float) -> None:
    """Cross-entropy of the main head on upright images and of every head on the joint labels."""
    case = Case("hsakd_teacher")
    found = {n: case.input(n, dtype, learns=True) for n in NAMES}
    method = HSAKD(HSAKDSpec(), setting(K), None, None)
    features = outputs(found["logits"], tuple(found[n] for n in NAMES[1:]))
    terms = method.teacher_loss(batch(case.input("target")), features, PROGRESS)
    assert near(terms["ce"], case.components["ce_main_rotation0"], tolerance)
    assert near(terms["heads"], sum(case.components[f"ce_aux_{j}"] for j in range(3)), tolerance)
    total = terms["ce"] + terms["heads"]
    total.backward()
    assert near(total, case.loss or 0.0, tolerance)
    for name in NAMES:
        grad = found[name].grad
        assert grad is not None
        assert near(grad, case.gradient(name), tolerance), name


@pytest.mark.parametrize(
    ("name", "reference"),
    [("wrn16_2", "wrn_16_2_aux"), ("resnet20", "resnet20_aux"), ("shufflenetv2", "ShuffleV2_aux")],
)
def test_the_students_heads_have_the_size_of_the_released_ones(name: str, reference: str) -> None:
    """With 100 classes and four rotations: as many parameters as the released networks have in their heads."""
    facts = json.loads((FOLDER / "models.json").read_text("utf-8"))["hsakd_models"]
    student, backbone = build(name, 100), build(name, 100)
    teacher = Headed(backbone, HSAKD.teacher_heads(HSAKDSpec(), backbone, 100))
    method = HSAKD(HSAKDSpec(), setting(100), student, teacher)
    assert parameters_of(method) == facts[reference]["params_auxiliary"]
    assert parameters_of(teacher.heads) == facts[reference]["params_auxiliary"]


# -------------------------------------------------------------------------------------------------- relation to VSD


def test_vsd_with_a_class_head_at_one_scale_is_hsakd() -> None:
    """The reading of VSD on which ours rests: equal weights in both give equal terms and equal gradients."""
    mine, data = Made(), images()
    terms = mine.terms(data)
    torch.stack(list(terms.values())).sum().backward()
    gradients = {name: p.grad for name, p in mine.student.named_parameters()}
    mine.student.zero_grad(set_to_none=True)
    mine.student.load_state_dict(Made().student.state_dict())  # BatchNorm statistics as before
    spec = VSDSpec(main_head="class", teacher_scale=1, rescale="none")
    other = VSD(spec, setting(K), mine.student, mine.teacher)
    other.student_heads.load_state_dict(Made().method.student_heads.state_dict())
    learned = other.student_features(mine.student, other.student_views(data, PROGRESS))
    taught = other.teacher_features(mine.teacher, other.teacher_views(data, PROGRESS))
    found = other.loss(data, learned, taught, PROGRESS)
    pairs = {"ce": "agg1", "kd": "kd2", "heads": "kd1"}
    assert {pairs[name]: term.item() for name, term in terms.items()} == pytest.approx(
        {name: term.item() for name, term in found.items()}
    )
    torch.stack(list(found.values())).sum().backward()
    for name, p in mine.student.named_parameters():
        wanted = gradients[name]
        assert wanted is not None
        assert p.grad is not None
        assert torch.allclose(p.grad, wanted, rtol=1e-3, atol=1e-5), name


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("weight", "term"),
    [("ce_weight", "ce"), ("kd_weight", "kd"), ("heads_weight", "heads"), ("student_ce", "heads_ce")],
)
def test_each_weight_scales_its_own_term(weight: str, term: str) -> None:
    """2.5 times the weight is 2.5 times the term, and the others stay."""
    data = images()
    one, more = Made(student_ce=1).terms(data), Made(**{"student_ce": 1, weight: 2.5}).terms(data)
    assert set(one) == {"ce", "kd", "heads", "heads_ce"}
    for name in one:
        assert more[name].item() == pytest.approx((2.5 if name == term else 1) * one[name].item(), rel=1e-5)


def test_by_default_the_students_heads_see_no_labels() -> None:
    """student_ce is the cross-entropy of all heads to the joint labels, and off."""
    assert set(Made().terms(images())) == {"ce", "kd", "heads"}
    heads = tuple(random(8, 40, seed=j) for j in range(3))
    data, method = images(), HSAKD(HSAKDSpec(student_ce=1), setting(K), None, None)
    logits = random(8, K, seed=9)
    terms = method.loss(data, outputs(logits, heads), outputs(logits, heads), PROGRESS)
    expected = sum(F.cross_entropy(z, joint_labels(data.labels, 4)).item() for z in heads)
    assert terms["heads_ce"].item() == pytest.approx(expected, rel=1e-12)


def test_the_temperature_softens_both_divergences() -> None:
    """T² · KL of the rows softened by T; the cross-entropy knows no temperature."""
    s, t, h, g = random(8, K, seed=1), random(8, K, seed=2), random(8, 40, seed=3), random(8, 40, seed=4)
    method = HSAKD(HSAKDSpec(temperature=1.7), setting(K), None, None)
    terms = method.loss(images(), outputs(s, (h,)), outputs(t, (g,)), PROGRESS)

    def softened(student: Tensor, teacher: Tensor) -> float:
        p, q = torch.softmax(teacher / 1.7, 1), torch.softmax(student / 1.7, 1)
        return 1.7**2 * (p * (p / q).log()).sum(1).mean().item()

    assert terms["kd"].item() == pytest.approx(softened(s, t), rel=1e-9)
    assert terms["heads"].item() == pytest.approx(softened(h, g), rel=1e-9)
    assert terms["ce"].item() == pytest.approx(F.cross_entropy(s[::4], images().labels).item(), rel=1e-9)


def test_label_smoothing_is_of_every_cross_entropy() -> None:
    """Main head over K classes, heads over 4K."""
    s, h, data = random(8, K, seed=1), random(8, 40, seed=3), images()
    method = HSAKD(HSAKDSpec(student_ce=1), setting(K, label_smoothing=0.2), None, None)
    terms = method.loss(data, outputs(s, (h,)), outputs(s, (h,)), PROGRESS)
    wanted = {
        "ce": F.cross_entropy(s[::4], data.labels, label_smoothing=0.2).item(),
        "heads_ce": F.cross_entropy(h, joint_labels(data.labels, 4), label_smoothing=0.2).item(),
    }
    assert {name: terms[name].item() for name in wanted} == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("transform", "m"), [("rot2", 2), ("perm6", 6), ("none", 1)])
def test_other_transformations_span_another_joint_space(transform: str, m: int) -> None:
    """M views, heads with M·K outputs on both networks, main heads with K."""
    data, made = images(), Made(transform=transform)
    assert torch.equal(made.method.student_views(data, PROGRESS), expand(data.images, transform))
    learned, taught = made.features(data)
    for found in (learned, taught):
        assert found.logits.shape == (2 * m, K)
        assert [z.shape for z in found.heads] == [(2 * m, m * K)] * 3
    assert all(torch.isfinite(term) for term in made.method.loss(data, learned, taught, PROGRESS).values())


def test_the_teacher_may_see_its_views_enlarged() -> None:
    """teacher_scale=2: 64 pixels for the teacher; the student's maps reach its heads as they are."""
    data, made = images(), Made("vgg8", "resnet14", teacher_scale=2)
    assert made.method.teacher_views(data, PROGRESS).shape == (8, 3, 64, 64)
    learned, taught = made.features(data)
    assert [z.shape for z in learned.heads] == [z.shape for z in taught.heads]
    own = [head(learned.maps[tap]) for head, tap in zip(made.method.student_heads, made.method.taps, strict=True)]
    for found, expected in zip(learned.heads, own, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


def test_without_heads_nothing_is_built_and_any_teacher_will_do() -> None:
    """heads_weight=0: the main heads' terms alone, with a teacher that has no heads."""
    teacher = build("resnet14", K).eval()
    student = build("resnet8", K)
    method = HSAKD(HSAKDSpec(heads_weight=0), setting(K), student, teacher)
    assert parameters_of(method) == 0
    data = images()
    learned = method.student_features(student, method.student_views(data, PROGRESS))
    taught = method.teacher_features(teacher, method.teacher_views(data, PROGRESS))
    assert taught.heads == ()
    assert set(method.loss(data, learned, taught, PROGRESS)) == {"ce", "kd"}


@pytest.mark.parametrize(
    ("student", "teacher", "taps", "teacher_taps"),
    [
        ("resnet20", "vgg13", (1, 2, 3), (1, 2, 4)),
        ("vgg8", "resnet8", (1, 2, 4), (1, 2, 3)),
        ("mobilenetv2", "vgg13", (1, 2, 3, 4), (0, 1, 2, 4)),
    ],
)
def test_unequal_numbers_of_heads_leave_out_the_shallowest(
    student: str, teacher: str, taps: tuple[int, ...], teacher_taps: tuple[int, ...]
) -> None:
    """The last heads of both networks are compared; those left out are not even computed."""
    made, data = Made(student, teacher), images()
    assert (made.method.taps, made.method.teacher_taps) == (taps, teacher_taps)
    learned, taught = made.features(data)
    assert len(learned.heads) == len(taught.heads) == len(taps)
    everything = made.teacher.features(made.method.teacher_views(data, PROGRESS)).heads
    for found, expected in zip(taught.heads, everything[-len(taps) :], strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- its teacher


def test_a_frozen_teacher_learns_its_heads_alone() -> None:
    """No constant term, a gradient for every parameter that is left, and none for the backbone."""
    spec = HSAKDSpec(teacher="frozen")
    backbone = build("resnet14", K)
    teacher = Headed(backbone, HSAKD.teacher_heads(spec, backbone, K), frozen=True).train()
    method, data = HSAKD(spec, setting(K), None, teacher), images()
    features = teacher.features(method.teacher_views(data, PROGRESS))
    terms = method.teacher_loss(data, features, PROGRESS)
    assert set(terms) == {"heads"}
    joint = HSAKD(HSAKDSpec(), setting(K), None, teacher).teacher_loss(data, features, PROGRESS)
    assert terms["heads"].item() == joint["heads"].item()
    terms["heads"].backward()
    assert all(p.grad is not None for p in teacher.heads.parameters())
    assert all(p.grad is None for p in backbone.parameters())


def test_the_two_ways_to_make_a_teacher() -> None:
    """joint: from scratch by the recipe; frozen: heads on a network of `none`, 100 of 240 epochs, decays at 30, 60, 90."""
    recipe = TrainSpec(schedule="cosine", lr=0.05)
    assert HSAKD.teacher_backbone(HSAKDSpec()) is None
    assert HSAKD.teacher_recipe(HSAKDSpec(), recipe) == recipe
    frozen = HSAKDSpec(teacher="frozen")
    assert HSAKD.teacher_backbone(frozen) == {"name": "none"}
    enlarged = HSAKD.teacher_backbone(HSAKDSpec(teacher="frozen", teacher_scale=2))
    assert enlarged == {"name": "none", "teacher_scale": 2, "scale_mode": "bilinear"}
    shorter = HSAKD.teacher_recipe(frozen, recipe)
    assert (shorter.epochs, shorter.schedule, shorter.lr) == (100, "step", 0.05)
    assert [m * shorter.epochs for m in shorter.milestones] == pytest.approx([30, 60, 90])
    assert HSAKD.teacher_recipe(frozen, TrainSpec(epochs=1)).epochs == 1
    assert HSAKD.teacher_recipe(HSAKDSpec(teacher="frozen", head_epochs=9), recipe).epochs == 9


def test_the_teacher_depends_only_on_what_trains_it() -> None:
    """The student's weights and temperature share a teacher; transformation, scale and kind of teacher do not."""
    base = HSAKD.teacher_settings(HSAKDSpec())
    for own in ({"temperature": 4}, {"heads_weight": 2}, {"student_ce": 1}, {"ce_weight": 0.1}):
        assert HSAKD.teacher_settings(HSAKDSpec(**own)) == base, own
    for theirs in (
        {"transform": "rot2"},
        {"teacher": "frozen"},
        {"teacher": "frozen", "head_epochs": 3},
        {"teacher_scale": 2},
    ):
        assert HSAKD.teacher_settings(HSAKDSpec(**theirs)) != base, theirs
    assert HSAKD.teacher_settings(HSAKDSpec(**base)) == base


# ----------------------------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize("projection", [False, True])
def test_a_teacher_without_heads_is_refused_with_the_command_that_makes_one(projection: bool) -> None:
    """A plain network, and one with SSKD's projection, end in exit code 4 before anything is trained."""
    plain = build("resnet14", K)
    teacher = Headed(plain, build_projection(plain)) if projection else plain
    with pytest.raises(IncompatibleError, match="no auxiliary heads") as problem:
        HSAKD(HSAKDSpec(), setting(K), build("resnet8", K), teacher)
    assert problem.value.code == 4
    assert "kd pretrain-teacher --method hsakd --teacher resnet14" in (problem.value.hint or "")


def test_vsd_refuses_a_projection_where_it_needs_heads() -> None:
    """It is a head on a teacher, but none of the joint space."""
    backbone = build("resnet14", K)
    teacher = Headed(backbone, build_projection(backbone))
    with pytest.raises(IncompatibleError, match="no auxiliary heads"):
        VSD(VSDSpec(main_head="class"), setting(K, scale=2), build("resnet8", K), teacher)


def test_heads_of_another_joint_space_are_refused() -> None:
    """A teacher trained with two rotations cannot teach a student with four."""
    backbone = build("resnet14", K)
    teacher = Headed(backbone, HSAKD.teacher_heads(HSAKDSpec(transform="rot2"), backbone, K))
    with pytest.raises(IncompatibleError, match=r"20 outputs.*needs 40"):
        HSAKD(HSAKDSpec(), setting(K), build("resnet8", K), teacher)


def test_a_teacher_of_other_classes_is_refused() -> None:
    """Main heads that cannot be compared, whatever the auxiliary ones."""
    backbone = build("resnet14", 3)
    teacher = Headed(backbone, HSAKD.teacher_heads(HSAKDSpec(), backbone, K))
    with pytest.raises(IncompatibleError, match="10 outputs and resnet14 has 3"):
        HSAKD(HSAKDSpec(), setting(K), build("resnet8", K), teacher)


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"ce_weight": 0, "kd_weight": 0}, "method.ce_weight"), ({"head_epochs": 5}, "method.head_epochs")],
)
def test_contradicting_settings_are_refused(settings: dict[str, Any], field: str) -> None:
    """A usage error that names the setting."""
    with pytest.raises(UsageError) as problem:
        HSAKD.check(HSAKDSpec(**settings))
    assert problem.value.field == field


def test_an_unknown_transformation_is_refused() -> None:
    """With the setting's name."""
    with pytest.raises(UsageError, match="rot5") as problem:
        HSAKDSpec(transform="rot5")
    assert problem.value.field == "method.transform"


def test_a_transformer_can_be_the_student() -> None:
    """Token networks have heads too; everything learns."""
    made = Made("timm:vit_tiny_patch16_224", "resnet14")
    torch.stack(list(made.terms(images()).values())).sum().backward()
    assert not [name for net in (made.method, made.student) for name, p in net.named_parameters() if p.grad is None]
