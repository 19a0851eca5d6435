"""R21, R22, R24: little memory, two runs in one directory, and what safety costs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from harness import TINY, Result, environment, finish, spawn, wait_for_step
from outcomes import Reference, differences, reference
from test_kills import Fresh, Whole
from warmed import Trial, Warm

MIB = 2**20
# Bigger images and batches than the other jobs, so that memory is what it needs.
WIDE = ["distill", "--method", "none", "--student", "resnet20", "--dataset", "digits", "--image-size", "64"]
WIDE += ["--train-fraction", "0.12", "--batch-size", "80", "--epochs", "1", "--threads", "1", "--device", "cpu"]
WIDE += ["--checkpoint-every", "1"]


def memory_complaints(trial: Trial) -> list[str]:
    """What is wrong with how a run took it that there was too little memory."""
    if trial.code in (0, -signal.SIGKILL):
        return []
    if trial.code != 7:
        return [f"exit code {trial.code}: {trial.err[-400:]}"]
    if len(trial.errors) != 1 or "Traceback" in trial.err or "out of memory" not in trial.errors[0]:
        return [f"not one line: {trial.err[-400:]}"]
    return []


def need(warm: Warm, words: list[str], folder: Path) -> tuple[int, int, Reference]:
    """Address space (bytes) of the process before the run, and what the run maps beyond that; and what it gives."""
    wanted = reference(warm, words, folder, memory=True)
    before, most = wanted.memory
    return before, most - before, wanted


@pytest.mark.slow
def test_too_little_memory(warm: Warm, fresh: Fresh) -> None:
    """RLIMIT_AS at shares of what the run needs: exit 7 in one line, or done; then, without a limit, the same bits."""
    warm.learn([*WIDE, "--out", "run"], fresh())
    before, more, wanted = need(warm, WIDE, fresh())
    codes = {}
    for share in (0.05, *(0.1 * n for n in range(1, 13)), 1.5, 2.0, 3.0):
        folder = fresh()
        words = [*WIDE, "--out", "run"]
        trial = warm.trial(words, folder, limits={"RLIMIT_AS": before + int(more * share)}, states=True)
        assert memory_complaints(trial) == [], f"{share:.2f} of {more / MIB:.0f} MiB"
        codes[f"{share:.2f}"] = trial.code
        again = warm.trial(words, folder, states=True)
        assert differences(wanted, folder / "run", [trial, again]) == []
    assert 7 in codes.values()
    print(f"R21: {more / MIB:.0f} MiB needed; share → exit code: {codes}")


def second_start(warm: Warm, wanted: Reference, folder: Path, *variants: str) -> tuple[Result, Result]:
    """Start a run while another works in its directory; how the first and the second ended."""
    words = [*wanted.words, "--out", "run"]
    first: list[Trial] = []
    other = Warm()
    try:
        # The first pauses in a step until the second has come and gone.
        pause = {"variants": ["slow_step", *variants], "states": True}
        thread = threading.Thread(target=lambda: first.append(other.trial(words, folder, **pause)))
        thread.start()
        until = time.monotonic() + 120
        while not (folder / "run/state/step-000000004.safetensors").exists() and time.monotonic() < until:
            time.sleep(0.01)
        second = warm.trial(words, folder, variants=list(variants))
        (folder / "go").touch()
        thread.join()
    finally:
        other.close()
    return first[0], second


def test_two_in_one_directory(warm: Warm, whole: Whole, fresh: Fresh) -> None:
    """The second leaves with 9 within a second; the first does not notice; a killed holder blocks nobody."""
    wanted, folder = whole("kd"), fresh()
    first, second = second_start(warm, wanted, folder)
    assert second.code == 9
    assert "in use by process" in second.error
    assert isinstance(second, Trial)
    assert second.seconds < 1
    assert isinstance(first, Trial)
    (folder / "go").unlink()
    assert differences(wanted, folder / "run", [first]) == []
    folder = fresh()
    words = [*wanted.words, "--out", "run"]
    assert warm.trial(words, folder, moment=[5, "step"], blow="kill").code == -signal.SIGKILL
    again = warm.trial(words, folder, states=True)
    assert differences(wanted, folder / "run", [again]) == []
    print(f"R22: the second left after {second.seconds:.2f} s")


@pytest.mark.slow
def test_a_true_second_process(fresh: Fresh) -> None:
    """Two real processes: the second is told who has the directory, the first is not disturbed."""
    folder = fresh()
    words = ["distill", "--method", "none", "--student", "resnet8", *TINY, "--epochs", "60", "--checkpoint-every", "5"]
    first = spawn(*words, "--out", "run", cwd=folder)
    wait_for_step(first, folder / "run", 5)
    second = finish(spawn(*words, "--out", "run", cwd=folder))
    assert second.code == 9
    assert f"process {first.pid}" in second.error
    assert finish(first, 600).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("student", ["resnet20", "wrn40_2"])
def test_what_saving_costs(student: str, tmp_path: Path) -> None:
    """R24: a true process trains for more than 90 s on images as those of CIFAR-100, a state every 30 s (the default).

    On a disk and not in memory. What counts is the time within saves, the first and the last among them, of all the time
    of the training; the start of the process is not part of it.
    """
    words = ["distill", "--method", "none", "--student", student, "--dataset", "synthetic:100", "--image-size", "32"]
    words += ["--batch-size", "64", "--epochs", "1000", "--threads", "1", "--device", "cpu", "--max-minutes", "1.7"]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("timed.py")), *words, "--out", str(tmp_path / "run")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 75, done.stderr
    times = json.loads(done.stdout)
    saves, total, step = times["saves"], times["total"], times["total"] / times["steps"]
    regular = saves[1:-1]  # the first and the last are the beginning and the end of the run, not the interval's
    assert total >= 90
    assert len(regular) >= 2
    share, given = 100 * sum(saves) / total, times["work"] / total
    print(
        f"R24: {student}: {len(saves)} saves in {total:.0f} s of training, {share:.2f} % of it; a save at the interval"
    )
    print(f"     takes {1000 * max(regular):.0f} ms at most, {100 * max(regular) / (50 * step):.2f} % of 50 steps;")
    print(f"     the machine gave the run {100 * given:.0f} % of a core")
    if given < 0.8:  # a save takes longer then, and the interval does not
        pytest.skip(f"this machine is too busy: {share:.2f} % with {100 * given:.0f} % of a core")
    assert share <= 2
