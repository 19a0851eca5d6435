"""Tiny-ImageNet (Stanford CS231n) in its official folder layout, whole or with any number of its classes.

`train/<wnid>/images/*.JPEG`, `val/images/*.JPEG` with `val/val_annotations.txt` as the test split, `wnids.txt`,
`words.txt`. A `val/` that was regrouped into class folders, as many tutorials do, is read too.
"""

from __future__ import annotations

from pathlib import Path

from kdcli.data.archive import extract, matching
from kdcli.data.classfolders import Walk
from kdcli.data.dataset import DataSet, Split
from kdcli.data.decode import decode
from kdcli.data.download import fetch
from kdcli.data.images import check_images
from kdcli.data.normalisation import constants
from kdcli.data.request import Request
from kdcli.data.textfile import lines
from kdcli.errors import InputError

FOLDER = "tiny-imagenet-200"
ARCHIVE = "tiny-imagenet-200.zip"
URL = f"http://cs231n.stanford.edu/{ARCHIVE}"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
MEMBERS = (
    FOLDER
    + r"/(train/n\d{8}/images/n\d{8}_\d+\.JPEG|val/images/val_\d+\.JPEG|val/val_annotations\.txt|w(nids|ords)\.txt)"
)


def read(request: Request) -> DataSet:
    """Read Tiny-ImageNet from `root`, `root/tiny-imagenet-200`, or the archive in `root` (which is unpacked).

    Classes are the sorted wnids; `readable` maps them to words.

    Raises:
        InputError: missing, damaged, hostile, or with images that cannot be used (all of them are named).
        WriteError: the archive could not be unpacked.
    """
    root = find(request.root)
    if root is None:
        _unpack(request)
        root = find(request.root)
    if root is None:
        raise request.missing([f"{FOLDER}/train/<wnid>/images", ARCHIVE])
    walk = Walk(root)
    folders = walk.folders(root / "train")
    listed = root / "wnids.txt"
    classes = sorted(lines(listed)) if listed.is_file() else folders
    if classes != folders:
        odd = sorted(set(classes) ^ set(folders))
        raise InputError(f"{root}: wnids.txt and the folders of train/ differ in {', '.join(odd[:10])}")
    train = walk.images(root / "train", classes)
    test = _test(walk, root / "val", classes)
    both = train[0] + test[0]
    if request.fits(len(both)):
        images = decode(both, request.size)
        splits = [
            Split.of(train[1], images=images[: len(train[0])]),
            Split.of(test[1], images=images[len(train[0]) :]),
        ]
    else:
        check_images(both)
        splits = [Split.of(labels, paths=paths) for paths, labels in (train, test)]
    mean, std = constants(request.name)
    return DataSet(
        request.name,
        tuple(classes),
        request.size,
        mean,
        std,
        *splits,
        notes=_notes(walk),
        readable=_words(root, classes),
    )


def find(root: Path) -> Path | None:
    """The folder whose train/ holds <wnid>/images, so that another set's train/ in `root` is not mistaken for it."""
    for folder in (root / FOLDER, root):
        if next((folder / "train").glob("*/images"), None) is not None and (folder / "val").is_dir():
            return folder
    return None


def _unpack(request: Request) -> None:
    archive = request.root / ARCHIVE
    if request.download:
        archive = fetch(URL, request.root, ARCHIVE, MD5)
    if archive.is_file():
        needed = [f"{FOLDER}/wnids.txt", f"{FOLDER}/words.txt", f"{FOLDER}/val/val_annotations.txt"]
        extract(archive, request.root / FOLDER, matching(MEMBERS, 4 << 20), needed)


def _test(walk: Walk, val: Path, classes: list[str]) -> tuple[list[str], list[int]]:
    """`(paths, labels)` of the validation images, which serve as the test split: its own has no labels."""
    annotations = val / "val_annotations.txt"
    if not annotations.is_file():
        return walk.images(val, classes)
    at = {name: label for label, name in enumerate(classes)}
    there = {Path(path).name: path for path in walk.images(val, ["images"])[0]}
    paths, labels = [], []
    for number, line in enumerate(lines(annotations), 1):
        name, *rest = line.split("\t")
        if not rest or rest[0] not in at:
            raise InputError(f"{annotations}, line {number}: {line[:60]!r} names no class of the training split")
        if name not in there:
            raise InputError(f"{annotations}, line {number}: {name[:60]!r} is not in {val / 'images'}")
        paths.append(there.pop(name))
        labels.append(at[rest[0]])
    if there:
        walk.ignored["validation images without an annotation"].update(there.values())
    return paths, labels


def _notes(walk: Walk) -> tuple[str, ...]:
    # Each class folder officially has one <wnid>_boxes.txt, which nobody needs to hear about.
    walk.ignored.pop("files without an image's extension", None)
    return walk.notes()


def _words(root: Path, classes: list[str]) -> dict[str, str]:
    path = root / "words.txt"
    if not path.is_file():
        return {}
    words = dict(line.split("\t", 1) for line in lines(path) if "\t" in line)
    return {name: words[name] for name in classes if name in words}
