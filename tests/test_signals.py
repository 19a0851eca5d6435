"""Stopping a run on purpose: it saves, leaves with the code that says why, and the same command goes on to the same bits."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from harness import PER_EPOCH, TINY, finish, outcome, spawn, steps_saved, wait_for_step
from PIL import Image

from kdcli.data.images import read_image
from kdcli.engine.signals import StopFlag, listening
from kdcli.errors import Stopped

ALONE = ["distill", "--method", "none", "--student", "resnet8", *TINY]

SIGNALS = [
    (signal.SIGTERM, [], 143, "terminated"),
    (signal.SIGTERM, ["--requeue"], 75, "stopped as asked"),
    (signal.SIGINT, [], 130, "interrupted"),
    (signal.SIGINT, ["--requeue"], 130, "interrupted"),
    (signal.SIGUSR1, [], 75, "stopped as asked"),
]


@pytest.mark.parametrize(("number", "flags", "code", "word"), SIGNALS)
def test_a_signal_in_mid_epoch(number, flags, code, word, kd, tmp_path, monkeypatch):
    """The step is finished, the state saved, the code right; the same command ends in the same bits."""
    from kdcli.engine import fit

    assert kd(*ALONE, "--out", "whole").code == 0
    original, armed = fit.Training.step, [True]

    def step(self, epoch, batch):
        if armed and self.at == PER_EPOCH + 3:
            armed.clear()
            os.kill(os.getpid(), number)
        original(self, epoch, batch)

    monkeypatch.setattr(fit.Training, "step", step)
    before = signal.getsignal(number)
    stopped = kd(*ALONE, "--out", "run", *flags)
    assert stopped.code == code
    assert word in stopped.error
    assert "at step 14 of 30" in stopped.error
    assert "same command" in stopped.error
    assert steps_saved(tmp_path / "run") == PER_EPOCH + 4
    assert signal.getsignal(number) is before
    assert kd(*ALONE, "--out", "run", *flags).code == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_signal_during_evaluation(kd, tmp_path, monkeypatch):
    """An evaluation does not hold up a stop, and is made up for."""
    from kdcli.engine import fit

    assert kd(*ALONE, "--out", "whole").code == 0
    original, calls = fit.evaluate, []

    def evaluate(*args, **more):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(*args, **more)

    monkeypatch.setattr(fit, "evaluate", evaluate)
    assert kd(*ALONE, "--out", "run").code == 75
    assert steps_saved(tmp_path / "run") == 2 * PER_EPOCH
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1
    assert kd(*ALONE, "--out", "run").code == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(("number", "flags", "code", "word"), SIGNALS[:2] + SIGNALS[4:])
def test_a_signal_before_training_begins(number, flags, code, word, kd, tmp_path, monkeypatch):
    """While the data are read there is nothing to save: it leaves at once, with the same codes, and nothing behind."""
    from kdcli import training

    original = training.load_data

    def load_data(*args):
        os.kill(os.getpid(), number)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "load_data", load_data)
        stopped = kd(*ALONE, "--out", "run", *flags)
    assert stopped.code == code
    assert word in stopped.error
    assert not (tmp_path / "run").exists()
    assert kd(*ALONE, "--max-steps", "2", "--out", "run").code == 0


def test_a_signal_while_an_image_is_decoded(tmp_path, monkeypatch):
    """It stops the command: it is not the image that is damaged, nor the block of EXIF that can be done without."""
    path = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(path)
    for place in ("load", "getexif"):
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, place, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(Stopped) as stop, listening(StopFlag(None, False), at_once=True):
                read_image(path)
        assert stop.value.code == 143


def test_a_stop_while_the_teacher_is_trained_on_the_way(kd, tmp_path, monkeypatch):
    """The same command goes on with the teacher first, then with the student; both are the uninterrupted ones."""
    from kdcli.engine import fit

    words = ["distill", "--method", "kd", "--teacher", "resnet14", "--student", "resnet8", *TINY]
    assert kd(*words, "--runs-dir", "whole").code == 0
    original, armed = fit.Training.step, [True]

    def step(self, epoch, batch):
        if armed and self.at == 7:
            armed.clear()
            os.kill(os.getpid(), signal.SIGUSR1)
        original(self, epoch, batch)

    monkeypatch.setattr(fit.Training, "step", step)
    assert kd(*words, "--runs-dir", "broken").code == 75
    result = kd(*words, "--runs-dir", "broken")
    assert result.code == 0
    assert "teacher resnet14: going on at step 8" in result.err
    runs = sorted(p.relative_to("whole") for p in Path("whole").glob("*/*"))
    assert len(runs) == 2
    for run in runs:
        assert outcome(tmp_path / "broken" / run) == outcome(tmp_path / "whole" / run)


def test_max_minutes_stops_after_a_checkpoint_and_the_same_command_goes_on(kd, tmp_path):
    """Time is up after every step here: one step a call, 75 each time, and in the end the same bits and code 0."""
    words = [*ALONE, "--epochs", "1"]
    assert kd(*words, "--out", "whole").code == 0
    codes = []
    while not codes or codes[-1] == 75:
        result = kd(*words, "--out", "run", "--max-minutes", "0.000001", "--json")
        codes.append(result.code)
        if result.code == 75:
            assert result.json["error"]["kind"] == "stopped"
            assert f"at step {min(len(codes), PER_EPOCH)} of {PER_EPOCH}" in result.error
            assert steps_saved(tmp_path / "run") == min(len(codes), PER_EPOCH)
        assert len(codes) <= PER_EPOCH + 4, "it does not get on"
        if len(codes) > PER_EPOCH:  # every step is done: the last evaluation needs a moment of its own
            words_left = kd(*words, "--out", "run")
            codes.append(words_left.code)
    assert codes[-1] == 0
    assert codes.count(75) >= PER_EPOCH
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(("number", "flags", "code"), [(signal.SIGTERM, ["--requeue"], 75), (signal.SIGINT, [], 130)])
def test_a_real_process(number, flags, code, kd, tmp_path):
    """The exit code as a shell or a scheduler sees it."""
    words = [*ALONE, "--epochs", "15", "--checkpoint-every", "5"]
    process = spawn(*words, "--out", "run", *flags, cwd=tmp_path)
    wait_for_step(process, tmp_path / "run", 15)
    process.send_signal(number)
    result = finish(process)
    assert result.code == code
    assert "saved at step" in result.error
    assert kd(*words, "--out", "run", *flags).code == 0
    assert kd(*words, "--out", "whole").code == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
