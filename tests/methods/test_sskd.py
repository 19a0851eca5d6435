"""SSKD: losses, selection and gradients of the released code, its views, its teacher's stage and every setting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import PRECISIONS, PROGRESS, Case, batch, near, setting
from torch import Tensor, nn

from kdcli.data.loader import Batch
from kdcli.errors import IncompatibleError, UsageError
from kdcli.methods import sskd
from kdcli.methods.sskd import SSKD, SSKDSpec, selected
from kdcli.models import build
from kdcli.models.features import Features
from kdcli.models.heads import Headed, Projection, build_heads
from kdcli.models.network import parameters_of
from kdcli.specs import TrainSpec
from kdcli.transforms import expand

K = 10


def images(size: int = 2) -> Batch:
    """A batch with the three further crops that SSKD asks for."""
    generator = torch.Generator().manual_seed(3)
    copies = [torch.randn(size, 3, 32, 32, generator=generator) for _ in range(4)]
    return Batch(copies[0], torch.arange(size) * 3 % K, torch.arange(size), 1.0, tuple(copies[1:]))


class Made:
    """SSKD with its two networks, built as the commands build them."""

    def __init__(self, student: str = "resnet8", teacher: str = "resnet14", smoothing: float = 0.0, **settings: Any):
        torch.manual_seed(0)
        self.spec = SSKDSpec(**settings)
        SSKD.check(self.spec)
        self.student, backbone = build(student, K), build(teacher, K)
        self.teacher = Headed(backbone, SSKD.teacher_heads(self.spec, backbone, K), frozen=True)
        self.teacher.eval().requires_grad_(False)
        made = setting(K, scale=self.spec.teacher_scale, label_smoothing=smoothing)
        self.method = SSKD(self.spec, made, self.student, self.teacher)

    def features(self, data: Batch) -> tuple[Features, Features]:
        with torch.no_grad():
            taught = self.method.teacher_features(self.teacher, self.method.teacher_views(data, PROGRESS))
        return self.method.student_features(self.student, self.method.student_views(data, PROGRESS)), taught

    def terms(self, data: Batch) -> dict[str, Tensor]:
        return self.method.loss(data, *self.features(data), PROGRESS)


def outputs(logits: Tensor, embedding: Tensor, *, teacher: bool = False) -> Features:
    """Features whose projection is `embedding`: the teacher's comes with the pass, the student's is the method's."""
    return Features(logits, embedding, (), (embedding,) if teacher else ())


def on_embeddings(classes: int, **settings: Any) -> SSKD:
    """SSKD whose own projection passes on what it is given."""
    method = SSKD(SSKDSpec(**settings), setting(classes), None, None)
    method.projection = nn.Identity()
    return method


def hyper(case: Case) -> dict[str, Any]:
    """The settings of a golden case."""
    names = {
        "kd_T": "kd_temperature",
        "tf_T": "tf_temperature",
        "ss_T": "ss_temperature",
        "ratio_tf": "tf_ratio",
        "ratio_ss": "ss_ratio",
    }
    return {names.get(k, k): v for k, v in case.hyper.items() if k not in ("batch", "classes")}


def waves() -> tuple[Features, Features, Tensor]:
    """Three images under four rotations, in closed form: (student, teacher, labels)."""
    n = torch.arange(60, dtype=torch.float64).reshape(12, 5)
    m = torch.arange(72, dtype=torch.float64).reshape(12, 6)
    student = outputs(2 * torch.sin(0.7 * n), torch.sin(0.9 * m))
    teacher = outputs(3 * torch.cos(0.5 * n), torch.cos(0.4 * m), teacher=True)
    return student, teacher, torch.tensor([1, 3, 0])


# ---------------------------------------------------------------------------------------------------- golden numbers


