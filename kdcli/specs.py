"""Run specs: every setting of a run, declared once, validated before torch is imported.

A field's docstring is its help text, its place gives its dotted name (`train.epochs`) and its flag (`--epochs`). A field
made with `_aside` does not change what is computed, only where or how it is carried out, so it is left out of the spec
digest: a run may be continued on another machine or with another checkpoint interval.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from kdcli.data.names import canonical as canonical_dataset
from kdcli.data.names import default_size, preparation
from kdcli.errors import UsageError, nearest
from kdcli.models.names import canonical as canonical_model

Command = Literal["pretrain-teacher", "distill", "linear-probe"]
Augment = Literal["auto", "crop", "flip", "none", "resized-crop", "rotation"]


# Magnitude, number of operations, probability of each, spread and bound of the magnitude, rising magnitudes, their set.
_POLICY = re.compile(
    r"rand(-(m\d{1,2}|n[1-9]|p(0(\.\d+)?|1(\.0+)?)|mstd\d+(\.\d+)?|mmax[1-9]\d?|inc[01]|t(weights|3a|3aw)))*"
)


def _keys(policy: str) -> list[str]:
    """The parts that a policy sets, without their values."""
    return [re.match(r"t|[a-z]+", part)[0] for part in policy.split("-")[1:]]  # type: ignore[index]


def _aside(default: Any, **constraints: Any) -> Any:
    """A field that is no part of a run's identity (left out of the spec digest)."""
    return Field(default, json_schema_extra={"identity": False}, **constraints)


class Section(BaseModel):
    """Base of every part of a spec: unknown keys are refused, values do not change, docstrings are help texts."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _can_be_a_path(cls, value: Any) -> Any:
        """No name, path or pattern has a NUL or half a character in it: the system's calls would choke on either."""
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, str) and "\0" in one:
                raise ValueError("a NUL character is in it")
            try:
                os.fsencode(one if isinstance(one, str) else "")
            except UnicodeEncodeError:
                raise ValueError("it is not text") from None
        return value


