"""One run, put together from its parts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from kdcli.models.names import canonical as canonical_model
from kdcli.specs.data import DataSpec
from kdcli.specs.section import Section, aside, strip_asides
from kdcli.specs.system import SystemSpec
from kdcli.specs.train import TrainSpec

Command = Literal["pretrain-teacher", "distill", "linear-probe"]


class ProbeSpec(Section):
    """How a frozen encoder is probed."""

    normalization: Literal["source", "target", "half"] = "source"
    """Normalise the probed images with the encoder's own statistics, the new data set's, or mean and std 0.5."""
    batchnorm: Literal["eval", "train"] = "eval"
    """BatchNorm of the frozen encoder: eval (HSAKD), or train, where its running statistics adapt to the new images
    (two other public protocols)."""
    cached: bool = False
    """Fast path: compute each image's features once (and those of its mirror image) instead of augmenting anew."""


class RunSpec(Section):
    """One training run: a teacher's, a student's or a linear probe's.

    `method` holds the method's own settings and its name; they are checked against the method's Spec once the method
    is imported (`kdcli.methods.resolve`), which also fills in its defaults.
    """

    command: Command = "distill"
    """The command this spec belongs to."""
    method: dict[str, Any] = Field(default={"name": "none"})
    """The distillation method's name and settings (`--method NAME`, `--set method.KEY=VALUE`)."""
    teacher: str | None = None
    """Teacher: an architecture, a checkpoint or a run directory."""
    assistant: tuple[str, ...] = ()
    """Assistants between teacher and student, from large to small, each an architecture, a checkpoint or a run directory;
    repeatable or comma-separated (takd, dgkd). Missing ones are distilled first."""
    student: str | None = None
    """Student architecture: a name of `kd list models`, timm:NAME or torchvision:NAME."""
    teacher_taps: tuple[str, ...] | None = None
    """Modules of a timm: or torchvision: teacher to tap as stages, instead of the automatic choice."""
    student_taps: tuple[str, ...] | None = None
    """Modules of a timm: or torchvision: student to tap as stages, instead of the automatic choice."""
    encoder: str | None = None
    """The network that a linear probe freezes: a checkpoint or a run directory."""
    baseline: bool = aside(False)
    """Also train the student alone, with the same recipe and seed, and print both."""
    pretrained: bool = False
    """Start timm: and torchvision: networks from the library's weights (needs a network the first time)."""
    teacher_pretrained: bool = False
    """Start only the teacher from the library's weights; the student starts afresh."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the initial weights, the order of the images and their augmentation."""
    data: DataSpec = DataSpec()
    """The images."""
    train: TrainSpec = TrainSpec()
    """The recipe."""
    probe: ProbeSpec = ProbeSpec()
    """The linear probe."""
    system: SystemSpec = SystemSpec()
    """Where and how."""

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("method")
    @classmethod
    def _named(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("name"), str):
            raise ValueError("the method needs a name")
        return value

    @field_validator("student")
    @classmethod
    def _known_student(cls, value: str | None) -> str | None:
        return None if value is None else canonical_model(value, field="--student")

    @field_validator("assistant")
    @classmethod
    def _known_assistants(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        def known(name: str) -> str:
            path = Path(name)  # whether a path leads to a network is found out when it is read
            return name if path.exists() or path.suffix else canonical_model(name, field="--assistant")

        return tuple(known(name) for name in value)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.command == "linear-probe":
            if self.encoder is None:
                raise ValueError("encoder: name the checkpoint or run directory to probe")
        elif self.command == "pretrain-teacher":
            if self.teacher is None:
                raise ValueError("--teacher: name the teacher's architecture, for example --teacher wrn40_2")
        elif self.student is None:
            raise ValueError("--student: name the student's architecture, for example --student wrn16_2")
        if self.data.dataset != "digits" and self.data.image_size is not None and self.data.image_size < 8:
            raise ValueError("--image-size: at least 8 pixels")
        return self

    def identity(self) -> dict[str, Any]:
        """The spec without the fields that do not change what is computed (paths, threads, devices, checkpoints)."""
        kept = strip_asides(self)
        kept["data"] |= self.data.identifying
        return kept

    def digest(self) -> str:
        """SHA-256 (hex) of the identity as canonical JSON."""
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
