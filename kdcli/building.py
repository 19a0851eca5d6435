"""From a resolved spec to the parts of a run: data, networks, the method's own modules, loaders."""

from __future__ import annotations

from typing import Any

import torch

from kdcli import data, methods
from kdcli.data.dataset import DataSet, Split
from kdcli.data.loader import Loader
from kdcli.data.mixing import Mixing
from kdcli.data.randomness import generator, mix
from kdcli.engine import distributed
from kdcli.engine.device import Device
from kdcli.methods.base import Method, Setting
from kdcli.models import build
from kdcli.models.folding import folded
from kdcli.models.heads import Headed
from kdcli.models.network import Network, stage_shapes
from kdcli.models.panel import Panel
from kdcli.output import Story
from kdcli.specs import RunSpec, TrainSpec

_EVAL_BATCH = 250


def load_data(spec: RunSpec, story: Story | None = None) -> DataSet:
    """The spec's data set: the training share, then the validation split taken from it."""
    wanted = spec.data
    dataset = data.load(
        wanted.dataset,
        wanted.data_dir,
        image_size=wanted.image_size,
        download=wanted.download,
        resident_mib=wanted.resident_mib,
    )
    for note in dataset.notes:
        if story is not None:
            story.note_once(note)
    dataset = dataset.with_fraction(wanted.train_fraction, wanted.split_seed)
    dataset = dataset.with_validation(wanted.val_fraction, wanted.split_seed)
    return dataset.with_fraction(wanted.ratio, wanted.split_seed)


def make_network(spec: RunSpec, role: str, method: type[Method], values: Any, dataset: DataSet) -> Network:
    """A fresh student or teacher; its initial weights depend on the seed and nothing else."""
    classes = len(dataset.classes)
    if role == "teacher":
        name, taps, outputs = spec.teacher, spec.teacher_taps, method.teacher_outputs(values, classes)
    else:
        name, taps, outputs = spec.student, spec.student_taps, method.student_outputs(values, classes)
    assert name is not None
    torch.manual_seed(mix(spec.seed, "weights"))
    return build(
        name,
        outputs,
        dataset.image_size,
        pretrained=spec.pretrained or (role == "teacher" and spec.teacher_pretrained),
        taps=taps,
        fixed_stride=method.fixed_stride or values.teacher_scale > 1,
    )


def make_teacher(
    spec: RunSpec, method: type[Method], values: Any, dataset: DataSet, backbone: Network | None = None
) -> Network | Headed:
    """A fresh teacher with the heads that the method asks for.

    Args:
        backbone: a trained network that is to get the heads, if the method keeps it as it is; default: a fresh one.
    """
    network = backbone or make_network(spec, "teacher", method, values, dataset)
    # Not every network takes every size: find out before anything is trained.
    stage_shapes(network, dataset.image_size * method.inference(values, "teacher")["scale"])
    torch.manual_seed(mix(spec.seed, "heads"))
    heads = method.teacher_heads(values, network, len(dataset.classes))
    if heads is None:
        return network
    return Headed(network, heads, frozen=method.teacher_backbone(values) is not None)


def make_method(
    spec: RunSpec, dataset: DataSet, student: Network | None, teacher: Network | Headed | Panel | None
) -> Method:
    """The method's side of the training, its own modules initialised from the seed."""
    method, values = methods.settings(spec)
    setting = Setting(
        len(dataset.classes),
        dataset.image_size,
        spec.train.label_smoothing,
        scale=values.teacher_scale,
        labels=dataset.train.labels,
    )
    torch.manual_seed(mix(spec.seed, "method"))
    return method(values, setting, student, teacher)  # type: ignore[call-arg]


def in_steps(
    objective: Method, teacher: Network | Headed | Panel | None, *, fold: bool = True
) -> Network | Headed | Panel | None:
    """A frozen teacher as a student's steps take it: None where no loss reads it, else with its BatchNorm folded.

    Args:
        fold: fold the BatchNorm where the method allows it.
    """
    if teacher is None or not objective.reads_teacher():
        return None
    return folded(teacher) if fold and not objective.needs_batchnorm() else teacher


def augmentation(spec: RunSpec, dataset: DataSet) -> str:
    """The geometric augmentation by name; `auto`: random crops for small images, random resized crops for large ones."""
    if spec.data.augment != "auto":
        return spec.data.augment
    return "crop" if dataset.image_size <= 96 else "resized-crop"


def make_loader(spec: RunSpec, dataset: DataSet, split: Split, device: Device, *, train: bool) -> Loader:
    """The loader of a split; this rank's share of it. For training with the extra views that the method asks for."""
    method, values = methods.settings(spec)
    wanted = spec.data
    mixing = Mixing(wanted.mixup, wanted.cutmix, wanted.mix_prob, wanted.mix_switch) if wanted.mixes else None
    return Loader(
        split,
        mean=dataset.mean,
        std=dataset.std,
        image_size=dataset.image_size,
        batch_size=spec.train.batch_size if train else evaluation_batch(dataset.image_size, device),
        seed=spec.seed,
        augment=augmentation(spec, dataset) if train else "none",
        device=device.torch,
        train=train,
        workers=spec.system.workers,
        timeout=spec.system.data_timeout,
        rank=distributed.rank(),
        world=distributed.world(),
        extra=method.augmentations(values) if train else (),
        rand_augment=wanted.rand_augment,
        color_jitter=wanted.color_jitter,
        erasing=wanted.erasing,
        mixing=mixing,
        classes=len(dataset.classes),
    )


def evaluation_batch(image_size: int, device: Device) -> int:
    """Images at a time in evaluations: 250, on a GPU more of the small ones, since few would not fill it."""
    return max(_EVAL_BATCH, min(2000, 2**21 // image_size**2)) if device.cuda else _EVAL_BATCH


def recipe_of(spec: RunSpec) -> TrainSpec:
    """How the spec's network is trained: its recipe, or what the method makes of it for the heads of its teacher."""
    if spec.command != "pretrain-teacher":
        return spec.train
    method, values = methods.settings(spec)
    return method.teacher_recipe(values, spec.train)


def evaluated_part(spec: RunSpec, split: Split) -> Split:
    """The images a run is evaluated on: all of them, or under `--max-steps` no more than it trains on (at least 250).

    A smoke run would otherwise spend its time on evaluation; the metrics say how many images they were measured on.
    """
    if spec.train.max_steps is None:
        return split
    limit = max(_EVAL_BATCH, spec.train.max_steps * spec.train.batch_size)
    if limit >= len(split):
        return split
    chosen = torch.randperm(len(split), generator=generator(spec.data.split_seed, "evaluated"))[:limit]
    return split.subset(chosen.sort().values)


def evaluation_loaders(spec: RunSpec, dataset: DataSet, device: Device) -> dict[str, Loader]:
    splits = {"val": dataset.val, "test": dataset.test}
    return {
        name: make_loader(spec, dataset, evaluated_part(spec, split), device, train=False)
        for name, split in splits.items()
        if split is not None
    }
