"""Which data sets lie in the data directory, and whether they are whole: by names, counts and sizes, not byte by byte."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from kdcli.data import data_root
from kdcli.doctor.finding import Finding
from kdcli.errors import InputError

PATIENCE = 2.0  # seconds for counting the images of one set; slow disks are not worth waiting for
_TINY = (200, 500, 10_000)  # classes, training images of each, validation images
_IMAGENET = 1000  # classes


def datasets(data_dir: str | None) -> list[Finding]:
    """One finding a set that is there, whole or not; a set that is not there is no finding.

    Args:
        data_dir: as the commands take it; None: $KD_DATA_DIR, else ./data.
    """
    root = data_root(data_dir)
    asked = bool(data_dir or os.environ.get("KD_DATA_DIR"))
    facts = {"path": str(root)}
    if not root.is_dir():
        if not asked:
            return [Finding("data", f"no folder {root}; digits and synthetic need none", facts=facts)]
        hint = "point --data-dir (or KD_DATA_DIR) at the folder of the data sets"
        return [Finding("data", f"{root} is not a folder", "problem", hint, code=3, facts=facts)]
    try:
        looks = _looks()
    except ImportError as problem:
        return [Finding("data", f"{root} was not looked at: {problem}", "warning", "install what is missing")]
    found = [finding for name, look in looks.items() if (finding := _found(name, look, root)) is not None]
    if found:
        return found
    text = f"{root} holds none of {', '.join(looks)}"
    hint = "point --data-dir (or KD_DATA_DIR) at them, or --download" if asked else None
    return [Finding("data", text, "warning" if asked else "ok", hint, facts=facts)]


def _looks() -> dict[str, Callable[[Path], tuple[str, str] | None]]:
    """How each set is looked for: its answer is what is there and a warning (or ""), or None where nothing is.

    A set that is not whole is an `InputError`, as for the command that reads it.
    """
    from kdcli.data import cifar

    names = list(cifar.LAYOUTS)
    return {
        **{name: (lambda root, name=name: _cifar(root, name)) for name in names},
        "stl10": _stl10,
        "tinyimagenet": _tinyimagenet,
        "imagenet": _imagenet,
    }


def _found(name: str, look: Callable[[Path], tuple[str, str] | None], root: Path) -> Finding | None:
    facts = {"path": str(root)}
    try:
        seen = look(root)
    except InputError as problem:
        return Finding(name, problem.message, "problem", problem.hint or "fetch it again", code=3, facts=facts)
    except OSError as problem:
        text = f"{problem.filename or root} cannot be read: {problem.strerror}"
        return Finding(name, text, "problem", "check its permissions", code=3, facts=facts)
    if seen is None:
        return None
    text, warning = seen
    return Finding(name, text, "warning" if warning else "ok", warning or None, facts=facts)


def _cifar(root: Path, name: str) -> tuple[str, str] | None:
    from kdcli.data.cifar import LAYOUTS, PIXELS, find
    from kdcli.data.pickles import MAX_BYTES

    layout = LAYOUTS[name]
    place = find(root, layout)
    if place is None:
        return _archive(root, layout.archives, (layout.binary, layout.python))
    folder, binary = place
    if binary:
        record = layout.label_bytes + PIXELS
        sizes = dict.fromkeys(layout.train, layout.train_records * record)
        for file, expected in {**sizes, layout.test: layout.test_records * record}.items():
            _require(folder / file, expected, expected)
        _require(folder / layout.names, 1, 1 << 16)
    else:
        rows = dict.fromkeys(layout.python_train, layout.train_records)
        for file, records in {**rows, layout.python_test: layout.test_records}.items():
            _require(folder / file, records * PIXELS, MAX_BYTES)
        _require(folder / layout.meta[0], 1, 1 << 20)
    count = len(layout.train) * layout.train_records
    return f"{folder}: {count:,} + {layout.test_records:,} images, {'binary' if binary else 'python'} layout", ""


def _stl10(root: Path) -> tuple[str, str] | None:
    from kdcli.data.stl10 import ARCHIVE, FOLDER, PIXELS, find

    folder = find(root)
    if folder is None:
        return _archive(root, (ARCHIVE,), (FOLDER,))
    counts = []
    for which in ("train", "test"):
        count = _require(folder / f"{which}_y.bin", 1, 1 << 20)
        _require(folder / f"{which}_X.bin", count * PIXELS, count * PIXELS)
        counts.append(count)
    _require(folder / "class_names.txt", 1, 1 << 16)
    return f"{folder}: {counts[0]:,} + {counts[1]:,} images", ""


def _tinyimagenet(root: Path) -> tuple[str, str] | None:
    from kdcli.data.tinyimagenet import ARCHIVE, FOLDER, find

    folder = find(root)
    if folder is None:
        if (root / FOLDER).is_dir():
            raise InputError(f"{root / FOLDER} is incomplete: train/<wnid>/images or val/ is missing")
        return _archive(root, (ARCHIVE,), (FOLDER,))
    classes = _folders(folder / "train")
    listed = folder / "wnids.txt"
    if listed.is_file():
        lacking = sorted(
            {line.strip() for line in listed.read_text("utf-8").splitlines() if line.strip()} - set(classes)
        )
        if lacking:
            raise InputError(f"{folder / 'train'} lacks {len(lacking)} of the classes of wnids.txt: {lacking[0]}, …")
    until = time.monotonic() + PATIENCE
    counted = 0
    for name in classes:
        if time.monotonic() > until:
            return f"{folder}: {len(classes)} classes; the images were not all counted, the disk is slow", ""
        images = folder / "train" / name / "images"
        here = sum(1 for _ in os.scandir(images)) if images.is_dir() else 0
        if not here:
            raise InputError(f"{images} holds no image")
        counted += here
    # A subset in the same layout has its validation images in class folders.
    tests = folder / "val" / "images"
    test = sum(1 for _ in os.scandir(tests)) if tests.is_dir() else 0
    text = f"{folder}: {len(classes)} classes, {counted:,} + {test or 'some'} images"
    if (len(classes), counted, test) == (_TINY[0], _TINY[0] * _TINY[1], _TINY[2]):
        return text, ""
    official = f"{_TINY[0]} classes, {_TINY[0] * _TINY[1]:,} + {_TINY[2]:,} images"
    return text, f"a subset: the official set has {official}"


def _imagenet(root: Path) -> tuple[str, str] | None:
    folder = root / "imagenet"
    if not (folder / "train").is_dir():
        return None  # a train/ directly in the data directory may be of any set
    classes = _folders(folder / "train")
    tests = [name for name in ("val", "validation", "test") if (folder / name).is_dir()]
    if len(classes) < 2:
        raise InputError(f"{folder / 'train'} has {len(classes)} class folders")
    sorted_ = [name for name in tests if _folders(folder / name)]
    if tests and not sorted_:
        raise InputError(f"{folder / tests[0]} has no class folders", hint="sort its images into one folder a class")
    if not tests:
        return f"{folder}: {len(classes)} classes", "no val/: a fixed fifth of each class will be the test split"
    odd = set(_folders(folder / sorted_[-1])) - set(classes)
    if odd:
        raise InputError(f"{folder / sorted_[-1]} has classes that train/ lacks: {min(odd)}, …")
    until = time.monotonic() + PATIENCE
    for name in classes:
        if time.monotonic() > until:
            break
        if next(os.scandir(folder / "train" / name), None) is None:
            raise InputError(f"{folder / 'train' / name} is empty", hint="fill or remove it")
    subset = "" if len(classes) == _IMAGENET else f"a subset: the official set has {_IMAGENET} classes"
    return f"{folder}: {len(classes)} classes, train and {sorted_[-1]}", subset


def _archive(root: Path, archives: tuple[str, ...], folders: tuple[str, ...]) -> tuple[str, str] | None:
    """An archive that the first use will unpack; None where there is none either."""
    for name, folder in zip(archives, folders, strict=True):
        if (root / name).is_file():
            writable = os.access(root, os.W_OK)
            hint = "" if writable else f"{root} cannot be written: unpack it by hand ({folder})"
            return f"{root / name}, which the first use will unpack", hint
    return None


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as listing:
        return sorted(entry.name for entry in listing if entry.is_dir() and not entry.name.startswith("."))


def _require(path: Path, least: int, most: int) -> int:
    """The size of a file in bytes, which must lie between the two."""
    if not path.is_file():
        raise InputError(f"{path} is missing", hint="fetch it again")
    found = path.stat().st_size
    if not least <= found <= most:
        expected = f"{least}" if least == most else f"{least} to {most}"
        raise InputError(f"{path} is damaged: expected {expected} bytes, found {found}", hint="fetch it again")
    return found
