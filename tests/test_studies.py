"""The shipped studies: every method is in one, each is one recipe, and the long ones run for a few steps here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdcli import presets
from kdcli.methods import SHIPPED
from kdcli.specs import RunSpec
from kdcli.sweep import file as sweepfile
from kdcli.sweep.planning import expand, steps

STUDIES = sorted(name for name in presets.sweeps() if name.startswith("studies/"))


def _specs(name: str) -> list[RunSpec]:
    return [run.spec for run in expand(name) if run.spec is not None]


def test_there_are_five():
    names = ("cpu", "cpu-vsd", "cpu-weights", "gpu", "gpu-vsd")
    assert [f"studies/{name}" for name in names] == STUDIES


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_compares_methods_and_nothing_else(name: str):
    """One recipe, one share of the images, one student; at least two seeds of every row; CIFAR-100 whole for testing."""
    specs = _specs(name)
    # At the literature's length each method keeps its authors' kind of momentum.
    usual = {"nesterov"} if name == "studies/gpu" else set()
    recipes = {json.dumps(spec.train.model_dump(exclude={"teacher_lr", *usual}), sort_keys=True) for spec in specs}
    assert len(recipes) == 1
    assert len({(spec.student, spec.data.dataset, spec.data.train_fraction, spec.data.ratio) for spec in specs}) == 1
    assert {spec.data.dataset for spec in specs} == {"cifar100"}
    assert len({spec.teacher for spec in specs} - {None}) == 1
    seeds: dict[str, list[int]] = {}
    for run in expand(name):
        for cell in run.cells:
            assert run.spec is not None
            seeds.setdefault(cell.label, []).append(run.spec.seed)
    assert seeds
    assert all(sorted(found) == list(range(len(found))) and len(found) > 1 for found in seeds.values())


def test_the_cpu_studies_hold_every_method():
    """Each with its defaults, but for warm-ups that are longer than the run."""
    found: dict[str, dict[str, object]] = {}
    for name in ("studies/cpu", "studies/cpu-vsd"):
        for entry in sweepfile.load(name).axes.methods:
            found.setdefault(entry.name, entry.settings)
    assert set(found) == set(SHIPPED)
    assert all(set(settings) <= {"warmup"} for settings in found.values())


def test_assistants_are_those_the_row_names():
    taught = {run.spec.method["name"]: run.spec for run in steps("studies/cpu") if run.spec and run.stage == "student"}
    assert {name for name, spec in taught.items() if spec.assistant} == {"takd", "dgkd"}
    assistants = [run.spec for run in steps("studies/cpu") if run.stage == "assistant" and run.spec is not None]
    assert [(spec.student, spec.data.ratio) for spec in assistants] == [("resnet14", 1.0)] * 2


def test_published_numbers_of_a_study_are_those_of_the_tables():
    """A study repeats numbers for its pair; each stands in a paper's table too."""
    for name in STUDIES:
        for row in sweepfile.load(name).published:
            method = next(entry.name for entry in sweepfile.load(name).axes.methods if entry.label == row.label)
            known = [value for _, published in sweepfile.published(method) for value in published.values]
            assert set(row.values) <= set(known), row.label


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_for_two_steps(name: str, kd, tmp_path: Path):
    """The very runs, on small random images of CIFAR-100's shape, with small batches."""
    sets = ["data.dataset=synthetic", "train.batch_size=4", "system.device=cpu", "system.workers=0"]
    words = [word for text in [*sets, "train.max_steps=2"] for word in ("--set", text)]
    result = kd("sweep", name, *words, "--only", "seed=0", "--json")
    assert result.code == 0, result.err
    runs = result.json["runs"]
    assert {run["status"] for run in runs} == {"done"}
    students = {run["run"] for run in runs if run["stage"] == "student"}
    assert len(students) == len(sweepfile.load(name).axes.methods)
    for directory in students:
        summary = json.loads((tmp_path / directory / "summary.json").read_text())
        assert 0 <= summary["metrics"]["test"]["top1"] <= 100
