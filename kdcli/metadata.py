"""What the metadata of a checkpoint, and the summary of a run, must look like before anything is made of them. Torch-free.

The digest and the seal of a file protect from damage, not from forgery: a file may say anything about itself. So it is read
like any other input, key by key.
"""

from __future__ import annotations

import json
import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdcli.errors import InputError

Finite = Annotated[float, Field(allow_inf_nan=False)]
Triple = Annotated[list[Finite], Field(min_length=3, max_length=3)]
Size = Annotated[int, Field(ge=1, le=4096)]
Count = Annotated[int, Field(ge=1, le=2**31)]


class _Part(BaseModel):
    """Unknown keys may come from a later kd and are left alone; known ones have the type they are written with."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _Arch(_Part):
    name: str
    outputs: Count
    image_size: Size
    taps: list[str] | None = None
    fixed_stride: bool = False


class _Normalization(_Part):
    mean: Triple
    std: Annotated[list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=3, max_length=3)]


class _Inference(_Part):
    model_config = ConfigDict(strict=True, extra="forbid")

    transform: str = "none"
    scale: Literal[1, 2, 4] = 1
    scale_mode: Literal["bilinear", "nearest", "bicubic"] = "bilinear"


class _AuxiliaryHeads(_Part):
    outputs: Count
    count: Count


class _ProjectionHead(_Part):
    kind: Literal["projection"]


class _Measured(_Part):
    top1: Finite
    n: int


class _Metrics(_Part):
    test: _Measured | None = None


class _Network(_Part):
    """Of a student or teacher."""

    arch: _Arch
    classes: Annotated[list[str], Field(min_length=1)]
    image_size: Size
    resize: Size | None = None
    normalization: _Normalization | None
    dataset: str | None
    inference: _Inference = _Inference()
    heads: _AuxiliaryHeads | _ProjectionHead | None = None
    metrics: _Metrics = _Metrics()


class _Top1(_Part):
    top1: Finite


class _State(_Part):
    """Of a resume state."""

    facts: dict[str, Any]
    threads: int
    lines: Annotated[int, Field(ge=0)]
    best: _Top1 | None
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Test(_Measured):
    """The last two are there or not; null they are not."""

    marginal: _Top1 = _Top1(top1=0.0)
    aggregate: _Top1 = _Top1(top1=0.0)


class _Tests(_Part):
    test: _Test


class _Teacher(_Part):
    arch: str
    digest: str
    checkpoint: str


class _Answer(_Part):
    """Of a training."""

    command: str
    method: str
    role: str
    network: str
    run: str
    checkpoint: str
    seed: int
    metrics: _Tests
    teacher: _Teacher | None = None


class _Probed(_Part):
    """Of a linear probe."""

    dataset: str
    metrics: _Tests


def require_summary(values: Any, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The summary of a finished run, checked as far as kd reads it again. Raises as `require_network`."""
    if not isinstance(values, dict):
        values = {}
    _require(_Probed if values.get("command") == "linear-probe" else _Answer, values, path, "summary of a run")
    return values


def require_network(metadata: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Refuse metadata from which no network can be built and used.

    Raises:
        InputError: naming the file, the key and what is wrong with it.
    """
    _require(_Network, metadata, path)


def require_state(metadata: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Refuse metadata of a resume state that a run cannot go on from. Raises as `require_network`."""
    _require(_State, metadata, path)


def _require(
    model: type[BaseModel], metadata: dict[str, Any], path: str | os.PathLike[str], what: str = "kd checkpoint"
) -> None:
    try:
        model.model_validate(metadata)
    except ValidationError as problem:
        first = problem.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        text = first["msg"][0].lower() + first["msg"][1:]
        if first["type"] != "missing":
            text += f", not {json.dumps(first['input'], default=str)[:60]}"
        hint = "restore it from a copy, or make it again"
        raise InputError(f"{os.fspath(path)} is not a sound {what}: its {key}: {text}", hint=hint) from None
