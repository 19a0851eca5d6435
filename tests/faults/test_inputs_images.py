"""R18: images of every mode are read or refused, all bad ones named at once; R19: any number of them works or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import complaints, fresh, stock, told, trial
from PIL import Image
from test_fuzz_data import words

WAYS = [
    pytest.param([], id="decoded once"),
    pytest.param(["--set", "data.resident_mib=0"], id="streamed", marks=pytest.mark.slow),
]
STUDENTS = [
    pytest.param("resnet8", id="BatchNorm"),
    pytest.param("timm:test_vit", id="no BatchNorm", marks=pytest.mark.slow),
]
RAMP = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
GREY = Image.fromarray((RAMP >> 8).astype(np.uint8))
COLOUR = Image.merge("RGB", [GREY, GREY.rotate(90), GREY.rotate(180)])


def oriented(number: int) -> Callable[[Path], None]:
    """A JPEG that says it lies on a side."""

    def write(path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = number
        COLOUR.save(path.with_suffix(".jpg"), exif=exif, quality=95)

    return write


def saved(image: Image.Image, kind: str, **options: Any) -> Callable[[Path], None]:
    return lambda path: image.save(path.with_suffix(kind), **options)


READ: dict[str, Callable[[Path], object]] = {
    "1": saved(GREY.convert("1"), ".png"),
    "L": saved(GREY, ".png"),
    "LA": saved(COLOUR.convert("LA"), ".png"),
    "P": saved(COLOUR.convert("P"), ".png"),
    "P, transparent": saved(COLOUR.convert("P"), ".png", transparency=0),
    "PA": saved(COLOUR.convert("PA"), ".tif"),
    "RGB": saved(COLOUR, ".png"),
    "RGB, transparent": saved(COLOUR, ".png", transparency=(0, 0, 0)),
    "RGBA": saved(COLOUR.convert("RGBA"), ".png"),
    "CMYK": saved(COLOUR.convert("CMYK"), ".jpg"),
    "YCbCr": saved(COLOUR.convert("YCbCr"), ".jpg"),
    "I": saved(Image.fromarray(RAMP.astype(np.int32)), ".tif"),
    "I;16": saved(Image.fromarray(RAMP), ".png"),
    "I;16 in a TIFF": saved(Image.fromarray(RAMP), ".tif"),
    "F": saved(Image.fromarray((RAMP / 65535).astype(np.float32)), ".tif"),
    **{f"EXIF {n}": oriented(n) for n in range(1, 9)},
}
REFUSED: dict[str, Callable[[Path], object]] = {
    "I outside": saved(Image.fromarray(RAMP.astype(np.int32) * 3), ".tif"),
    "I negative": saved(Image.fromarray(RAMP.astype(np.int32) - 9), ".tif"),
    "F outside": saved(Image.fromarray(RAMP.astype(np.float32)), ".tif"),
    "F not finite": saved(Image.fromarray(np.full((9, 9), np.nan, np.float32)), ".tif"),
    "LAB": saved(Image.new("LAB", (9, 9)), ".tif"),
    "empty": lambda path: path.with_suffix(".png").write_bytes(b""),
    "text": lambda path: path.with_suffix(".jpg").write_text("<html>"),
    "cut": lambda path: path.with_suffix(".png").write_bytes(_png()[:-300]),
    "a bomb": saved(Image.new("1", (9000, 9000)), ".png"),
}


def _png() -> bytes:
    import io

    COLOUR.save(content := io.BytesIO(), "PNG")
    return content.getvalue()


def folders(root: Path, writers: dict[str, Callable[[Path], object]], classes: int = 2) -> None:
    """Class folders that hold one file of each writer, and three ordinary ones."""
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for i in range(3):
            COLOUR.rotate(i).save(root / f"class{label}/ordinary{i}.png")
        for number, write in enumerate(writers.values()):
            write(root / f"class{label}/{number:02d}")


@pytest.mark.parametrize("way", WAYS)
def test_images_of_every_mode_are_read(way, tmp_path):
    """R18: a training on every mode and orientation there is."""
    stock()
    folders(tmp_path / "d", READ)
    found = trial(words("folder:d", *way, "--batch-size", "5"), tmp_path, writable=["run"])
    wrong = complaints(found, [0])
    assert not wrong, told(found, wrong)


@pytest.mark.parametrize("way", WAYS)
def test_all_bad_images_are_named_at_once(way, tmp_path):
    """R18: what cannot be read is exit 3, with every file of it in the one line."""
    stock()
    folders(tmp_path / "d", {**READ, **REFUSED})
    found = trial(words("folder:d", *way), tmp_path, writable=["run"])
    wrong = complaints(found, [3])
    assert not wrong, told(found, wrong)
    assert f"{2 * len(REFUSED)} of " in found.err
    for number in range(len(READ), len(READ) + len(REFUSED)):
        for label in range(2):
            assert f"class{label}/{number:02d}." in found.err, number


def levels(path: Path) -> int:
    """How many different greys `kd` sees in a file."""
    from kdcli.data.images import read_image

    return len(np.unique(np.asarray(read_image(path))))


def test_a_ramp_of_sixteen_bits_keeps_its_levels(tmp_path):
    """R18: at least 250 of 256."""
    for kind in (".png", ".tif"):
        Image.fromarray(RAMP).save(tmp_path / f"ramp{kind}")
        assert levels(tmp_path / f"ramp{kind}") >= 250


def test_the_check_of_levels_has_teeth(monkeypatch, tmp_path):
    """Pillow's own conversion clips sixteen bits: a few levels are left."""
    from kdcli.data import images

    Image.fromarray(RAMP).save(tmp_path / "ramp.png")
    monkeypatch.setattr(images, "_to_rgb", lambda image: image.convert("RGB"))
    assert levels(tmp_path / "ramp.png") < 250


