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
from kdcli.data.erasing import Erasing, erase
from kdcli.data.mixing import Draw, Mixing, mixed_images, mixed_labels
from kdcli.data.randomness import generator
from kdcli.data.ranks import share
from kdcli.data.recolour import further
from kdcli.data.resident import Resident, draw, draw_crop
from kdcli.data.stream import Samples, Stream
from kdcli.data.transforms import transform
from kdcli.errors import UsageError, nearest

Share = tuple[int, int, float]
"""`(start, stop, weight)` of what this rank computes of a step, see `ranks.share`."""

AUGMENTS = ("crop", "flip", "none", "resized-crop", "rotation")
EXTRAS = ("crop", "strong")


@dataclass
class Batch:
    """One rank's part of a step; b samples.

    Attributes:
        images: float [b,3,S,S], normalised, on the device.
        labels: int64 [b], on the device.
        index: int64 [b], positions in the loader's split, on the device.
        weight: n_local * world / n_global; 0 for a sample that only keeps the rank busy. See `ranks.share`.
        extra: further augmented copies of the images, each like `images`; what `Loader` was asked for.
        soft: float [b,K], each image's shares of the classes, where images are mixed; `labels` is the largest share's class.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    weight: float
    extra: tuple[Tensor, ...] = ()
    soft: Tensor | None = None

    @property
    def targets(self) -> Tensor:
        """What a cross-entropy to the labels takes: int64 [b], or float [b,K] where images are mixed."""
        return self.labels if self.soft is None else self.soft


class Loader:
    """Batches of a split, epoch by epoch.

    Resident images under `crop`, `flip` or `none` stay on the device; everything else streams, sample by sample. The
    order is timm's: augmentation, RandAugment or colours, normalisation, erasing, mixing.

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
        extra: further views of each image in a batch, in training only. `crop`: the same flip and another crop (where
            the augmentation crops nothing, the same image); `strong`: RandAugment and a cut-out on a crop and flip of
            its own, always streamed. `Batch.images` do not depend on it.
        rand_augment, color_jitter, erasing: as in `DataSpec`; the first two make images stream. Further crops have them
            too, with draws of their own, strong views do not.
        mixing: how batches are mixed, all views of one alike, each rank's images among themselves; None for not at all.
        classes: K, for the targets of mixed images.

    Raises:
        UsageError: no samples, a batch size below 1, or an unknown augmentation or further view.
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
        extra: tuple[str, ...] = (),
        rand_augment: str | None = None,
        color_jitter: float = 0.0,
        erasing: float = 0.0,
        mixing: Mixing | None = None,
        classes: int = 0,
    ) -> None:
        if len(split) == 0:
            raise UsageError("there are no samples, so an epoch would have no step", field="data")
        if batch_size < 1:
            raise UsageError(f"a batch of {batch_size} samples", field="train.batch_size", hint="use 1 or more")
        if augment not in AUGMENTS:
            raise UsageError(f"unknown augmentation {augment!r}", field="data.augment", hint=nearest(augment, AUGMENTS))
        for kind in extra:
            if kind not in EXTRAS:
                raise UsageError(f"unknown further view {kind!r}", field="method", hint=nearest(kind, EXTRAS))
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
        self.extra = extra if train else ()
        self.erasing = Erasing(erasing) if train and erasing > 0 else None
        self.mixing, self.classes = mixing if train else None, classes
        behind = further(rand_augment, color_jitter, image_size, mean) if train else None
        self._resident: Resident | None = None
        self._stream: Stream | None = None
        if split.images is not None and self.augment in ("crop", "flip", "none") and behind is None:
            padding = split.images.shape[-1] // 8 if self.augment == "crop" else 0
            self._resident = Resident(
                split.images, padding=padding, device=self.device, scale=self.scale, shift=self.shift
            )
        # The views that are read sample by sample: all of them, or only the strong ones.
        self._streamed_extra = self.extra if self._resident is None else tuple(k for k in self.extra if k == "strong")
        if self._resident is None or self._streamed_extra:
            function = transform(image_size, self.augment, train=train, files=split.images is None)
            samples = Samples(
                split,
                function,
                seed,
                random=self.augment != "none",
                further=behind,
                extra=self._streamed_extra,
                base=self._resident is None,
            )
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
        labels, index = self._aligned(order)
        views = self._from_device(epoch, order, shares) if self._resident else self._streamed(epoch, order, shares)
        views = self._erased(epoch, order, shares, views)
        for (low, high, weight), (images, *extra) in zip(shares, views, strict=True):
            batch = Batch(images, labels[low:high], index[low:high], weight, tuple(extra))
            yield batch if self.mixing is None else self._mixed(batch, epoch, low // self.batch_size)

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

    def _from_device(self, epoch: int, order: Tensor, shares: list[Share]) -> Iterator[list[Tensor]]:
        """All views of each share: the image, then the extra ones in their order."""
        resident = self._resident
        assert resident is not None
        crop = self.augment == "crop"
        draws = None if self.augment == "none" else draw(len(self.split), resident.padding, self.seed, epoch)
        plan = resident.plan(order, draws, crop=crop)
        plans = []
        for number, kind in enumerate(self.extra):
            if kind == "crop":
                other = draw_crop(draws, resident.padding, self.seed, epoch, number) if draws and crop else draws
                plans.append(resident.plan(order, other, crop=crop))
        strong = self._streamed(epoch, order, shares) if self._streamed_extra else iter([[] for _ in shares])
        for low, high, _ in shares:
            first, *others = (resident.batch(p, low, high, self.image_size) for p in [plan, *plans])
            crops, strongs = map(self._laid_out, others), iter(next(strong))
            yield [self._laid_out(first), *(next(crops if kind == "crop" else strongs) for kind in self.extra)]

    def _streamed(self, epoch: int, order: Tensor, shares: list[Share]) -> Iterator[list[Tensor]]:
        """The views of each share that are read sample by sample."""
        stream = self._stream
        assert stream is not None
        positions = order.tolist()
        for raw in stream.batches([(epoch, positions[low:high]) for low, high, _ in shares]):
            views = [raw] if raw.dim() == 4 else list(raw.unbind(1))
            yield [torch.addcmul(self.shift, self._laid_out(view.to(self.device)), self.scale) for view in views]

    def _erased(
        self, epoch: int, order: Tensor, shares: list[Share], views: Iterator[list[Tensor]]
    ) -> Iterator[list[Tensor]]:
        """The views of each share with rectangles of noise, where the loader erases."""
        if self.erasing is None:
            yield from views
            return
        kinds = ("first", *self.extra)
        boxes = [
            self.erasing.draw(len(self.split), self.image_size, self.seed, epoch, "erasing", number)[order].tolist()
            for number in range(len(kinds))
        ]
        ids = self.split.ids[order].tolist()
        for (low, high, _), made in zip(shares, views, strict=True):
            for number, kind in enumerate(kinds):
                if kind != "strong":
                    where = [(self.seed, epoch, i, "noise", number) for i in ids[low:high]]
                    erase(made[number], boxes[number][low:high], where)
            yield made

    def _mixed(self, batch: Batch, epoch: int, step: int) -> Batch:
        """The batch with its images mixed in pairs, every view alike."""
        assert self.mixing is not None
        drawn: Draw = self.mixing.draw(self.image_size, self.image_size, self.seed, epoch, step, "mixing")
        labels, soft = mixed_labels(batch.labels, self.classes, drawn)
        first, *extra = (self._laid_out(mixed_images(x, drawn)) for x in (batch.images, *batch.extra))
        return Batch(first, labels, batch.index, batch.weight, tuple(extra), soft)

    def _laid_out(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=self.memory_format)
