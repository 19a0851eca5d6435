"""The incumbents' way of training the same: what RepDistiller and its descendants do, with our networks and losses.

Eager operations in fp32 and NCHW; torch's DataLoader over PIL images and torchvision's transforms; a plain optimiser, one
operation a parameter and slot; the teacher as it is; loss and accuracy read back every step.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms as T

from kdcli import methods
from kdcli.bench.parts import Parts
from kdcli.building import augmentation
from kdcli.data.dataset import DataSet
from kdcli.data.loader import Batch
from kdcli.data.randomness import mix
from kdcli.data.stream import quiet_children
from kdcli.engine import optim
from kdcli.engine.device import Device
from kdcli.engine.step import StepOutput
from kdcli.errors import UsageError
from kdcli.methods.base import Progress
from kdcli.specs import RunSpec

_AHEAD = 2  # batches that each worker of a DataLoader prepares in advance


def refuse(spec: RunSpec) -> None:
    """Refuse what the incumbents' loop does not have, so that both paths do the same work.

    Raises:
        UsageError: the spec asks for it.
    """
    data, train = spec.data, spec.train
    extras = {
        "--rand-augment": data.rand_augment is not None,
        "--color-jitter": data.color_jitter > 0,
        "--erasing": data.erasing > 0,
        "--mixup": data.mixes and data.mixup > 0,
        "--cutmix": data.mixes and data.cutmix > 0,
        "--accumulate": train.accumulate > 1,
        "--clip-grad": train.clip_grad is not None,
        "--ema": train.ema is not None,
    }
    for flag, asked in extras.items():
        if asked:
            raise UsageError("the naive loop does not have it", field=flag, hint="leave it or --against out")


class Naive:
    """A student that learns the incumbents' way; its position in the training is `Ours`'s."""

    def __init__(self, spec: RunSpec, dataset: DataSet, parts: Parts, device: Device) -> None:
        self.spec, self.recipe, self.device = spec, spec.train, device
        self.module = parts.step.to(device.torch).train()
        if parts.teacher is not None:
            parts.teacher.to(device.torch)
        self.optimizer = _plain(spec, parts)
        self.per_epoch = -(-len(dataset.train) // self.recipe.batch_size)
        self.total = self.recipe.epochs * self.per_epoch
        self.at = self.total // 2
        self.pictures = _Pictures(spec, dataset)

    def learn(self, batch: Batch) -> float:
        """Take a step on images [B,3,S,S], on the device; its loss before the update."""
        if self.at + 1 >= self.total:
            self.at = self.total // 2
        for group in self.optimizer.param_groups:
            group["lr"] = optim.rate(self.recipe, self.at, self.per_epoch)
        place = self.device.torch
        progress = Progress(
            torch.full((), float(self.at // self.per_epoch + 1), device=place),
            torch.full((), self.at / self.total, device=place),
            bool(self.at % 2),
            mix(self.spec.seed, "batch", self.at),
        )
        output: StepOutput = self.module(batch, progress)
        loss = output.total.item()
        self.correct = output.correct.item() / len(batch.labels)
        self.optimizer.zero_grad()
        output.total.backward()
        self.optimizer.step()
        self.at += 1
        return loss

    def warm_up(self) -> float:
        """Take two steps; the seconds of the second."""
        return self.round(1)

    def round(self, steps: int) -> float:
        """Seconds a step, over `steps` steps.

        The workers are new each time and prepare exactly the batches of the round, so that they are idle while something
        else is timed. What they prepared while nobody learned is thrown away, and one step is taken, before the clock
        starts: they are then as far ahead as in the midst of a training.
        """
        ahead = _AHEAD * self.spec.system.workers
        batches = self._batches(ahead + 1 + steps)
        for _ in range(ahead):
            next(batches)
        self.learn(next(batches))
        self.device.synchronize()
        began = time.perf_counter()
        for batch in batches:
            self.learn(batch)
        self.device.synchronize()
        return (time.perf_counter() - began) / steps

    def _batches(self, count: int) -> Iterator[Batch]:
        size, workers = self.recipe.batch_size, self.spec.system.workers
        sampler = RandomSampler(self.pictures, num_samples=count * size)
        loader: DataLoader[Any] = DataLoader(
            self.pictures, size, sampler=sampler, num_workers=workers, worker_init_fn=_ignore_interrupts
        )
        place = self.device.torch
        # torch's handler of SIGCHLD would take the end of our own stream's workers for an accident.
        with quiet_children():
            source = iter(loader)
        for views, labels, index in source:
            first, *extra = (view.to(place) for view in views)
            yield Batch(first, labels.to(place), index.to(place), 1.0, tuple(extra))


def _plain(spec: RunSpec, parts: Parts) -> torch.optim.Optimizer:
    """The recipe's optimiser, neither fused nor with operations over lists of tensors."""
    groups = optim.optimizer(spec.train, parts.step, False, parts.step.undecayed()).param_groups
    plain = [{**group, "fused": False, "foreach": False} for group in groups]
    kind = torch.optim.AdamW if spec.train.optimizer == "adamw" else torch.optim.SGD
    return kind(plain, lr=spec.train.lr or 0.0)


class _Pictures(Dataset[Any]):
    """`(views, label, position)` of each training image; views are augmented float [3,S,S], first the student's."""

    def __init__(self, spec: RunSpec, dataset: DataSet) -> None:
        split, size = dataset.train, dataset.image_size
        self.paths, self.labels = split.paths, split.labels.tolist()
        self.pixels = None if split.images is None else split.images.permute(0, 2, 3, 1).contiguous().numpy()
        native = None if split.images is None else split.images.shape[-1]
        method, values = methods.settings(spec)
        kinds = ("plain", *method.augmentations(values))
        augment = augmentation(spec, dataset)
        self.chains = [_chain(augment, size, native, dataset, strong=kind == "strong") for kind in kinds]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[list[torch.Tensor], int, int]:
        if self.pixels is not None:
            image = Image.fromarray(self.pixels[position])
        else:
            assert self.paths is not None
            image = Image.open(self.paths[position]).convert("RGB")
        return [chain(image) for chain in self.chains], self.labels[position], position


def _chain(augment: str, size: int, native: int | None, dataset: DataSet, *, strong: bool) -> Callable[[Any], Any]:
    """PIL image → normalised float [3,size,size]."""
    square: list[Any] = [] if native == size else [T.Resize(size), T.CenterCrop(size)]
    first: dict[str, list[Any]] = {
        "crop": [*square, T.RandomCrop(size, size // 8)],
        "flip": square,
        "none": square,
        "resized-crop": [T.RandomResizedCrop(size)],
        "rotation": [*square, T.RandomRotation(20)],
    }
    flip = [] if augment == "none" else [T.RandomHorizontalFlip()]
    more = [T.RandAugment()] if strong else []
    behind = [T.RandomErasing(1.0)] if strong else []
    return T.Compose([*first[augment], *flip, *more, T.ToTensor(), T.Normalize(dataset.mean, dataset.std), *behind])


def _ignore_interrupts(_: int) -> None:
    """Ctrl-C is for the main process; workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
