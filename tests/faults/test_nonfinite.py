"""R10: whatever makes a number NaN or infinite, training stops before the update, says where, and reports no metric."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzzing import METHODS, Trial, complaints, stock, told, trial

from kdcli import checkpoint

AT = 5  # the step that is poisoned
NAN, INF = float("nan"), float("inf")

Patch = Callable[[], None]


def spoil(tensor: Any, value: float) -> None:
    """Put `value` in the place of a tensor's first element."""
    tensor[(0,) * tensor.ndim] = value


def at_step(change: Callable[[Any], None]) -> Patch:
    """A patch that calls `change(training)` just before step `AT`."""

    def patch() -> None:
        from kdcli.engine import fit

        original = fit.Training.step

        def step(self: Any, epoch: int, batch: Any) -> None:
            if self.at == AT:
                change(self)
            original(self, epoch, batch)

        fit.Training.step = step  # type: ignore[method-assign]

    return patch


def images(value: float) -> Patch:
    """One pixel of the batch."""

    def patch() -> None:
        from kdcli.engine import fit

        original = fit.Training.step

        def step(self: Any, epoch: int, batch: Any) -> None:
            if self.at == AT:
                batch.images[0, 0, 3, 3] = value
            original(self, epoch, batch)

        fit.Training.step = step  # type: ignore[method-assign]

    return patch


def term(value: float, which: int) -> Patch:
    """A term of the loss: the first or the last by name."""

    def change(training: Any) -> None:
        method = training.job.step.method
        original = method.outcome

        def outcome(*args: Any) -> Any:
            found = original(*args)
            name = sorted(found.terms)[which]
            found.terms[name] = found.terms[name] * value
            return found

        method.outcome = outcome

    return at_step(change)


def second_part() -> Patch:
    """The second half of an accumulated batch."""

    def change(training: Any) -> None:
        method, calls = training.job.step.method, []
        original = method.outcome

        def outcome(*args: Any) -> Any:
            calls.append(1)
            found = original(*args)
            if len(calls) == 2:
                name = next(iter(found.terms))
                found.terms[name] = found.terms[name] * NAN
            return found

        method.outcome = outcome

    return at_step(change)


def gradient(value: float) -> Patch:
    """A gradient, of a loss that is finite."""

    def change(training: Any) -> None:
        weight = list(training.job.step.trained.parameters())[3]
        weight.register_hook(lambda grad: grad * value if value != value or value == INF else grad + value)

    return at_step(change)


def teacher_outputs(value: float, what: str) -> Patch:
    """The teacher's logits and pooled vector, or everything it gives."""

    def change(training: Any) -> None:
        from dataclasses import replace

        method = training.job.step.method
        original = method.teacher_features

        def features(*args: Any) -> Any:
            found = original(*args)
            heads = tuple(x * value for x in found.heads or ())
            if what == "everything":
                maps = tuple(x * value for x in found.maps)
                return replace(found, maps=maps, pooled=found.pooled * value, logits=found.logits * value, heads=heads)
            return replace(found, logits=found.logits * value, pooled=found.pooled * value, heads=heads)

        method.teacher_features = features

    return at_step(change)


def weight(value: float) -> Patch:
    """A weight of the student."""

    def change(training: Any) -> None:
        spoil(next(training.job.step.trained.parameters()).data, value)

    return at_step(change)


def own_module(value: float) -> Patch:
    """A weight or a bank of the method's own modules (of `kd`, which has none, of the student's last layer)."""

    def change(training: Any) -> None:
        step = training.job.step
        banks = [b for name, b in step.method.named_buffers() if "memory" in name]
        own = banks or list(step.method.parameters()) or list(step.trained.parameters())
        own[-1].data.fill_(value)

    return at_step(change)


def statistics(value: float, which: str) -> Patch:
    """A BatchNorm statistic of the student, which no training step reads and every evaluation does."""

    def change(training: Any) -> None:
        for name, buffer in training.job.step.trained.named_buffers():
            if name.endswith(which):
                spoil(buffer, value)
                return

    return at_step(change)


def evaluated() -> Patch:
    """The outputs of the network in evaluation mode only."""

    def change(training: Any) -> None:
        network = training.job.step.trained

        def poison(module: Any, args: Any, output: Any) -> Any:
            return output if module.training else output * NAN

        network.register_forward_hook(poison)

    return at_step(change)


