"""R1, R2: a run that is killed anywhere, and started again by the same command, ends in the same bits."""

from __future__ import annotations

import itertools
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from branches import unpack
from faultjobs import EVERY, METHODS, PER_EPOCH, STEPS
from harness import finish, spawn, steps_saved
from killing import killed_run, kills
from outcomes import Reference, differences, lost, read, states_of
from warmed import Trial, Warm

from kdcli import checkpoint

SEED = 20260814

Whole = Callable[[str], Reference]
Fresh = Callable[[], Path]


def strike_every_call(
    warm: Warm, wanted: Reference, fresh: Fresh, blows: list[str], every: int, words: list[str], **more: object
) -> tuple[list[dict], Path]:
    """Strike one run at every `every`-th call; what the blows did, and where the directories they left are kept."""
    folder, keep = fresh(), fresh()
    if "before" in more:
        unpack(Path(str(more.pop("before"))), folder)
    branch = {"blows": blows, "keep": str(keep), "every": every, **more}
    trunk = warm.trial([*words, "--out", "run"], folder, branch=branch, states=True, limit=7200)
    assert trunk.only("branch"), trunk.err
    assert differences(wanted, folder / "run", [trunk]) == [], "the run that is branched from must not notice"
    return trunk.only("branch"), keep


def resume_all(
    warm: Warm, wanted: Reference, fresh: Fresh, words: list[str], keep: Path, keys: set[str]
) -> dict[str, list[str]]:
    """Start the command in a copy of each kept directory; what is wrong with each result, where something is."""
    wrong = {}
    for key in sorted(keys):
        folder = fresh()
        unpack(keep / key, folder)
        trial = warm.trial([*words, "--out", "run"], folder, states=True)
        if problems := differences(wanted, folder / "run", [trial]):
            wrong[key] = problems
    return wrong


def kill_at_every_call(warm: Warm, wanted: Reference, fresh: Fresh, every: int) -> None:
    """R2 for one job; see `branches` for what a blow at a call is."""
    struck, keep = strike_every_call(warm, wanted, fresh, ["kill", "half"], every, wanted.words)
    assert {event["code"] for event in struck} == {-signal.SIGKILL}
    calls = len({event["n"] for event in struck})
    assert calls == (len(wanted.trace) + every - 1) // every
    keys = {event["key"]: event["n"] for event in struck}
    assert [problem for key, number in keys.items() for problem in lost(keep / key, wanted, number)] == []
    assert resume_all(warm, wanted, fresh, wanted.words, keep, set(keys)) == {}
    print(f"R2: {len(struck)} kills at {calls} calls left {len(keys)} different directories, all resumed alike")


def test_killed_at_some_calls(warm: Warm, whole: Whole, fresh: Fresh) -> None:
    kill_at_every_call(warm, whole("kd"), fresh, 13)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_every_call(method: str, warm: Warm, whole: Whole, fresh: Fresh) -> None:
    kill_at_every_call(warm, whole(method), fresh, 1)


