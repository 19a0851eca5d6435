"""R11: mutated data sets: CIFAR in both layouts and as an archive, class folders, image files, Tiny-ImageNet."""

from __future__ import annotations

import functools
import io
import os
import pickle
import random
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fuzzing import HARMLESS, Trial, campaign, complaints, shown, trial
from mutators import damaged
from PIL import Image

REFUSED = (3,)
RECORDS = 4  # of each of CIFAR-10's files here, where the real ones have 10,000
CLASSES = [f"class{i}" for i in range(10)]


def words(dataset: str, *more: object) -> list[object]:
    """A training of one step on the data set `dataset`, found in `d`."""
    return [
        *("distill", "--method", "none", "--student", "resnet8", "--dataset", dataset, "--data-dir", "d"),
        *("--image-size", "8", "--batch-size", "4", "--epochs", "1", "--max-steps", "1"),
        *("--device", "cpu", "--threads", "1", "--workers", "0", "--out", "run", *more),
    ]


def small_cifar() -> None:
    """Let CIFAR-10's files have four records each. The reader is otherwise as it is."""
    from kdcli.data import cifar

    small = replace(cifar.LAYOUTS["cifar10"], train_records=RECORDS, test_records=RECORDS)
    cifar.LAYOUTS["cifar10"] = small


def rows(seed: int) -> tuple[list[int], np.ndarray]:
    """Labels and pixels of one file; five files hold every class."""
    pixels = np.random.default_rng(seed).integers(0, 256, (RECORDS, 3072), dtype=np.uint8)
    return [(seed * RECORDS + i) % 10 for i in range(RECORDS)], pixels


