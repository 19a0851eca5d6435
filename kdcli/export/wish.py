"""What `kd export` is asked for, and whether there is such a thing. Nothing is read here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kdcli.errors import UsageError, nearest
from kdcli.transforms import INFERENCE

FORMATS = {"safetensors": ".safetensors", "onnx": ".onnx", "torch": ".pt2"}
"""Suffixes by format."""

_CHOICES = {"inputs": ("float", "uint8"), "outputs": ("logits", "probabilities"), "inference": INFERENCE}
_NO_GRAPH = {
    "inputs": "kdcli.load takes both by itself",
    "outputs": "kdcli.load gives logits; take their softmax",
    "inference": "the checkpoint itself has every inference",
}


@dataclass(frozen=True)
class Wish:
    """What is to be exported, and how.

    Attributes:
        format: a key of `FORMATS`; None: by the suffix of `out`.
        limit: how many images the two are compared on.
        random: compare on random images even if the test images are there.
        teacher: a checkpoint or run to print beside it; None: the one that the run names, if it is still there.
    """

    checkpoint: str
    out: Path
    format: str | None = None
    inputs: str = "float"
    outputs: str = "logits"
    inference: str = "single"
    data_dir: str | None = None
    limit: int = 256
    random: bool = False
    teacher: str | None = None
    opset: int | None = None
    threads: int | None = None


def checked(wish: Wish) -> str:
    """The format that is wished for, a key of `FORMATS`.

    Raises:
        UsageError: there is no such format, input, output, inference or opset, or not in this format.
    """
    kind = _format(wish)
    for name, known in _CHOICES.items():
        value = getattr(wish, name)
        if value not in known:
            raise UsageError(f"{value!r} is none of {', '.join(known)}", field=f"--{name}", hint=nearest(value, known))
        if kind == "safetensors" and value != known[0]:
            raise UsageError(
                f"a safetensors file holds weights, and no {value}", field=f"--{name}", hint=_NO_GRAPH[name]
            )
    if wish.opset is not None and (kind != "onnx" or not 18 <= wish.opset <= 64):
        hint = "onnx alone has opsets, here 18 and up"
        raise UsageError(f"no opset {wish.opset} for {kind}", field="--opset", hint=hint)
    return kind


def _format(wish: Wish) -> str:
    suffix = wish.out.suffix.lower()
    if wish.format is None:
        found = [kind for kind, known in FORMATS.items() if known == suffix]
        if not found:
            hint = f"name it *{', *'.join(FORMATS.values())}"
            raise UsageError(f"{wish.out.name} does not say which format", field="--out", hint=hint)
        return found[0]
    if wish.format not in FORMATS:
        raise UsageError(f"no format {wish.format!r}", field="--format", hint=nearest(wish.format, FORMATS))
    if suffix != FORMATS[wish.format]:
        hint = f"name it {wish.out.stem}{FORMATS[wish.format]}"
        raise UsageError(f"a {wish.format} file ends in {FORMATS[wish.format]}", field="--out", hint=hint)
    return wish.format
