"""R11 and R12: mutated checkpoints, resume states and run directories; every flip and every cut is noticed."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
from fuzzing import HARMLESS, Trial, campaign, shown, stock, trial
from mutators import damaged, forged, json_text, tampered, twisted

from kdcli.checkpoint import layout

REFUSED = (3, 4)
LIMITS = ["--device", "cpu", "--threads", "1"]


def files() -> list[Path]:
    """A student, two teachers (one with heads and a joint label space), and a resume state of each kind of method."""
    made = stock()
    return [made.student, made.teacher, made.joint, *(max((r / "state").iterdir()) for r in made.runs.values())]


def reading(path: Path, draw: random.Random) -> list[object]:
    """One of the commands that read a checkpoint; some know what it is of, and some only that it is one."""
    commands: list[list[object]] = [["verify", path], ["digest", path], ["inspect", path], ["verify", path, "--json"]]
    commands.append(["evaluate", path, "--limit", "5", *LIMITS])
    return draw.choice(commands)


def damage(draw: random.Random, folder: Path) -> tuple[Trial, Collection[int]]:
    """Bytes changed, or a header that does not fit its seal: nothing of it may go unnoticed."""
    content = draw.choice(files()).read_bytes()
    mutated = damaged(content, draw) if draw.random() < 0.7 else tampered(content, draw)
    (folder / "x.safetensors").write_bytes(mutated)
    return trial(reading(Path("x.safetensors"), draw), folder), [HARMLESS] if mutated == content else REFUSED


def forgery(draw: random.Random, folder: Path) -> tuple[Trial, Collection[int]]:
    """A header that lies under a seal that fits: whatever it says, no traceback, and no memory that the file has not."""
    made = stock()
    content = draw.choice([made.student, made.teacher, made.joint]).read_bytes()
    path = folder / "x.safetensors"
    path.write_bytes(forged(content, draw))
    teaching = [*made.words("kd"), "--teacher", path, "--max-steps", "1", "--out", "run"]
    words = teaching if draw.random() < 0.4 else reading(path, draw)
    return trial(words, folder, writable=["run"]), (HARMLESS, *REFUSED)


def state_forgery(draw: random.Random, folder: Path) -> tuple[Trial, Collection[int]]:
    """The newest state of an unfinished run, or both, forged."""
    method = draw.choice(["kd", "kd", "crd"])
    made = stock()
    run = shutil.copytree(made.runs[method], folder / "run")
    states = sorted((run / "state").iterdir())
    for state in states if draw.random() < 0.5 else states[1:]:
        state.write_bytes(forged(state.read_bytes(), draw))
    return trial([*made.words(method), "--out", "run"], folder, writable=["run"]), (HARMLESS, *REFUSED)


def run_directory(draw: random.Random, folder: Path) -> tuple[Trial, Collection[int]]:
    """A JSON file of a run directory, finished or not, with other content."""
    made = stock()
    finished = draw.random() < 0.5
    run = shutil.copytree((made.whole if finished else made.runs)["kd"], folder / "run")
    names = ["spec.json", "summary.json"] if finished else ["spec.json", "env.json", "metrics.jsonl"]
    name = draw.choice(names)
    content = (run / name).read_bytes()
    if name == "metrics.jsonl" or draw.random() < 0.3:
        mutated = damaged(content, draw)
    else:
        value = twisted({"x": json.loads(content)}, draw, draw.choice((1, 2))).get("x")
        mutated = json_text(value, draw) if isinstance(value, dict) else json.dumps(value).encode()
    (run / name).write_bytes(mutated)
    words = [*made.words("kd"), "--out", "run", *draw.choice(([], ["--json"]))]
    return trial(words, folder, writable=["run"]), (HARMLESS, 2, *REFUSED)


KINDS: dict[str, tuple[Callable[[random.Random, Path], tuple[Trial, Collection[int]]], int, int]] = {
    "damage": (damage, 30, 4700),
    "forgery": (forgery, 16, 700),
    "state_forgery": (state_forgery, 2, 100),
    "run_directory": (run_directory, 5, 200),
}
"""What is mutated, how often in the normal tests, and how often in the slow ones."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_mutated_checkpoints(kind, tmp_path):
    """R11, a sample: one line, the right code, nothing else."""
    one, count, _ = KINDS[kind]
    failures = campaign(kind, count, tmp_path, one)
    assert not failures, shown(failures)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_checkpoints(kind, tmp_path):
    """R11: 5,700 mutations of checkpoints, states and run directories."""
    one, _, count = KINDS[kind]
    failures = campaign(kind, count, tmp_path, one)
    assert not failures, shown(failures)


def test_these_checks_have_teeth(monkeypatch, tmp_path):
    """A reader that looks neither at the digest nor at the seal takes what it should not, or falls over it."""
    for name in ("require_digest", "require_seal"):
        monkeypatch.setattr(layout, name, lambda *_: None)
    assert campaign("damage", 12, tmp_path, damage)
