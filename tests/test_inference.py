"""From a network and a batch of images to class logits, and the classifier that `kdcli.load` gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdcli
from kdcli import checkpoint
from kdcli.data.dataset import DataSet, Split
from kdcli.errors import UsageError
from kdcli.inference import INFERENCE, Classifier, Use, class_logits
from kdcli.models import build
from kdcli.models.heads import Headed, build_heads
from kdcli.networks import describe, tensors_of
from kdcli.transforms import expand, views

K = 10


class Counting(nn.Module):
    """A network that records the shapes of the batches it is given."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.seen = network, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(tuple(x.shape))
        return self.network(x)


def network(transform: str) -> Counting:
    torch.manual_seed(0)
    return Counting(build("resnet8", K * views(transform)).eval())


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def naive(net: nn.Module, x: Tensor, use: Use, mode: str) -> Tensor:
    """Class probabilities or logits of one mode, image by image, view by view, class by class."""
    m = views(use.transform)
    if use.scale > 1:
        corners = None if use.scale_mode == "nearest" else False
        x = F.interpolate(x, scale_factor=use.scale, mode=use.scale_mode, align_corners=corners)
    rows = []
    for image in x:
        joint = [net(view[None])[0] for view in expand(image[None], use.transform)]
        if mode == "single":
            rows.append([joint[0][y * m] for y in range(K)])
        elif mode == "marginal":
            p = torch.softmax(joint[0], 0)
            rows.append([sum(p[y * m + i] for i in range(m)) for y in range(K)])
        else:
            rows.append([sum(joint[i][y * m + i] for i in range(m)) / m for y in range(K)])
    return torch.tensor(rows)


@torch.no_grad()
@pytest.mark.parametrize(
    "use", [Use("rot4"), Use("perm3"), Use("rot2", 2), Use("rot4", 2, "nearest"), Use("rot2xperm3")]
)
def test_every_mode_is_what_its_formula_says(use: Use) -> None:
    """single: slice of view 0; marginal: sum of probabilities; aggregate: mean of each view's slice."""
    net = network(use.transform)
    found = class_logits(net, images(), use, INFERENCE)
    assert list(found) == list(INFERENCE)
    assert torch.allclose(found["single"], naive(net, images(), use, "single"), atol=1e-4)
    assert torch.allclose(torch.softmax(found["marginal"], 1), naive(net, images(), use, "marginal"), atol=1e-5)
    assert torch.allclose(found["aggregate"], naive(net, images(), use, "aggregate"), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("modes", "forwards"),
    [
        (("single",), 1),
        (("marginal",), 1),
        (("single", "marginal"), 1),
        (("aggregate",), 4),
        (("single", "marginal", "aggregate"), 4),
    ],
)
def test_passes_are_no_more_than_the_modes_need(modes: tuple[str, ...], forwards: int) -> None:
    """One pass for single and marginal, M for aggregate, never one batch of M times the images."""
    net = network("rot4")
    assert tuple(class_logits(net, images(), Use("rot4"), modes)) == modes
    assert net.seen == [(3, 3, 32, 32)] * forwards


@torch.no_grad()
def test_a_plain_network_has_one_mode_and_needs_one_pass() -> None:
    """Without a joint head all modes are the logits themselves."""
    assert Use().modes == ("single",)
    assert Use("rot4").modes == INFERENCE
    net = network("none")
    found = class_logits(net, images(), Use(), INFERENCE)
    assert len(net.seen) == 1
    for logits in found.values():
        assert torch.equal(logits, net.network(images()))


@torch.no_grad()
def test_the_input_is_enlarged_once_by_the_networks_scale() -> None:
    """A teacher trained at twice the size sees images at twice the size, in every view."""
    net = network("rot4")
    class_logits(net, images(), Use("rot4", 2), INFERENCE)
    assert net.seen == [(3, 3, 64, 64)] * 4


def test_how_to_use_a_network_is_read_from_its_metadata() -> None:
    """The checkpoint's `inference` entry; none means a plain classifier."""
    assert Use.of({}) == Use("none", 1, "bilinear")
    assert Use.of({"inference": {"transform": "rot4", "scale": 2, "scale_mode": "nearest"}}) == Use(
        "rot4", 2, "nearest"
    )


METADATA = {
    "classes": [f"c{i}" for i in range(K)],
    "image_size": 32,
    "normalization": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]},
}


def test_classifier_normalises_bytes_and_floats_alike() -> None:
    """uint8 images are divided by 255; both are normalised per channel; the result equals normalising by hand."""
    data = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    classifier = Classifier(network("none").network, Use(), METADATA)
    expected = torch.stack([(data[:, c] / 255 - (0.5, 0.4, 0.3)[c]) / (0.2, 0.25, 0.3)[c] for c in range(3)], 1)
    assert torch.allclose(classifier.preprocess(data), expected, atol=1e-5)
    assert torch.allclose(classifier.preprocess(data.float() / 255), expected, atol=1e-5)
    assert classifier.classes == tuple(METADATA["classes"])
    assert classifier.image_size == 32
    assert not [name for name in classifier.state_dict() if not name.startswith("network.")]


@torch.no_grad()
@pytest.mark.parametrize("mode", INFERENCE)
def test_classifier_answers_in_its_inference_mode(mode: str) -> None:
    """[B,K] class logits of the mode it was made with."""
    net = network("rot4").network
    classifier = Classifier(net, Use("rot4", 2), METADATA, mode)
    data = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    expected = class_logits(net, classifier.preprocess(data), Use("rot4", 2), (mode,))[mode]
    assert classifier(data).shape == (3, K)
    assert torch.equal(classifier(data), expected)


def test_classifier_refuses_an_unknown_mode() -> None:
    """A misspelt mode is an error with the nearest name, and not some other mode's numbers."""
    with pytest.raises(UsageError, match="aggregated") as problem:
        Classifier(network("rot4").network, Use("rot4"), METADATA, "aggregated")
    assert "aggregate" in (problem.value.hint or "")


def dataset() -> DataSet:
    split = Split.of(torch.arange(K), images=torch.zeros(K, 3, 32, 32, dtype=torch.uint8))
    return DataSet("cifar10", tuple(METADATA["classes"]), 32, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), split, split)


@torch.no_grad()
@pytest.mark.parametrize("headed", [False, True])
@pytest.mark.parametrize("mode", INFERENCE)
def test_load_gives_a_ready_classifier(tmp_path: Path, mode: str, headed: bool) -> None:
    """A saved student or a teacher with heads: eval mode, preprocessing, class names, and the logits it was saved with."""
    torch.manual_seed(0)
    net = build("resnet8", 4 * K)
    saved = Headed(net, build_heads(net, 4 * K)) if headed else net
    saved(images())  # moves the BatchNorm statistics away from their initial values
    saved.eval()
    use = Use("rot4", 2 if headed else 1)
    file = tmp_path / "network.safetensors"
    role = "teacher" if headed else "student"
    checkpoint.save(file, tensors_of(saved), {"role": role, **describe(saved, dataset(), use)})
    loaded = kdcli.load(file, inference=mode)
    assert not loaded.training
    assert loaded.classes == tuple(METADATA["classes"])
    data = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    by_hand = class_logits(net, loaded.preprocess(data), use, (mode,))[mode]
    assert torch.equal(loaded(data), by_hand)
    assert not [name for name, _ in loaded.named_modules() if "heads" in name]
