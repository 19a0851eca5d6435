"""CAT-KD against its released code: maps, weights, normalisation, binarisation and the choice of classes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from golden import PRECISIONS, PROGRESS, Case, batch, features, near, setting
from torch import Tensor

from kdcli.errors import IncompatibleError
from kdcli.methods.catkd import CATKD, CATKDSpec
from kdcli.models import build
from kdcli.models.features import Features


def seen(final: Tensor, weight: Tensor) -> Features:
    """What a network with this last map and a classifier without a bias gives."""
    pooled = final.mean((2, 3))
    return replace(features(pooled @ weight.T, pooled), final=final, classifier=weight)


@PRECISIONS
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("catkd", {}),
        ("cat_normalized_binarized", {"normalize": True, "binarize": True, "ce_weight": 0}),
        ("cat_partial_top", {"classes": 5, "ce_weight": 0}),
    ],
)
def test_the_reference(name: str, settings: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    """Loss, its parts, and the gradients of the student's map and classifier."""
    case = Case(name)
    spec = CATKDSpec(weight=case.hyper["CAT_loss_weight"], resolution=case.hyper["CAM_resolution"], **settings)
    final = case.input("student_feature", dtype, learns=True)
    weight = case.weight("student_classifier", dtype)[:, :, 0, 0].requires_grad_()
    taught = seen(case.input("teacher_feature", dtype), case.weight("teacher_classifier", dtype)[:, :, 0, 0])
    method = CATKD(spec, setting(20), None, None)
    terms = method.loss(batch(case.input("target")), seen(final, weight), taught, PROGRESS)
    total = terms["ce"] + terms["cat"]
    total.backward()
    assert near(total, case.loss or 0.0, tolerance)
    assert near(terms["cat"], case.components["loss_CAT"], tolerance)
    assert final.grad is not None
    assert weight.grad is not None
    assert near(final.grad, case.gradient("student_feature"), tolerance)
    assert near(weight.grad, case.gradient("student_classifier")[:, :, 0, 0], tolerance)


def test_the_classes_that_the_reference_chooses() -> None:
    """N-1 classes of the N highest, as released; N without `released_count`; N+1 of the N lowest."""
    case = Case("cat_partial_top")
    taught = seen(case.input("teacher_feature"), case.weight("teacher_classifier")[:, :, 0, 0])
    made = {
        key: CATKD(CATKDSpec(classes=5, select=key[0], released_count=key[1]), setting(20), None, None)
        for key in (("highest", True), ("highest", False), ("lowest", True), ("lowest", False))
    }
    counts = {key: int(method.chosen(taught.logits)[0].sum()) for key, method in made.items()}
    assert counts == {("highest", True): 4, ("highest", False): 5, ("lowest", True): 6, ("lowest", False): 5}
    assert torch.equal(made["highest", True].chosen(taught.logits), case.output("class_mask"))
    lowest = made["lowest", False].chosen(taught.logits)
    assert bool((taught.logits[lowest].view(8, 5).amax(1) < taught.logits[~lowest].view(8, 15).amin(1)).all())


@pytest.mark.parametrize(
    "name",
    [
        "resnet8",
        "wrn16_1",
        "vgg8",
        "mobilenetv2",
        "shufflenetv1",
        "shufflenetv2",
        "mobilenetv1",
        "torchvision:resnet18",
        "timm:resnet18",
    ],
)
def test_maps_average_to_the_logits(name: str) -> None:
    """On real networks the mean of the class activation maps plus the bias is the logit; one pass, one BatchNorm update."""
    torch.manual_seed(0)
    network = build(name, 7).train()
    method = CATKD(CATKDSpec(resolution=1), setting(7), network, network)
    out = method.student_features(network, torch.randn(4, 3, 64, 64))
    bias = network.get_submodule(network.classifier_name).bias
    assert torch.allclose(method._cells(out, binarize=False)[:, :, 0, 0] + bias, out.logits, atol=1e-5)
    tracked = {int(v) for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")}
    assert tracked == {1}


def test_maps_of_different_sizes_meet_at_the_smaller_grid() -> None:
    """MobileNetV2's 2x2 map against an 8x8 one at r = 4: four cells."""
    student, teacher = build("mobilenetv2", 7).eval(), build("resnet8", 7).eval()
    method = CATKD(CATKDSpec(resolution=4), setting(7), student, teacher)
    x = torch.randn(2, 3, 32, 32)
    terms = method.loss(
        batch(torch.tensor([0, 1])), method.student_features(student, x), method.teacher_features(teacher, x), PROGRESS
    )
    assert torch.isfinite(terms["cat"])


def test_the_pairs_settings() -> None:
    """β, r and the normalisation by pair; ImageNet's; nothing for others."""
    assert CATKD.for_pair({}, "wrn40_2", "wrn16_2", "cifar100") == {"weight": 12, "resolution": 2, "normalize": False}
    cross = CATKD.for_pair({}, "resnet32x4", "shufflenetv1", "cifar100")
    assert cross == {"weight": 600, "resolution": 4, "normalize": True}
    assert CATKD.for_pair({}, "torchvision:resnet34", "torchvision:resnet18", "imagenet")["weight"] == 0.5
    assert CATKD.for_pair({}, "torchvision:resnet50", "mobilenetv1", "imagenet")["weight"] == 10
    assert CATKD.for_pair({}, "torchvision:resnet50", "torchvision:resnet18", "imagenet") == {}
    assert CATKD.for_pair({}, "resnet14", "resnet8", "digits") == {}


def test_a_network_without_a_final_map_is_refused() -> None:
    """A class token is no mean of a map."""
    vit = build("timm:vit_tiny_patch16_224", 7)
    with pytest.raises(IncompatibleError, match="class activation") as problem:
        CATKD(CATKDSpec(), setting(7), build("resnet8", 7), vit)
    assert problem.value.field == "--teacher"
