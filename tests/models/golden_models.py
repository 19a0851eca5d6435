"""Reading the network golden numbers: deterministic weights, input and statistics as `models.json` defines them."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from kdcli.models import build
from kdcli.models.network import Network

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
FACTS = json.loads((GOLDEN / "models.json").read_text())


@functools.cache
def tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "models.safetensors")


def images(size: int = 32) -> torch.Tensor:
    """The input rule, `[2, 3, size, size]` float64 (golden at size 32)."""
    rule = FACTS["input_rule"]
    k = torch.arange(2 * 3 * size * size, dtype=torch.float64)
    return torch.sin(rule["freq"] * k + rule["chirp"] * k * k + rule["phase"]).reshape(2, 3, size, size)


def _unit(n: int, i: int) -> np.ndarray:
    """u(n, i): n numbers in [0, 1), uint32 arithmetic wraps as the rule asks."""
    shift = np.uint32((i * 40503 + FACTS["fill_rule"]["salt"]) % 2**32)
    x = np.arange(n, dtype=np.uint32) * np.uint32(2654435761) + shift
    x ^= x >> np.uint32(15)
    x *= np.uint32(2246822519)
    x ^= x >> np.uint32(13)
    x *= np.uint32(3266489917)
    x ^= x >> np.uint32(16)
    return x / 2.0**32


def filled(entry: dict, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """The state dict of one golden network, under its original keys."""
    shapes = dict(entry["state_dict"])
    state = {key: torch.tensor(0) for key in shapes if key.endswith("num_batches_tracked")}
    for i, key in enumerate(sorted(k for k in shapes if k not in state)):
        shape = shapes[key]
        n = math.prod(shape)
        u = _unit(n, i)
        if key.endswith("running_var") or (key.endswith("weight") and len(shape) == 1):
            value = 0.8 + 0.4 * u
        elif key.endswith(("running_mean", "bias")):
            value = 0.2 * (2 * u - 1)
        else:
            value = (2 * u - 1) * (math.sqrt(3) * entry["gain"] / math.sqrt(n / shape[0]))
        state[key] = torch.from_numpy(value).reshape(shape).to(dtype)
    return state


def empty(name: str, outputs: int, **options) -> Network:
    """The network without memory or initialisation: weights are assigned next."""
    with torch.device("meta"):
        return build(name, outputs, **options)


def assert_stats(x: torch.Tensor, expected: dict) -> None:
    """Mean, rms, minimum and the position-dependent checksum, to 1e-9 of the rms."""
    assert list(x.shape) == expected["shape"]
    flat = x.detach().flatten()
    k = torch.arange(flat.numel(), dtype=torch.float64)
    found = {
        "mean": flat.mean(),
        "rms": flat.square().mean().sqrt(),
        "min": flat.min(),
        "checksum": (flat * torch.cos(0.01 * k)).mean(),
    }
    for name, value in found.items():
        assert abs(value.item() - expected[name]) <= 1e-9 * max(expected["rms"], abs(expected[name])), name
