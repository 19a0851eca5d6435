"""Every network of the literature against the golden numbers: keys, sizes, logits, stage and pre-activation maps."""

from __future__ import annotations

import pytest
import torch
from golden_models import FACTS, assert_stats, empty, filled, images, tensors

from kdcli.models.network import macs, parameters_of, stage_shapes

NETWORKS = list(FACTS["models"])


@pytest.mark.parametrize("name", NETWORKS)
def test_network_matches_golden(name: str) -> None:
    entry = FACTS["models"][name]
    network = empty(name, 100)
    own = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert own == dict(entry["state_dict"])
    assert parameters_of(network) == entry["params"]
    assert macs(network, 32) == entry["macs_32"]

    network.load_state_dict(filled(entry), assign=True)
    network.eval()
    with torch.no_grad():
        features = network.features(images())
        preact = [features.preact(i) for i in range(1, network.n_stages + 1)]
        plain = network(images())
    error = (features.logits - tensors()[entry["logits"]]).abs().max().item()
    assert error <= 1e-9 * entry["logits_rms"]
    assert torch.equal(plain, features.logits)
    for found, expected in zip([*features.maps, features.pooled], entry["features"], strict=True):
        assert_stats(found, expected)
    for found, expected in zip(preact, entry["features_preact"][1:-1], strict=True):
        assert_stats(found, expected)
    assert stage_shapes(network, 32) == [tuple(m.shape[1:]) for m in features.maps]
    assert network.pooled_dim == features.pooled.shape[1]
    names = dict(network.named_modules())
    if entry.get("bn_before_relu"):
        found = [network.preact_norm(i) for i in range(1, network.n_stages + 1)]
        assert found == [names[n] for n in entry["bn_before_relu"]]
    assert names[network.classifier_name].weight.shape == (100, network.pooled_dim)


def test_mobilenetv1_matches_golden() -> None:
    entry = FACTS["imagenet_models"]["MobileNetV1"]
    network = empty("mobilenetv1", 1000, image_size=224)
    own = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert own == dict(entry["state_dict"])
    assert parameters_of(network) == entry["params"]
    assert macs(network, 224) == entry["macs_224"]
    assert [list(s) for s in stage_shapes(network, 224)[1:]] == entry["feature_shapes"]
    assert [network.pooled_dim] == entry["pooled"]


def test_float32_logits_are_within_the_stated_deviation() -> None:
    entry = FACTS["models"]["wrn_16_2"]
    network = empty("wrn_16_2", 100)
    network.load_state_dict(filled(entry, torch.float32), assign=True)
    with torch.no_grad():
        logits = network.eval()(images().float())
    assert (logits - tensors()[entry["logits"]]).abs().max().item() <= 10 * entry["float32_max_abs_diff"]
