"""The shared losses against numbers and gradients made with public reference implementations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kdcli.data.loader import Batch
from kdcli.errors import IncompatibleError
from kdcli.losses import cross_entropy, divergence
from kdcli.methods.base import Progress, Setting
from kdcli.methods.kd import KD, KDSpec
from kdcli.models.features import Features

GOLDEN = Path(__file__).resolve().parent / "golden"
CASES = {case["id"]: case for case in json.loads((GOLDEN / "losses.json").read_text())["cases"]}
TENSORS = load_file(GOLDEN / "kd.safetensors")
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)


def near(found: Tensor, expected: Tensor | float, tolerance: float) -> bool:
    """max|found - expected| / max|expected|, the measure of the golden numbers."""
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    assert found.shape == wanted.shape
    return bool((found.detach().double() - wanted).abs().max() <= tolerance * wanted.abs().max())


def logits(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    student = TENSORS[f"{case}/in/student_logits"].to(dtype, copy=True).requires_grad_()
    return student, TENSORS[f"{case}/in/teacher_logits"].to(dtype)


@PRECISIONS
@pytest.mark.parametrize("case", ["kd_T4", "kd_T1"])
def test_divergence_and_its_gradient_are_the_reference_ones(case: str, dtype: torch.dtype, tolerance: float) -> None:
    """T² · batch mean of KL(teacher ‖ student), value and gradient for the student's logits."""
    student, teacher = logits(case, dtype)
    loss = divergence(student, teacher, CASES[case]["hyperparameters"]["T"])
    loss.backward()
    assert near(loss, CASES[case]["loss"], tolerance)
    assert student.grad is not None
    assert near(student.grad, TENSORS[f"{case}/grad/student_logits"], tolerance)


@PRECISIONS
def test_the_method_kd_is_the_reference_total(dtype: torch.dtype, tolerance: float) -> None:
    """KD with its default weights (0.1, 0.9, T = 4): both weighted terms, their sum, and its gradient."""
    case = CASES["kd_total"]
    student, teacher = logits("kd_total", dtype)
    target = TENSORS["kd_total/in/target"]
    setting = Setting(classes=20, image_size=32, label_smoothing=0.0)
    batch = Batch(torch.zeros(8, 3, 32, 32), target, torch.arange(8), 1.0)
    progress = Progress(torch.tensor(1.0), torch.tensor(0.0), odd_step=False)
    none = torch.empty(8, 0)
    terms = KD(KDSpec(), setting, None, None).loss(
        batch, Features(student, none, ()), Features(teacher, none, ()), progress
    )
    total = terms["ce"] + terms["kd"]
    total.backward()
    assert set(terms) == {"ce", "kd"}
    assert near(terms["ce"], case["components"]["loss_ce"], tolerance)
    assert near(terms["kd"], case["components"]["loss_kd"], tolerance)
    assert near(total, case["loss"], tolerance)
    assert student.grad is not None
    assert near(student.grad, TENSORS["kd_total/grad/student_logits"], tolerance)


def formula() -> tuple[Tensor, Tensor, Tensor]:
    """The small deterministic logits of the fact sheet: s [4,5], t [4,5] and labels [4]."""
    b, c = torch.arange(4, dtype=torch.float64)[:, None], torch.arange(5, dtype=torch.float64)
    return 2 * torch.sin(1 + 3 * b + 7 * c), 3 * torch.cos(2 + 5 * b + 3 * c), torch.tensor([0, 2, 4, 1])


def test_numbers_anyone_can_recompute() -> None:
    """Logits from sines and cosines: CE 2.7285969568, KD_4 1.9850123642, KD_1 0.9077838326."""
    s, t, y = formula()
    assert s[0, :2].tolist() == pytest.approx([1.682942, 1.978716], abs=1e-6)
    assert t[0, :2].tolist() == pytest.approx([-1.248441, 0.850987], abs=1e-6)
    assert cross_entropy(s, y).item() == pytest.approx(2.7285969568, abs=1e-10)
    assert divergence(s, t, 4).item() == pytest.approx(1.9850123642, abs=1e-10)
    assert divergence(s, t, 1).item() == pytest.approx(0.9077838326, abs=1e-10)


def test_unscaled_divergence_lacks_exactly_the_square_of_the_temperature() -> None:
    """`scaled=False` leaves T² out."""
    s, t, _ = formula()
    assert divergence(s, t, 4, scaled=False).item() * 16 == pytest.approx(divergence(s, t, 4).item(), rel=1e-12)


def test_the_teacher_is_a_constant_of_the_divergence() -> None:
    """No gradient reaches the teacher's logits, and equal logits give zero."""
    s, t, _ = formula()
    s.requires_grad_()
    t.requires_grad_()
    divergence(s, t, 4).backward()
    assert s.grad is not None
    assert s.grad.abs().max() > 0
    assert t.grad is None
    assert divergence(t, t, 4).item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("shape", [(4, 1), (1, 5), (4, 6), (8, 5)])
def test_divergence_of_unequal_shapes_is_refused(shape: tuple[int, int]) -> None:
    """Shapes that broadcasting would accept are refused too, and the message names both."""
    s, _, _ = formula()
    with pytest.raises(IncompatibleError, match=r"\(4, 5\).*" + str(shape).replace("(", r"\(").replace(")", r"\)")):
        divergence(s, torch.zeros(shape), 4)


def test_cross_entropy_smoothing_and_temperature() -> None:
    """Smoothing spreads its share over all K classes; the temperature divides the logits."""
    s, _, y = formula()
    log_p = torch.log_softmax(s / 2, 1)
    target = torch.full((4, 5), 0.1 / 5, dtype=torch.float64)
    target[torch.arange(4), y] += 0.9
    assert cross_entropy(s, y, 0.1, 2.0).item() == pytest.approx(-(target * log_p).sum(1).mean().item(), rel=1e-12)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_logits_are_computed_in_fp32(low: torch.dtype) -> None:
    """Half-precision logits give the fp32 loss of their values, also where softmax would overflow or round away."""
    s, t, y = formula()
    s, t = (1000 * s).to(low), (1000 * t).to(low)
    for found, expected in (
        (divergence(s, t, 1), divergence(s.float(), t.float(), 1)),
        (cross_entropy(s, y), cross_entropy(s.float(), y)),
    ):
        assert found.dtype == torch.float32
        assert torch.isfinite(found)
        assert found.item() == expected.item()
