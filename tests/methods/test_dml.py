"""DML against reference numbers, and what its peers are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden import PRECISIONS, PROGRESS, Case, batch, features, near, setting

from kdcli.errors import UsageError
from kdcli.losses import divergence
from kdcli.methods.dml import DML, DMLSpec
from kdcli.models import build
from kdcli.specs import validate


@PRECISIONS
def test_two_networks_of_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    """Each network's loss, their sum, and both gradients: the other's logits are constants."""
    case = Case("dml")
    one, two = (case.input(f"logits_{i}", dtype, learns=True) for i in (1, 2))
    seen = replace(features(one), assistants=(features(two),))
    terms = DML(DMLSpec(), setting(20), None, None).loss(batch(case.input("target")), seen, None, PROGRESS)
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    assert near(total, case.loss or 0.0, tolerance)
    assert near(terms["ce"] + terms["kl"], case.components["loss_1"], tolerance)
    assert near(terms["peers_ce"] + terms["peers_kl"], case.components["loss_2"], tolerance)
    for i, logits in ((1, one), (2, two)):
        assert logits.grad is not None
        assert near(logits.grad, case.gradient(f"logits_{i}"), tolerance)


def test_three_networks_take_the_mean_of_the_others_and_weights_weigh() -> None:
    """With two peers each divergence counts half; ce_weight, kl_weight and T do as they say."""
    torch.manual_seed(0)
    z = [torch.randn(4, 20, dtype=torch.float64) for _ in range(3)]
    seen = replace(features(z[0]), assistants=(features(z[1]), features(z[2])))
    method = DML(DMLSpec(ce_weight=0, kl_weight=3, temperature=2), setting(20), None, None)
    terms = method.loss(batch(torch.arange(4)), seen, None, PROGRESS)
    mean = (divergence(z[0], z[1], 2) + divergence(z[0], z[2], 2)) / 2
    assert terms["kl"].item() == pytest.approx(3 * mean.item(), rel=1e-12)
    assert terms["ce"].item() == terms["peers_ce"].item() == 0


def test_by_default_there_is_one_untrained_peer_of_the_students_kind() -> None:
    """Same architecture, other weights; named peers are what they are named, and all run on the student's images."""
    torch.manual_seed(0)
    student = build("resnet8", 5)
    method = DML(DMLSpec(), setting(5), student, None)
    (peer,) = method.peers
    assert peer.arch == "resnet8"
    assert not torch.equal(peer.state_dict()["conv1.weight"], student.state_dict()["conv1.weight"])
    named = DML(DMLSpec(peers=("wrn_16_1", "vgg8")), setting(5), student, None)
    assert [peer.arch for peer in named.peers] == ["wrn16_1", "vgg8"]
    seen = named.student_features(student, torch.randn(2, 3, 32, 32))
    assert [other.logits.shape for other in seen.assistants] == [(2, 5), (2, 5)]


def test_an_unknown_peer_is_refused() -> None:
    with pytest.raises(UsageError, match="no network named"):
        validate(DMLSpec, {"peers": ["resnet15"]}, prefix="method")
