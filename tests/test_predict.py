"""Files are classified as evaluation sees them, in order, one JSON line each, whatever else lies among them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import command, environment, finish, spawn
from PIL import Image

import kdcli
from kdcli import checkpoint
from kdcli.errors import Stopped
from kdcli.output import Story
from kdcli.predict import Asked, predict, prediction_line
from kdcli.preprocessing import Preprocessing

CLASSES = ("blue", "green", "red")
TRAIN = [
    *("distill", "--method", "none", "--student", "resnet8", "--epochs", "4", "--batch-size", "6", "--threads", "1"),
    *("--device", "cpu", "--workers", "0", "--augment", "none", "--lr", "0.05"),
]


def picture(path: Path, colour: int, seed: int) -> None:
    """A photograph-like file, 60 x 44, mostly of one colour channel."""
    draw = np.random.default_rng(seed)
    values = draw.integers(0, 120, (44, 60, 3), dtype=np.uint8)
    values[..., colour] += draw.integers(60, 130, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 8 training and 4 test images."""
    folder = tmp_path_factory.mktemp("photos")
    for label, name in enumerate(CLASSES):
        for number in range(12):
            part = "train" if number < 8 else "val"
            picture(folder / part / name / f"{number}.jpg", 2 - label, 100 * label + number)
    return folder


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on them at 16 pixels (held in memory) and at 128 (read file by file, with ImageNet's margin)."""
    from kdcli.__main__ import run

    folder = tmp_path_factory.mktemp("trained")
    for size in (16, 128):
        words = [*TRAIN, "--dataset", f"folder:{photos}", "--image-size", str(size), "--quiet"]
        assert run([*words, "--out", str(folder / str(size))]) == 0
    return folder


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("size", [16, 128])
def test_files_are_seen_as_in_evaluation(size, kd, photos, trained):
    """The share that is classified right is the accuracy that the run measured on the same files."""
    result = kd("predict", trained / str(size), photos / "val", "--threads", 1)
    assert result.code == 0, result.err
    found = lines(result.out)
    assert len(found) == 12
    right = sum(Path(one["path"]).parent.name == one["class"] for one in found)
    summary = json.loads((trained / str(size) / "summary.json").read_text())
    assert 100 * right / 12 == pytest.approx(summary["metrics"]["test"]["top1"], abs=1e-3)
    assert summary["metrics"]["test"]["top1"] > 50


def test_the_margin_is_that_of_the_evaluation(kd, photos, trained):
    """Above 128 pixels the shorter side is brought to 256/224 of the size; a checkpoint without the entry means the same."""
    metadata = checkpoint.read_metadata(trained / "128/student.safetensors")
    assert metadata["resize"] == 146
    assert Preprocessing.of(metadata) == Preprocessing(128, 146)
    del metadata["resize"]
    assert Preprocessing.of(metadata) == Preprocessing(128, 146)
    assert Preprocessing.of({"image_size": 224, "dataset": "cifar100"}) == Preprocessing(224, 224)
    assert Preprocessing.of({"image_size": 224, "dataset": None}) == Preprocessing(224, 256)
    assert Preprocessing.of({"image_size": 64, "dataset": "folder:x"}) == Preprocessing(64, 64)


def test_the_answer_is_that_of_load(kd, photos, trained):
    """Confidence is the softmax of the class logits; the top classes come in falling order, indices with them."""
    path = photos / "val/red/9.jpg"
    (one,) = lines(kd("predict", trained / "16", path, "--top", 2).out)
    classify = kdcli.load(trained / "16")
    with torch.no_grad():
        shares = classify(Preprocessing.of(classify.metadata).read(path)[None]).softmax(1)[0]
    values, indices = shares.topk(2)
    assert [top["index"] for top in one["top"]] == indices.tolist()
    assert [top["confidence"] for top in one["top"]] == pytest.approx(values.tolist(), abs=2e-5)
    assert [top["class"] for top in one["top"]] == [CLASSES[i] for i in indices.tolist()]
    assert (one["class"], one["index"], one["confidence"]) == tuple(
        one["top"][0][k] for k in ("class", "index", "confidence")
    )
    assert len(lines(kd("predict", trained / "16", path, "--top", 99).out)[0]["top"]) == 3


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_exported_files_classify_alike(suffix, kd, photos, trained, tmp_path):
    """Same classes, same confidences, from a file that knows its own preprocessing."""
    if suffix == "onnx":
        pytest.importorskip("onnxruntime", reason="the extra kdcli[onnx] is not installed")
    out = tmp_path / f"net.{suffix}"
    assert kd("export", trained / "128", "--out", out, "--inputs", "uint8", "--outputs", "probabilities").code == 0
    trust = ["--trust"] if suffix == "pt2" else []
    ours, theirs = (
        lines(kd("predict", source, photos / "val", "--batch-size", 5, *more).out)
        for source, more in ((trained / "128", []), (out, trust))
    )
    assert [one["class"] for one in ours] == [one["class"] for one in theirs]
    assert [one["confidence"] for one in ours] == pytest.approx([one["confidence"] for one in theirs], abs=1e-4)
    refused = kd("predict", out, photos / "val", "--mode", "aggregate", *trust)
    assert refused.code == 4
    assert "exported for single" in refused.error
    assert kd("predict", out, photos / "val", "--device", "cuda", *trust).code == 2


def test_a_pt2_file_is_opened_only_on_demand(kd, tmp_path):
    """torch reads it without restriction, so a stranger's file could do anything: exit 2 before it is touched."""
    (tmp_path / "x.pt2").write_bytes(b"anything")
    result = kd("predict", "x.pt2", "x.jpg")
    assert result.code == 2
    assert "--trust" in result.error


def test_what_cannot_be_read_is_told_and_the_rest_done(kd, photos, trained, tmp_path):
    """One line each on stderr, also with --quiet; the good ones in their order; exit 3 at the end."""
    good = photos / "val/red/9.jpg"
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "cut.jpg").write_bytes(good.read_bytes()[:300])
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    bad = ["text.jpg", "gone.jpg", "cut.jpg", "pipe.png", "new\nline.jpg"]
    words = [good, *bad[:3], good, *bad[3:], photos / "val/blue/8.jpg"]
    result = kd("predict", trained / "16", *words, "--quiet", "--batch-size", 2)
    assert result.code == 3
    assert [one["path"] for one in lines(result.out)] == [str(good), str(good), str(photos / "val/blue/8.jpg")]
    skipped = [line for line in result.err.splitlines() if line.startswith("skipped: ")]
    assert len(skipped) == len(bad)
    assert all(name.replace("\n", "\\x0a") in line for name, line in zip(bad, skipped, strict=True))
    assert "5 of 8 images" in result.error
    document = kd("predict", trained / "16", *words, "--json").json
    assert document["ok"] is False
    assert document["classified"] == len(document["predictions"]) == 3
    assert [one["path"] for one in document["unreadable"]] == bad
    empty = kd("predict", trained / "16", "folder.jpg")
    assert empty.code == 3
    assert "holds no image" in empty.error


