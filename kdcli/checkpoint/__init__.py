"""Checkpoints: one safetensors file that says by itself what it is, and in which no flipped bit goes unnoticed.

The file is plain safetensors and opens in any reader. All of kd's metadata is one JSON text under the single key `kd`,
because safetensors writes metadata keys in random order. Two hashes cover every byte of the file:

- `digest`: SHA-256 over the tensors, in the order of their names: a line of JSON `[name, dtype, shape]`, then bytes.
  It depends on nothing else (no dates, no paths), so equal weights have equal digests. `kd digest` prints this number.
- `seal`: SHA-256 over the header as it lies in the file (its length, padding and all, `digest` included), with the 64
  characters of the seal itself read as zeros.

Together with the checks that the tensors lie end to end and fill the file, any one-bit flip or truncation is an error.
(safetensors itself overlooks 98 % of single-bit flips.) This is protection from damage, not from forgery.

Torch-free at import; only `save`, `load` and the state functions that call them use torch, and import it when called.
"""

from __future__ import annotations

from kdcli.checkpoint.file import CHUNK, digest, load, locate, read_metadata, save, verify
from kdcli.checkpoint.layout import DTYPES, FORMAT, HEADER_LIMIT, ROLES, Damaged, Entry, Header
from kdcli.checkpoint.states import load_state, save_state

__all__ = [
    "CHUNK",
    "DTYPES",
    "FORMAT",
    "HEADER_LIMIT",
    "ROLES",
    "Damaged",
    "Entry",
    "Header",
    "digest",
    "load",
    "load_state",
    "locate",
    "read_metadata",
    "save",
    "save_state",
    "verify",
]
