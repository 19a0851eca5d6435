"""MLKD against the released code's numbers, its views, its masks, and what differs from the paper."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import PRECISIONS, PROGRESS, Case, batch, features, near, setting
from torch import Tensor

from kdcli.methods import mlkd
from kdcli.methods.mlkd import MLKD, MLKDSpec, batch_level, class_level, instance_level, unsure
from kdcli.models.features import Features
from kdcli.transforms import rescale


def method(classes: int = 20, **changes: object) -> MLKD:
    return MLKD(MLKDSpec.model_validate(changes), setting(classes), None, None)


def interleaved(weak: Tensor, strong: Tensor) -> Features:
    """What a pass over both views of each image gives."""
    return features(torch.stack([weak, strong], 1).flatten(0, 1))


def logits(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The student's weak and strong, the teacher's weak and strong logits of a case."""
    names = [f"{who}_logits_{view}" for who in ("student", "teacher") for view in ("weak", "strong")]
    return [case.input(name, dtype, learns=name.startswith("student")) for name in names]


@PRECISIONS
@pytest.mark.parametrize(
    ("level", "function"), [("instance", instance_level), ("class", class_level), ("batch", batch_level)]
)
def test_each_level_and_its_gradient(level: str, function: object, dtype: torch.dtype, tolerance: float) -> None:
    """The unmasked loss of one temperature: a share per image or class, and their sum."""
    case = Case(f"mlkd_{level}_T4")
    s, t = case.input("student_logits", dtype, learns=True), case.input("teacher_logits", dtype)
    shares = function(s, t, 4.0)  # type: ignore[operator]
    shares.sum().backward()
    unreduced = case.output("unreduced")
    expected = unreduced / 8 if level == "instance" else unreduced.sum(0)
    assert near(shares, expected, tolerance)
    assert near(shares.sum(), case.loss or 0.0, tolerance)
    assert s.grad is not None
    assert near(s.grad, case.gradient("student_logits"), tolerance)


@PRECISIONS
def test_the_released_total_and_its_gradients(dtype: torch.dtype, tolerance: float) -> None:
    """All terms with their weights, and the gradients of both views."""
    case = Case("mlkd_total")
    weak, strong, taught, taught_strong = logits(case, dtype)
    mine = method(ce_weight=1, kd_weight=1)
    y = case.input("target")
    terms = mine.loss(batch(y), interleaved(weak, strong), interleaved(taught, taught_strong), PROGRESS)
    assert list(terms) == ["ce", "kd", "cc", "bc"]
    for name, term in terms.items():
        assert near(term, case.components[f"loss_{name}"], tolerance)
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    assert near(total, case.loss or 0.0, tolerance)
    for view, name in ((weak, "student_logits_weak"), (strong, "student_logits_strong")):
        assert view.grad is not None
        assert near(view.grad, case.gradient(name), tolerance)


def test_masks_keep_what_the_teacher_is_unsure_of() -> None:
    """The case's masks; and for odd and even counts those of numpy's 50th percentile, which the released code takes."""
    case = Case("mlkd_total")
    p = case.input("teacher_logits_weak").softmax(1)
    assert torch.equal(unsure(p.amax(1)), case.output("sample_mask"))
    assert torch.equal(unsure(p.sum(0)), case.output("class_mask"))
    for count in (1, 2, 5, 6, 7, 64):
        values = torch.rand(count, generator=torch.Generator().manual_seed(count))
        expected = values.numpy() <= np.percentile(values.numpy(), 50)
        assert unsure(values).tolist() == expected.tolist()


def test_numbers_anyone_can_recompute() -> None:
    """CC_4 0.0058063736, BC_4 0.0042475675 from logits of sines and cosines."""
    b, c = torch.arange(4, dtype=torch.float64)[:, None], torch.arange(5, dtype=torch.float64)
    s, t = 2 * torch.sin(1 + 3 * b + 7 * c), 3 * torch.cos(2 + 5 * b + 3 * c)
    assert class_level(s, t, 4).sum().item() == pytest.approx(0.0058063736, abs=1e-10)
    assert batch_level(s, t, 4).sum().item() == pytest.approx(0.0042475675, abs=1e-10)


