"""R1, R2: a run that is killed anywhere, and started again by the same command, ends in the same bits."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from branches import unpack
from faultjobs import METHODS
from harness import finish, spawn
from killing import killed_run, kills
from outcomes import Reference, differences, lost, states_of
from warmed import Warm

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
    draw = random.Random(seed)
    killed = inside = runs = 0
    while killed < least or inside < saves:
        folder = fresh()
        trials = killed_run(warm, wanted, folder, draw, inside_a_save=inside < saves)
        assert differences(wanted, folder / "run", trials) == [], f"seed {seed}, run {runs}"
        runs += 1
        killed += kills(trials)
        inside += sum(e["path"].startswith("run/state") for t in trials for e in t.only("struck") if e["path"])
    print(f"R1: seed {seed!r}: {killed} kills in {runs} runs, {inside} of them within a save; all ended alike")


def test_killed_at_random(warm: Warm, whole: Whole, fresh: Fresh) -> None:
    random_kills(warm, whole("kd"), fresh, f"{SEED}-quick", 6, 2)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_often(method: str, warm: Warm, whole: Whole, fresh: Fresh) -> None:
    random_kills(warm, whole(method), fresh, f"{SEED}-{method}", 200 if method == "kd" else 50, 20)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_true_processes_killed_by_the_clock(method: str, whole: Whole, fresh: Fresh) -> None:
    """Twenty kills of real `kd` processes, from the start of the interpreter on: no fork, no shim."""
    wanted, draw, killed, runs = whole(method), random.Random(f"{SEED}-{method}-cli"), 0, 0
    folder, started = fresh(), time.monotonic()
    words = [*wanted.words, "--out", "run"]
    assert finish(spawn(*words, cwd=folder), 600).code == 0
    needed = time.monotonic() - started
    assert (folder / "run/student.safetensors").read_bytes() == wanted.student
    while killed < 20:
        folder = fresh()
        for _ in range(5):
            process = spawn(*words, cwd=folder)
            time.sleep(draw.uniform(0.4, 1.0) * needed)
            process.kill()
            if finish(process).code == 0:
                break
            killed += 1
        assert finish(spawn(*words, cwd=folder), 600).code == 0
        runs += 1
        assert (folder / "run/student.safetensors").read_bytes() == wanted.student
        assert (folder / "run/metrics.jsonl").read_bytes() == wanted.metrics
    print(f"R1, true processes: {killed} kills in {runs} runs of {method}")


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