@PRECISIONS
@pytest.mark.parametrize("name", ["sskd_default", "sskd_filtered"])
def test_the_released_loss_and_its_gradients(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Total, every term and both gradients; the case named default needs no setting."""
    case = Case(name)
    settings = hyper(case)
    assert name != "sskd_default" or SSKDSpec(**settings) == SSKDSpec()
    s, p = case.input("logits", dtype, learns=True), case.input("projection", dtype, learns=True)
    t, q = case.input("teacher_logits", dtype), case.input("teacher_projection", dtype)
    method = on_embeddings(12, **settings)
    terms = method.loss(batch(case.input("target")), outputs(s, p), outputs(t, q, teacher=True), PROGRESS)
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    assert near(total, case.loss or 0.0, tolerance)
    for term, found in terms.items():
        assert near(found, case.components[f"loss_{term}"] * getattr(method.spec, f"{term}_weight"), tolerance), term
    for tensor, wanted in ((s, "logits"), (p, "projection")):
        assert tensor.grad is not None
        assert near(tensor.grad, case.gradient(wanted), tolerance), wanted


@pytest.mark.parametrize("name", ["sskd_default", "sskd_filtered"])
def test_the_released_selection(name: str) -> None:
    """Exactly the rows that the released code keeps, by class and by own image."""
    case = Case(name)
    turned = case.input("teacher_logits").unflatten(0, (8, 4))[:, 1:].flatten(0, 1)
    keep = selected(turned, case.input("target").repeat_interleave(3), case.hyper["ratio_tf"])
    assert torch.equal(keep.nonzero()[:, 0], case.output("selected_tf"))
    keep = selected(case.output("teacher_similarity"), torch.arange(8).repeat_interleave(3), case.hyper["ratio_ss"])
    assert torch.equal(keep.nonzero()[:, 0], case.output("selected_ss"))


@PRECISIONS
def test_the_released_loss_of_the_teachers_projection(dtype: torch.dtype, tolerance: float) -> None:
    """Cosine similarities without a temperature, each turned copy's own image right."""
    case = Case("sskd_teacher_head")
    p = case.input("projection", dtype, learns=True)
    method = SSKD(SSKDSpec(), setting(K), None, None)
    found = outputs(torch.zeros(32, K, dtype=dtype), p, teacher=True)
    terms = method.teacher_loss(batch(torch.zeros(8, dtype=torch.int64)), found, PROGRESS)
    assert set(terms) == {"ss"}
    terms["ss"].backward()
    assert near(terms["ss"], case.loss or 0.0, tolerance)
    assert p.grad is not None
    assert near(p.grad, case.gradient("projection"), tolerance)


def test_numbers_in_closed_form() -> None:
    """Sines and cosines as outputs: four terms computed elsewhere from the released code, to ten digits."""
    student, teacher, labels = waves()
    ones = dict.fromkeys(("ce_weight", "kd_weight", "tf_weight", "ss_weight"), 1.0)
    terms = on_embeddings(5, **ones).loss(batch(labels), student, teacher, PROGRESS)
    expected = {"ce": 1.8795503967, "kd": 2.3596092236, "tf": 1.7320194362, "ss": 0.3706120285}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-9)


# ----------------------------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize(
    ("ratio", "kept"), [(0, [0, 3]), (0.3, [0, 3]), (0.34, [0, 1, 3]), (0.75, [0, 1, 3, 4]), (1, [0, 1, 2, 3, 4])]
)
def test_right_rows_and_the_best_of_the_wrong_ones_are_kept(ratio: float, kept: list[int]) -> None:
    """Ranks 0, 1, 2, 0, 1: int(ratio · 3 wrong rows), better ranks first, ties in the order of the batch."""
    scores = torch.tensor([[9.0, 0, 1], [4, 5, 1], [1, 2, 3], [3, 2, 1], [4, 1, 5]])
    keep = selected(scores, torch.zeros(5, dtype=torch.int64), ratio)
    assert keep.nonzero()[:, 0].tolist() == kept