@pytest.mark.parametrize("every", [61, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_while_it_replaces_another_run(every: int, warm: Warm, whole: Whole, fresh: Fresh) -> None:
    """`--overwrite` over a finished run of another seed: whatever the moment, the same command ends in the new run."""
    wanted, old = whole("kd"), fresh()
    assert warm.trial([*wanted.words, "--seed", "3", "--out", "run"], old).code == 0
    words = [*wanted.words, "--overwrite"]
    struck, keep = strike_every_call(warm, wanted, fresh, ["kill"], every, words, before=str(old))
    assert {event["code"] for event in struck} == {-signal.SIGKILL}
    assert resume_all(warm, wanted, fresh, words, keep, {event["key"] for event in struck}) == {}


def random_kills(warm: Warm, wanted: Reference, fresh: Fresh, seed: str, least: int, saves: int) -> None:
    """R1 for one job: at least `least` kills, `saves` of them within a save, in runs of one to three kills each."""
    draw, most = random.Random(seed), 0
    killed = inside = runs = 0
    while killed < least or inside < saves:
        folder = fresh()
        trials = killed_run(warm, wanted, folder, draw, inside_a_save=inside < saves)
        assert differences(wanted, folder / "run", trials) == [], f"seed {seed}, run {runs}"
        most = max(most, repeated(trials))
        assert most <= EVERY, f"R24: seed {seed}, run {runs}: {most} steps were done again"
        runs += 1
        killed += kills(trials)
        inside += sum(e["path"].startswith("run/state") for t in trials for e in t.only("struck") if e["path"])
    print(f"R1: seed {seed!r}: {killed} kills in {runs} runs, {inside} of them within a save; all ended alike;")
    print(f"R24: a start repeated {most} steps at most, of {EVERY} between two states")


def repeated(trials: list[Trial]) -> int:
    """The most steps that a start had to do again, where it is known how far the killed one before it was."""
    most = 0
    for killed, after in itertools.pairwise(trials):
        done = max((event["step"] for event in killed.only("struck")), default=0)
        if begun := re.search(r"going on at step (\d+) of", after.err):
            most = max(most, done - int(begun[1]))
    return most


def test_killed_at_random(warm: Warm, whole: Whole, fresh: Fresh) -> None:
    random_kills(warm, whole("kd"), fresh, f"{SEED}-quick", 6, 2)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_often(method: str, warm: Warm, whole: Whole, fresh: Fresh) -> None:
    random_kills(warm, whole(method), fresh, f"{SEED}-{method}", 200, 20)


def killed_in_every_step(warm: Warm, wanted: Reference, fresh: Fresh, *variants: str) -> list[str]:
    """A state at every step and a kill in every step, so that each but the first start goes on within an epoch."""
    words, folder, trials = [*wanted.words, "--checkpoint-every", "1", "--out", "run"], fresh(), []
    for step in range(STEPS):
        plan = {"moment": [step, "backward"], "blow": "kill", "variants": list(variants)}
        trials.append(warm.trial(words, folder, states=True, **plan))
    trials.append(warm.trial(words, folder, states=True, variants=list(variants)))
    assert kills(trials) == STEPS
    return differences(wanted, folder / "run", trials)


@pytest.mark.parametrize("method", ["kd", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS[1:])])
def test_killed_three_times_in_each_epoch(method: str, warm: Warm, whole: Whole, fresh: Fresh) -> None:
    """A count that begins anew at each start is right once an epoch and wrong from its second start on."""
    assert killed_in_every_step(warm, whole(method), fresh) == []
    print(f"R1: {method}: {STEPS} kills in one run, {PER_EPOCH} in each epoch; it ended alike")


LONGER = ["--epochs", "20"]  # 60 steps, so that a kill from outside finds the training at work
LAST = 20 * PER_EPOCH - 8  # no kill waits for a later step: the run might be done before


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_true_processes_killed(method: str, warm: Warm, whole: Whole, fresh: Fresh) -> None:
    """Twenty-four kills of real `kd` processes, no fork and no shim: four while they start, the others while they train."""
    draw, reference_run = random.Random(f"{SEED}-{method}-cli"), fresh()
    words = [*whole(method).words, *LONGER, "--out", "run"]
    assert warm.trial(words, reference_run).code == 0
    student, metrics, _ = read(reference_run / "run")
    early = training = 0
    for _ in range(4):
        folder = fresh()
        process = spawn(*words, cwd=folder)
        time.sleep(draw.uniform(0.2, 3.0))
        process.kill()
        early += finish(process).code == -signal.SIGKILL
        for step in sorted(draw.sample(range(2, LAST), 5)):
            training += killed_at(spawn(*words, cwd=folder), folder / "run", step, draw.uniform(0, 0.05))
        assert finish(spawn(*words, cwd=folder), 600).code == 0
        assert read(folder / "run")[:2] == (student, metrics)
    assert training >= 18
    assert early + training >= 20
    print(f"R1, true processes: {method}: {early} kills at the start, {training} in training; 4 runs, all ended alike")


def killed_at(process: subprocess.Popen[str], run: Path, step: int, pause: float) -> bool:
    """Kill a process `pause` seconds after it has saved the state of `step` or a later one; whether it was still there."""
    until = time.monotonic() + 300
    while process.poll() is None and steps_saved(run) < step and time.monotonic() < until:
        time.sleep(0.002)
    time.sleep(pause)
    process.kill()
    return finish(process).code == -signal.SIGKILL


def test_a_killed_run_is_neither_a_cold_start_nor_lucky(warm: Warm, whole: Whole, fresh: Fresh) -> None:
    """What the comparison rests on: it goes on from the state (not from nothing), and the state holds the optimiser."""
    wanted, folder = whole("kd"), fresh()
    words = [*wanted.words, "--out", "run"]
    assert warm.trial(words, folder, moment=[5, "step"], blow="kill").code == -signal.SIGKILL
    tensors, metadata = checkpoint.load(folder / "run/state/step-000000004.safetensors")
    assert metadata["digest"] == wanted.states[4]["digest"]
    assert any(name.startswith("optimizer.") and bool(value.any()) for name, value in tensors.items())
    trial = warm.trial(words, folder, states=True)
    assert "going on at step 4" in trial.err
    assert sorted(states_of([trial])) == [6, 8]
    assert differences(wanted, folder / "run", [trial]) == []
