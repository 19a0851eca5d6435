"""The jobs of the fault suite: three epochs of three steps, with resume states in the middle and at the end of epochs."""

from __future__ import annotations

from pathlib import Path

METHODS = ("kd", "vsd", "crd", "slkd")

# 43 images: the last batch of each epoch is smaller. States are written at steps 0, 2, 4, 6 and 8.
JOB = [
    *("--dataset", "digits", "--image-size", "8", "--train-fraction", "0.03", "--batch-size", "15", "--epochs", "3"),
    *("--device", "cpu", "--threads", "1"),
]
STEPS, PER_EPOCH, EVERY = 9, 3, 2


def distil(method: str, place: Path) -> list[str]:
    """The distillation of a method, without its `--out`."""
    teacher = place / "teachers" / method
    words = ["distill", "--method", method, "--teacher", str(teacher), "--student", "resnet8", *JOB]
    return [*words, "--checkpoint-every", str(EVERY)]
