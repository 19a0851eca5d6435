"""docs/own-images.md, command by command, on a folder such as people have: odd names, odd files, few of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from harness import ROOT, environment
from PIL import Image
from warm_kd import Warm

PAGE = ROOT / "docs" / "own-images.md"
CLASSES = ["Golden Retriever", "a|b `c` <i>#", "кошка", "🐦 bird"]
# What the page trains for an hour with fetched weights is done here in seconds and without a network.
INSTEAD = {
    "timm:resnet50": "timm:resnet10t",
    "timm:mobilenetv3_small_100": "timm:mobilenetv3_small_050",
    "--pretrained": "--no-pretrained --no-teacher-pretrained --image-size 32 --max-steps 3 --batch-size 8 --device cpu",
}


def photo(path: Path, mode: str, seed: int) -> None:
    """A file of some colour mode, of a size of its own."""
    draw = np.random.default_rng(seed)
    values = draw.integers(0, 256, (int(draw.integers(20, 60)), int(draw.integers(20, 60)), 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).convert(mode).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `photos` and `new`."""
    folder = tmp_path_factory.mktemp("own")
    files = [
        ("1.jpg", "RGB"),
        ("2.JPEG", "L"),
        ("3.jpg", "CMYK"),
        ("sub folder/4.png", "P"),
        ("5.png", "LA"),
        ("6.tiff", "I;16"),
    ]
    for label, name in enumerate(CLASSES):
        for number, (file, mode) in enumerate(files[: 2 if label == 3 else 6]):
            if mode == "I;16":
                values = np.random.default_rng(label).integers(0, 65536, (30, 40)).astype(np.uint16)
                Image.fromarray(values).save(folder / "photos" / name / file)
            else:
                photo(folder / "photos" / name / file, mode, 10 * label + number)
    photo(folder / "photos/.ipynb_checkpoints/1.jpg", "RGB", 99)
    (folder / "photos/кошка/notes.txt").write_text("no image")
    for number, mode in enumerate(("RGB", "L", "CMYK")):
        photo(folder / f"new/{mode} ü.jpg", mode, 200 + number)
    photo(folder / "new/photo.jpg", "RGB", 7)
    return folder


def script() -> str:
    """The page's commands as a shell script, less the installation."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if not line.startswith("pip ")]
    text = "\n".join(lines)
    for word, other in INSTEAD.items():
        assert word in text, word
        text = text.replace(word, other)
    return text


@pytest.fixture(scope="module")
def told(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.CompletedProcess[str]]:
    """The page, carried out by a shell."""
    pytest.importorskip("onnxruntime", reason="the extra kdcli[onnx] is not installed")
    pytest.importorskip("onnxscript", reason="the extra kdcli[onnx] is not installed")
    programs = tmp_path_factory.mktemp("bin")
    warm = Warm(programs, {}, programs)
    try:
        yield subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script()],
            cwd=place,
            env={**environment(), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
            timeout=560,
        )
    finally:
        warm.close()


def test_the_page_goes_through(told, place):
    """From the folder to a network that classifies: every command of the page in turn, with exit code 0."""
    assert told.returncode == 0, told.stderr
    assert "training it first" in told.stderr
    assert "a fixed fifth of each class is the test split" in told.stderr
    assert (place / "runs/photos/student.safetensors").exists()
    assert "teacher timm:resnet10t" in told.stdout
    assert "test images of folder:photos" in told.stdout
    assert "finished: top-1" in told.stdout


def test_new_images_get_one_of_the_classes(told, place):
    """Each of them, whatever its colours; names come back as they were written."""
    assert told.returncode == 0, told.stderr
    found = [json.loads(line) for line in (place / "answers.jsonl").read_text("utf-8").splitlines()]
    assert sorted(one["path"] for one in found) == sorted(str(p.relative_to(place)) for p in (place / "new").iterdir())
    assert all(sorted(top["class"] for top in one["top"]) == sorted(CLASSES) for one in found)


def test_the_script_of_the_page_agrees(told, place):
    """The page's own few lines for ONNX Runtime name the class that kd names (or one that is as good as equal to it)."""
    assert told.returncode == 0, told.stderr
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=place, env={**environment(), "PYTHONIOENCODING": "utf-8"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = (place / "answers.jsonl").read_text("utf-8").splitlines()
    (one,) = [one for one in map(json.loads, lines) if one["path"] == "new/photo.jpg"]
    # Pillow's resizing and torch's differ in the last bit, and three steps of training make nobody sure of anything.
    near = [top["class"] for top in one["top"] if top["confidence"] > one["confidence"] - 0.02]
    assert done.stdout.strip() in near


def test_the_card_is_written_and_harmless(told, place):
    """Class names that look like markup are shown as they are; nothing of it says where the files lay."""
    assert told.returncode == 0, told.stderr
    card = (place / "runs/photos/MODEL_CARD.md").read_text("utf-8")
    for part in (
        "# timm:mobilenetv3\\_small\\_050, distilled with kd on folder:photos",
        "`кошка`",
        "`🐦 bird`",
        "## Limits",
    ):
        assert part in card, part
    assert "`a\\|b 'c' <i>#`" in card
    assert str(place) not in card
    assert "teacher: `timm:resnet10t`" in card
    assert "of 4 test images" in card


def test_dot_names_are_no_classes_and_that_is_said(told, place):
    """`.ipynb_checkpoints` and its like are left out, and counted in a note."""
    assert told.returncode == 0, told.stderr
    assert "1 dot-names ignored" in told.stderr
    classes = json.loads((place / "answers.jsonl").read_text("utf-8").splitlines()[0])["top"]
    assert len(classes) == len(CLASSES)


def test_a_note_on_the_images_is_told_once_though_two_networks_are_trained(kd, tmp_path):
    for number in range(10):
        photo(tmp_path / f"photos/{'ab'[number % 2]}/{number}.png", "RGB", number)
    result = kd(
        *("distill", "--method", "kd", "--dataset", "folder:photos", "--image-size", "16"),
        *("--teacher", "resnet14", "--student", "resnet8"),
        *("--max-steps", "1", "--batch-size", "4", "--device", "cpu", "--workers", "0"),
    )
    assert result.code == 0, result.err
    assert "training it first" in result.err
    assert result.err.count("a fixed fifth of each class is the test split") == 1
