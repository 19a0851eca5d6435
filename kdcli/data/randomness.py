"""Randomness without hidden state: every draw is a pure function of (seed, epoch, sample, purpose).

A run that is resumed, sharded over ranks or fed by another number of workers therefore draws the same numbers.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def mix(*parts: int | str) -> int:
    """A 63-bit integer from any integers and strings, the same on every machine and in every process.

    Each part is hashed with its type and length, so that `mix(1, 23)`, `mix(12, 3)` and `mix("1", 23)` differ. BLAKE2b
    (RFC 7693) rather than arithmetic, because seeds and epochs are small neighbouring numbers.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        kind, text = ("s", part) if isinstance(part, str) else ("i", str(int(part)))
        data = text.encode("utf-8", "surrogateescape")
        digest.update(f"{kind}{len(data)}:".encode() + data)
    return int.from_bytes(digest.digest(), "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `mix(*parts)`.

    Always on the CPU: a device's own generator would make the data depend on the device.
    """
    import torch

    return torch.Generator().manual_seed(mix(*parts))