class DataSpec(Section):
    """Which images, which part of them, and how they are augmented."""

    dataset: str = "cifar100"
    """Data set: cifar100, cifar10, stl10, tinyimagenet, imagenet, digits, synthetic or folder:PATH."""
    data_dir: str | None = _aside(None)
    """Where the data sets lie; default $KD_DATA_DIR, else ./data."""
    download: bool = _aside(False)
    """Fetch the data set if it is not there (needs a network)."""
    image_size: int | None = Field(default=None, ge=4, le=1024)
    """Side of the images in pixels; default: the data set's own."""
    augment: Augment = "auto"
    """Training augmentation: crop (zero-pad, random crop, flip), flip, resized-crop, rotation (20 degrees, flip), none;
    auto is crop up to 96 pixels and resized-crop above."""
    rand_augment: str | None = None
    """RandAugment behind it, as timm's policy string, for example rand-m9-mstd0.5-inc1."""
    color_jitter: float = Field(default=0.0, ge=0)
    """Random brightness, contrast and saturation, each by a factor within 1 ± this; as in timm not where RandAugment
    changes the colours already (unless its set of operations is 3a)."""
    erasing: float = Field(default=0.0, ge=0, le=1)
    """Probability of erasing a rectangle of an image, filled with noise after normalisation (timm's mode pixel)."""
    mixup: float = Field(default=0.0, ge=0)
    """Blend pairs of images of a batch and their labels, the share drawn from Beta(a, a) with this a; 0 is off."""
    cutmix: float = Field(default=0.0, ge=0)
    """Paste a box of one image of a pair into the other, its area drawn from Beta(a, a) with this a; 0 is off."""
    mix_prob: float = Field(default=1.0, ge=0, le=1)
    """Probability that a batch is mixed, where mixup or cutmix is on."""
    mix_switch: float = Field(default=0.5, ge=0, le=1)
    """Probability of cutmix where mixup and cutmix are both on."""
    train_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the training images used, stratified by class; the teacher sees the same share."""
    ratio: float = Field(default=1.0, gt=0, le=1)
    """Few-shot ratio: share of the training images the student sees; the teacher still sees all of them."""
    val_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training images held out for validation, seeded and stratified."""
    split_seed: int = Field(default=0, ge=0)
    """Seed of the stratified splits; the same for every method and seed, so that all see the same images."""
    resident_mib: int = _aside(2048, ge=0)
    """Data sets up to this size (MiB, decoded) are held on the device and augmented there; larger ones stream. Where that
    changes the images (folder: up to 96 pixels, tinyimagenet, other sizes than a set's own), it is another run."""

    @field_validator("dataset")
    @classmethod
    def _known_dataset(cls, value: str) -> str:
        return canonical_dataset(value)

    @field_validator("rand_augment")
    @classmethod
    def _known_policy(cls, value: str | None) -> str | None:
        if value is None or (_POLICY.fullmatch(value) and len(_keys(value)) == len(set(_keys(value)))):
            return value
        raise ValueError(f"{value!r} is no RandAugment policy of timm, for example rand-m9-mstd0.5-inc1")

    @property
    def identifying(self) -> dict[str, Any]:
        """`resident_mib`, where it brings the images to their size in another way than its default would."""
        size = default_size(self.dataset) if self.image_size is None else self.image_size
        usual = type(self).model_fields["resident_mib"].default
        ways = [preparation(self.dataset, size, mib) for mib in (self.resident_mib, usual)]
        return {} if ways[0] == ways[1] else {"resident_mib": self.resident_mib}

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed, so that targets are shares of the classes."""
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)


class TrainSpec(Section):
    """The recipe: optimiser, schedule, regularisation and length."""

    epochs: int = Field(default=240, ge=1)
    """Passes over the training images."""
    max_steps: int | None = Field(default=None, ge=1)
    """Finish after this many optimiser steps (smoke runs); the schedule stays that of the full run."""
    batch_size: int = Field(default=64, ge=1)
    """Images per optimiser step, over all ranks; methods with several views multiply it by their number."""
    accumulate: int = Field(default=1, ge=1)
    """Split each batch into this many parts and add up their gradients."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimiser: sgd (momentum) or adamw."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; default: base_lr, or light_lr for the MobileNet and ShuffleNet students."""
    teacher_lr: float | None = Field(default=None, gt=0)
    """Learning rate of a teacher trained on the way; default: lr if that is given, else as for a student."""
    base_lr: float = Field(default=0.05, gt=0)
    """The recipe's learning rate."""
    light_lr: float = Field(default=0.01, gt=0)
    """The recipe's learning rate for light networks (MobileNetV2, ShuffleNetV1, ShuffleNetV2)."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD momentum."""
    nesterov: bool | None = None
    """Nesterov momentum; default: for vsd, and for hsakd but on ImageNet, whose authors add it to the common recipe."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """Weight decay, on the parameters that `decay` names."""
    decay: Literal["all", "weights"] = "all"
    """What weight decay is on: all parameters, or only weights (as timm does): no biases, norms, tokens or positions."""
    schedule: Literal["step", "cosine", "onecycle", "constant"] = "step"
    """Learning-rate schedule: step (by epoch), cosine or onecycle (by step), constant."""
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    """When the step schedule decays: values below 1 are shares of all epochs, others are epochs."""
    gamma: float = Field(default=0.1, gt=0, le=1)
    """Factor of each decay of the step schedule."""
    min_lr: float = Field(default=0.0, ge=0)
    """Where the cosine and onecycle schedules end."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Linear warm-up to the learning rate, in epochs (for onecycle: the length of the rise)."""
    warmup_lr: float = Field(default=0.0, ge=0)
    """Where the warm-up starts."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing of the cross-entropy to the labels."""
    clip_grad: float | None = Field(default=None, gt=0)
    """Clip the gradient's L2 norm to this value."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights; it is what is evaluated and exported."""
    eval_every: int = Field(default=1, ge=1)
    """Epochs between evaluations; the last epoch is always evaluated."""

    @field_validator("milestones")
    @classmethod
    def _rising(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(m <= 0 for m in value) or list(value) != sorted(value):
            raise ValueError("milestones must be positive and rising")
        return value


class SystemSpec(Section):
    """Where and how the run is carried out."""

    device: str = _aside("auto")
    """auto, cpu, cuda or cuda:N; auto takes a GPU if there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the networks; losses are always computed in fp32."""
    compile: bool = False
    """Compile the training step with torch.compile: a minute or two at the start, faster steps after."""
    cuda_graphs: bool = _aside(True)
    """On a GPU, record the training step once and replay it: small networks wait for the host otherwise."""
    threads: int | None = _aside(None, ge=1, le=1024)
    """CPU threads; recorded, because the last bits depend on them; default: all cores."""
    workers: int = _aside(2, ge=0, le=256)
    """Data worker processes for data sets that stream; results do not depend on it."""
    data_timeout: float = _aside(120.0, gt=0)
    """Seconds to wait for a data worker before the run ends with exit code 8."""
    nproc: int = _aside(1, ge=1, le=1024)
    """Processes to train with on this machine, one rank each (torch's elastic launcher)."""
    rank_timeout: float = _aside(600.0, gt=0)
    """Seconds to wait for another rank before the run ends with exit code 8."""
    out: str | None = _aside(None)
    """The run directory; default: a name made from the spec under runs_dir."""
    runs_dir: str = _aside("runs")
    """Where run directories are made and teachers are looked for."""
    overwrite: bool = _aside(False)
    """Start anew in a run directory that holds a run already."""
    checkpoint_every: int | None = _aside(None, ge=1)
    """Steps between checkpoints; default: one every 30 seconds."""
    max_minutes: float | None = _aside(None, gt=0)
    """Save and stop after this many minutes (exit code 75); the same command goes on."""
    requeue: bool = _aside(False)
    """On SIGTERM leave with exit code 75 (run the same command again) instead of 143."""
    tensorboard: bool = _aside(False)
    """Also write what metrics.jsonl holds to RUN/tensorboard (needs kdcli[tensorboard])."""
    wandb: str | None = _aside(None)
    """Also log to this project of Weights & Biases, offline unless you are logged in (needs kdcli[wandb])."""

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", value):
            return value
        raise UsageError(f"{value!r} is no device", field="--device", hint="auto, cpu, cuda or cuda:N")

    @model_validator(mode="after")
    def _a_gpu_each(self) -> Self:
        if self.nproc > 1 and self.device.startswith("cuda:"):
            raise UsageError(
                f"{self.device} is one GPU, and there are {self.nproc} ranks", field="--device", hint="use cuda"
            )
        return self


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
    method: dict[str, Any] = {"name": "none"}
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
    baseline: bool = _aside(False)
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


def strip_asides(section: BaseModel) -> dict[str, Any]:
    """The section as plain JSON values, without its fields marked as no part of the identity."""
    kept: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("identity") is False:
            continue
        value = getattr(section, name)
        kept[name] = strip_asides(value) if isinstance(value, BaseModel) else json.loads(json.dumps(value))
    return kept


def field_paths(model: type[BaseModel] = RunSpec, prefix: str = "") -> dict[str, str]:
    """Leaf name → dotted path of every setting that has a flag (`epochs` → `train.epochs`)."""
    paths: dict[str, str] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            paths |= field_paths(field.annotation, f"{prefix}{name}.")
        elif f"{prefix}{name}" != "command":
            paths[name] = f"{prefix}{name}"
    return paths


def bare(annotation: Any) -> Any:
    """An annotation without its `| None`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation


def field_at(path: str) -> FieldInfo:
    """The pydantic field at a dotted path of the run spec."""
    model: Any = RunSpec
    *sections, leaf = path.split(".")
    for section in sections:
        model = model.model_fields[section].annotation
    return model.model_fields[leaf]


def validate(model: type[BaseModel], values: dict[str, Any], prefix: str = "") -> Any:
    """Build `model` from `values`, turning pydantic's first complaint into one `UsageError` that names field and fix."""
    try:
        return model.model_validate(values)
    except ValidationError as problem:
        raise explain(model, problem, prefix) from None


def explain(model: type[BaseModel], problem: ValidationError, prefix: str = "") -> UsageError:
    """The first error of a `ValidationError` as a `UsageError`: dotted field, what is wrong, the nearest known name."""
    first = problem.errors()[0]
    location = [str(part) for part in first["loc"]]
    path = ".".join([prefix, *location] if prefix else location)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UsageError):
        return cause
    if first["type"] == "extra_forbidden":
        holder = model
        for part in location[:-1]:
            annotation = holder.model_fields[part].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                holder = annotation
        known = set(holder.model_fields)
        hint = nearest(location[-1], known)
        elsewhere = field_paths().get(location[-1])
        if elsewhere and elsewhere != path and not prefix:
            hint = f"it is {elsewhere}"
        return UsageError("no such setting", field=path, hint=hint)
    message = re.sub(r"^Value error, ", "", first["msg"])
    flagged = re.match(r"--([a-z-]+): (.*)", message)
    if flagged and not location:
        return UsageError(flagged[2], field=f"--{flagged[1]}")
    text = message[0].lower() + message[1:]
    if first["type"] not in ("missing", "value_error"):
        text += f", got {json.dumps(first['input'], default=str)[:80]}"
    return UsageError(text, field=path or None)
