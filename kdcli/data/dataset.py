"""A data set: its classes, its normalisation, and its splits, in memory or as files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kdcli.errors import IncompatibleError, InputError, UsageError


@dataclass(frozen=True, eq=False)
class Split:
    """N labelled images, either resident (`images`) or as files (`paths`).

    Attributes:
        labels: int64 [N], 0..K-1.
        ids: int64 [N], the position in the full original split; subsetting keeps it, so it names a sample for good.
        images: uint8 [N,3,H,W] RGB, or None.
        paths: N file names, or None.
    """

    labels: Tensor
    ids: Tensor
    images: Tensor | None = None
    paths: list[str] | None = None

    def __post_init__(self) -> None:
        held = self.images if self.images is not None else self.paths
        if held is None or (self.images is not None and self.paths is not None):
            raise ValueError("a split has either images or paths")
        if not len(self.labels) == len(self.ids) == len(held):
            raise InputError(f"{len(held)} images but {len(self.labels)} labels and {len(self.ids)} ids")

    @classmethod
    def of(
        cls, labels: Tensor | Sequence[int], *, images: Tensor | None = None, paths: list[str] | None = None
    ) -> Split:
        """A full split, whose ids are its positions."""
        labels = torch.as_tensor(labels, dtype=torch.int64)
        return cls(labels, torch.arange(len(labels)), images, paths)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor | Sequence[int]) -> Split:
        """The samples at these positions, in this order, ids kept."""
        at = torch.as_tensor(indices, dtype=torch.int64)
        return Split(
            self.labels[at],
            self.ids[at],
            None if self.images is None else self.images[at],
            None if self.paths is None else [self.paths[i] for i in at.tolist()],
        )


Triple = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class DataSet:
    """Splits with what a network must know about them. Creating one checks it.

    Attributes:
        name: canonical name.
        classes: the K class names, in label order.
        image_size: side S of the images the network sees. Resident images may be smaller: the loader resizes them.
        mean, std: per channel, on the 0..1 scale.
        train, test, val: the splits; `val` is None unless the data bring one or `with_validation` made one.
        notes: what the user should be told (files ignored, a split made up).
        readable: class name -> words, where class names are codes.

    Raises:
        InputError: an empty split, a label outside 0..K-1, or a class without a training image.
    """

    name: str
    classes: tuple[str, ...]
    image_size: int
    mean: Triple
    std: Triple
    train: Split
    test: Split
    val: Split | None = None
    notes: tuple[str, ...] = ()
    readable: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for which, split in (("training", self.train), ("test", self.test), ("validation", self.val)):
            if split is None:
                continue
            if len(split) == 0:
                raise InputError(f"{self.name}: the {which} split is empty")
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= len(self.classes):
                bad = low if low < 0 else high
                raise InputError(
                    f"{self.name}: label {bad} in the {which} split, but there are {len(self.classes)} classes"
                )
        counts = torch.bincount(self.train.labels, minlength=len(self.classes))
        empty = [self.classes[i] for i in (counts == 0).nonzero().flatten().tolist()]
        if empty:
            shown = ", ".join(empty[:20]) + (", …" if len(empty) > 20 else "")
            raise InputError(f"{self.name}: {len(empty)} classes have no training image: {shown}")

    def with_fraction(self, fraction: float, seed: int) -> DataSet:
        """Train on a stratified part of the training split; the test split stays whole.

        The subset is scikit-learn's StratifiedShuffleSplit(n_splits=1, test_size=1-fraction, random_state=seed), in
        ascending order: HSAKD's few-shot protocol (METHODS 7.2).

        Raises:
            UsageError: a fraction outside (0, 1], or too few images to stratify.
        """
        if fraction == 1:
            return self
        kept, _ = _stratified(self.train.labels, 1 - fraction, seed, f"a fraction of {fraction}", "data")
        return replace(self, train=self.train.subset(kept))

    def with_validation(self, fraction: float, seed: int) -> DataSet:
        """Hold a stratified part of the training split out as `val`; 0 leaves everything as it is.

        Raises:
            UsageError: a fraction outside [0, 1), or too few images to stratify.
        """
        if fraction == 0:
            return self
        kept, held = _stratified(
            self.train.labels, fraction, seed, f"a validation part of {fraction}", "data.val_fraction"
        )
        return replace(self, train=self.train.subset(kept), val=self.train.subset(held))

    def with_classes(self, names: Sequence[str]) -> DataSet:
        """Renumber the labels so that the class order is `names`.

        Raises:
            IncompatibleError: `names` are not this set's classes.
        """
        if tuple(names) == self.classes:
            return self
        if sorted(names) != sorted(self.classes):
            odd = sorted(set(names) ^ set(self.classes))[:5]
            raise IncompatibleError(
                f"{self.name} has {len(self.classes)} classes, {len(names)} were expected; "
                f"not in both: {', '.join(odd)}",
                hint="use the data set the checkpoint was trained on",
            )
        at = {name: i for i, name in enumerate(names)}
        table = torch.tensor([at[name] for name in self.classes])

        def renumber(split: Split) -> Split:
            return replace(split, labels=table[split.labels])

        val = None if self.val is None else renumber(self.val)
        return replace(self, classes=tuple(names), train=renumber(self.train), test=renumber(self.test), val=val)


def _stratified(labels: Tensor, held: float, seed: int, what: str, field: str) -> tuple[Tensor, Tensor]:
    """Ascending positions `(kept, held out)` of a stratified split that holds out the part `held`."""
    from sklearn.model_selection import StratifiedShuffleSplit

    if not 0 < held < 1:
        raise UsageError(f"{what} is outside 0..1", field=field, hint="use a number between 0 and 1")
    y = labels.numpy()
    try:
        kept, out = next(StratifiedShuffleSplit(n_splits=1, test_size=held, random_state=seed).split(y, y))
    except ValueError as error:
        raise UsageError(f"{what} cannot be drawn from {len(y)} images: {error}", field=field) from error
    return torch.from_numpy(kept).sort().values, torch.from_numpy(out).sort().values