def test_orientation_is_obeyed(tmp_path):
    """R18: eight files that show the same, each lying on another side, are eight different images; 1 is as stored."""
    from kdcli.data.images import read_image

    seen = set()
    for number in range(1, 9):
        oriented(number)(tmp_path / str(number))
        seen.add(np.asarray(read_image(tmp_path / f"{number}.jpg")).tobytes())
    assert len(seen) == 8


# ---------------------------------------------------------------------------------------------------- numbers of images

BATCH = 4


def counted(root: Path, train: int, test: int) -> None:
    """Two classes, `train` and `test` images in turn."""
    for part, count in (("train", train), ("test", test)):
        for label in range(2):
            (root / part / f"class{label}").mkdir(parents=True)
        for i in range(count):
            COLOUR.rotate(i).save(root / part / f"class{i % 2}/{i}.png")


def small_evaluation() -> None:
    """Let evaluation take its images in batches of four too."""
    from kdcli import building

    building._EVAL_BATCH = BATCH


@pytest.mark.parametrize("student", STUDENTS)
def test_any_number_of_training_images(student, tmp_path):
    """R19: N = 0, 1, B-1, B, B+1 works, or is refused before training: 3 where a class has no image, 2 for a batch of one."""
    stock()
    for count in (0, 1, 2, BATCH - 1, BATCH, BATCH + 1, 2 * BATCH - 1, 2 * BATCH + 1):
        folder = fresh(tmp_path / str(count))
        counted(folder / "d", count, 3)
        more = ["--student", student, "--epochs", "2", "--max-steps", "9", "--image-size", "32"]
        found = trial(words("folder:d", *more), folder, writable=["run"], patience=200)
        expected = 3 if count < 2 else 2 if student == "resnet8" and count % BATCH == 1 else 0
        wrong = complaints(found, [expected])
        assert not wrong, f"{count}: {told(found, wrong)}"
        assert (folder / "run/student.safetensors").exists() == (expected == 0)
        if expected == 2:
            assert "--batch-size" in found.err
            assert not (folder / "run/state").exists()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("student", STUDENTS)
def test_every_test_image_counts_once(student, way, tmp_path):
    """R19: n of the metrics is the number of test images, in whatever batches they come."""
    stock()
    for count in (1, BATCH - 1, BATCH, BATCH + 1, 2 * BATCH + 1):
        folder = fresh(tmp_path / str(count))
        counted(folder / "d", 6, count)
        more = ["--student", student, "--image-size", "32", "--max-steps", "100", *way]
        found = trial(words("folder:d", *more), folder, before=small_evaluation, writable=["run"], patience=200)
        wrong = complaints(found, [0])
        assert not wrong, f"{count}: {told(found, wrong)}"
        assert json.loads((folder / "run/summary.json").read_text())["metrics"]["test"]["n"] == count


def unchecked() -> None:
    """`kd` that does not look at the size of the last batch."""
    from kdcli import training

    training.check_batches = lambda *_: None


def test_the_check_of_batches_has_teeth(tmp_path):
    """Without it a batch of one reaches BatchNorm: at 8 pixels the last maps have a single place, and torch refuses them."""
    stock()
    counted(tmp_path / "d", BATCH + 1, 3)
    found = trial(
        words("folder:d", "--image-size", "8", "--max-steps", "9"), tmp_path, before=unchecked, writable=["run"]
    )
    assert complaints(found, [2])
