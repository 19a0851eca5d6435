"""CIFAR-10 and CIFAR-100 in the binary and the python layout (Krizhevsky 2009, cs.toronto.edu/~kriz/cifar.html).

Binary: records of label bytes (CIFAR-100: coarse, fine) and 3,072 pixel bytes, planes R G B, row-major. Python:
pickles of the same bytes, read by `pickles`. The fine labels of CIFAR-100 are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdcli.data.archive import exactly, extract
from kdcli.data.dataset import DataSet, Split
from kdcli.data.download import fetch
from kdcli.data.normalisation import constants
from kdcli.data.pickles import MAX_BYTES, read_pickle
from kdcli.data.request import Request
from kdcli.data.resize import resident
from kdcli.data.textfile import lines
from kdcli.errors import InputError

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """How one of the two sets is stored.

    Attributes:
        label_bytes: bytes before the pixels of a binary record; the last one is the label.
        train, test: binary files, in order, each with `per_file` records.
        python_train, python_test: pickles, in order, each with `per_file` rows.
        names: binary layout's text file of class names.
        meta: python layout's pickle of class names, and the key they are under.
        key: key of the labels in a pickle.
    """

    classes: int
    label_bytes: int
    binary: str
    train: tuple[str, ...]
    test: str
    names: str
    python: str
    python_train: tuple[str, ...]
    python_test: str
    meta: tuple[str, str]
    key: str
    archives: tuple[str, str]
    train_records: int
    test_records: int


LAYOUTS = {
    "cifar100": Layout(
        classes=100,
        label_bytes=2,
        binary="cifar-100-binary",
        train=("train.bin",),
        test="test.bin",
        names="fine_label_names.txt",
        python="cifar-100-python",
        python_train=("train",),
        python_test="test",
        meta=("meta", "fine_label_names"),
        key="fine_labels",
        archives=("cifar-100-binary.tar.gz", "cifar-100-python.tar.gz"),
        train_records=50_000,
        test_records=10_000,
    ),
    "cifar10": Layout(
        classes=10,
        label_bytes=1,
        binary="cifar-10-batches-bin",
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test="test_batch.bin",
        names="batches.meta.txt",
        python="cifar-10-batches-py",
        python_train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        python_test="test_batch",
        meta=("batches.meta", "label_names"),
        key="labels",
        archives=("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"),
        train_records=10_000,
        test_records=10_000,
    ),
}
"""`train_records` counts the records of each training file."""


def read(request: Request) -> DataSet:
    """Read CIFAR from `root`, from its layout's folder in `root`, or from an archive in `root` (which is unpacked).

    Raises:
        InputError: missing, truncated, damaged or hostile.
        WriteError: an archive could not be unpacked.
    """
    layout = LAYOUTS[request.name]
    found = find(request.root, layout)
    if found is None:
        _unpack(request, layout)
        found = find(request.root, layout)
    if found is None:
        raise request.missing(
            [f"{layout.binary}/{layout.train[0]}", f"{layout.python}/{layout.python_train[0]}", *layout.archives]
        )
    folder, binary = found
    if binary:
        classes = lines(folder / layout.names)
        train = _join([_binary(folder / name, layout, layout.train_records) for name in layout.train])
        test = _binary(folder / layout.test, layout, layout.test_records)
    else:
        classes = _names(folder / layout.meta[0], layout.meta[1])
        train = _join([_pickled(folder / name, layout, layout.train_records) for name in layout.python_train])
        test = _pickled(folder / layout.python_test, layout, layout.test_records)
    if len(classes) != layout.classes or len(set(classes)) != layout.classes:
        raise InputError(f"{folder} names {len(set(classes))} classes, {request.name} has {layout.classes}")
    mean, std = constants(request.name)
    return DataSet(
        request.name,
        tuple(classes),
        request.size,
        mean,
        std,
        train=Split.of(train[1], images=resident(train[0], request.size, request.limit)),
        test=Split.of(test[1], images=resident(test[0], request.size, request.limit)),
    )


def find(root: Path, layout: Layout) -> tuple[Path, bool] | None:
    """The folder that holds the set, and whether it is the binary layout."""
    for folder in (root, root / layout.binary):
        if (folder / layout.train[0]).is_file():
            return folder, True
    for folder in (root, root / layout.python):
        # `train` may also be a folder of another set: the class names beside it tell.
        if (folder / layout.python_train[0]).is_file() and (folder / layout.meta[0]).is_file():
            return folder, False
    if (root / layout.python).is_dir():
        raise InputError(
            f"{root / layout.python} is incomplete: {layout.python_train[0]} or {layout.meta[0]} is missing"
        )
    if (root / layout.binary).is_dir():
        raise InputError(f"{root / layout.binary} is incomplete: {layout.train[0]} is missing")
    return None


def _unpack(request: Request, layout: Layout) -> None:
    """Unpack an archive in the data directory, fetching the python one first if that is allowed and none is there."""
    binary, python = (request.root / name for name in layout.archives)
    if request.download and not binary.is_file():
        from torchvision import datasets

        source = {"cifar100": datasets.CIFAR100, "cifar10": datasets.CIFAR10}[request.name]
        python = fetch(source.url, request.root, source.filename, source.tgz_md5)
    if binary.is_file():
        record = layout.label_bytes + PIXELS
        sizes = {f"{layout.binary}/{name}": layout.train_records * record for name in layout.train}
        sizes[f"{layout.binary}/{layout.test}"] = layout.test_records * record
        sizes[f"{layout.binary}/{layout.names}"] = 1 << 16
        extract(binary, request.root / layout.binary, exactly(sizes), list(sizes))
    elif python.is_file():
        names = (*layout.python_train, layout.python_test, layout.meta[0])
        sizes = {f"{layout.python}/{name}": MAX_BYTES for name in names}
        extract(python, request.root / layout.python, exactly(sizes), list(sizes))


def _binary(path: Path, layout: Layout, records: int) -> tuple[Tensor, Tensor]:
    """`(uint8 [N,3,32,32], int64 [N])` of a binary file of exactly `records` records."""
    record = layout.label_bytes + PIXELS
    try:
        size = path.stat().st_size
        if size != records * record:
            word = "truncated" if size < records * record else "too long"
            raise InputError(
                f"{path} is {word}: expected {records * record} bytes, found {size}", hint="fetch it again"
            )
        rows = np.fromfile(path, dtype=np.uint8).reshape(records, record)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    labels = torch.from_numpy(rows[:, layout.label_bytes - 1].astype(np.int64))
    return torch.from_numpy(rows[:, layout.label_bytes :].reshape(-1, 3, 32, 32).copy()), labels


def _pickled(path: Path, layout: Layout, records: int) -> tuple[Tensor, Tensor]:
    """`(uint8 [N,3,32,32], int64 [N])` of a pickle of exactly `records` rows."""
    batch = read_pickle(path)
    data, labels = batch.get("data"), batch.get(layout.key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (records, PIXELS):
        found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise InputError(f"{path} is not a CIFAR batch: expected uint8 ({records}, {PIXELS}), found {found}")
    if not isinstance(labels, list) or len(labels) != records or not all(type(label) is int for label in labels):
        raise InputError(f"{path} is not a CIFAR batch: {layout.key!r} is not a list of {records} integers")
    if not all(0 <= label < layout.classes for label in labels):
        raise InputError(f"{path} is damaged: a label is outside 0..{layout.classes - 1}")
    return torch.from_numpy(data.reshape(-1, 3, 32, 32).copy()), torch.tensor(labels)


def _names(path: Path, key: str) -> list[str]:
    names = read_pickle(path).get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path} is not a CIFAR meta file: {key!r} is not a list of names")
    return names


def _join(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])
