"""Losses and gradients of public reference implementations, and how a method is held against them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kdcli.data.loader import Batch
from kdcli.methods.base import Progress, Setting
from kdcli.models.features import Features

FOLDER = Path(__file__).resolve().parent.parent / "golden"
CASES: dict[str, dict[str, Any]] = {
    case["id"]: case for case in json.loads((FOLDER / "losses.json").read_text("utf-8"))["cases"]
}
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
"""The two precisions of the golden README with their tolerances; it uses relative ones, see `near`."""
PROGRESS = Progress(torch.tensor(1000.0), torch.tensor(0.5), odd_step=False)
"""Late enough that every warm-up is over."""


def near(found: Tensor, expected: Tensor | float, tolerance: float) -> bool:
    """max|found - expected| <= tolerance * max|expected|: the measure of the golden numbers."""
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return bool((found.detach().double() - wanted).abs().max() <= tolerance * wanted.abs().max())


@cache
def _file(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / name)


class Case:
    """One golden case: `case.input("student", dtype)` and its like give tensors, `case.loss` the expected loss."""

    def __init__(self, name: str) -> None:
        self.name, self.facts = name, CASES[name]
        self.tensors = _file(self.facts["file"])
        self.loss: float | None = self.facts.get("loss")
        self.components: dict[str, float] = self.facts.get("components", {})
        self.hyper: dict[str, Any] = self.facts["hyperparameters"]

    def _get(self, role: str, name: str, dtype: torch.dtype | None) -> Tensor:
        tensor = self.tensors[f"{self.name}/{role}/{name}"]
        return tensor.to(dtype, copy=True) if dtype is not None and tensor.is_floating_point() else tensor.clone()

    def input(self, name: str, dtype: torch.dtype | None = None, *, learns: bool = False) -> Tensor:
        """An input; `learns`: with gradient."""
        return self._get("in", name, dtype).requires_grad_(learns)

    def weight(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A parameter of a side module, to be copied into the method's own."""
        return self._get("weight", name, dtype)

    def output(self, name: str) -> Tensor:
        """An intermediate or final value."""
        return self._get("out", name, None)

    def gradient(self, name: str) -> Tensor:
        """d loss / d (input or weight `name`)."""
        return self._get("grad", name, None)


def features(logits: Tensor, pooled: Tensor | None = None, maps: tuple[Tensor, ...] = ()) -> Features:
    """What a network's pass would have given."""
    return Features(logits, torch.empty(logits.shape[0], 0) if pooled is None else pooled, maps)


def batch(labels: Tensor, index: Tensor | None = None) -> Batch:
    """A batch of blank 32x32 images with these labels."""
    n = labels.shape[0]
    return Batch(torch.zeros(n, 3, 32, 32), labels, torch.arange(n) if index is None else index, 1.0)


def setting(classes: int, **changes: Any) -> Setting:
    """A setting for 32x32 images and K classes without label smoothing."""
    return replace(Setting(classes, 32, 0.0), **changes)
