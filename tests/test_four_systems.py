"""SLKD, TAS and ReKD from the shell on real CIFAR-100: a few steps, a kill in their midst, the same bits, an evaluation.

`$KD_DATA_DIR` names the folder of the data set; without it these tests are skipped. VSD has the same elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from harness import Kd, finish, outcome, spawn, wait_for_step

DATA = os.environ.get("KD_DATA_DIR")
CIFAR = ("--dataset", "cifar100", "--threads", "1", "--device", "cpu")
VIT, SWIN, MLP = "timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224", "timm:resmlp_12_224"

PAIRS = {
    "slkd": ("slkd", "resnet32x4", "resnet8x4"),
    "slkd in sequence": ("slkd", "resnet20", "resnet8", "--set", "method.training=sequential"),
    "rekd": ("rekd", "resnet32x4", "resnet8x4"),
    "rekd, ViT to CNN": ("rekd", VIT, "resnet20"),
    "tas, Swin to CNN": ("tas", SWIN, "resnet18"),
    "tas, ViT to CNN": ("tas", VIT, "resnet20"),
    "tas, CNN to ViT": ("tas", "resnet20", VIT),
    "tas, CNN to MLP": ("tas", "resnet20", MLP),
    "tas, ViT to MLP": ("tas", VIT, MLP),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DATA is None or not (Path(DATA) / "cifar-100-binary").is_dir(), reason="no CIFAR-100 here"),
]


@pytest.mark.parametrize("pair", PAIRS)
def test_a_killed_run_goes_on_bit_for_bit_and_is_evaluated(pair: str, kd: Kd, tmp_path: Path):
    """SIGKILL in the midst of six steps of real images; the same command ends in the bits of an undisturbed run."""
    method, teacher, student, *more = PAIRS[pair]
    words = [
        *("distill", "--method", method, "--teacher", teacher, "--student", student, *more, *CIFAR),
        *("--batch-size", "16", "--max-steps", "6", "--checkpoint-every", "1"),
    ]
    # Both find the teacher (and what is taught beforehand) that the first one has trained.
    whole = kd(*words, "--out", "whole", "--json")
    assert whole.code == 0, whole.err
    process = spawn(*words, "--out", "broken", cwd=tmp_path)
    wait_for_step(process, tmp_path / "broken", 3, timeout=300)
    process.kill()
    finish(process)
    assert not (tmp_path / "broken/summary.json").exists()
    again = finish(spawn(*words, "--out", "broken", cwd=tmp_path), timeout=600)
    assert again.code == 0, again.err
    assert "going on at step" in again.err
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    evaluated = kd("evaluate", "broken", "--teacher", whole.json["teacher"]["checkpoint"], "--limit", "250", "--json")
    assert evaluated.code == 0, evaluated.err
