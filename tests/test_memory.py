"""Memory: what is alive at once is counted right, real or fake; a preview predicts a run's peak; epochs do not add up."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import TINY, Kd, command, environment

from kdcli.__main__ import run
from kdcli.engine import device as device_
from kdcli.engine import fit
from kdcli.engine.device import begin_run, open_device
from kdcli.preview import memory
from kdcli.preview.memory import LiveBytes, Training, extrapolated
from kdcli.specs import SystemSpec

STUDENT = ["--student", "resnet8", *TINY]

# A method that reads a number from its loss, which fake tensors have not.
READING = """
from kdcli.losses import cross_entropy
from kdcli.methods.base import Method, MethodSpec


class Spec(MethodSpec):
    name: str = "reading"


class Reading(Method):
    Spec = Spec
    needs_teacher = False

    def loss(self, batch, student, teacher, progress):
        ce = cross_entropy(student.logits, batch.targets, 0.0)
        return {"ce": ce * (2.0 if ce.item() > 1e9 else 1.0)}
"""


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The trainings whose memory a preview would estimate, in their order."""
    monkeypatch.chdir(tmp_path)
    found: list[Training] = []

    def estimate(trainings):
        found.extend(trainings)
        return 0.0

    monkeypatch.setattr(memory, "estimate", estimate)

    def preview(*words: object) -> list[Training]:
        found.clear()
        assert run(["distill", *map(str, words), *STUDENT, "--dry-run", "--quiet", "--json"]) == 0
        return found

    return preview


# --------------------------------------------------------------------------------------------------------- the counter


def test_each_storage_counts_once_and_as_long_as_it_lives():
    """Views keep it alive, in-place work and results in given memory add nothing, the peak stays."""
    before = torch.zeros(500)
    with LiveBytes() as live:
        x = torch.ones(1000)
        assert live.now == 4000
        view = x[:10].view(5, 2)
        x += 1
        torch.add(x, 1, out=x)
        assert (live.now, live.peak) == (4000, 4000)
        y = x * 2
        del x, y
        assert (live.now, live.peak) == (4000, 8000)
        del view
        assert live.now == 0
        before.add_(1)
        assert live.now == 0
        del before
        assert (live.now, live.peak) == (-2000, 8000)


def test_what_autograd_keeps_is_alive_until_the_backward_pass():
    """sin keeps its input and exp its output, though no variable holds either."""
    x = torch.ones(1000, requires_grad=True)
    with LiveBytes() as live:
        y = (x * 2).sin().exp().sum()
        assert live.now == 4000 + 4000 + 4
        y.backward()
        assert x.grad is not None
        assert live.now == 4000 + 4
    assert live.peak >= 12000


def test_a_quadratic_is_carried_over_exactly():
    assert extrapolated([4, 8, 16], [3 + n + 5 * n * n for n in (4, 8, 16)], 256) == pytest.approx(3 + 256 + 5 * 256**2)
    assert extrapolated([4], [7.0], 100) == 7


# ------------------------------------------------------------------------------------------------------ the prediction


@pytest.mark.parametrize("method", ["kd", "crd", "rkd", "slkd"])
def test_fake_steps_count_what_real_steps_count(method, trainings, teachers):
    """To the byte: the same batch on fake tensors and on real ones, with losses that compare images in pairs or banks."""
    (training,) = trainings("--method", method, "--teacher", teachers / "kd")
    fake = training._counted(training._take, 15)
    assert fake == training._counted(training._take, 15, fake=False)
    assert fake == training.steps(15) > 0


def test_a_method_that_reads_numbers_is_extrapolated(trainings, tmp_path):
    """Fake tensors hold no numbers: real steps of a few images stand in, and come within 5 % of the real batch."""
    (tmp_path / "reading.py").write_text(READING)
    (training,) = trainings("--method", "reading.py")
    with pytest.raises(RuntimeError):
        training._counted(training._take, 60)
    assert training.steps(60) == pytest.approx(training._counted(training._take, 60, fake=False), rel=0.05)


def test_more_images_parts_averages_and_ranks_are_counted(trainings, teachers):
    """Accumulation takes less at once; an average of the weights and ranks take more beside the step."""
    (plain,) = trainings("--method", "kd", "--teacher", teachers / "kd")
    (parts,) = trainings("--method", "kd", "--teacher", teachers / "kd", "--accumulate", "3")
    (beside,) = trainings("--method", "kd", "--teacher", teachers / "kd", "--ema", "0.9", "--nproc", "3")
    assert parts.steps(15) < plain.steps(15) < plain.steps(30)
    assert (plain.images, beside.images) == (15, 5)
    assert plain.beside() == 0
    trained = sum(p.nbytes for p in plain.step.parameters())
    assert beside.beside() > 2 * trained


def test_a_teacher_that_is_trained_first_is_counted_too(trainings):
    """Its training takes place in the same process, so there are two peaks to choose from."""
    first, second = trainings("--method", "kd", "--teacher", "resnet20")
    assert first.step.trained is not second.step.trained
    assert first.steps(15) > second.steps(15)


