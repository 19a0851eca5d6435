"""Batches: which samples, in which order, augmented how, on which device.

Everything random is a pure function of (seed, epoch, sample, purpose), so that neither workers, ranks, device nor an
interruption changes a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcli.data.dataset import Split
from kdcli.data.randomness import generator
from kdcli.data.ranks import share
from kdcli.data.resident import Resident, draw
from kdcli.data.stream import Samples, Stream
from kdcli.data.transforms import transform
from kdcli.errors import UsageError, nearest

AUGMENTS = ("crop", "flip", "none", "resized-crop", "rotation")


@dataclass
class Batch:
    """One rank's part of a step; b samples.

    Attributes:
        images: float [b,3,S,S], normalised, on the device.
        labels: int64 [b], on the device.
        index: int64 [b], positions in the loader's split, on the device.
        weight: n_local * world / n_global; 0 for a sample that only keeps the rank busy. See `ranks.share`.
        extra: further augmented copies of the images, each like `images`; what `Loader` was asked for.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    weight: float
    extra: tuple[Tensor, ...] = ()


class Loader:
    """Batches of a split, epoch by epoch.

    Resident images under `crop`, `flip` or `none` stay on the device; everything else streams, sample by sample.

    Args:
        split: the samples.
        mean, std: per channel, on the 0..1 scale.
        image_size: side S of the images in a batch. Resident images of another size are resized batch by batch.
        batch_size: of the global batch, over all ranks. The last one of an epoch may be smaller and is kept.
        seed: with the epoch and the sample, all that randomness depends on.
        augment: one of `AUGMENTS`; `crop` pads the images' own size / 8 with black, 4 at 32x32. Only for training.
        device: where batches go.
        train: shuffled and augmented; otherwise natural order, each sample exactly once over the ranks.
        workers: processes that stream; they change nothing but speed.
        timeout: seconds to wait for a worker.
        rank, world: this process among its peers.
        channels_last: memory format of the images.

    Raises:
        UsageError: no samples, a batch size below 1, or an unknown augmentation.
    """

    def __init__(
        self,
        split: Split,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        image_size: int,
        batch_size: int,
        seed: int,
        augment: str,
        device: torch.device | str,
        train: bool,
        workers: int = 0,
        timeout: float = 120.0,
        rank: int = 0,
        world: int = 1,
        channels_last: bool = True,
    ) -> None:
        if len(split) == 0:
            raise UsageError("there are no samples, so an epoch would have no step", field="data")
        if batch_size < 1:
            raise UsageError(f"a batch of {batch_size} samples", field="train.batch_size", hint="use 1 or more")
        if augment not in AUGMENTS:
            raise UsageError(f"unknown augmentation {augment!r}", field="data.augment", hint=nearest(augment, AUGMENTS))
        self.split, self.image_size, self.batch_size = split, image_size, batch_size
        self.seed, self.train, self.rank, self.world = seed, train, rank, world
        self.device = torch.device(device)
        self.augment = augment if train else "none"
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.steps = -(-len(split) // batch_size)
        # (v/255 - mean) / std as one multiply-add on the byte v.
        deviation = torch.tensor(std, dtype=torch.float64)
        self.scale = (1 / (255 * deviation)).float()
        self.shift = (-torch.tensor(mean, dtype=torch.float64) / deviation).float()
        self._resident: Resident | None = None
        self._stream: Stream | None = None
        if split.images is not None and self.augment in ("crop", "flip", "none"):
            padding = split.images.shape[-1] // 8 if self.augment == "crop" else 0
            self._resident = Resident(
                split.images, padding=padding, device=self.device, scale=self.scale, shift=self.shift
            )
        else:
            function = transform(image_size, self.augment, train=train, files=split.images is None)
            samples = Samples(split, function, seed, random=self.augment != "none")
            self._stream = Stream(samples, workers=workers, timeout=timeout)
            self.scale, self.shift = (t.to(self.device).view(3, 1, 1) for t in (self.scale, self.shift))

    def __len__(self) -> int:
        return self.steps

    def order(self, epoch: int) -> Tensor:
        """int64 [N], on the CPU: the positions in the order of this epoch, the same on all ranks."""
        if not self.train:
            return torch.arange(len(self.split))
        return torch.randperm(len(self.split), generator=generator(self.seed, epoch, "order"))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on; earlier ones are not produced.

        Raises:
            UsageError: `start` is outside the epoch.
            InputError: a streamed image cannot be read.
            WorkerError: a worker died or does not answer.
        """
        if not 0 <= start <= self.steps:
            raise UsageError(f"step {start} is outside an epoch of {self.steps} steps")
        order = self.order(epoch)
        shares = [self._share(step) for step in range(start, self.steps)]
        shares = [(low, high, weight) for low, high, weight in shares if low < high]
        yield from self._from_device(epoch, order, shares) if self._resident else self._streamed(epoch, order, shares)

    def close(self) -> None:
        """End the worker processes, if there are any."""
        if self._stream is not None:
            self._stream.close()

    def _share(self, step: int) -> tuple[int, int, float]:
        low = step * self.batch_size
        high = min(low + self.batch_size, len(self.split))
        return share(low, high, self.rank, self.world, train=self.train)

    def _aligned(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """`(labels, index)` of an epoch, in its order, on the device: a batch's are then mere slices."""
        return self.split.labels[order].to(self.device), order.to(self.device)

    def _from_device(self, epoch: int, order: Tensor, shares: list[tuple[int, int, float]]) -> Iterator[Batch]:
        resident = self._resident
        assert resident is not None
        draws = None if self.augment == "none" else draw(len(self.split), resident.padding, self.seed, epoch)
        plan = resident.plan(order, draws, crop=self.augment == "crop")
        labels, index = self._aligned(order)
        for low, high, weight in shares:
            images = resident.batch(plan, low, high, self.image_size).contiguous(memory_format=self.memory_format)
            yield Batch(images, labels[low:high], index[low:high], weight)

    def _streamed(self, epoch: int, order: Tensor, shares: list[tuple[int, int, float]]) -> Iterator[Batch]:
        stream = self._stream
        assert stream is not None
        labels, index = self._aligned(order)
        positions = order.tolist()
        keys = [(epoch, positions[low:high]) for low, high, _ in shares]
        for (low, high, weight), raw in zip(shares, stream.batches(keys), strict=True):
            pixels = raw.to(self.device).contiguous(memory_format=self.memory_format)
            yield Batch(torch.addcmul(self.shift, pixels, self.scale), labels[low:high], index[low:high], weight)
