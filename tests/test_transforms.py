"""Views, joint labels and their folding into class logits, against SLA's and HSAKD's published code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kdcli.errors import UsageError
from kdcli.transforms import check, expand, fold, joint_labels, rescale, views

GOLDEN = Path(__file__).resolve().parent / "golden"
SLA = load_file(GOLDEN / "sla.safetensors")
HSAKD = load_file(GOLDEN / "hsakd.safetensors")
# SLA's published order of the channel permutations.
PERMUTATIONS = ["RGB", "RBG", "GRB", "GBR", "BRG", "BGR"]
ALL = ["none", "rot2", "rot4", "perm3", "perm6", "rot4xperm6", "perm3xrot2"]


def images(batch: int = 3, side: int = 6) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("case", ["sla_rotation", "sla_rotation_large"])
def test_rotations_and_joint_labels_are_those_of_sla(case: str) -> None:
    """Rotated images bit for bit, interleaved per image, and the labels 4*y + r."""
    assert torch.equal(expand(SLA[f"{case}/in/image"], "rot4"), SLA[f"{case}/out/transformed_images"])
    assert torch.equal(joint_labels(SLA[f"{case}/in/target"], 4), SLA[f"{case}/out/joint_labels"])


@pytest.mark.parametrize("case", ["sla_rotation", "sla_rotation_large"])
def test_single_and_aggregated_inference_are_those_of_sla(case: str) -> None:
    """`single` from view 0 alone, `aggregate` from all views."""
    joint = SLA[f"{case}/in/joint_logits"]
    assert torch.equal(fold(joint[::4], 4, "single"), SLA[f"{case}/out/single_logits"])
    expected = SLA[f"{case}/out/aggregated_logits"]
    assert (fold(joint, 4, "aggregate") - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_aggregated_logits_of_sla_with_self_distillation() -> None:
    """The second published use of the aggregation gives the same numbers."""
    expected = SLA["sla_self_distillation/out/aggregated_logits"]
    found = fold(SLA["sla_self_distillation/in/joint_logits"], 4, "aggregate")
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_the_rotated_batch_is_that_of_hsakd() -> None:
    """HSAKD's rotated batch and joint labels, bit for bit; the class labels are the joint ones divided by 4."""
    assert torch.equal(expand(HSAKD["hsakd_student/in/image"], "rot4"), HSAKD["hsakd_student/out/rotated_images"])
    labels = joint_labels(HSAKD["hsakd_student/in/target"], 4)
    assert torch.equal(labels, HSAKD["hsakd_student/out/joint_labels"])
    assert torch.equal(labels // 4, HSAKD["hsakd_student/out/class_labels"])


def test_joint_labels_and_rotation_by_hand() -> None:
    """The fact sheet's examples."""
    expected = [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 4, 5, 6, 7]
    assert joint_labels(torch.tensor([0, 2, 4, 1]), 4).tolist() == expected
    turned = expand(torch.tensor([[[[0, 1], [2, 3]]]]).float(), "rot4")
    assert turned[1, 0].tolist() == [[1, 3], [0, 2]]


def test_colour_permutations_in_slas_order() -> None:
    """perm6 is SLA's order, identity first; perm3 the cyclic ones; both interleaved per image."""
    x = images()
    six = expand(x, "perm6").unflatten(0, (3, 6))
    for i, order in enumerate(PERMUTATIONS):
        assert torch.equal(six[:, i], x[:, ["RGB".index(c) for c in order]]), order
    three = expand(x, "perm3").unflatten(0, (3, 3))
    for i in range(3):
        assert torch.equal(three[:, i], x.roll(-i, 1))


@pytest.mark.parametrize("transform", ALL)
def test_view_zero_is_the_image_and_all_views_differ(transform: str) -> None:
    """M views an image, the first untouched, no two alike; `views` counts them."""
    x, m = images(), views(transform)
    stack = expand(x, transform).unflatten(0, (3, m))
    assert torch.equal(stack[:, 0], x)
    for i in range(m):
        for j in range(i):
            assert not torch.equal(stack[:, i], stack[:, j]), (i, j)


def test_a_product_runs_through_its_second_factor_first() -> None:
    """rot4xperm6: view 6*r + c is permutation c of rotation r."""
    x = images()
    stack = expand(x, "rot4xperm6").unflatten(0, (3, 24))
    assert views("rot4xperm6") == 24
    for r in range(4):
        turned = torch.rot90(x, r, (2, 3))
        for c, order in enumerate(PERMUTATIONS):
            assert torch.equal(stack[:, 6 * r + c], turned[:, ["RGB".index(k) for k in order]])


@pytest.mark.parametrize("transform", ["rot4", "perm6", "rot4xperm6"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("factor", [2, 4])
def test_enlarging_commutes_with_the_views(transform: str, mode: str, factor: int) -> None:
    """Enlarging once and then transforming is enlarging every view: what lets VSD interpolate B and not B*M images."""
    x = images(side=8).float()
    once = expand(rescale(x, factor, mode), transform)
    each = rescale(expand(x, transform), factor, mode)
    assert once.shape == (3 * views(transform), 3, 8 * factor, 8 * factor)
    assert torch.allclose(once, each, rtol=0, atol=1e-6)


def test_nearest_rescale_copies_pixels_and_factor_one_does_nothing() -> None:
    """nearest: each pixel factor x factor times."""
    x = images()
    assert torch.equal(rescale(x, 2, "nearest"), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert rescale(x, 1) is x


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_views_keep_the_memory_format(memory: torch.memory_format) -> None:
    """channels-last images stay channels-last (the fast layout), with the same values."""
    x = images().contiguous(memory_format=memory)
    assert expand(x, "rot4").is_contiguous(memory_format=memory)
    assert torch.equal(expand(x, "rot4"), expand(images(), "rot4"))


@pytest.mark.parametrize("m", [2, 4, 24])
def test_folding_is_what_its_names_say(m: int) -> None:
    """single: the slice of view 0. marginal: softmax is the sum of p(y,i). aggregate: mean of each view's own slice."""
    joint = torch.randn(3 * m, 5 * m, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    first = joint[::m]
    assert torch.equal(fold(first, m, "single"), first[:, [y * m for y in range(5)]])
    p = torch.softmax(first, 1)
    summed = torch.stack([p[:, y * m : (y + 1) * m].sum(1) for y in range(5)], 1)
    assert torch.allclose(torch.softmax(fold(first, m, "marginal"), 1), summed, rtol=1e-12)
    naive = torch.zeros(3, 5, dtype=torch.float64)
    for b in range(3):
        for y in range(5):
            naive[b, y] = sum(joint[m * b + i, y * m + i] for i in range(m)) / m
    assert torch.allclose(fold(joint, m, "aggregate"), naive, rtol=1e-12)


@pytest.mark.parametrize("inference", ["single", "marginal", "aggregate"])
def test_folding_plain_class_logits_changes_nothing(inference: str) -> None:
    """M = 1: the logits are class logits already."""
    x = torch.randn(4, 7)
    assert fold(x, 1, inference) is x


def test_unknown_transformations_are_refused_with_the_nearest_name() -> None:
    """A misspelt set, alone or in a product, names the field and a fix."""
    with pytest.raises(UsageError, match="rot5") as problem:
        check("rot5")
    assert problem.value.field == "method.transform"
    assert "rot4" in (problem.value.hint or "")
    with pytest.raises(UsageError, match="rot4xprem6") as problem:
        check("rot4xprem6", "method.teacher_transform")
    assert problem.value.field == "method.teacher_transform"
    assert "perm6" in (problem.value.hint or "")


@pytest.mark.parametrize("transform", ["rot4xrot2", "perm6xperm6", "perm3xrot4xperm6"])
def test_a_product_that_repeats_a_view_is_refused(transform: str) -> None:
    """Two labels for one picture cannot be told apart."""
    with pytest.raises(UsageError, match="twice"):
        check(transform)
