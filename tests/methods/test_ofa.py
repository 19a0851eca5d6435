"""OFA: its loss against the released code, and its heads on every kind of student."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden import PRECISIONS, PROGRESS, Case, batch, features, near, setting

from kdcli.errors import IncompatibleError
from kdcli.losses import cross_entropy
from kdcli.methods.ofa import OFA, ConvHead, OFASpec, TokenHead
from kdcli.models import build


def made(**settings: Any) -> OFA:
    return OFA(OFASpec(**({"ce_weight": 0.0, "stage_weight": 0.0} | settings)), setting(20), None, None)


@PRECISIONS
@pytest.mark.parametrize("name", ["ofa_eps1_T1", "ofa_eps1.5_T1", "ofa_eps1.4_T2", "ofa_soft_label"])
def test_the_reference(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Value and gradient for three exponents and two temperatures; a mixed label counts by its largest class."""
    case = Case(name)
    s, t = case.input("student_logits", dtype, learns=True), case.input("teacher_logits", dtype)
    labels = case.input("soft_target").argmax(1) if name == "ofa_soft_label" else case.input("target")
    method = made(eps=case.hyper["eps"], temperature=case.hyper["T"])
    terms = method.loss(batch(labels), features(s), features(t), PROGRESS)
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    assert near(total, case.loss or 0.0, tolerance)
    assert s.grad is not None
    assert near(s.grad, case.gradient("student_logits"), tolerance)


def test_numbers_anyone_can_recompute() -> None:
    """The fact sheet's logits from sines and cosines: 2.0180554958 at ε = 1, 1.8360209357 at 1.5."""
    b, c = torch.arange(4, dtype=torch.float64)[:, None], torch.arange(5, dtype=torch.float64)
    s, t = 2 * torch.sin(1 + 3 * b + 7 * c), 3 * torch.cos(2 + 5 * b + 3 * c)
    labels = torch.tensor([0, 2, 4, 1])
    for eps, expected in ((1.0, 2.0180554958), (1.5, 1.8360209357)):
        terms = made(eps=eps).loss(batch(labels), features(s), features(t), PROGRESS)
        assert terms["ofa"].item() == pytest.approx(expected, abs=1e-10)


def test_the_heads_follow_the_teacher_like_the_student() -> None:
    """The stages' term is the sum of the same loss on each head's logits; weights weigh; the heads get gradients."""
    torch.manual_seed(0)
    student, teacher = build("wrn16_1", 20).train(), build("resnet8", 20).eval()
    method = OFA(OFASpec(ce_weight=2, logit_weight=0, stage_weight=3), setting(20), student, teacher).train()
    x, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    s, t = student.features(x), teacher.features(x)
    terms = method.loss(batch(labels), s, t, PROGRESS)
    wanted = 0.0
    for head, stage in zip(method.heads, (1, 2, 3), strict=True):
        wanted += made().loss(batch(labels), features(head(s.maps[stage])), t, PROGRESS)["ofa"].item()
    assert terms["stages"].item() == pytest.approx(3 * wanted, rel=1e-5)
    assert terms["ofa"].item() == 0
    assert terms["ce"].item() == pytest.approx(2 * cross_entropy(s.logits, labels).item(), rel=1e-6)
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None for p in method.parameters())


@pytest.mark.parametrize(
    ("student", "count", "kind"),
    [
        ("resnet8", 3, ConvHead),
        ("mobilenetv2", 4, ConvHead),
        ("vgg8", 4, ConvHead),
        ("timm:vit_tiny_patch16_224", 4, TokenHead),
    ],
)
def test_every_stage_has_a_head_that_reads_it(student: str, count: int, kind: type) -> None:
    """Four from the last, or all; behind the last stage no map is halved; every head gives K logits."""
    network, teacher = build(student, 20), build("resnet14", 20)
    method = OFA(OFASpec(), setting(20), network, teacher)
    assert len(method.heads) == count
    assert all(isinstance(head, kind) for head in method.heads)
    out = network.features(torch.randn(2, 3, 32, 32))
    for head, stage in zip(method.heads, method.stages, strict=True):
        assert head(out.maps[stage]).shape == (2, 20)


def test_widths_double_and_end_at_the_wider_network() -> None:
    """A 64-wide student's first of three stages: 16 → 32 → max of both pooled widths."""
    head = ConvHead(16, 32, 2, 128, 20)
    assert head(torch.randn(2, 16, 32, 32)).shape == (2, 20)
    assert [block[5].out_channels for block in head.blocks] == [32, 128]  # type: ignore[index,union-attr]
    assert head.classifier.in_features == 128


def test_behind_the_last_stage_is_a_bare_convolution() -> None:
    """1x1 with a bias and nothing else, as released; so a batch of one can be trained on."""
    head = ConvHead(64, 1, 0, 128, 20)
    assert [type(block) for block in head.blocks] == [torch.nn.Conv2d]
    assert head.blocks[0].bias is not None
    assert head(torch.randn(1, 64, 1, 1)).shape == (1, 20)


def test_large_grids_are_merged() -> None:
    """14 x 14 patches become 7 x 7; 8 x 8 stay."""
    assert TokenHead(8, 14, 1, 8, 5).merge(torch.randn(1, 8, 14, 14)).shape[2:] == (7, 7)
    assert TokenHead(8, 8, 1, 8, 5).merge(torch.randn(1, 8, 8, 8)).shape[2:] == (8, 8)


def test_the_data_set_chooses_the_exponent() -> None:
    assert OFA.for_pair({}, "a", "b", "imagenet") == {"eps": 1.5}
    assert OFA.for_pair({}, "a", "b", "cifar100") == {}


def test_other_outputs_are_refused() -> None:
    with pytest.raises(IncompatibleError, match="outputs"):
        OFA(OFASpec(), setting(20), build("resnet8", 20), build("resnet8", 10))