def test_a_folder_without_images_keeps_no_other_from_being_classified(kd, photos, trained, tmp_path):
    (tmp_path / "empty").mkdir()
    good = photos / "val/red"
    result = kd("predict", trained / "16", "empty", good, "--quiet")
    assert result.code == 3
    assert len(lines(result.out)) == 4
    assert result.err.splitlines()[0] == "skipped: empty holds no image"
    assert "1 of 5 paths could not be read" in result.error
    document = kd("predict", trained / "16", good, "empty", "--json").json
    assert document["classified"] == 4
    assert document["unreadable"] == [{"path": "empty", "message": "empty holds no image"}]


@pytest.mark.parametrize("side", ["wide", "long"])
def test_a_very_long_image_is_refused_by_its_header(kd, photos, trained, tmp_path, side):
    """Resized by its shorter side it would be 50,000 times as long as the network's input."""
    size = (100_000, 2) if side == "wide" else (2, 100_000)
    Image.new("L", size).save(tmp_path / "line.png")
    Image.new("L", (200, 2)).save(tmp_path / "strip.png")
    result = kd("predict", trained / "16", "line.png", "strip.png")
    assert result.code == 3
    assert "line.png is more than 100 times as long as wide (100000 by 2 pixels)" in result.err
    assert [one["path"] for one in lines(result.out)] == ["strip.png"]


@pytest.mark.parametrize("end", ["\n", "\0"])
def test_paths_from_stdin(end, kd, photos, trained, monkeypatch):
    """`-` is a list, one a line or with NULs between; it may stand among other paths."""
    paths = sorted(str(path) for path in (photos / "val").rglob("*.jpg"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("".join(p + end for p in paths[1:]).encode())))
    result = kd("predict", trained / "16", paths[0], "-")
    assert result.code == 0
    assert [one["path"] for one in lines(result.out)] == paths


def test_folders_are_walked_in_order(kd, trained, photos, tmp_path):
    """Images at any depth by name; no dot-names, nothing behind linked folders, no other files."""
    for name in ("b/2.jpg", "b/10.jpg", "a.JPG", ".hidden.jpg", ".git/x.jpg", "b/c/1.jpg"):
        (tmp_path / "walk" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "walk" / name).write_bytes((photos / "val/red/9.jpg").read_bytes())
    (tmp_path / "walk/notes.txt").write_text("no image")
    (tmp_path / "walk/linked").symlink_to(photos)
    result = kd("predict", trained / "16", "walk")
    assert result.code == 0
    assert [one["path"] for one in lines(result.out)] == [
        f"walk/{n}" for n in ("a.JPG", "b/10.jpg", "b/2.jpg", "b/c/1.jpg")
    ]