def test_nothing_to_learn_from_is_zero_and_not_nan() -> None:
    """A teacher that is wrong everywhere and a ratio of 0: no row is kept, the loss is 0 with a gradient of 0."""
    logits = torch.tensor([[0.0, 9.0]]).repeat(8, 1)
    s = torch.randn(8, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
    p = torch.ones(8, 3, requires_grad=True)
    method = on_embeddings(2, tf_ratio=0, ss_ratio=0)
    upright = [torch.eye(3)[i] for i in range(2)]
    # Each turned copy looks like the other image.
    q = torch.stack([upright[0], *[upright[1]] * 3, upright[1], *[upright[0]] * 3])
    data = batch(torch.zeros(2, dtype=torch.int64))
    terms = method.loss(data, outputs(s, p), outputs(logits, q, teacher=True), PROGRESS)
    assert terms["tf"].item() == terms["ss"].item() == 0
    (terms["tf"] + terms["ss"]).backward()
    assert s.grad is not None
    assert p.grad is not None
    assert s.grad.abs().max() == p.grad.abs().max() == 0


def test_every_rank_computes_the_loss_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks with two images and one: gathered rows give both of them what one process gives, selection included."""
    student, teacher, labels = waves()
    method = on_embeddings(5, tf_ratio=0.5)

    def loss(images: slice) -> dict[str, Tensor]:
        rows = slice(4 * images.start, 4 * images.stop)
        own = outputs(student.logits[rows], student.pooled[rows])
        other = outputs(teacher.logits[rows], teacher.heads[0][rows], teacher=True)
        return method.loss(batch(labels[images]), own, other, PROGRESS)

    whole = loss(slice(0, 3))
    sent: list[list[Tensor]] = []
    for part in (slice(0, 2), slice(2, 3)):
        mine: list[Tensor] = []
        monkeypatch.setattr(sskd, "gathered", lambda x, batch, mine=mine: mine.append(x) or x)
        loss(part)
        sent.append(mine)
    assert len(sent[0]) == len(sent[1]) == 5  # logits, labels and embeddings: what couples the batch, and nothing else
    for part in (slice(0, 2), slice(2, 3)):
        everything = iter([torch.cat(pair) for pair in zip(*sent, strict=True)])
        monkeypatch.setattr(sskd, "gathered", lambda x, batch, everything=everything: next(everything))
        found = loss(part)
        assert found["tf"].item() == pytest.approx(whole["tf"].item(), rel=1e-12)
        assert found["ss"].item() == pytest.approx(whole["ss"].item(), rel=1e-12)


# --------------------------------------------------------------------------------------------------------------- views


def test_each_turned_copy_has_a_crop_of_its_own() -> None:
    """Row 4b+k is copy k of image b, turned k times counter-clockwise; three further crops are asked for."""
    data, made = images(), Made()
    assert SSKD.augmentations(made.spec) == ("crop", "crop", "crop")
    found = made.method.student_views(data, PROGRESS)
    for b in range(2):
        for k, copies in enumerate((data.images, *data.extra)):
            assert torch.equal(found[4 * b + k], torch.rot90(copies[b], k, (1, 2)))
    assert torch.equal(made.method.teacher_views(data, PROGRESS), found)


def test_one_crop_may_be_shared() -> None:
    """crops=shared: the rotations of HSAKD and VSD, and no further crop."""
    data, made = images(), Made(crops="shared")
    assert SSKD.augmentations(made.spec) == ()
    assert torch.equal(made.method.student_views(data, PROGRESS), expand(data.images, "rot4"))


def test_views_keep_the_memory_format() -> None:
    """Images in channels_last stay so: networks would otherwise convert them."""
    data, made = images(), Made()
    formats = [x.contiguous(memory_format=torch.channels_last) for x in (data.images, *data.extra)]
    found = made.method.student_views(Batch(formats[0], data.labels, data.index, 1.0, tuple(formats[1:])), PROGRESS)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, made.method.student_views(data, PROGRESS))


def test_the_teacher_may_see_its_rotations_enlarged() -> None:
    """teacher_scale=2: the same four views at 64 pixels; student and losses stay as they are."""
    data, made = images(), Made("wrn16_2", "vgg8", teacher_scale=2)
    views = made.method.teacher_views(data, PROGRESS)
    assert views.shape == (8, 3, 64, 64)
    wanted = F.interpolate(made.method.student_views(data, PROGRESS), scale_factor=2, mode="bilinear")
    assert torch.allclose(views, wanted)
    terms = made.terms(data)
    assert set(terms) == {"ce", "kd", "tf", "ss"}
    assert all(torch.isfinite(term) for term in terms.values())


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("term", ["ce", "kd", "tf", "ss"])
def test_each_weight_scales_its_own_term(term: str) -> None:
    """Twice the weight is twice the term, and the others stay."""
    data = images()
    one, two = Made().terms(data), Made(**{f"{term}_weight": 2 * getattr(SSKDSpec(), f"{term}_weight")}).terms(data)
    for name in one:
        assert two[name].item() == pytest.approx((1 + (name == term)) * one[name].item(), rel=1e-6)


@pytest.mark.parametrize(("setting_name", "term"), [("kd", "kd"), ("tf", "tf"), ("ss", "ss")])
def test_each_temperature_is_its_own_terms(setting_name: str, term: str) -> None:
    """T² · KL of the softened rows, of all of them, written out row by row."""
    student, teacher, labels = waves()
    method = on_embeddings(5, tf_ratio=1, ss_ratio=1, **{f"{setting_name}_temperature": 1.7, f"{term}_weight": 1.0})
    found = method.loss(batch(labels), student, teacher, PROGRESS)[term]
    upright = [4 * b for b in range(3)]
    turned = [4 * b + k for b in range(3) for k in range(1, 4)]

    def cosines(x: Tensor) -> Tensor:
        return torch.stack([F.cosine_similarity(x[row][None], x[upright]) for row in turned])

    if term == "ss":
        s, t = cosines(student.pooled), cosines(teacher.heads[0])
    else:
        rows = upright if term == "kd" else turned
        s, t = student.logits[rows], teacher.logits[rows]
    p, q = torch.softmax(t / 1.7, 1), torch.softmax(s / 1.7, 1)
    assert found.item() == pytest.approx(1.7**2 * (p * (p / q).log()).sum(1).mean().item(), rel=1e-9)


@pytest.mark.parametrize(("ratio", "term"), [("tf_ratio", "tf"), ("ss_ratio", "ss")])
def test_each_ratio_selects_rows_of_its_own_term(ratio: str, term: str) -> None:
    """Fewer rows change that term's mean and no other."""
    student, teacher, labels = waves()
    terms = [
        on_embeddings(5, **{ratio: value}).loss(batch(labels), student, teacher, PROGRESS) for value in (0.25, 1.0)
    ]
    assert {name for name in terms[0] if terms[0][name].item() != terms[1][name].item()} == {term}


def test_label_smoothing_is_of_the_upright_images_cross_entropy() -> None:
    """The other terms have no labels to smooth."""
    data = images()
    plain, smooth = Made(), Made(smoothing=0.2)
    one, two = plain.terms(data), smooth.terms(data)
    logits = smooth.features(data)[0].logits[::4]
    assert two["ce"].item() == pytest.approx(0.1 * F.cross_entropy(logits, data.labels, label_smoothing=0.2).item())
    assert {name for name in one if one[name].item() != two[name].item()} == {"ce"}


def test_without_the_similarities_there_is_no_projection() -> None:
    """ss_weight=0: nothing to train beside the student, and any teacher will do; tf_weight=0: no rows to select."""
    method = SSKD(SSKDSpec(ss_weight=0), setting(K), build("resnet8", K), build("resnet14", K))
    assert parameters_of(method) == 0
    made = Made(ss_weight=0, tf_weight=0)
    learned, taught = made.features(images())
    assert taught.heads == ()  # and is not computed
    assert set(made.method.loss(images(), learned, taught, PROGRESS)) == {"ce", "kd"}


def test_the_students_projection_is_the_methods_own() -> None:
    """Two layers of the pooled vector's width with a ReLU between, trained by the similarities alone."""
    made = Made("wrn16_2", "wrn16_2")
    assert parameters_of(made.method) == 33_024
    terms = made.terms(images())
    terms["ss"].backward()
    assert not [name for name, p in made.method.named_parameters() if p.grad is None or not p.grad.any()]
    assert {name.partition(".")[0] for name, _ in made.method.named_parameters()} == {"projection"}


def test_imagenet_weighs_the_cross_entropy_more() -> None:
    """Torchdistill's weights there, the released ones elsewhere."""
    pair = ("torchvision:resnet34", "torchvision:resnet18")
    assert SSKD.for_pair({}, *pair, "imagenet") == {"ce_weight": 1.0, "head_epochs": 30}
    assert SSKD.for_pair({}, "wrn40_2", "wrn16_2", "cifar100") == {}


# --------------------------------------------------------------------------------------------------- the teacher's stage


def test_the_teachers_projection_is_trained_on_an_ordinary_network() -> None:
    """Backbone of `none` at the teacher's scale; 60 of 240 epochs with the rate falling at 30 and 45."""
    assert SSKD.teacher_backbone(SSKDSpec()) == {"name": "none"}
    enlarged = SSKD.teacher_backbone(SSKDSpec(teacher_scale=2, scale_mode="nearest"))
    assert enlarged == {"name": "none", "teacher_scale": 2, "scale_mode": "nearest"}
    recipe = SSKD.teacher_recipe(SSKDSpec(), TrainSpec(schedule="cosine", lr=0.05))
    assert (recipe.epochs, recipe.schedule, recipe.lr) == (60, "step", 0.05)
    assert [m * recipe.epochs for m in recipe.milestones] == [30, 45]
    assert SSKD.teacher_recipe(SSKDSpec(), TrainSpec(epochs=3)).epochs == 1
    assert SSKD.teacher_recipe(SSKDSpec(head_epochs=7), TrainSpec()).epochs == 7


def test_the_teacher_depends_only_on_what_trains_it() -> None:
    """Weights, temperatures and ratios are the student's; crops, epochs and scale are the teacher's too."""
    base = SSKD.teacher_settings(SSKDSpec())
    for own in ({"ss_weight": 1}, {"tf_ratio": 0.5}, {"kd_temperature": 1}, {"ss_temperature": 1}):
        assert SSKD.teacher_settings(SSKDSpec(**own)) == base, own
    for theirs in ({"crops": "shared"}, {"head_epochs": 5}, {"teacher_scale": 2}):
        assert SSKD.teacher_settings(SSKDSpec(**theirs)) != base, theirs
    assert SSKD.teacher_settings(SSKDSpec(**base)) == base


def test_only_the_projection_gets_a_gradient_in_the_teachers_stage() -> None:
    """The backbone is a constant and its BatchNorm statistics stay."""
    backbone = build("resnet14", K)
    teacher = Headed(backbone, SSKD.teacher_heads(SSKDSpec(), backbone, K), frozen=True).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    method = SSKD(SSKDSpec(), setting(K), None, teacher)
    data = images()
    terms = method.teacher_loss(data, teacher.features(method.teacher_views(data, PROGRESS)), PROGRESS)
    terms["ss"].backward()
    learning = {name.partition(".")[0] for name, p in teacher.named_parameters() if p.grad is not None}
    assert learning == {"heads"}
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


# ----------------------------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize("heads", [False, True])
def test_a_teacher_without_a_projection_is_refused_with_the_command_that_makes_one(heads: bool) -> None:
    """A plain network, and one with heads on its maps, end in exit code 4 before anything is trained."""
    teacher = build("resnet14", K)
    given = Headed(teacher, build_heads(teacher, 4 * K)) if heads else teacher
    with pytest.raises(IncompatibleError, match="no projection") as problem:
        SSKD(SSKDSpec(), setting(K), build("resnet8", K), given)
    assert problem.value.code == 4
    assert "kd pretrain-teacher --method sskd --teacher resnet14" in (problem.value.hint or "")


def test_a_teacher_of_other_classes_is_refused() -> None:
    """Its logits cannot be compared, whatever its projection."""
    backbone = build("resnet14", 3)
    teacher = Headed(backbone, SSKD.teacher_heads(SSKDSpec(), backbone, K))
    with pytest.raises(IncompatibleError, match="10 outputs and resnet14 has 3"):
        SSKD(SSKDSpec(), setting(K), build("resnet8", K), teacher)


def test_similarities_alone_would_train_no_classifier() -> None:
    """A usage error that names the setting."""
    with pytest.raises(UsageError) as problem:
        SSKD.check(SSKDSpec(ce_weight=0, kd_weight=0, tf_weight=0))
    assert problem.value.field == "method.ce_weight"


def test_teachers_and_students_of_other_widths_and_depths() -> None:
    """Similarities are compared, so the projections may differ in width: vgg13 (512) and mobilenetv2 (1280)."""
    made = Made("mobilenetv2", "vgg13")
    assert isinstance(made.method.projection, Projection)
    assert made.method.projection.layers[0].in_features == 1280
    assert made.teacher.heads[0].layers[0].in_features == 512
    torch.stack(list(made.terms(images()).values())).sum().backward()
    assert not [name for name, p in made.method.named_parameters() if p.grad is None]
