"""Recorded steps: a training that replays them gives the bits of one that does not. On the CPU a tape stands in for CUDA."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_tape import Recording, Tape
from methods.test_contract import batch, cases, make, state
from torch import Tensor

from kdcli.data.loader import Batch
from kdcli.engine import optim
from kdcli.engine.device import Device
from kdcli.engine.record import Recorder
from kdcli.engine.totals import Totals
from kdcli.engine.update import Update
from kdcli.errors import NotFiniteError
from kdcli.specs import RunSpec

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs are recorded there only")


@dataclass(frozen=True)
class Pretended(Device):
    """The CPU, taken for a GPU by whoever asks."""

    @property
    def cuda(self) -> bool:
        return True


Case = tuple[str, str | None, str | None]


def every_method() -> list[Case]:
    """The students, and where a method trains its own, the teachers of all methods, with small networks."""
    found = []
    for parameters in [*cases("student"), *cases("teacher")]:
        name, teacher, student = parameters.values[0]
        if not parameters.marks:
            found.append((name, teacher and "resnet14", student and "resnet8"))
    return found


GPU = Pretended(torch.device("cpu"), "fp32", 1)


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tapes instead of CUDA graphs."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)


class Training:
    """Steps of a run, some of them recorded."""

    def __init__(
        self,
        case: Case,
        recorded: bool,
        settings: dict[str, Any] | None = None,
        device: Device = GPU,
    ) -> None:
        self.spec, self.step, self.teacher = make(*case, device=device, settings=settings)
        self.optimizer = optim.optimizer(self.spec.train, self.step, True, self.step.undecayed())
        self.totals, self.told = Totals(device.torch), list[str]()
        self.update = Update(self.step, self.step, self.optimizer, self.spec.train, device, self.totals, Path("state"))
        self.take = Recorder(self.update, self.told.append)
        self.take.enabled = recorded
        self.at = 0

    def steps(self, batches: list[Batch]) -> None:
        for given in batches:
            self.update.moment(self.at, 100, 4, 0.01 * (self.at + 1))
            torch.manual_seed(self.at)
            odd = bool(self.at % 2)
            variant = self.step.variant(self.update.progress(odd=odd, seed=0))
            self.take(given, variant, odd=odd, seed=self.at)
            self.at += 1


def to(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    extra = tuple(x.to(device) for x in batch.extra)
    return Batch(batch.images.to(device), batch.labels.to(device), batch.index.to(device), 1.0, extra)


def batches(spec: RunSpec, count: int) -> list[Batch]:
    """Different images at every step, one batch smaller than the others."""
    found = []
    for number in range(count):
        made = batch(spec, 3 if number == 4 else 4)
        made.images += 0.1 * number
        found.append(made)
    return found


def agree(plain: dict[str, Tensor], recorded: dict[str, Tensor]) -> None:
    assert plain.keys() == recorded.keys()
    for name, value in plain.items():
        # Rounding: a gradient may lie elsewhere in memory. A rate or a seed that got stuck would be 1e-2 off.
        torch.testing.assert_close(recorded[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.usefixtures("tape")
@pytest.mark.parametrize("case", every_method(), ids=str)
def test_replayed_steps_are_the_steps(case: Case) -> None:
    """Seven steps of every method: three as they are, one of another size, the others recorded and replayed."""
    plain, recorded = Training(case, False), Training(case, True)
    for training in (plain, recorded):
        training.steps(batches(training.spec, 7))
    assert recorded.told == []
    drawn = recorded.step.variant(recorded.update.progress(odd=False, seed=0)) is None
    assert len(recorded.take._recordings) == (0 if drawn else 1)
    agree(state(plain.step), state(recorded.step))
    agree(plain.totals.values, recorded.totals.values)


@pytest.mark.usefixtures("tape")
def test_what_alternates_is_recorded_twice() -> None:
    """VSD with a scale of 1 on every other step: two recordings, each replayed where it belongs."""
    case = ("vsd", "resnet14", "resnet8")
    settings = {"scale_policy": "mixed"}
    plain, recorded = Training(case, False, settings), Training(case, True, settings)
    for training in (plain, recorded):
        training.steps([batch(training.spec, 4) for _ in range(10)])
    assert len(recorded.take._recordings) == 2
    agree(state(plain.step), state(recorded.step))


@pytest.mark.usefixtures("tape")
def test_a_replayed_step_that_is_not_finite_changes_nothing() -> None:
    """From the step of the NaN on no update is applied; the step is named when the host looks."""
    training = Training(("kd", "resnet14", "resnet8"), True)
    training.steps(batches(training.spec, 4))
    assert len(training.take._recordings) == 1
    weights = {name: p.detach().clone() for name, p in training.step.named_parameters()}
    bad = batch(training.spec, 4)
    bad.images[0] = float("nan")
    training.steps([bad, batch(training.spec, 4)])
    for name, p in training.step.named_parameters():
        assert torch.equal(p, weights[name]), name
    with pytest.raises(NotFiniteError, match="at step 4"):
        training.update.check()


def test_a_step_that_cannot_be_recorded_runs_all_the_same(monkeypatch: pytest.MonkeyPatch, tape: None) -> None:
    """One line says so, once."""
    plain, recorded = Training(("kd", "resnet14", "resnet8"), False), Training(("kd", "resnet14", "resnet8"), True)
    original = type(recorded.step).forward

    def waiting(self: Any, given: Batch, progress: Any) -> Any:
        given.labels.max().item()
        return original(self, given, progress)

    monkeypatch.setattr(type(recorded.step), "forward", waiting)
    for training in (plain, recorded):
        training.steps(batches(training.spec, 7))
    assert len(recorded.told) == 1
    assert "cannot be recorded" in recorded.told[0]
    agree(state(plain.step), state(recorded.step))


def distilled(directory: Path, *flags: str) -> dict[str, Any]:
    """The summary of a short run on the GPU, from the shell."""
    command = [
        sys.executable,
        "-m",
        "kdcli",
        "distill",
        "--method",
        "kd",
        "--teacher",
        "resnet14",
        "--student",
        "resnet8",
    ]
    more = ["--dataset", "synthetic", "--epochs", "3", "--device", "cuda", "--json", "--quiet", "--out", str(directory)]
    done = subprocess.run([*command, *more, *flags], capture_output=True, text=True, check=True, cwd=directory.parent)
    return json.loads(done.stdout)


@needs_gpu
def test_on_a_gpu_recorded_and_unrecorded_runs_agree(tmp_path: Path) -> None:
    """The real thing: the same losses, epoch by epoch, to rounding."""
    lines = []
    for number, flags in enumerate([("--cuda-graphs",), ("--no-cuda-graphs",)]):
        summary = distilled(tmp_path / str(number), "--runs-dir", str(tmp_path / "runs"), *flags)
        assert summary["ok"]
        lines.append([json.loads(x) for x in (tmp_path / str(number) / "metrics.jsonl").read_text().splitlines()])
    for recorded, plain in zip(*lines, strict=True):
        assert recorded["train"]["loss"] == pytest.approx(plain["train"]["loss"], rel=1e-3)


@needs_gpu
@pytest.mark.parametrize("case", every_method(), ids=str)
def test_on_a_gpu_every_method_is_recorded(case: Case) -> None:
    """CUDA records every method's step, and the replayed steps agree with plain ones."""
    device = Device(torch.device("cuda", 0), "fp32", 1)
    plain, recorded = Training(case, False, device=device), Training(case, True, device=device)
    for training in (plain, recorded):
        with device.stream():
            training.steps([to(x, device.torch) for x in batches(training.spec, 7)])
    assert recorded.told == []
    for name, value in state(plain.step).items():
        torch.testing.assert_close(state(recorded.step)[name], value, rtol=1e-2, atol=1e-3)
