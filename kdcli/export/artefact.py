"""An exported file: what it says about itself, and what it answers."""

from __future__ import annotations

import contextlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from kdcli import durable
from kdcli.errors import IncompatibleError, InputError, UsageError
from kdcli.preprocessing import Preprocessing

Side = Annotated[int, Field(ge=1, le=4096)]
SUFFIXES = {".onnx": "onnx", ".pt2": "torch"}
KEY = "kd"
"""Where an exported file keeps what it says about itself: a property of an ONNX model, a file in a .pt2 archive."""


class Facts(BaseModel):
    """What an exported file says about itself, as JSON.

    Attributes:
        resize: what the shorter side of an image is brought to, in pixels; then the centre of `image_size` is cut out.
        inputs: `float` is 0..1, `uint8` 0..255; both RGB, [B,3,S,S]. The normalisation is inside.
        outputs: [B,K]
        inference: how the classes are read off a joint head.
        normalization: mean and std that are inside, for the record.
        source: digest of the weights that were exported.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    classes: Annotated[list[str], Field(min_length=1)]
    image_size: Side
    resize: Side
    inputs: Literal["float", "uint8"]
    outputs: Literal["logits", "probabilities"]
    inference: Literal["single", "marginal", "aggregate"]
    arch: str
    dataset: str | None
    normalization: dict[str, list[float]]
    preprocessing: dict[str, Any]
    source: str

    @property
    def pixels(self) -> Preprocessing:
        """How an image file becomes the pixels that are wanted."""
        return Preprocessing(self.image_size, max(self.image_size, self.resize))


@dataclass(frozen=True)
class Artefact:
    """An exported file, opened.

    Attributes:
        run: uint8 [B,3,S,S] → what it answers, float [B,K], whatever type of input it was exported for.
    """

    facts: Facts
    run: Callable[[Tensor], Tensor]


def read_facts(text: str | bytes | None, name: str) -> Facts:
    """What a file says about itself. Raises InputError."""
    if not text:
        raise InputError(f"{name} was not made by kd export", hint="it lacks class names and preprocessing")
    try:
        return Facts.model_validate_json(text)
    except ValidationError as problem:
        first = problem.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{name} was not made by kd export: its {key}: {first['msg']}") from None


def open_artefact(path: Path, *, trust: bool) -> Artefact:
    """An `.onnx` or `.pt2` file of `kd export`, ready to run on the CPU.

    Args:
        trust: open a `.pt2` file, which torch reads with pickles and expressions of its own, so that it can hold code.

    Raises:
        UsageError: it is a .pt2 file and `trust` is false, or the runtime is not installed.
        InputError: missing, damaged, or not made by `kd export`.
    """
    kind = SUFFIXES[path.suffix.lower()]
    if kind == "torch" and not trust:
        raise UsageError(
            f"{path} may hold code: torch opens .pt2 files without restriction",
            hint="--trust if it is your own; or export to onnx or safetensors",
        )
    with open(durable.open_regular(path), "rb") as file:
        try:
            content = file.read()
        except OSError as problem:
            raise InputError(f"cannot read {path}: {problem.strerror}", hint="check the disk") from None
    return opened(kind, content, os.fspath(path))


def opened(kind: str, content: bytes, name: str) -> Artefact:
    """An exported file's content, ready to run. Raises as `open_artefact`."""
    return _onnx(content, name) if kind == "onnx" else _program(content, name)


def require_onnx() -> Any:
    """ONNX Runtime, with what exporting to ONNX needs. Raises UsageError with the install hint."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as problem:
        raise UsageError(
            f"ONNX needs a package that is not installed: {problem.name}", hint="pip install 'kdcli[onnx]'"
        ) from None
    return onnxruntime


def _onnx(content: bytes, name: str) -> Artefact:
    runtime = require_onnx()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what it refuses comes back as an exception
    try:
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as problem:  # its own classes, for damage and for operators it does not know
        raise InputError(f"{name} cannot be opened by ONNX Runtime: {_first_line(problem)}") from None
    facts = read_facts(session.get_modelmeta().custom_metadata_map.get(KEY), name)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1:
        raise InputError(f"{name} was not made by kd export: it has {len(inputs)} inputs and {len(outputs)} outputs")

    def run(images: Tensor) -> Tensor:
        with _running(name):
            return torch.from_numpy(session.run(None, {inputs[0].name: _as_input(images, facts).numpy()})[0])

    return Artefact(facts, run)


def _program(content: bytes, name: str) -> Artefact:
    extra: dict[str, Any] = {f"{KEY}.json": ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.export.load(io.BytesIO(content), extra_files=extra).module()
    except Exception as problem:  # a damaged archive raises almost anything
        raise InputError(f"{name} cannot be opened by torch.export: {_first_line(problem)}") from None
    facts = read_facts(extra[f"{KEY}.json"], name)

    def run(images: Tensor) -> Tensor:
        with _running(name), torch.no_grad():
            return module(_as_input(images, facts))

    return Artefact(facts, run)


def _as_input(images: Tensor, facts: Facts) -> Tensor:
    images = images.contiguous()
    return images if facts.inputs == "uint8" else images.float() / 255


@contextlib.contextmanager
def _running(name: str) -> Iterator[None]:
    """A graph that was changed since, or that does not do what its facts say."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as problem:
        raise IncompatibleError(f"{name} cannot be run: {_first_line(problem)}") from None


def _first_line(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0][:200]


def facts_text(facts: Facts) -> str:
    """`facts` as JSON, in ASCII: class names in any script pass through any tool."""
    return json.dumps(facts.model_dump(mode="json"), ensure_ascii=True)
