"""The data sets `kd` knows, by name. Nothing here imports torch: the command line checks names before work starts."""

from __future__ import annotations

from pathlib import PurePath

from kdcli.errors import UsageError, nearest

DEFAULT_SIZE: dict[str, int] = {
    "cifar100": 32,
    "cifar10": 32,
    "stl10": 96,
    "tinyimagenet": 64,
    "imagenet": 224,
    "folder": 224,
    "digits": 32,
    "synthetic": 32,
}
"""Side in pixels of the square images a network sees, unless the spec asks for another."""

FOLDER_RESIDENT_UP_TO = 96
"""Largest side at which `folder:PATH` is decoded once and kept: above it, training crops from the whole file instead."""

_DECODED: dict[str, tuple[int, tuple[int, ...]]] = {
    "cifar100": (32, (50_000, 10_000)),
    "cifar10": (32, (50_000, 10_000)),
    "stl10": (96, (5_000, 8_000)),
    "digits": (8, (1_797,)),
}
"""Sets that are in memory at any rate: the side of their images, and how many are brought to another side at once."""

_ABOUT: dict[str, str] = {
    "cifar100": "CIFAR-100: 50,000 + 10,000 images of 32x32, 100 fine classes (binary or python layout)",
    "cifar10": "CIFAR-10: 50,000 + 10,000 images of 32x32, 10 classes (binary or python layout)",
    "stl10": "STL-10: the 5,000 + 8,000 labelled images of 96x96, 10 classes (binary layout)",
    "tinyimagenet": "Tiny-ImageNet: 100,000 + 10,000 images of 64x64, 200 classes; any subset in the official layout",
    "imagenet": "ImageNet: train/ and val/ with one folder per class, streamed from disk",
    "folder": "folder:PATH, any tree with one folder per class, with or without train/ and val/",
    "digits": "scikit-learn's 1,797 handwritten digits of 8x8, 10 classes; needs no download",
    "synthetic": "synthetic or synthetic:K, generated images of K = 10 classes for smoke tests",
}

_ALIASES: dict[str, str] = {
    "stl": "stl10",
    "tinyimagenet200": "tinyimagenet",
    "imagenet1k": "imagenet",
    "ilsvrc2012": "imagenet",
    "digit": "digits",
    "fake": "synthetic",
}


def _fold(name: str) -> str:
    return name.strip().lower().replace("-", "").replace("_", "").replace(" ", "")


def known() -> list[str]:
    """The names a user can type, in the order they are shown."""
    return ["folder:PATH" if name == "folder" else name for name in _ABOUT]


def canonical(name: str, field: str = "data.dataset") -> str:
    """The one spelling of a data set's name: `CIFAR-100` is `cifar100`; the path of `folder:PATH` is left as typed.

    Raises:
        UsageError: the name is unknown (the hint names the nearest one), `folder:` has no path, or the `K` of
            `synthetic:K` is not a whole number from 2 to 1000.
    """
    head, colon, argument = name.partition(":")
    kind = _fold(head)
    kind = _ALIASES.get(kind, kind)
    if kind == "folder":
        if not argument.strip():
            raise UsageError("folder needs a path", field=field, hint="write folder:PATH")
        return f"folder:{argument.strip()}"
    if kind == "synthetic" and colon:
        if not (argument.isascii() and argument.isdecimal() and 2 <= int(argument) <= 1000):
            message = f"synthetic:{argument} is not a number of classes"
            raise UsageError(message, field=field, hint="write synthetic:K with K from 2 to 1000")
        return "synthetic" if int(argument) == 10 else f"synthetic:{int(argument)}"
    if kind not in _ABOUT or colon:
        raise UsageError(f"unknown data set {name!r}", field=field, hint=nearest(name, known()))
    return kind


def public(name: str) -> str:
    """A canonical name for others to read: of `folder:PATH` the folder's own name, as where it lay is nobody's business."""
    kind, colon, argument = name.partition(":")
    return kind + colon + (PurePath(argument).name or argument)


def describe(name: str) -> str:
    """One line about a data set, for help texts and listings."""
    return _ABOUT[canonical("folder:." if _fold(name) in ("folder", "folder:path") else name).partition(":")[0]]


def preparation(name: str, size: int, mib: int) -> object:
    """Whatever is equal for two `mib` that bring a set's images to `size` in the same way; None where all do.

    Images that fit are brought to their size before they are augmented: from files as whole squares, and to whole
    levels of brightness. Others are cropped as files or at their own side, with draws of another generator, and resized
    behind it, so that both training and test images differ.

    Args:
        name: canonical name of the set.
        size: side in pixels of the images wanted.
        mib: how much room there is for them, `DataSpec.resident_mib`.
    """
    kind = name.partition(":")[0]
    if kind in _DECODED:
        side, counts = _DECODED[kind]
        return None if size == side else tuple(count * 3 * size**2 <= mib << 20 for count in counts)
    files = kind == "tinyimagenet" or (kind == "folder" and size <= FOLDER_RESIDENT_UP_TO)
    return mib if files else None  # how many files there are is not known before they are looked for


def default_size(name: str) -> int:
    """`DEFAULT_SIZE` of a canonical name, argument and all (`folder:PATH`, `synthetic:K`)."""
    return DEFAULT_SIZE[name.partition(":")[0]]
