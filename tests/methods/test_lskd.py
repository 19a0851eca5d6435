"""LSKD against the released code's numbers around three methods; how it takes, completes and refuses inner methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden import PRECISIONS, PROGRESS, Case, batch, features, near, setting

from kdcli import methods
from kdcli.errors import IncompatibleError, UsageError
from kdcli.methods.dist import DIST, DISTSpec
from kdcli.methods.dkd import DKD, DKDSpec
from kdcli.methods.kd import KD
from kdcli.methods.lskd import LSKD, LSKDSpec, standardise
from kdcli.methods.mlkd import MLKD
from kdcli.models import build
from kdcli.models.features import Features
from kdcli.specs import RunSpec, validate


def method(classes: int = 20, **changes: Any) -> LSKD:
    return LSKD(spec(**changes), setting(classes), None, None)


def spec(**changes: Any) -> LSKDSpec:
    return validate(LSKDSpec, changes, prefix="method")


def resolve(teacher: str, student: str, dataset: str = "cifar100", **own: Any) -> dict[str, Any]:
    """The settings of a run, with everything the user left out."""
    values = {"command": "distill", "method": {"name": "lskd", **own}, "teacher": teacher, "student": student}
    return methods.resolve(RunSpec.model_validate(values | {"data": {"dataset": dataset}})).method


@PRECISIONS
@pytest.mark.parametrize("name", ["lskd_kd_T2", "lskd_kd_T4"])
def test_kd_on_standardised_logits(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Standardised logits, the loss without a weight, and its gradient through both statistics."""
    case = Case(name)
    s, t = case.input("student_logits", dtype, learns=True), case.input("teacher_logits", dtype)
    assert near(standardise(s), case.output("student_standardised"), tolerance)
    assert near(standardise(t), case.output("teacher_standardised"), tolerance)
    mine = method(weight=1, temperature=case.hyper["T"])
    term = mine.inner.distil(batch(torch.zeros(8).long()), features(s), features(t), PROGRESS)["kd"]
    term.backward()
    assert near(term, case.loss or 0.0, tolerance)
    assert s.grad is not None
    assert near(s.grad, case.gradient("student_logits"), tolerance)


@PRECISIONS
def test_dkd_on_standardised_logits(dtype: torch.dtype, tolerance: float) -> None:
    """DKD's α and β are kept, LSKD's weight multiplies both."""
    case = Case("lskd_dkd")
    s, t, y = (
        case.input("student_logits", dtype, learns=True),
        case.input("teacher_logits", dtype),
        case.input("target"),
    )
    mine = method(inner={"name": "dkd", "beta": case.hyper["beta"]}, weight=1, temperature=case.hyper["T"])
    terms = mine.inner.distil(batch(y), features(s), features(t), PROGRESS)
    total = terms["tckd"] + terms["nckd"]
    total.backward()
    assert near(total, case.loss or 0.0, tolerance)
    assert s.grad is not None
    assert near(s.grad, case.gradient("student_logits"), tolerance)


@PRECISIONS
def test_mlkd_with_its_instance_level_standardised(dtype: torch.dtype, tolerance: float) -> None:
    """The released total with LSKD's defaults: 0.1 for both cross-entropies, 9 for all levels, T = 2 in place of 4."""
    case = Case("mlkd_total_lskd")
    views = [case.input(f"student_logits_{view}", dtype, learns=True) for view in ("weak", "strong")]
    taught = [case.input(f"teacher_logits_{view}", dtype) for view in ("weak", "strong")]
    student, teacher = (features(torch.stack(both, 1).flatten(0, 1)) for both in (views, taught))
    terms = method(inner={"name": "mlkd"}).loss(batch(case.input("target")), student, teacher, PROGRESS)
    for name, term in terms.items():
        assert near(term, case.components[f"loss_{name}"], tolerance)
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    assert near(total, case.loss or 0.0, tolerance)
    for view, name in zip(views, ("student_logits_weak", "student_logits_strong"), strict=True):
        assert view.grad is not None
        assert near(view.grad, case.gradient(name), tolerance)