def average() -> Patch:
    """The averaged weights, which are what is evaluated."""

    def change(training: Any) -> None:
        spoil(next(training.average.module.parameters()).data, NAN)

    return at_step(change)


def momentum(value: float) -> Patch:
    """The optimiser's memory."""

    def change(training: Any) -> None:
        state = next(iter(training.optimizer.state.values()))
        spoil(state["momentum_buffer"], value)

    return at_step(change)


RUNNING: dict[str, tuple[Patch | None, list[str]]] = {
    "NaN in an image": (images(NAN), []),
    "infinity in an image": (images(INF), []),
    "a loss term NaN": (term(NAN, 0), []),
    "another loss term infinite": (term(INF, -1), []),
    "the second part of a batch": (second_part(), ["--accumulate", "2"]),
    "a gradient NaN": (gradient(NAN), []),
    "a gradient infinite": (gradient(INF), []),
    "gradients too large to be measured": (gradient(1e30), ["--clip-grad", "1"]),
    "teacher's logits NaN": (teacher_outputs(NAN, "logits"), []),
    "teacher's outputs infinite": (teacher_outputs(INF, "everything"), []),
    "a weight NaN": (weight(NAN), []),
    "the method's own modules NaN": (own_module(NAN), []),
    "a running mean NaN": (statistics(NAN, "running_mean"), []),
    "a running variance infinite": (statistics(INF, "running_var"), []),
    "outputs in evaluation only": (evaluated(), []),
    "the averaged weights": (average(), ["--ema", "0.9"]),
    "momentum infinite": (momentum(INF), []),
    "a learning rate too high": (None, ["--lr", "1e25"]),
    "a learning rate that overflows the weights": (None, ["--lr", "3e38", "--checkpoint-every", "1"]),
}
"""While a run runs: what is injected, and further words of the command."""

TEMPERATURES = {"kd": "temperature", "vsd": "tau_kd", "crd": "contrast_temperature", "slkd": "temperature"}

FILES = ("a teacher's weight", "a teacher's statistic", "a resumed weight", "a resumed statistic", "a resumed momentum")
"""In a file: NaN behind a digest and a seal that fit."""


def wrong_with(found: Trial, run: Path, *, step: bool) -> list[str]:
    """What `complaints` finds, and whatever else a run must not say or leave behind after a number that is none.

    Args:
        step: the message must name a step and where the last good state is.
    """
    wrong = complaints(found, [6])
    text = found.err
    if "not finite" not in text:
        wrong.append("nothing about what is not finite")
    if step and not (re.search(r"step \d+\b", text) and "last good state is in" in text):
        wrong.append("neither step nor last good state named")
    for name in ("summary.json", "student.safetensors"):
        if (run / name).exists():
            wrong.append(f"{name} written")
    if (run / "metrics.jsonl").exists():
        for line in (run / "metrics.jsonl").read_text().splitlines():
            try:
                json.loads(line, parse_constant=lambda name: 1 / 0)
            except (ValueError, ZeroDivisionError):
                wrong.append("NaN in the log")
    for path in sorted((run / "state").glob("*.safetensors")):
        tensors, metadata = checkpoint.load(path)
        if metadata["step"] > AT and step:
            # A state of a later step could only be one that the poison has gone into.
            wrong.append(f"a state of step {metadata['step']}")
        if not all(t.isfinite().all() for name, t in tensors.items() if t.is_floating_point() and name[:4] != "sum."):
            wrong.append(f"{path.name} is not finite")
    return wrong


def poisoned(method: str, cause: str, folder: Path, before: Patch | None = None) -> tuple[Trial, list[str]]:
    """Run a job with one of `RUNNING`'s causes; what is wrong with how it ended."""
    patch, more = RUNNING[cause]

    def both() -> None:
        for one in (before, patch):
            if one is not None:
                one()

    words = [*stock().words(method), "--checkpoint-every", "1", *more, "--out", "run"]
    found = trial(words, folder, before=both, writable=["run"])
    late = cause.startswith(("a running", "outputs in", "the averaged"))  # no step is wrong, only what is measured
    wrong = wrong_with(found, folder / "run", step=True)
    if patch is not None and not late and not re.search(rf"step ({AT}|{AT + 1})\b", found.err):
        wrong.append(f"another step than {AT} is named")
    if " loss term " in cause and "the loss term " not in found.err:
        wrong.append("the term is not named")
    return found, [one for one in wrong if not (late and "a state of step" in one)]


