"""ImageNet and `folder:PATH`: a tree of class folders, with or without train/ and val/."""

from __future__ import annotations

from pathlib import Path

import torch

from kdcli.data.classfolders import Walk
from kdcli.data.dataset import DataSet, Split
from kdcli.data.decode import decode
from kdcli.data.images import check_images
from kdcli.data.names import FOLDER_RESIDENT_UP_TO
from kdcli.data.normalisation import constants
from kdcli.data.randomness import generator
from kdcli.data.request import Request
from kdcli.errors import InputError

_TESTS = ("val", "validation", "test")


def read(request: Request) -> DataSet:
    """Read a tree of class folders.

    With `train/` and one of `val/`, `validation/`, `test/` inside, those are the splits (where both a validation and a
    test folder hold class folders, they become `val` and `test`). Otherwise the tree is one set, of which a fixed
    fifth of every class is the test split. Classes are the sorted folder names.

    Raises:
        InputError: missing, fewer than two classes, a class without images, a link that leaves the root, or images
            that cannot be used (all of them are named).
    """
    kind = request.name.partition(":")[0]
    root = _root(request)
    walk = Walk(root)
    found = {name: root / name for name in walk.folders(root)}
    tests = [name for name in _TESTS if name in found and walk.folders(found[name])]
    notes: tuple[str, ...] = ()
    if "train" in found and tests:
        classes, paths, labels = _tree(walk, found["train"])
        splits = {"train": (paths, labels), "test": _like(walk, found[tests[-1]], classes)}
        if len(tests) > 1:
            splits["val"] = _like(walk, found[tests[0]], classes)
    elif "train" in found and (flat := next((name for name in _TESTS if name in found), None)):
        # As one set this would be two classes, "train" and "val": it trains, and means nothing.
        raise InputError(f"{found[flat]} has no class folders", hint="sort its images into one folder a class")
    else:
        only_train = list(found) == ["train"]
        classes, paths, labels = _tree(walk, found["train"] if only_train else root)
        splits = _fifth(classes, paths, labels)
        notes = (f"no test folder in {root}: a fixed fifth of each class is the test split",)
    everything = [path for part, _ in splits.values() for path in part]
    if kind == "folder" and request.size <= FOLDER_RESIDENT_UP_TO and request.fits(len(everything)):
        images = decode(everything, request.size)
        parts = iter(images.split([len(part) for part, _ in splits.values()]))
        made = {name: Split.of(labels, images=next(parts)) for name, (_, labels) in splits.items()}
    else:
        check_images(everything)
        made = {name: Split.of(labels, paths=paths) for name, (paths, labels) in splits.items()}
    mean, std = constants(request.name)
    return DataSet(
        request.name,
        tuple(classes),
        request.size,
        mean,
        std,
        train=made["train"],
        test=made["test"],
        val=made.get("val"),
        notes=notes + walk.notes(),
    )


def _root(request: Request) -> Path:
    if request.name.startswith("folder:"):
        if not request.root.is_dir():
            raise InputError(f"{request.root} is not a folder", hint="folder:PATH needs a folder of class folders")
        return request.root
    for folder in (request.root / "imagenet", request.root):
        if (folder / "train").is_dir():
            return folder
    if request.download:
        raise InputError("imagenet cannot be downloaded without an account", hint="fetch it from image-net.org by hand")
    raise InputError(
        f"imagenet is not in {request.root}: looked for imagenet/train and train, with one folder per class",
        hint="point --data-dir (or KD_DATA_DIR) at it",
    )


def _tree(walk: Walk, folder: Path) -> tuple[list[str], list[str], list[int]]:
    """`(classes, paths, labels)` of a tree that defines the classes."""
    classes = walk.folders(folder)
    if len(classes) < 2:
        raise InputError(f"{folder} has {len(classes)} class folders, at least two are needed")
    paths, labels = walk.images(folder, classes)
    empty = [name for label, name in enumerate(classes) if label not in set(labels)] if paths else classes
    if empty:
        shown = ", ".join(empty[:20]) + (", …" if len(empty) > 20 else "")
        raise InputError(f"{folder}: {len(empty)} class folders have no image: {shown}", hint="fill or remove them")
    return classes, paths, labels


def _like(walk: Walk, folder: Path, classes: list[str]) -> tuple[list[str], list[int]]:
    """`(paths, labels)` of a tree that must use the classes of the training tree."""
    odd = sorted(set(walk.folders(folder)) - set(classes))
    if odd:
        raise InputError(f"{folder} has classes that the training split lacks: {', '.join(odd[:20])}")
    paths, labels = walk.images(folder, classes)
    if not paths:
        raise InputError(f"{folder} has no image of its own")
    return paths, labels


def _fifth(classes: list[str], paths: list[str], labels: list[int]) -> dict[str, tuple[list[str], list[int]]]:
    """A fixed split: a fifth of each class for testing, at least one image where the class has two or more.

    Drawn from the class's name and size alone, so that adding a class does not move the images of another.
    """
    target = torch.tensor(labels)
    test: set[int] = set()
    for label, name in enumerate(classes):
        own = (target == label).nonzero().flatten().tolist()
        if len(own) >= 2:
            shuffled = torch.randperm(len(own), generator=generator(0, "folder split", name)).tolist()
            test.update(own[i] for i in shuffled[: max(1, round(0.2 * len(own)))])
    if not test:
        raise InputError("no class has two images, so none can be kept for testing", hint="add images")
    train = [i for i in range(len(paths)) if i not in test]
    return {
        "train": ([paths[i] for i in train], [labels[i] for i in train]),
        "test": ([paths[i] for i in sorted(test)], [labels[i] for i in sorted(test)]),
    }
