"""R16: a run goes on only under the spec it began with; R17: a teacher must know the classes of the data set, by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzzing import Trial, complaints, stock, told, trial
from harness import snapshot

from kdcli import checkpoint
from kdcli.specs import RunSpec, Section

OTHER: dict[str, Any] = {
    "method": None,  # its settings follow
    "teacher": "wrn16_2",
    "assistant": None,  # only methods that take assistants have any
    "student": "resnet14",
    "teacher_taps": ["layer1"],
    "student_taps": ["layer1"],
    "encoder": "elsewhere",
    "pretrained": True,
    "teacher_pretrained": True,
    "seed": 1,
    "data.dataset": "synthetic",
    "data.image_size": 16,
    "data.augment": "flip",
    "data.rand_augment": "rand-m9",
    "data.color_jitter": 0.1,
    "data.erasing": 0.1,
    "data.mixup": 0.1,
    "data.cutmix": 0.1,
    "data.mix_prob": 0.5,
    "data.mix_switch": 0.1,
    "data.train_fraction": 0.2,
    "data.ratio": 0.5,
    "data.val_fraction": 0.2,
    "data.split_seed": 1,
    "train.optimizer": "adamw",
    "train.schedule": "onecycle",
    "train.decay": "weights",
    "train.nesterov": True,
    "train.milestones": [0.25],
    "train.momentum": 0.5,
    "train.gamma": 0.5,
    "train.label_smoothing": 0.1,
    "train.clip_grad": 1.0,
    "train.ema": 0.5,
    "system.precision": "bf16",
    "system.compile": True,
    "probe.normalization": "half",
}
"""Another value of each field whose default plus one is none."""

ASIDE = {
    "baseline": False,
    "data.data_dir": "elsewhere",
    "data.download": True,
    "data.resident_mib": 100,
    "system.cuda_graphs": False,
    "system.workers": 1,
    "system.data_timeout": 33.0,
    "system.rank_timeout": 33.0,
    "system.runs_dir": "elsewhere",
    "system.checkpoint_every": 5,
    "system.max_minutes": 9.0,
    "system.requeue": True,
}
"""Fields that may differ when a run is started again, with other values; device, threads, nproc, out and overwrite are
tested by themselves elsewhere."""


def semantic() -> dict[str, Any]:
    """Every field of the spec that is part of a run's identity, with another value than the stock run has."""
    spec = json.loads((stock().whole["kd"] / "spec.json").read_text())
    found: dict[str, Any] = {}

    def visit(model: type[Section], values: dict[str, Any], prefix: str) -> None:
        for name, field in model.model_fields.items():
            path, value = prefix + name, values.get(name)
            extra = field.json_schema_extra
            if path == "command" or (isinstance(extra, dict) and extra.get("identity") is False):
                continue
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                visit(field.annotation, value or {}, f"{path}.")
            elif path in OTHER:
                found[path] = OTHER[path]
            else:  # a number, or none yet
                found[path] = value * 2 if value else 1 if "epochs" in path or path.startswith("probe") else 0.01

    visit(RunSpec, spec, "")  # type: ignore[arg-type]
    found |= {f"method.{key}": value for key, value in {"temperature": 2.0, "teacher_scale": 2}.items()}
    found["method.scale_mode"] = "nearest"
    return {path: value for path, value in found.items() if value is not None}


def resumed(path: str, value: Any, folder: Path, before: Callable[[], None] | None = None) -> tuple[Trial, list[str]]:
    """An unfinished run started again with one field changed; what is wrong with how that ended."""
    made = stock()
    run = shutil.copytree(made.runs["kd"], folder / "run")
    kept = {name: content for name, content in snapshot(run).items() if name != ".lock"}
    words = [*made.words("kd"), "--out", "run", "--set", f"{path}={json.dumps(value)}"]
    found = trial(words, folder, before=before, writable=["run"])
    wrong = complaints(found, [4])
    leaf = path.split(".")[-1]
    if not (f"{leaf} was " in found.err and ", is " in found.err):
        wrong.append("field, old and new value not named")
    if {name: content for name, content in snapshot(run).items() if name != ".lock"} != kept:
        wrong.append("the run was changed")
    return found, wrong


def test_every_semantic_field_is_refused(tmp_path):
    """R16: exit 4 naming field, old and new value; the run in the directory stays as it was."""
    fields = semantic()
    assert len(fields) > 50
    refused, failures = 0, []
    for number, (path, value) in enumerate(fields.items()):
        found, wrong = resumed(path, value, tmp_path / str(number))
        if found.code == 2:  # it makes no sense here at all, which is told before any directory is looked at
            wrong = complaints(found, [2])
        else:
            refused += 1
        if wrong:
            failures.append(told(found, wrong))
    assert not failures, f"{len(failures)}\n" + "\n".join(failures[:5])
    assert refused >= 0.9 * len(fields)
    print(f"R16: {len(fields)} fields changed: {refused} refused as drift, the others as nonsense")


