"""R11: mutated specs, presets and sweep files: values, types, keys, nesting, bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Collection
from pathlib import Path

import pytest
from fuzzing import HARMLESS, Trial, campaign, shown, stock, trial
from mutators import NASTY, json_text, toml_text, twisted

from kdcli.specs import checking

REFUSED = (2, 3, 4)
SMALL = ["--image-size", "8", "--batch-size", "4", "--device", "cpu", "--threads", "1", "--dry-run"]

PRESET = """
student = "resnet8"
seed = 0

[about]
title = "a preset"

[method]
name = "kd"
temperature = 4.0

[data]
dataset = "digits"
train_fraction = 0.1

[train]
epochs = 3
lr = 0.05
milestones = [0.5, 0.75]
schedule = "step"
optimizer = "sgd"

[system]
workers = 0
"""

SWEEP = """
student = "resnet8"

[about]
title = "a table"
kind = "table"
teachers = "own"
epoch = "last"

[data]
dataset = "digits"

[train]
epochs = 3

[sweep]
pairs = [["resnet14", "resnet8"], ["wrn16_2", "wrn16_1"]]
methods = ["none", {name = "kd", label = "KD", temperature = 3.0}, {name = "vsd", settings = {transform = "rot4"}}]
seeds = [0, 1]
"train.batch_size" = [64, 128]

[[published]]
label = "KD"
values = [70.1, 71.2]
"""


def harmless_as_asked(value: object) -> object:
    """A mutated spec that does not ask for a network: downloads and library weights are not what is tested here."""
    if isinstance(value, dict):
        return {k: harmless_as_asked(v) for k, v in value.items() if k not in ("download", "pretrained")}
    return value


def a_spec(draw: random.Random, folder: Path) -> tuple[Trial, Collection[int]]:
    """The spec.json of a run, given as a preset."""
    spec = json.loads((stock().whole["kd"] / "spec.json").read_text())
    if draw.random() < 0.3:
        spec["method"] = draw.choice(({"name": "vsd"}, {"name": "crd"}, {"name": "slkd"}, {"name": "lskd"}))
    if draw.random() < 0.2:
        spec["command"] = "pretrain-teacher"
    value = harmless_as_asked(twisted(spec, draw, draw.choice((1, 1, 2, 5))))
    path = folder / draw.choice(("x.json", "x.toml", "x"))
    path.write_bytes(json_text(value, draw))
    command = "pretrain-teacher" if spec["command"] == "pretrain-teacher" else "distill"
    return trial([command, "--preset", path, *SMALL], folder), (HARMLESS, *REFUSED)


def a_preset(draw: random.Random, folder: Path) -> tuple[Trial, Collection[int]]:
    """A preset in TOML."""
    (folder / "x.toml").write_bytes(toml_text(PRESET, draw))
    words = ["distill", "--preset", "x.toml", "--teacher", stock().teacher, *SMALL]
    return trial(words, folder), (HARMLESS, *REFUSED)


def a_sweep(draw: random.Random, folder: Path) -> tuple[Trial, Collection[int]]:
    """A sweep file, whose plan is asked for."""
    (folder / "x.toml").write_bytes(toml_text(SWEEP, draw))
    return trial(["sweep", "x.toml", "--plan", *draw.choice(([], ["--json"]))], folder), (HARMLESS, *REFUSED)


def a_setting(draw: random.Random, folder: Path) -> tuple[Trial, Collection[int]]:
    """`--set` and flags with any value, on a command line that was sound."""
    made = stock()
    spec = json.loads((made.whole["kd"] / "spec.json").read_text())
    section = draw.choice(["data", "train", "system", "method", "probe", ""])
    keys = [key for key in (spec[section] if section else spec) if key not in ("download", "pretrained")]
    key = ".".join(filter(None, [section, draw.choice([*keys, "x"])]))
    value = draw.choice(NASTY)
    text = json.dumps(value) if draw.random() < 0.6 else str(value)[:4000]
    text = text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape").replace("\0", "")
    words = ["distill", "--method", "kd", "--student", "resnet8", "--dataset", "digits", "--train-fraction", "0.1"]
    words = [*words, "--teacher", str(made.teacher), *SMALL]
    return trial([*words, "--set", f"{key}={text}"], folder), (HARMLESS, *REFUSED)


KINDS = {"a_spec": (a_spec, 14, 1200), "a_preset": (a_preset, 10, 600), "a_sweep": (a_sweep, 8, 500)}
KINDS["a_setting"] = (a_setting, 8, 300)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_mutated_specs(kind, tmp_path):
    """R11, a sample: exit 2, 3 or 4 with one line, or 0 where the mutation changed nothing that matters."""
    one, count, _ = KINDS[kind]
    failures = campaign(kind, count, tmp_path, one)
    assert not failures, shown(failures)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_specs(kind, tmp_path):
    """R11: 2,600 mutations of specs, presets, sweep files and settings."""
    one, _, count = KINDS[kind]
    failures = campaign(kind, count, tmp_path, one)
    assert not failures, shown(failures)


def test_these_checks_have_teeth(monkeypatch, tmp_path):
    """Without a sentence for each of pydantic's complaints, a wrong value is a bug in kd and no usage error."""

    def as_it_is(model, problem, prefix=""):
        raise problem

    monkeypatch.setattr(checking, "explain", as_it_is)
    assert campaign("a_spec", 12, tmp_path, a_spec)
