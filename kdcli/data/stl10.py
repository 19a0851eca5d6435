"""The labelled part of STL-10 in its binary layout (Coates, Ng, Lee 2011, ai.stanford.edu/~acoates/stl10).

`*_X.bin`: N x 3 x 96 x 96 bytes, each plane column-major. `*_y.bin`: N bytes, labels 1..10.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdcli.data.archive import exactly, extract
from kdcli.data.dataset import DataSet, Split
from kdcli.data.download import fetch
from kdcli.data.normalisation import constants
from kdcli.data.request import Request
from kdcli.data.resize import resident
from kdcli.data.textfile import lines
from kdcli.errors import InputError

FOLDER = "stl10_binary"
ARCHIVE = "stl10_binary.tar.gz"
PIXELS = 3 * 96 * 96
SIZES = {
    "train_X.bin": 5_000 * PIXELS,
    "train_y.bin": 5_000,
    "test_X.bin": 8_000 * PIXELS,
    "test_y.bin": 8_000,
    "class_names.txt": 1 << 16,
}
"""The files needed and the most bytes an archive may give them; the 2.6 GB of unlabelled images are left out."""


def read(request: Request) -> DataSet:
    """Read STL-10 from `root`, `root/stl10_binary`, or an archive in `root` (which is unpacked). Any N is accepted.

    Raises:
        InputError: missing, truncated or damaged.
        WriteError: an archive could not be unpacked.
    """
    folder = find(request.root)
    if folder is None:
        _unpack(request)
        folder = find(request.root)
    if folder is None:
        raise request.missing([f"{FOLDER}/train_X.bin", ARCHIVE])
    classes = lines(folder / "class_names.txt")
    mean, std = constants(request.name)
    train, test = _split(folder, "train", len(classes), request), _split(folder, "test", len(classes), request)
    return DataSet(request.name, tuple(classes), request.size, mean, std, train, test)


def find(root: Path) -> Path | None:
    """The folder that holds the set: `root` itself, or the official one in it."""
    return next((folder for folder in (root, root / FOLDER) if (folder / "train_X.bin").is_file()), None)


def _unpack(request: Request) -> None:
    archive = request.root / ARCHIVE
    if request.download:
        from torchvision.datasets import STL10

        archive = fetch(STL10.url, request.root, STL10.filename, STL10.tgz_md5)
    if archive.is_file():
        sizes = {f"{FOLDER}/{name}": most for name, most in SIZES.items()}
        extract(archive, request.root / FOLDER, exactly(sizes), list(sizes))


def _split(folder: Path, which: str, classes: int, request: Request) -> Split:
    pixels, labels = _bytes(folder / f"{which}_X.bin"), _bytes(folder / f"{which}_y.bin")
    if len(pixels) != len(labels) * PIXELS:
        raise InputError(
            f"{folder / f'{which}_X.bin'} is truncated or too long: expected {len(labels) * PIXELS} bytes for the "
            f"{len(labels)} labels of {which}_y.bin, found {len(pixels)}",
            hint="fetch it again",
        )
    if len(labels) and not 1 <= int(labels.min()) <= int(labels.max()) <= classes:
        raise InputError(f"{folder / f'{which}_y.bin'} is damaged: a label is outside 1..{classes}")
    # Column-major planes: the file's third axis is x, its fourth y.
    images: Tensor = torch.from_numpy(pixels.reshape(-1, 3, 96, 96)).transpose(2, 3).contiguous()
    return Split.of(torch.from_numpy(labels.astype(np.int64) - 1), images=resident(images, request.size, request.limit))


def _bytes(path: Path) -> np.ndarray:
    try:
        return np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