QUICK = [("kd", "a loss term NaN"), ("kd", "a gradient NaN"), ("kd", "a running mean NaN"), ("vsd", "a weight NaN")]
QUICK += [
    ("crd", "the method's own modules NaN"),
    ("slkd", "teacher's logits NaN"),
    ("kd", "outputs in evaluation only"),
]
QUICK += [("kd", "a learning rate that overflows the weights")]


@pytest.mark.parametrize(
    ("method", "cause"),
    [
        pytest.param(method, cause, id=f"{method}-{cause}", marks=() if (method, cause) in QUICK else pytest.mark.slow)
        for method in METHODS
        for cause in RUNNING
    ],
)
def test_not_finite_stops_before_the_update(method, cause, tmp_path):
    """Exit 6 with step and last good state; every state left is finite and of a step before the poison."""
    found, wrong = poisoned(method, cause, tmp_path)
    assert not wrong, told(found, wrong)


@pytest.mark.slow
@pytest.mark.parametrize("value", ["1e-30", "1e3"])
@pytest.mark.parametrize("method", METHODS)
def test_an_extreme_temperature_is_stopped_or_harmless(method, value, tmp_path):
    """A temperature at the edge of what is allowed: finite all the way, or exit 6."""
    words = [*stock().words(method), "--set", f"method.{TEMPERATURES[method]}={value}", "--out", "run"]
    found = trial(words, tmp_path, writable=["run"])
    wrong = complaints(found, [0]) if found.code == 0 else wrong_with(found, tmp_path / "run", step=True)
    assert not wrong, told(found, wrong)


def edited(path: Path, where: str, value: float) -> None:
    """Put `value` into the first tensor of a checkpoint whose name ends with `where`, digest and seal made to fit."""
    tensors, metadata = checkpoint.load(path)
    name = next(name for name in tensors if name.endswith(where))
    spoil(tensors[name], value)
    checkpoint.save(path, tensors, metadata)


@pytest.mark.parametrize("cause", FILES)
@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m == "kd" else pytest.mark.slow, id=m) for m in METHODS]
)
def test_not_finite_in_a_file(method, cause, tmp_path):
    """A teacher or a resume state with NaN or infinity in it is named, tensor and file, before anything is trained."""
    made = stock()
    words = [*made.words(method), "--out", "run"]
    if "teacher" in cause:
        path = Path(shutil.copy(made.joint if method == "vsd" else made.teacher, tmp_path / "t.safetensors"))
        edited(path, "weight" if "weight" in cause else "running_var", NAN)
        words += ["--teacher", str(path)]
    else:
        run = shutil.copytree(made.runs[method], tmp_path / "run")
        wanted = {"weight": "conv1.weight", "statistic": "running_mean", "momentum": "momentum_buffer"}
        path = max((run / "state").iterdir())
        edited(path, wanted[cause.split()[-1]], INF)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.safetensors")}
    found = trial(words, tmp_path, writable=["run"])
    wrong = complaints(found, [6])
    assert not wrong, told(found, wrong)
    assert path.name in found.err
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.safetensors")} == before


def unguarded() -> None:
    """`kd` without its finite checks."""
    from kdcli.engine import state
    from kdcli.engine.evaluate import Tally
    from kdcli.engine.update import Update

    def result(self: Any, *, agreement: bool = False, original: Any = Tally.result) -> Any:
        self.finite.fill_(True)
        return original(self, agreement=agreement)

    Update._guard = lambda *_: None  # type: ignore[method-assign]
    state.not_finite = lambda *_: None
    Tally.result = result  # type: ignore[method-assign]


@pytest.mark.parametrize("cause", ["a gradient NaN", "a running mean NaN"])
def test_these_checks_have_teeth(cause, tmp_path):
    """Without the guards the same causes are found out by what is checked here."""
    _, wrong = poisoned("kd", cause, tmp_path, before=unguarded)
    assert any("exit code" in one for one in wrong), wrong