def write_binary(folder: Path) -> None:
    folder.mkdir(parents=True)
    for seed, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        labels, pixels = rows(seed)
        lines = [bytes([label]) + row.tobytes() for label, row in zip(labels, pixels, strict=True)]
        (folder / name).write_bytes(b"".join(lines))
    (folder / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n")


def write_python(folder: Path) -> None:
    folder.mkdir(parents=True)
    for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        labels, pixels = rows(seed)
        (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": labels}, protocol=2 + seed % 3))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CLASSES}, protocol=2))


FORMATS = ("png", "jpg", "bmp", "ppm", "tif", "webp")


def write_folders(root: Path) -> None:
    """Three classes, one file of each format in each, of several modes."""
    for label, name in enumerate(("ant", "bee", "cat")):
        (root / name).mkdir(parents=True)
        for seed, kind in enumerate(FORMATS):
            pixels = np.random.default_rng(10 * label + seed).integers(0, 256, (20, 16, 3), dtype=np.uint8)
            image = Image.fromarray(pixels)
            if kind == "png" and label:
                image = image.convert(("L", "P")[label - 1])
            image.save(root / name / f"{seed}.{kind}")


def write_tiny(root: Path) -> None:
    """Two classes in Tiny-ImageNet's official layout."""
    lines = []
    for label, name in enumerate(("n00000001", "n00000002")):
        for i in range(4):
            path = root / f"train/{name}/images/{name}_{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rows(i)[1].reshape(64, 64, 3)).save(path)
        path = root / f"val/images/val_{label}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rows(label)[1].reshape(64, 64, 3)).save(path)
        lines.append(f"val_{label}.JPEG\t{name}\t0\t0\t63\t63\n")
    (root / "val/val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("n00000001\nn00000002\n")
    (root / "words.txt").write_text("n00000001\tan ant\nn00000002\ta bee\n")


@functools.cache
def sound(kind: str) -> Path:
    """A data folder of a kind, written once."""
    root = Path(tempfile.mkdtemp(prefix=f"kd-faults-{kind}-"))
    if kind == "binary":
        write_binary(root / "cifar-10-batches-bin")
    elif kind == "python":
        write_python(root / "cifar-10-batches-py")
    elif kind == "archive":
        write_python(root / "cifar-10-batches-py")
        with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz", compresslevel=1) as archive:
            archive.add(root / "cifar-10-batches-py", "cifar-10-batches-py")
        shutil.rmtree(root / "cifar-10-batches-py")
    elif kind == "folders":
        write_folders(root)
    else:
        write_tiny(root / "tiny-imagenet-200")
    return root


def mutated(kind: str, draw: random.Random, folder: Path) -> Path:
    """A copy of a data folder with one or two of its files damaged, removed, emptied, renamed or replaced."""
    root = shutil.copytree(sound(kind), folder / "d")
    files = sorted(path for path in root.rglob("*") if path.is_file())
    for _ in range(draw.choice((1, 1, 2))):
        left = [path for path in files if path.is_file()]
        if not left:
            break
        path = draw.choice(left)
        how = draw.random()
        if how < 0.8:
            path.write_bytes(damaged(path.read_bytes(), draw))
        elif how < 0.84:
            path.unlink()
        elif how < 0.88:
            path.write_bytes(draw.choice((b"", b"\0" * 100, b"<html>not found</html>", b"\x80\x02N.", b"GIF89a")))
        elif how < 0.92:
            path.write_bytes(draw.choice(left).read_bytes() if path not in files[:1] else b"x")
        elif how < 0.96:
            path.rename(path.with_name(draw.choice(("a\x1b[31m", "b\nerror: c", ".hidden", "x", "ü")) + path.suffix))
        else:
            path.unlink()
            path.mkdir()
    return root


def of_kind(kind: str, dataset: str) -> Callable[[random.Random, Path], tuple[Trial, Collection[int]]]:
    """The trial of one kind of data folder."""

    def one(draw: random.Random, folder: Path) -> tuple[Trial, Collection[int]]:
        mutated(kind, draw, folder)
        # However many images the mutation takes away, those that are left are one batch, and never a batch of one.
        asked = words(dataset, "--batch-size", "64")
        found = trial(asked, folder, before=small_cifar, writable=["run", "d" if kind == "archive" else "run"])
        return found, (HARMLESS, *REFUSED)

    return one


def opcodes(draw: random.Random, folder: Path) -> tuple[Trial, Collection[int]]:
    """A batch that is a pickle of random instructions, well formed more often than chance would have it."""
    root = shutil.copytree(sound("python"), folder / "d")
    body = io.BytesIO(b"\x80\x02")
    body.seek(0, os.SEEK_END)
    names = (b"os\nsystem\n", b"builtins\neval\n", b"numpy\ndtype\n", b"numpy.core.multiarray\n_reconstruct\n")
    for _ in range(draw.randint(1, 60)):
        code = draw.choice(b"(]}){tuslaeRbo1q20Kh.NIcjr\x8e\x8a\x8cBX\x85\x86\x87\x93\x92\x81\x94G\x88Q")
        body.write(bytes([code]))
        if code in b"c":
            body.write(draw.choice(names))
        elif code in b"Kqh":
            body.write(draw.randbytes(1))
        elif code in b"jr\x42X":
            body.write(draw.choice((b"\x02\0\0\0ab", b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff")))
        elif code == 0x8E:
            body.write((2**40).to_bytes(8, "little"))
    (root / "cifar-10-batches-py" / draw.choice(("data_batch_1", "batches.meta"))).write_bytes(body.getvalue() + b".")
    return trial(words("cifar10"), folder, before=small_cifar, writable=["run"]), REFUSED


KINDS = {
    "binary": (of_kind("binary", "cifar10"), 3, 200),
    "python": (of_kind("python", "cifar10"), 5, 500),
    "opcodes": (opcodes, 5, 400),
    "archive": (of_kind("archive", "cifar10"), 4, 250),
    "folders": (of_kind("folders", "folder:d"), 5, 300),
    "tiny": (of_kind("tiny", "tinyimagenet"), 2, 100),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_mutated_data(kind, tmp_path):
    """R11, a sample: exit 3 with one line, or 0 where only pixels changed."""
    one, count, _ = KINDS[kind]
    failures = campaign(f"data {kind}", count, tmp_path, one)
    assert not failures, shown(failures)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_data(kind, tmp_path):
    """R11: 1,750 mutations of data sets."""
    one, _, count = KINDS[kind]
    failures = campaign(f"data {kind}", count, tmp_path, one)
    assert not failures, shown(failures)


def unrestricted() -> None:
    """`kd` that reads CIFAR's pickles as Python does."""
    from kdcli.data import pickles

    pickles._Restricted = lambda content: pickle.Unpickler(io.BytesIO(content))  # type: ignore[assignment,misc]


def test_these_checks_have_teeth(tmp_path):
    """A batch that calls a program is refused; read without restriction, it is found out."""
    root = shutil.copytree(sound("python"), tmp_path / "d")
    (root / "cifar-10-batches-py/data_batch_1").write_bytes(b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.")

    def both() -> None:
        small_cifar()
        unrestricted()

    found = trial(words("cifar10"), tmp_path, before=small_cifar, writable=["run"])
    assert complaints(found, REFUSED) == []
    found = trial(words("cifar10"), tmp_path, before=both, writable=["run"])
    assert any("os.system" in one for one in complaints(found, REFUSED))