def test_a_heap_grows_by_more_than_is_alive():
    """Free room in it serves in part, the peak so far is the least, and other allocators hold what is asked for."""
    mib = 2**20
    assert memory._Process(500 * mib, 500 * mib, None).peak_with(100 * mib) == 600 * mib
    assert memory._Process(500 * mib, 900 * mib, None).peak_with(100 * mib) == 900 * mib
    assert memory._Process(500 * mib, 500 * mib, 0).peak_with(200 * mib) == pytest.approx(860 * mib)
    assert memory._Process(500 * mib, 500 * mib, 100 * mib).peak_with(200 * mib) == pytest.approx(810 * mib)
    assert memory._Process(500 * mib, 500 * mib, 300 * mib).peak_with(10 * mib) == 500 * mib
    now = memory._Process.now()
    assert 0 < now.resident <= now.peak


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["distill", "--method", "kd", "--teacher", "TEACHER", "--student", "resnet8", "--batch-size", "256"],
        ["distill", "--method", "slkd", "--teacher", "TEACHER", "--student", "resnet8", "--batch-size", "64"],
        ["distill", "--method", "rkd", "--teacher", "resnet14", "--student", "resnet8", "--batch-size", "64"],
        ["pretrain-teacher", "--teacher", "wrn16_2", "--batch-size", "64"],
    ],
    ids=["kd", "slkd", "teacher-first", "pretrain-teacher"],
)
def test_the_peak_is_predicted_within_a_fifth(words, tmp_path):
    """A real process is asked first and measured then: `estimate.memory_mib` against `cost.peak_mib`."""
    shared = ["--dataset", "synthetic", "--device", "cpu", "--threads", "1", "--max-steps", "3", "--quiet", "--json"]

    def kd(*more: str) -> dict:
        line = command(*more, *shared)
        done = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    if "TEACHER" in words:
        teacher = tmp_path / "teacher"
        kd("pretrain-teacher", "--teacher", "resnet14", "--out", str(teacher))
        words = [str(teacher) if word == "TEACHER" else word for word in words]
    predicted = kd(*words, "--dry-run")["estimate"]["memory_mib"]
    assert predicted == pytest.approx(kd(*words)["cost"]["peak_mib"], rel=0.2)


# ------------------------------------------------------------------------------------------ several runs of a process


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can forget a process's peak")
def test_the_peak_of_a_run_is_its_own(monkeypatch, tmp_path):
    """What an earlier run of the process took does not count; where the system cannot forget it, nothing is told."""
    device = open_device(SystemSpec(device="cpu", threads=1))
    begin_run()
    held = [torch.ones(2**18) for _ in range(300)]
    first = device.peak_mib()
    del held
    begin_run()
    second = device.peak_mib()
    assert first is not None
    assert second is not None
    assert first - second > 200
    monkeypatch.setattr(device_, "_CLEAR_REFS", tmp_path / "no/such/file")
    monkeypatch.setattr(device_, "_peak", device_._Peak())
    begin_run()
    assert device.peak_mib() is not None  # of the first run it is known in any case
    begin_run()
    assert device.peak_mib() is None


def test_the_peak_of_a_gpu_is_counted_anew(monkeypatch):
    """Of each GPU there is, once CUDA is in use. No GPU is needed: torch is mocked."""
    reset: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    begin_run()
    assert reset == [0, 1]


def test_an_unknown_peak_is_null_and_left_out_of_the_card(kd: Kd, monkeypatch, tmp_path):
    """A run says null; the heartbeat and the model card go without."""
    monkeypatch.setattr(device_.Device, "peak_mib", lambda self: None)
    result = kd("distill", "--method", "none", *STUDENT, "--max-steps", "2", "--out", "run", "--json")
    assert result.code == 0, result.err
    assert result.json["cost"]["peak_mib"] is None
    assert "minutes |" in (tmp_path / "run/MODEL_CARD.md").read_text()
    assert kd("report", "run", "--no-page", "--format", "csv").code == 0


# ----------------------------------------------------------------------------------------------------- over the epochs


@pytest.mark.parametrize("method", ["kd", "crd"])
def test_no_epoch_leaves_anything_behind(method, kd: Kd, teachers, monkeypatch):
    """Bytes of tensors alive after each epoch, and the most within it: all epochs but the first are equal to the byte."""
    ends: list[int] = []
    peaks: list[int] = []
    original = fit.Training._record

    def record(self, epoch, evaluated):
        original(self, epoch, evaluated)
        gc.collect()
        ends.append(live.now)
        peaks.append(live.peak)
        live.restart()

    monkeypatch.setattr(fit.Training, "_record", record)
    with LiveBytes() as live:
        result = kd("distill", "--method", method, "--teacher", teachers / "kd", *STUDENT, "--epochs", "5", "--json")
    assert result.code == 0
    assert len(ends) == 5
    assert len(set(ends[1:])) == 1
    assert len(set(peaks[1:])) == 1
    assert result.json["cost"]["peak_mib"] > 0