def test_masks_per_sample_leave_the_confident_out() -> None:
    """per_sample: sums over the images and classes that are kept, with the reductions of the unmasked losses."""
    case = Case("mlkd_total")
    weak, strong, taught, taught_strong = logits(case)
    mine = method(kd_weight=1, masks="per_sample")
    y = case.input("target")
    terms = mine.distil(batch(y), interleaved(weak, strong), interleaved(taught, taught_strong), PROGRESS)
    images, classes = case.output("sample_mask").double(), case.output("class_mask").double()
    kd = cc = bc = torch.zeros((), dtype=torch.float64)
    for theta, view in zip((4.0, 3.0, 5.0, 2.0, 6.0), "sssww", strict=True):
        s, t = (weak / theta).softmax(1), (taught / theta).softmax(1)
        rows = theta**2 * (t * (t.log() - s.log())).sum(1)
        kd = kd + (rows * images).mean()
        a, b = (strong, taught_strong) if view == "s" else (weak, taught)
        kd = kd + theta**2 * F.kl_div((a / theta).log_softmax(1), (b / theta).softmax(1), reduction="batchmean")
        cc = cc + ((t.T @ t - s.T @ s).square() * classes).sum() / 20
        bc = bc + ((t @ t.T - s @ s.T).square() * images).sum() / 8
    for name, expected in (("kd", kd), ("cc", cc), ("bc", bc)):
        assert near(terms[name], expected.detach(), 1e-12)


def test_the_papers_strong_terms_compare_strong_views_at_every_temperature() -> None:
    """strong_terms=paper: what changes is the view of the unmasked terms at 2 and 6; class and batch level do not."""
    case = Case("mlkd_total")
    weak, strong, taught, taught_strong = logits(case)
    arguments = (
        batch(case.input("target")),
        interleaved(weak, strong),
        interleaved(taught, taught_strong),
        PROGRESS,
    )
    released = method(kd_weight=1).distil(*arguments)
    paper = method(kd_weight=1, strong_terms="paper").distil(*arguments)
    swap = sum(
        instance_level(strong, taught_strong, theta).sum() - instance_level(weak, taught, theta).sum()
        for theta in (2.0, 6.0)
    )
    assert paper["kd"].item() == pytest.approx((released["kd"] + swap).item(), rel=1e-12)
    assert (paper["cc"].item(), paper["bc"].item()) == (released["cc"].item(), released["bc"].item())


def test_relations_span_the_batch_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank with half of the images computes the terms of the whole batch, from the rows that all ranks give."""
    case = Case("mlkd_total")
    weak, strong, taught, taught_strong = (x.detach() for x in logits(case))
    student, teacher = interleaved(weak, strong).logits, interleaved(taught, taught_strong).logits
    y = case.input("target")
    whole = method().distil(batch(y), features(student), features(teacher), PROGRESS)
    rest = {tuple(x[:8].flatten().tolist()): x for x in (student, teacher)}
    monkeypatch.setattr(mlkd, "gathered", lambda x, batch: rest[tuple(x.flatten().tolist())])
    half = method().distil(batch(y[:4]), features(student[:8]), features(teacher[:8]), PROGRESS)
    assert {k: v.item() for k, v in half.items()} == {k: v.item() for k, v in whole.items()}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_both_networks_see_weak_and_strong_views_interleaved(layout: torch.memory_format) -> None:
    """Row 2b is the image as augmented, row 2b+1 its strong copy; the teacher's are enlarged; the layout is kept."""
    generator = torch.Generator().manual_seed(0)
    weak, strong = (torch.randn(3, 3, 8, 8, generator=generator).contiguous(memory_format=layout) for _ in range(2))
    both = replace(batch(torch.arange(3)), images=weak, extra=(strong,))
    mine = method(teacher_scale=2)
    seen = mine.student_views(both, PROGRESS)
    assert mine.augmentations(mine.spec) == ("strong",)
    assert torch.equal(seen[0::2], weak)
    assert torch.equal(seen[1::2], strong)
    assert seen.is_contiguous(memory_format=layout)
    assert torch.equal(mine.teacher_views(both, PROGRESS), rescale(seen, 2))


def test_the_labels_of_both_views_are_learned() -> None:
    """The cross-entropies of weak and strong view are added up, each a mean over the images, with smoothing."""
    case = Case("mlkd_total")
    weak, strong, taught, taught_strong = logits(case)
    y = case.input("target")
    mine = MLKD(MLKDSpec(), setting(20, label_smoothing=0.1), None, None)
    terms = mine.loss(batch(y), interleaved(weak, strong), interleaved(taught, taught_strong), PROGRESS)
    each = [F.cross_entropy(view, y, label_smoothing=0.1).item() for view in (weak, strong)]
    assert terms["ce"].item() == pytest.approx(0.1 * sum(each), rel=1e-12)