def test_a_folder_that_cannot_be_listed_is_not_passed_over(kd, trained, photos, tmp_path, monkeypatch):
    """Its images would be missing from the answer without a word: exit 3 before anything is classified."""
    (tmp_path / "walk/locked").mkdir(parents=True)
    (tmp_path / "walk/1.jpg").write_bytes((photos / "val/red/9.jpg").read_bytes())
    scandir = os.scandir

    def refusing(path):
        if os.fspath(path).endswith("locked"):  # no permission keeps root out
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    result = kd("predict", trained / "16", "walk")
    assert result.code == 3
    assert "walk/locked cannot be listed: Permission denied" in result.error
    assert result.out == ""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_text(kd, trained, photos, tmp_path):
    """A path that is not UTF-8 comes back so that it can be found again, and terminal escapes stay harmless."""
    raw = os.fsencode(tmp_path) + b"/caf\xe9 \x1b[31m.jpg"
    Path(os.fsdecode(raw)).write_bytes((photos / "val/red/9.jpg").read_bytes())
    result = kd("predict", trained / "16", os.fsdecode(raw))
    assert result.code == 0
    assert result.out.isascii()
    assert "\x1b" not in result.out
    assert os.fsencode(lines(result.out)[0]["path"]) == raw


def test_rows_for_people():
    """On a terminal: confidence, class, path, runners-up; nothing in a name moves the cursor or breaks the line."""
    top = [
        {"class": "a\x1b[2Jb\n", "index": 0, "confidence": 0.75},
        {"class": "x" * 90, "index": 1, "confidence": 0.25},
    ]
    row = prediction_line({"path": "p\t.jpg", **top[0], "top": top})
    name = "a\\x1b[2Jb\\x0a".ljust(24)
    assert row == f" 75.00 %  {name}  p\\x09.jpg  ({'x' * 23}… 25.0 %)"


def test_a_terminal_gets_rows(trained, photos, tmp_path):
    """And a pipe JSON lines, from the same command."""
    import pty

    leader, follower = pty.openpty()
    process = spawn("predict", trained / "16", photos / "val/red", cwd=tmp_path, stdout=follower)
    os.close(follower)
    assert finish(process).code == 0
    shown = os.read(leader, 10**5).decode()
    os.close(leader)
    assert shown.count(" %  ") >= 4
    assert "{" not in shown


def test_a_reader_that_leaves_ends_it(trained, photos, tmp_path):
    """`| head -1` does not make the rest be classified in vain, and is no error."""
    words = " ".join(map(str, command("predict", trained / "16", photos, "--batch-size", "1", "--json")[:-1]))
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; {words} | (read -r one; echo "$one")'],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(lines(done.stdout)) == 1
    assert "Traceback" not in done.stderr


def test_stopped_in_the_middle_nothing_more_is_read(trained, photos, monkeypatch):
    """Ctrl-C waits for no file that has not been begun, and takes the bar away, which had hidden the cursor."""
    read, begun = Preprocessing.read, []

    def slowly(self, path):
        begun.append(path)
        time.sleep(0.05)
        return read(self, path)

    monkeypatch.setattr(Preprocessing, "read", slowly)
    monkeypatch.setattr("kdcli.predict.threads", lambda: 1)
    story = Story(quiet=True)
    ended = []
    monkeypatch.setattr(story, "end", lambda: ended.append(True))
    files = [str(photos / "val/red/9.jpg")] * 60

    def interrupt(prediction):
        raise Stopped("interrupted", 130)

    with pytest.raises(Stopped):
        predict(str(trained / "16"), files, Asked(batch_size=2, device="cpu", threads=1), story, interrupt)
    assert len(begun) < 8
    assert ended


def test_the_ways_of_inference(kd, teachers, photos):
    """A joint head has three, an ordinary network one."""
    answers = {}
    for mode in ("single", "marginal", "aggregate"):
        result = kd("predict", teachers / "vsd", photos / "val/red/9.jpg", "--mode", mode, "--top", 10)
        assert result.code == 0
        (one,) = lines(result.out)
        assert sum(top["confidence"] for top in one["top"]) == pytest.approx(1, abs=1e-4)
        answers[mode] = one["top"]
    assert answers["single"] != answers["aggregate"] != answers["marginal"]
    assert (
        lines(kd("predict", teachers / "vsd", photos / "val/red/9.jpg", "--top", 10).out)[0]["top"] == answers["single"]
    )
    refused = kd("predict", teachers / "kd", photos / "val/red/9.jpg", "--mode", "aggregate")
    assert refused.code == 4
    assert "it has single" in refused.error
    assert kd("predict", teachers / "kd", photos / "val/red/9.jpg", "--mode", "agregate").code == 2


def test_the_network_must_be_sound(kd, trained, photos, tmp_path):
    """Missing or damaged: exit 3; it never depends on the images."""
    assert kd("predict", "nothing.safetensors", photos / "val").code == 3
    damaged = bytearray((trained / "16/student.safetensors").read_bytes())
    damaged[-5] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(damaged)
    assert kd("predict", "bad.safetensors", photos / "val").code == 3