def test_numbers_anyone_can_recompute() -> None:
    """KD_2 on standardised logits of sines and cosines is 0.7994277728."""
    b, c = torch.arange(4, dtype=torch.float64)[:, None], torch.arange(5, dtype=torch.float64)
    s, t = 2 * torch.sin(1 + 3 * b + 7 * c), 3 * torch.cos(2 + 5 * b + 3 * c)
    terms = method(5).loss(batch(torch.tensor([0, 2, 4, 1])), features(s), features(t), PROGRESS)
    assert terms["kd"].item() == pytest.approx(9 * 0.7994277728, abs=1e-9)
    assert terms["ce"].item() == pytest.approx(0.1 * 2.7285969568, abs=1e-10)


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "nkd"])
def test_the_size_of_the_logits_plays_no_part(name: str) -> None:
    """Scaled and shifted logits of either network give the same terms; those of the labels do change."""
    case = Case("lskd_dkd")
    s, t, y = case.input("student_logits"), case.input("teacher_logits"), case.input("target")
    mine = method(inner={"name": name})
    one = mine.loss(batch(y), features(s), features(t), PROGRESS)
    two = mine.loss(batch(y), features(3 * s - 1), features(t / 2 + 5), PROGRESS)
    assert one.pop("ce").item() != two.pop("ce").item()
    assert {k: v.item() for k, v in two.items()} == pytest.approx({k: v.item() for k, v in one.items()}, rel=1e-5)


def test_around_dist_the_weight_takes_the_place_of_its_own() -> None:
    """Any logit method: DIST's own weight and temperature give way to LSKD's, its cross-entropy's weight stays."""
    case = Case("dist_b1_g1_tau1")
    s, t, y = case.input("student_logits"), case.input("teacher_logits"), torch.zeros(8).long()
    mine = method(inner={"name": "dist", "gamma": 3}, weight=5, temperature=1.5)
    found = mine.loss(batch(y), features(s), features(t), PROGRESS)
    plain = DIST(DISTSpec(kd_weight=5, temperature=1.5, gamma=3), setting(20), None, None)
    z = features(standardise(s)), features(standardise(t))
    expected = plain.distil(batch(y), *z, PROGRESS)
    assert {k: found[k].item() for k in expected} == {k: v.item() for k, v in expected.items()}
    assert found["ce"].item() == plain.loss(batch(y), features(s), features(t), PROGRESS)["ce"].item()


def test_the_plain_method_is_left_as_it_is() -> None:
    """Standardisation belongs to LSKD's own instance of the method, not to its class."""
    case = Case("lskd_dkd")
    s, t, y = case.input("student_logits"), case.input("teacher_logits"), case.input("target")
    plain = DKD(DKDSpec(), setting(20), None, None)
    before = plain.distil(batch(y), features(s), features(t), PROGRESS)
    assert isinstance(method(inner={"name": "dkd"}).inner, DKD)
    after = plain.distil(batch(y), features(s), features(t), PROGRESS)
    assert {k: v.item() for k, v in before.items()} == {k: v.item() for k, v in after.items()}


