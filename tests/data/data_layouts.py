"""Small files of each data set's layout, written by the tests that read them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
from PIL import Image


def cifar_rows(count: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`(labels [N], pixels uint8 [N,3072])`, labels in turn."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
    return np.arange(count) % classes, pixels


def write_cifar100_binary(folder: Path) -> np.ndarray:
    """Write the binary layout; returns the training pixels."""
    folder.mkdir(parents=True)
    for name, count in (("test", 100), ("train", 400)):
        labels, pixels = cifar_rows(count, 100, seed=count)
        rows = np.concatenate([(labels % 20)[:, None], labels[:, None], pixels], axis=1).astype(np.uint8)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(f"c{i:02d}" for i in range(100)) + "\n")
    return pixels


def write_cifar100_python(folder: Path) -> np.ndarray:
    """Write the python layout; returns the training pixels."""
    folder.mkdir(parents=True)
    for name, count in (("test", 100), ("train", 400)):
        labels, pixels = cifar_rows(count, 100, seed=count)
        batch = {b"data": pixels, b"fine_labels": labels.tolist(), b"coarse_labels": (labels % 20).tolist()}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = [f"c{i:02d}" for i in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, protocol=2))
    return pixels


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (20, 16)) -> None:
    """A noise image whose pixels depend on `seed`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_tree(root: Path, classes: list[str], each: int) -> None:
    """A tree of class folders with `each` PNG images."""
    for label, name in enumerate(classes):
        for i in range(each):
            write_image(root / name / f"{i}.png", seed=100 * label + i)