def test_other_fields_are_allowed(tmp_path):
    """Where and how, but not what: the run goes on and finishes."""
    made = stock()
    shutil.copytree(made.runs["kd"], tmp_path / "run")
    changes = [f"--set={path}={json.dumps(value)}" for path, value in ASIDE.items()]
    found = trial([*made.words("kd"), "--out", "run", *changes], tmp_path, writable=["run"])
    wrong = complaints(found, [0])
    assert not wrong, told(found, wrong)
    assert checkpoint.digest(tmp_path / "run") == checkpoint.digest(made.whole["kd"])


def drifting() -> None:
    """`kd` that goes on whatever the spec says."""
    from kdcli.runs import directory

    directory.refuse_drift = lambda *_: None


def test_the_check_of_drift_has_teeth(tmp_path):
    """Without the comparison, another learning rate is found out."""
    _, wrong = resumed("train.momentum", 0.5, tmp_path, before=drifting)
    assert any("exit code" in one for one in wrong)


# ------------------------------------------------------------------------------------------------------------ the teacher

CHANGES: dict[str, Callable[[list[str]], list[str]]] = {
    "permuted": lambda names: [names[1], names[0], *names[2:]],
    "reversed": lambda names: names[::-1],
    "renamed": lambda names: ["zero", *names[1:]],
    "missing": lambda names: names[:-1],
    "extra": lambda names: [*names, "10"],
}


def taught_by(
    change: Callable[[dict[str, Any]], None], folder: Path, before: Callable[[], None] | None = None
) -> Trial:
    """A distillation from the stock teacher with changed metadata."""
    tensors, metadata = checkpoint.load(stock().teacher)
    change(metadata)
    checkpoint.save(folder / "t.safetensors", tensors, metadata)
    words = [*stock().words("kd"), "--teacher", folder / "t.safetensors", "--out", "run"]
    return trial(words, folder, before=before, writable=["run"])


@pytest.mark.parametrize("name", CHANGES)
def test_classes_of_the_teacher(name, tmp_path):
    """R17: permuted, renamed, missing or extra classes: exit 4, in a training and in an evaluation, and no run is left."""
    found = taught_by(lambda metadata: metadata.update(classes=CHANGES[name](metadata["classes"])), tmp_path)
    wrong = complaints(found, [4])
    assert not wrong, told(found, wrong)
    assert "classes" in found.err or "class" in found.err
    assert not (tmp_path / "run/spec.json").exists()
    found = trial(["evaluate", "t.safetensors", "--device", "cpu", "--threads", "1"], tmp_path)
    assert not (wrong := complaints(found, [4])), told(found, wrong)


def test_another_normalisation_is_told(tmp_path):
    """A teacher trained on otherwise normalised images teaches, and it is said; so is its accuracy, before epoch 1."""
    found = taught_by(lambda m: m["normalization"].update(mean=[0.1, 0.2, 0.3]), tmp_path)
    assert not (wrong := complaints(found, [0])), told(found, wrong)
    assert "was trained with mean [0.1, 0.2, 0.3] and std" in found.err
    assert found.err.index("% on 250 test images") < found.err.index("epoch 1/")
    sound = trial([*stock().words("kd"), "--out", "run2"], tmp_path, writable=["run2"])
    assert "was trained with mean" not in sound.err


def test_a_spread_of_the_images_that_differs_is_told(tmp_path):
    """The standard deviation counts as well as the mean."""
    found = taught_by(lambda m: m["normalization"].update(std=[0.1, 0.2, 0.3]), tmp_path)
    assert "was trained with" in found.err


@pytest.mark.parametrize("method", ["kd", "vsd", "crd", "slkd"])
def test_the_teacher_stays_as_it_was(method):
    """R17: the digest of the teacher that the student's checkpoint names is that of the file, which nobody wrote to."""
    made = stock()
    file = made.joint if method == "vsd" else made.teacher
    summary = json.loads((made.whole[method] / "summary.json").read_text())
    assert summary["teacher"]["digest"] == checkpoint.digest(file)


def in_train_mode() -> None:
    """`kd` whose teacher keeps its BatchNorm layers and is in training mode, so that their statistics drift."""
    from kdcli.engine.step import StudentStep
    from kdcli.methods.base import Method

    original = StudentStep.forward
    Method.needs_batchnorm = lambda self: True  # type: ignore[method-assign]

    def forward(self: Any, *args: Any) -> Any:
        self._teacher[0].train()
        return original(self, *args)

    StudentStep.forward = forward  # type: ignore[method-assign]


def regardless() -> None:
    """`kd` that does not compare class names."""
    from kdcli import networks, training

    networks.compare_classes = training.compare_classes = lambda *_: None


def test_these_checks_have_teeth(tmp_path):
    """Without the comparison of names a permuted teacher teaches, and is found out; one that drifts ends the run."""
    found = taught_by(lambda m: m.update(classes=CHANGES["permuted"](m["classes"])), tmp_path, before=regardless)
    assert "exit code 0" in complaints(found, [4])
    drifts = trial([*stock().words("kd"), "--out", "drift"], tmp_path, before=in_train_mode, writable=["drift"])
    assert drifts.code == 1
    assert "the frozen teacher changed" in drifts.err
