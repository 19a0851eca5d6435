"""HSAKD's networks with heads: the imported keys fill ours exactly, and every head gives the golden logits."""

from __future__ import annotations

import pytest
import torch
from golden_models import FACTS, empty, filled, images, tensors

from kdcli.models.heads import Headed, build_heads
from kdcli.models.import_keys import map_keys
from kdcli.models.network import macs, macs_with_heads, parameters_of


def arch_of(name: str) -> str:
    """HSAKD's MobileNetV2 is the one with the stride-1 stem."""
    return {"mobilenetV2_aux": "mobilenetv2_s1"}.get(name, name.removesuffix("_aux"))


@pytest.mark.parametrize("name", list(FACTS["hsakd_models"]))
def test_heads_match_golden(name: str) -> None:
    entry = FACTS["hsakd_models"][name]
    network = empty(arch_of(name), 100)
    with torch.device("meta"):
        headed = Headed(network, build_heads(network, entry["aux_width"]))

    renamed = map_keys(arch_of(name), [key for key, _ in entry["state_dict"]])
    ours = {key if key.startswith("heads.") else f"network.{key}" for key in renamed.values()}
    assert ours == set(headed.state_dict())
    assert parameters_of(headed) == entry["params"]
    assert parameters_of(network) == entry["params_backbone"]
    assert macs(headed, 32) == entry["macs_32_backbone"]
    assert macs_with_heads(headed, 32) == entry["macs_32"]

    dtype = torch.float64
    state = filled(entry, dtype)
    headed.load_state_dict(
        {(n if n.startswith("heads.") else f"network.{n}"): state[key] for key, n in renamed.items()}, assign=True
    )
    headed.eval()
    with torch.no_grad():
        features = headed.features(images())
    assert (features.logits - tensors()[entry["logits"]]).abs().max().item() <= 1e-9 * entry["logits_rms"]
    assert len(features.heads) == len(entry["aux_logits"])
    for found, expected in zip(features.heads, entry["aux_logits"], strict=True):
        golden = tensors()[expected]
        assert (found - golden).abs().max().item() <= 1e-9 * golden.square().mean().sqrt().item()
