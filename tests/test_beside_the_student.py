"""What a method may have beside the student: values followed, alarms, measured networks, spliced passes, teachers."""

from __future__ import annotations

import json

import pytest
import torch
from harness import TINY, Kd, outcome
from torch import nn

from kdcli import checkpoint
from kdcli.data.dataset import Split
from kdcli.data.loader import Loader
from kdcli.engine.device import Device
from kdcli.engine.evaluate import evaluate
from kdcli.inference import Use

WORDS = ["distill", "--method", "own.py", "--teacher", "resnet14", "--student", "resnet8", *TINY]

METHOD = '''
from dataclasses import replace
import torch
from torch import nn
from kdcli.losses import cross_entropy, divergence
from kdcli.methods.base import Method, MethodSpec, Outcome
from kdcli.methods.pairing import backbone


class OwnSpec(MethodSpec):
    name: str = "own"
    copies: int = 0


class Spliced(nn.Module):
    """The student's stages up to the last, then the teacher's last."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, images):
        x = self.student.stem(images)
        for i in range(1, self.student.n_stages):
            x = self.student.stage(i, x)
        return self.teacher.tail(self.teacher.stage(self.teacher.n_stages, x))[1]


class Own(Method):
    Spec = OwnSpec

    @classmethod
    def prepared(cls, spec):
        return ({"name": "kd", "temperature": 2.0},) * spec.copies

    def joint_features(self, student, teacher):
        network = teacher.network
        logits = network.tail(network.stage(network.n_stages, student.maps[-2]))[1]
        return replace(student, assistants=(replace(student, logits=logits),))

    def outcome(self, batch, student, teacher, progress):
        (spliced,) = student.assistants
        terms = {
            "ce": cross_entropy(student.logits, batch.targets),
            "spliced": cross_entropy(spliced.logits, batch.targets),
        }
        taught = [divergence(student.logits, a.logits, 2.0) for a in teacher.assistants]
        terms |= {f"kd{i}": term for i, term in enumerate(taught)}
        hits = (spliced.logits.argmax(1) == batch.labels).float().mean()
        return Outcome(terms, {"spliced_top1": 100 * hits, "images": batch.labels.new_tensor(7.0, dtype=torch.float32)})

    def loss(self, batch, student, teacher, progress):
        return self.outcome(batch, student, teacher, progress).terms

    def alarms(self, followed):
        return ["the splice has learned nothing"] if followed["spliced_top1"] < 101 else []

    def companions(self, student, teacher):
        return {"spliced": Spliced(student, backbone(teacher))}
'''


@pytest.fixture
def own(kd: Kd, tmp_path) -> Kd:
    """The command, beside a file with a method that uses everything."""
    (tmp_path / "own.py").write_text(METHOD)
    return kd


def test_followed_values_alarms_and_companions_are_recorded_each_epoch(own: Kd, tmp_path):
    """A followed value is the epoch's mean over the images and no part of the loss."""
    result = own(*WORDS, "--out", "run", "--json")
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert line["followed"]["images"] == 7.0
        assert 0 <= line["followed"]["spliced_top1"] <= 100
        assert set(line["terms"]) == {"ce", "spliced"}
        assert line["train"]["loss"] == pytest.approx(sum(line["terms"].values()), abs=1e-6)
        assert line["alarms"] == ["the splice has learned nothing"]
        assert line["companions"]["spliced"]["test"]["n"] == line["test"]["single"]["n"]
    assert result.json["companions"] == lines[-1]["companions"]
    assert result.err.count("the splice has learned nothing") == 3
    assert f"spliced test {lines[-1]['companions']['spliced']['test']['top1']:.2f}" in result.err


def test_a_run_with_companions_resumes_bit_for_bit(own: Kd, tmp_path):
    """Followed sums and what evaluation touches are part of the state."""
    assert own(*WORDS, "--out", "whole").code == 0
    assert own(*WORDS, "--out", "broken", "--max-minutes", "0.0001").code == 75
    assert own(*WORDS, "--out", "broken").code == 0
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "broken")
    whole, broken = ((tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "broken"))
    assert whole == broken


def test_prepared_networks_are_ordinary_runs_of_the_teachers_architecture(own: Kd, tmp_path):
    """Each with a seed of its own; they teach frozen beside the teacher, and are found again."""
    words = [*WORDS, "--epochs", "1", "--set", "method.copies=2", "--json"]
    planned = own(*words, "--dry-run")
    assert planned.json["networks"]["teacher"]["assistants"] == ["resnet14", "resnet14"], planned.err
    first = own(*words)
    assert first.code == 0, first.err
    told = first.json["teacher"]["assistants"]
    assert [a["arch"] for a in told] == ["resnet14", "resnet14"]
    assert told[0]["digest"] != told[1]["digest"]
    for number, one in enumerate(told):
        metadata = checkpoint.read_metadata(tmp_path / one["checkpoint"])
        assert (metadata["seed"], metadata["method"]["name"]) == (number, "kd")
        assert metadata["method"]["temperature"] == 2.0
        assert metadata["teacher"]["digest"] == first.json["teacher"]["digest"]
    again = own(*words, "--seed", "3")
    assert again.code == 0, again.err
    assert again.err.count("taught beforehand: runs") == 2
    assert again.json["teacher"]["assistants"] == told
    refused = own(*words, "--seed", "4", "--runs-dir", "elsewhere", "--no-auto-teacher")
    assert refused.code == 3, refused.err


def test_evaluation_leaves_every_module_in_its_own_mode():
    """A companion may be made of a training student and a frozen teacher's stage."""
    network = nn.Sequential(nn.Flatten(), nn.Sequential(nn.BatchNorm1d(192), nn.Linear(192, 3)))
    network[1].eval()
    split = Split.of([0, 1, 2, 0], images=torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    loader = Loader(
        split,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        image_size=8,
        batch_size=2,
        seed=0,
        augment="none",
        device="cpu",
        train=False,
    )
    evaluate(network, Use(), loader, Device(torch.device("cpu"), "fp32", 1))
    assert [m.training for m in network.modules()] == [True, True, False, False, False]
