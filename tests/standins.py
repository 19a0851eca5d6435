"""Stand-ins for what the documents' examples need: data sets of the official layouts with few images, files, programs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

TRAIN, TEST = 8000, 10  # a quarter of a tenth is two images a class

# Read by every Python below: the reader of CIFAR checks the number of records, and 60,000 are too many for a test.
SITE = f"""
import importlib.abc, importlib.util, sys
from dataclasses import replace

class Smaller(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "kdcli.data.cifar":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        whole = spec.loader.exec_module
        def exec_module(module):
            whole(module)
            layouts = module.LAYOUTS
            layouts["cifar100"] = replace(layouts["cifar100"], train_records={TRAIN}, test_records={TEST})
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Smaller())
"""


def image(path: Path, seed: int, side: int = 40) -> None:
    """A file of noise, in the format of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)


def data_sets(root: Path) -> None:
    """CIFAR-100 (with `SITE`), STL-10, Tiny-ImageNet and ImageNet."""
    _cifar100(root / "cifar-100-binary")
    _stl10(root / "stl10_binary")
    _tinyimagenet(root / "tiny-imagenet-200")
    for part in ("train", "val"):
        for label, name in enumerate(("n01440764", "n01443537")):
            for number in range(4):
                image(root / "imagenet" / part / name / f"{number}.JPEG", 10 * label + number)


def _cifar100(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, count in (("train", TRAIN), ("test", TEST)):
        labels = np.arange(count) % 100
        pixels = np.random.default_rng(count).integers(0, 256, (count, 3072))
        rows = np.concatenate([(labels % 20)[:, None], labels[:, None], pixels], axis=1)
        (folder / f"{name}.bin").write_bytes(rows.astype(np.uint8).tobytes())
    (folder / "fine_label_names.txt").write_text("".join(f"class {number}\n" for number in range(100)))


def _stl10(folder: Path) -> None:
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 96, 96), dtype=np.uint8)
        (folder / f"{part}_X.bin").write_bytes(pixels.tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes(number % 10 + 1 for number in range(20)))
    (folder / "class_names.txt").write_text("".join(f"class {number}\n" for number in range(10)))


def _tinyimagenet(folder: Path) -> None:
    names = ["n00000001", "n01443537"]
    for label, name in enumerate(names):
        for number in range(4):
            image(folder / "train" / name / "images" / f"{name}_{number}.JPEG", 10 * label + number, 64)
        (folder / "train" / name / f"{name}_boxes.txt").write_text("")
    for number in range(4):
        image(folder / "val/images" / f"val_{number}.JPEG", 50 + number, 64)
    rows = [f"val_{number}.JPEG\t{names[number % 2]}\t0\t0\t1\t1\n" for number in range(4)]
    (folder / "val/val_annotations.txt").write_text("".join(rows))
    (folder / "wnids.txt").write_text("".join(f"{name}\n" for name in names))
    (folder / "words.txt").write_text("n00000001\ta thing\nn01443537\tgoldfish\n")
