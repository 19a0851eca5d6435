"""The OFA-KD recipe from the command line: it trains, is resumed bit for bit, and every method that mixes reads shares."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Kd, finish, kd, spawn, wait_for_step  # noqa: F401
from methods.test_contract import PROGRESS, batch, make

from kdcli import checkpoint, methods
from kdcli.data.loader import Batch
from kdcli.engine.step import StepOutput
from kdcli.probe import ProbeStep

RECIPE = [
    *("--preset", "recipes/ofa-token-32", "--dataset", "digits", "--image-size", "16", "--device", "cpu"),
    *("--threads", "1", "--workers", "0"),
]
SMALL = ["--batch-size", "15", "--accumulate", "2", "--train-fraction", "0.05"]


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_the_recipe_trains_teacher_and_student(kd: Kd, tmp_path: Path) -> None:  # noqa: F811
    """Two steps of each; what is left open by the recipe (crops, size) is the data set's."""
    told = kd(
        *("distill", *RECIPE, "--method", "ofa", "--teacher", "timm:vit_tiny_patch16_224", "--student", "resnet8"),
        *(*SMALL, "--max-steps", "2", "--out", "run", "--json"),
    )
    assert told.code == 0, told.err
    spec = json.loads((tmp_path / "run/spec.json").read_text())
    assert (spec["data"]["mixup"], spec["data"]["augment"], spec["train"]["decay"]) == (0.8, "none", "weights")
    (line,) = lines(tmp_path / "run")
    assert line["step"] == 2
    assert line["train"]["loss"] > 0


def test_a_stopped_run_goes_on_in_mid_epoch(kd: Kd, tmp_path: Path) -> None:  # noqa: F811
    """Killed after some steps of an epoch of five: weights and metrics of the whole run, to the bit."""
    job = [
        "distill",
        *RECIPE,
        "--method",
        "none",
        "--student",
        "resnet8",
        *SMALL,
        "--epochs",
        "4",
        "--warmup-epochs",
        "1",
    ]
    assert kd(*job, "--out", "whole").code == 0
    process = spawn(*job, "--out", "broken", "--checkpoint-every", "1", cwd=tmp_path)
    wait_for_step(process, tmp_path / "broken", 7)
    process.kill()
    finish(process)
    assert not (tmp_path / "broken/summary.json").exists()
    assert kd(*job, "--out", "broken", "--checkpoint-every", "1").code == 0
    whole, broken = (checkpoint.load(tmp_path / name / "student.safetensors")[0] for name in ("whole", "broken"))
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")


def test_a_method_that_cannot_mix_says_so(kd: Kd) -> None:  # noqa: F811
    """Exit code 2, one line that names the flag and what to do."""
    told = kd("distill", *RECIPE, "--method", "vsd", "--teacher", "wrn40_2", "--student", "wrn16_2")
    assert told.code == 2
    assert told.error == "error: --mixup: the method vsd cannot learn from mixed images (--mixup 0 --cutmix 0)"


def _reads_labels(name: str) -> bool:
    """Whether it mixes, and its default has a cross-entropy to the labels (DGKD's released one does not)."""
    method = methods.method_class(name)
    return method.mixes and getattr(method.Spec(), "ce_weight", 1.0) > 0


READING = [name for name in methods.SHIPPED if _reads_labels(name)]


@pytest.mark.parametrize("name", READING)
def test_methods_read_the_shares_of_mixed_images(name: str) -> None:
    """Certain shares are labels; others, of the same largest class, change the cross-entropies; gradients flow."""
    needs = methods.method_class(name).needs_teacher
    spec, step, _ = make(name, "wrn40_2" if needs else None, "wrn16_2")
    plain = batch(spec)
    certain = torch.nn.functional.one_hot(plain.labels, 10).float()
    before = {key: value.clone() for key, value in step.state_dict().items()}

    def output(soft: torch.Tensor | None) -> StepOutput:
        torch.manual_seed(0)
        step.load_state_dict(before)
        return step(replace(plain, soft=soft), PROGRESS)

    label, sure, mixed = output(None), output(certain), output(0.7 * certain + 0.3 * certain.roll(1, 1))
    assert all(torch.allclose(value, sure.terms[key], rtol=1e-5) for key, value in label.terms.items())
    moved = {key for key, value in label.terms.items() if not torch.allclose(value, mixed.terms[key], rtol=1e-5)}
    assert moved
    assert all("ce" in key for key in moved), moved
    mixed.total.backward()
    assert all(p.grad is not None for p in step.parameters() if p.requires_grad)


def test_a_probe_reads_the_shares_of_mixed_images() -> None:
    """Its loss is the cross-entropy to the shares: between those to the labels that are mixed."""

    class Fixed(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

    step = ProbeStep(Fixed(), 0.0)  # type: ignore[arg-type]
    logits = torch.randn(2, 3, 1, 1)
    one, two = torch.tensor([0, 1]), torch.tensor([1, 2])
    soft = 0.7 * torch.eye(3)[one] + 0.3 * torch.eye(3)[two]
    losses = [step(Batch(logits, y, y, 1.0), PROGRESS).total for y in (one, two)]
    mixed = step(Batch(logits, one, one, 1.0, soft=soft), PROGRESS).total
    assert torch.allclose(mixed, 0.7 * losses[0] + 0.3 * losses[1])