def test_half_precision_logits_are_standardised_in_fp32() -> None:
    """The statistics of bf16 logits are those of their fp32 values."""
    x = torch.randn(4, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(standardise(x), standardise(x.float()))


def test_the_inner_methods_defaults_are_part_of_the_settings() -> None:
    """A run records them; what LSKD governs appears once; and recorded settings are read back as they are."""
    values = spec(inner={"name": "dkd", "alpha": 2})
    assert values.inner == {"name": "dkd", "ce_weight": 1.0, "alpha": 2.0, "beta": 8.0, "warmup": 20}
    assert spec(**values.model_dump(mode="json")) == values
    assert spec().inner == {"name": "kd", "ce_weight": 0.1}


def test_published_temperatures_and_weights_of_pairs() -> None:
    """(T, weight) from the released logs by inner method and pair, DKD's β with them; the user's own values win."""

    def found(inner: str, teacher: str, student: str, **own: Any) -> tuple[float, ...]:
        values = resolve(teacher, student, inner={"name": inner}, **own)
        return values["temperature"], values["weight"], *([values["inner"]["beta"]] if inner == "dkd" else [])

    assert found("kd", "wrn40_2", "wrn16_2") == (2, 9)
    assert found("kd", "vgg13", "vgg8") == found("kd", "resnet32x4", "wrn16_2") == (3, 9)
    assert found("kd", "resnet50", "mobilenetv2") == (3, 1)
    assert found("kd", "resnet110", "resnet20") == (4, 12)
    assert found("dkd", "wrn40_2", "wrn16_2") == (2, 12, 2)
    assert found("dkd", "resnet56", "resnet20") == (3, 18, 2)
    assert found("dkd", "resnet32x4", "wrn16_2") == (2, 9, 2)
    assert found("dkd", "resnet32x4", "resnet8x4") == (2, 9, 8)
    assert found("mlkd", "vgg13", "vgg8") == (2, 6)
    assert found("mlkd", "wrn40_2", "wrn16_2") == (2, 9)
    assert found("kd", "resnet110", "resnet20", weight=5) == (4, 5)
    own = resolve("resnet56", "resnet20", inner={"name": "dkd", "beta": 7, "ce_weight": 0.5})
    assert (own["weight"], own["inner"]["beta"], own["inner"]["ce_weight"]) == (18, 7, 0.5)
    assert resolve("vgg13", "vgg8")["temperature"] == 3  # the inner method is kd where none is named


def test_imagenet_keeps_the_usual_temperature_and_weight() -> None:
    """T = 2 and weight 9; KD's cross-entropy weighs 1 there, DKD has its β and short warm-up."""
    assert LSKD.for_pair({"name": "lskd"}, "resnet34", "resnet18", "imagenet") == {"inner": {"ce_weight": 1.0}}
    found = LSKD.for_pair({"inner": {"name": "dkd"}}, "resnet34", "resnet18", "imagenet")
    assert found == {"inner": {"warmup": 1, "beta": 0.5}}


@pytest.mark.parametrize("name", ["vsd", "none", "lskd", "takd", "nothing", "some/where.py", 3])
def test_only_logit_methods_can_be_inside(name: object) -> None:
    """Whatever is no logit method, wants assistants or does not exist is refused, and the hint names those that fit."""
    with pytest.raises(UsageError, match="no logit method") as problem:
        spec(inner={"name": name})
    assert problem.value.field == "method.inner.name"
    names = (problem.value.hint or "").removeprefix("one of ").split(", ")
    assert {"kd", "dkd", "nkd", "dist", "mlkd"} <= set(names)
    assert not {"vsd", "none", "lskd", "takd", "dgkd"} & set(names)


@pytest.mark.parametrize(
    ("inner", "field", "hint"),
    [
        ({"name": "dkd", "bata": 3}, "method.inner.bata", "beta"),
        ({"name": "dkd", "beta": -3}, "method.inner.beta", None),
        ({"kd_weight": 3}, "method.inner.kd_weight", "set method.weight"),
        ({"temperature": 3}, "method.inner.temperature", "set method.temperature"),
        ({"teacher_scale": 2}, "method.inner.teacher_scale", "set method.teacher_scale"),
    ],
)
def test_invalid_inner_settings_are_named(inner: dict[str, Any], field: str, hint: str | None) -> None:
    """Unknown, out of range, or governed by LSKD: the dotted name says where."""
    with pytest.raises(UsageError) as problem:
        spec(inner=inner)
    assert problem.value.field == field
    if hint is not None:
        assert hint in (problem.value.hint or "")


def test_an_inner_method_that_is_no_table_is_refused() -> None:
    """`--set method.inner=dkd` says how it is meant, before the pair's settings are looked up."""
    with pytest.raises(UsageError, match="table") as problem:
        resolve("wrn40_2", "wrn16_2", inner="dkd")
    assert problem.value.field == "method.inner"


def test_views_and_scale_are_those_of_the_inner_method() -> None:
    """Around MLKD both views are asked for and seen, the teacher's enlarged by LSKD's own teacher_scale."""
    mine = method(inner={"name": "mlkd"}, teacher_scale=2)
    both = batch(torch.arange(3))
    both.extra = (torch.ones_like(both.images),)
    assert LSKD.augmentations(mine.spec) == MLKD.augmentations(None) == ("strong",)
    assert LSKD.augmentations(spec()) == ()
    assert mine.student_views(both, PROGRESS).shape == (6, 3, 32, 32)
    assert mine.teacher_views(both, PROGRESS).shape == (6, 3, 64, 64)
    assert method().student_views(both, PROGRESS) is both.images


def test_teachers_are_shared_with_the_inner_method() -> None:
    """Neither the wrapper nor its weight asks for another teacher; a scale does."""
    assert LSKD.teacher_settings(spec(weight=3)) == KD.teacher_settings(KD.Spec.model_validate({"name": "kd"}))
    assert LSKD.teacher_settings(spec(teacher_scale=2))["teacher_scale"] == 2
    assert (LSKD.student_outputs(spec(), 7), LSKD.teacher_outputs(spec(), 7)) == (7, 7)


def test_what_the_inner_method_refuses_is_refused() -> None:
    """Networks of other outputs: exit code 4 before training."""
    with pytest.raises(IncompatibleError, match="10 outputs"):
        LSKD(spec(), setting(10), build("resnet8", 10), build("resnet14", 3))


def test_real_networks_of_unlike_families_distil() -> None:
    """One step: every parameter of the student gets a finite gradient."""
    torch.manual_seed(0)
    network, taught = build("mobilenetv2", 10), build("resnet8x4", 10).eval()
    mine = LSKD(spec(inner={"name": "dkd"}), setting(10), network, taught)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        target: Features = taught.features(images)
    terms = mine.loss(batch(torch.tensor([1, 7])), network.features(images), target, PROGRESS)
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_two_classes_are_refused() -> None:
    """Standardised, two logits are always the same two numbers: an error with exit code 4, before training."""
    with pytest.raises(IncompatibleError, match="three classes") as problem:
        method(2)
    assert problem.value.code == 4
