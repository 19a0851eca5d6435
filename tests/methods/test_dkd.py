"""DKD against mdistiller's numbers, its warm-up, its settings per pair, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden import PRECISIONS, PROGRESS, Case, batch, features, near, setting
from torch import Tensor

from kdcli import methods
from kdcli.errors import IncompatibleError
from kdcli.methods.dkd import DKD, DKDSpec
from kdcli.methods.kd import KD, KDSpec
from kdcli.models import build
from kdcli.specs import RunSpec


def method(classes: int = 20, **changes: float) -> DKD:
    return DKD(DKDSpec.model_validate(changes), setting(classes), None, None)


def formula() -> tuple[Tensor, Tensor, Tensor]:
    """Small deterministic logits: s [4,5], t [4,5] and labels [4]."""
    b, c = torch.arange(4, dtype=torch.float64)[:, None], torch.arange(5, dtype=torch.float64)
    return 2 * torch.sin(1 + 3 * b + 7 * c), 3 * torch.cos(2 + 5 * b + 3 * c), torch.tensor([0, 2, 4, 1])


@PRECISIONS
@pytest.mark.parametrize("name", ["dkd_a1_b8_T4", "dkd_a1_b2_T1"])
def test_the_reference_losses_and_their_gradient(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Both parts, their weighted sum and its gradient, the warm-up being over."""
    case = Case(name)
    beta, temperature = case.hyper["beta"], case.hyper["T"]
    s, t, y = (
        case.input("student_logits", dtype, learns=True),
        case.input("teacher_logits", dtype),
        case.input("target"),
    )
    terms = method(beta=beta, temperature=temperature).distil(batch(y), features(s), features(t), PROGRESS)
    total = terms["tckd"] + terms["nckd"]
    total.backward()
    assert near(terms["tckd"], case.components["tckd"], tolerance)
    assert near(terms["nckd"], beta * case.components["nckd"], tolerance)
    assert near(total, case.loss or 0.0, tolerance)
    assert s.grad is not None
    assert near(s.grad, case.gradient("student_logits"), tolerance)


def test_numbers_anyone_can_recompute() -> None:
    """TCKD 0.6357328193, NCKD 1.7964713534 and their sum with β = 8, 15.0075036468, at T = 4."""
    s, t, y = formula()
    terms = method(5).distil(batch(y), features(s), features(t), PROGRESS)
    assert terms["tckd"].item() == pytest.approx(0.6357328193, abs=1e-10)
    assert terms["nckd"].item() == pytest.approx(8 * 1.7964713534, abs=1e-9)
    assert (terms["tckd"] + terms["nckd"]).item() == pytest.approx(15.0075036468, abs=1e-10)


def test_the_two_parts_make_up_the_divergence_of_kd() -> None:
    """KD is TCKD + (1 - p_y(t)) · NCKD, row by row (the paper's Eq. 6)."""
    s, t, y = formula()
    for row in range(4):
        s1, t1, y1 = s[row : row + 1], t[row : row + 1], y[row : row + 1]
        terms = method(5, beta=1).distil(batch(y1), features(s1), features(t1), PROGRESS)
        plain = KD(KDSpec(kd_weight=1), setting(5), None, None).distil(batch(y1), features(s1), features(t1), PROGRESS)
        rest = 1 - (t1 / 4).softmax(1)[0, y1]
        assert (terms["tckd"] + rest * terms["nckd"]).item() == pytest.approx(plain["kd"].item(), rel=1e-10)


@pytest.mark.parametrize(("epoch", "share"), [(1, 0.05), (10, 0.5), (20, 1.0), (240, 1.0)])
def test_the_warm_up_rises_over_twenty_epochs(epoch: int, share: float) -> None:
    """1/20 in the first epoch, all from the twentieth on; the cross-entropy has its full weight throughout."""
    s, t, y = formula()
    arguments = batch(y), features(s), features(t)
    full = method(5).loss(*arguments, PROGRESS)
    part = method(5).loss(*arguments, replace(PROGRESS, epoch=torch.tensor(float(epoch))))
    assert part["ce"].item() == full["ce"].item()
    for name in ("tckd", "nckd"):
        assert part[name].item() == pytest.approx(share * full[name].item(), rel=1e-7)


def test_each_weight_multiplies_its_part() -> None:
    """alpha TCKD alone, beta NCKD alone, kd_weight both, ce_weight neither."""
    s, t, y = formula()
    arguments = batch(y), features(s), features(t), PROGRESS
    base = method(5, beta=1).loss(*arguments)
    changed = method(5, ce_weight=0.5, kd_weight=2, alpha=3, beta=5).loss(*arguments)
    factors = {name: changed[name].item() / base[name].item() for name in base}
    assert factors == pytest.approx({"ce": 0.5, "tckd": 6, "nckd": 10}, rel=1e-12)


def test_a_student_that_is_sure_of_the_target_still_has_a_finite_gradient() -> None:
    """The probability of all other classes underflows in fp32, its logarithm does not."""
    s = torch.zeros(2, 5)
    s[:, 1] = 400
    s.requires_grad_()
    terms = method(5, temperature=1).distil(
        batch(torch.ones(2).long()), features(s), features(torch.zeros(2, 5)), PROGRESS
    )
    (terms["tckd"] + terms["nckd"]).backward()
    assert s.grad is not None
    assert torch.isfinite(terms["tckd"])
    assert torch.isfinite(s.grad).all()
    assert s.grad.abs().max() > 0.1


def beta(teacher: str, student: str, **own: float) -> float:
    spec = RunSpec.model_validate(
        {"command": "distill", "method": {"name": "dkd", **own}, "teacher": teacher, "student": student}
    )
    return methods.resolve(spec).method["beta"]


def test_the_weight_of_the_other_classes_is_that_of_the_pair() -> None:
    """mdistiller's β; 8 for a pair nobody published; the user's own value before all."""
    assert [beta("WRN-40-2", student) for student in ("wrn16_2", "wrn40_1", "shufflenetv1")] == [6, 6, 8]
    assert [beta("vgg13", student) for student in ("vgg8", "mobilenetv2", "resnet8")] == [6, 6, 8]
    assert [beta("resnet56", "resnet20"), beta("resnet110", "resnet32"), beta("resnet32x4", "resnet8x4")] == [2, 2, 8]
    assert [beta("resnet50", "wrn16_2"), beta("resnet50", "mobilenetv2")] == [6, 8]
    assert beta("resnet56", "resnet20", beta=3) == 3


def test_imagenet_has_settings_of_its_own() -> None:
    """No temperature, one epoch of warm-up, β by student."""
    assert DKD.for_pair({}, "resnet34", "resnet18", "imagenet") == {"temperature": 1, "warmup": 1, "beta": 0.5}
    assert DKD.for_pair({}, "torchvision:resnet50", "mobilenetv1", "imagenet")["beta"] == 2


def test_two_classes_are_refused() -> None:
    """With two classes nothing is left beside the target: an error with exit code 4, before training."""
    with pytest.raises(IncompatibleError, match="2 classes") as problem:
        method(2)
    assert problem.value.code == 4


def test_networks_with_other_outputs_are_refused_when_the_method_is_made() -> None:
    """Logit methods compare class by class; the message names both widths."""
    student, teacher = build("resnet8", 10), build("resnet14", 3)
    with pytest.raises(IncompatibleError, match="10 outputs and resnet14 has 3"):
        DKD(DKDSpec(), setting(10), student, teacher)
