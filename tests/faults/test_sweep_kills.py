"""A sweep that is killed wherever it is: the same command ends it, repeats no finished run, and prints the same table."""

from __future__ import annotations

import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness import finish, outcome, spawn
from warmed import Warm

SEED = 20261121
# A teacher, four students and four probes of them; 43 images, states at every second of 6 steps.
SWEEP = """
[data]
dataset = "digits"
image_size = 8
train_fraction = 0.03

[train]
batch_size = 15

[system]
device = "cpu"
threads = 1
checkpoint_every = 2

[sweep]
pairs = [["resnet14", "resnet8"]]
methods = ["none", "kd"]
seeds = [0, 1]
probes = ["digits"]
"""
# Probes have steps of their own recipe, and take over what `--set` says.
WORDS = ["sweep", "s.toml", "--json", "--set", "train.epochs=2", "--set", "train.max_steps=6"]
RUNS = 9

Stamps = dict[str, tuple[int, int]]


@dataclass
class Whole:
    """An uninterrupted sweep.

    Attributes:
        document: what it printed.
        folder: where it ran.
        trace: every call that changed a file, in order.
        seconds: how long it took.
    """

    document: dict[str, Any]
    folder: Path
    trace: list[dict[str, Any]]
    seconds: float

    def calls(self, where: str) -> list[dict[str, Any]]:
        """The calls of a part of it: in the `teacher`'s run, `between` two trainings, in a `probe`, or `any`."""
        probes = tuple(run["run"] for run in self.document["runs"] if run["stage"] == "probe")
        parts: dict[str, Callable[[str], bool]] = {
            "teacher": lambda path: "/teacher-" in path,
            "between": lambda path: "/state/" not in path and "metrics" not in path,
            "probe": lambda path: path.startswith(probes),
            "any": lambda path: True,
        }
        return [event for event in self.trace if parts[where](event["path"])]


@pytest.fixture(scope="session")
def sweep(warm: Warm, place: Path) -> Whole:
    """The sweep without a kill."""
    first, folder = (empty(place) for _ in range(2))
    warm.learn(WORDS, first)
    trial = warm.trial(WORDS, folder, trace=True)
    assert trial.code == 0, trial.err
    assert len(trial.json["runs"]) == RUNS
    return Whole(trial.json, folder, trial.only("call"), trial.seconds)


def empty(place: Path) -> Path:
    """A new directory with the sweep's file and nothing else."""
    folder = Path(tempfile.mkdtemp(dir=place))
    (folder / "s.toml").write_text(SWEEP)
    return folder


def finished(folder: Path) -> list[Path]:
    """The directories of the runs that are finished, relative to the folder."""
    return sorted(path.parent.relative_to(folder) for path in folder.glob("runs/*/*/summary.json"))


def stamps(folder: Path, runs: list[Path]) -> Stamps:
    """Inode and time of every file of some runs; the lock is written by whoever looks, and states are cleared up."""
    files = [path for run in runs for path in (folder / run).iterdir() if path.is_file() and path.name[0] != "."]
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def kept(before: Stamps, after: Stamps) -> bool:
    """Whether every file that was there is still the same."""
    return all(after.get(path) == stamp for path, stamp in before.items())


def same_runs(one: Path, other: Path) -> bool:
    """Whether two folders hold the same finished runs, networks and logs bit for bit (probes by their numbers)."""
    runs = finished(one)
    trained = [run for run in runs if list((one / run).glob("*.safetensors"))]
    return runs == finished(other) and all(outcome(one / run) == outcome(other / run) for run in trained)


def killed_and_ended(warm: Warm, sweep: Whole, folder: Path, draw: random.Random, where: str) -> dict[str, Any]:
    """Kill a sweep once or twice, then let it end; how many kills there were, and how many runs were finished by then."""
    kills = 0
    for _ in range(draw.randint(1, 2)):
        before = stamps(folder, finished(folder))
        if where == "clock":
            plan: dict[str, Any] = {"signals": [(draw.uniform(0, sweep.seconds), int(signal.SIGKILL))]}
        else:
            call = draw.choice(sweep.calls(where))
            plan = {"at": call["n"], "blow": "half" if call["call"] == "write" and draw.random() < 0.5 else "kill"}
        trial = warm.trial(WORDS, folder, **plan)
        assert trial.code in (0, -signal.SIGKILL), trial.err
        assert kept(before, stamps(folder, finished(folder))), "a finished run was touched"
        kills += trial.code != 0
        where = draw.choice(["clock", "any"])
    done = finished(folder)
    before = stamps(folder, done)
    trial = warm.trial(WORDS, folder)
    assert trial.code == 0, trial.err
    assert kept(before, stamps(folder, done)), "a finished run was repeated"
    assert trial.err.count("is finished already") == len(done)
    assert trial.json == sweep.document
    assert same_runs(folder, sweep.folder)
    return {"kills": kills, "finished": len(done)}


@pytest.mark.parametrize("where", ["teacher", "between", "probe"])
def test_a_killed_sweep_is_ended_by_the_same_command(where: str, warm: Warm, sweep: Whole, place: Path) -> None:
    """In the teacher's training, between two runs, in a probe."""
    found = killed_and_ended(warm, sweep, empty(place), random.Random(f"{SEED} {where}"), where)
    assert found["kills"] >= 1
    assert where == "between" or (found["finished"] == 0) == (where == "teacher")


@pytest.mark.slow
def test_a_sweep_is_killed_at_forty_points(warm: Warm, sweep: Whole, place: Path) -> None:
    """Ten each in the teacher's run, between two trainings, at any call that changes a file, and by the clock."""
    draw = random.Random(SEED)
    told = [
        killed_and_ended(warm, sweep, empty(place), draw, where)
        for where in ("teacher", "between", "any", "clock")
        for _ in range(10)
    ]
    kills = sum(one["kills"] for one in told)
    print(f"{kills} kills; finished before the last start: {sorted(one['finished'] for one in told)}")
    assert kills >= 40
    assert len({one["finished"] for one in told}) > 4  # they fell early and late


@pytest.mark.slow
def test_a_sweep_of_two_at_a_time_is_killed_at_twenty_points(warm: Warm, place: Path) -> None:
    """By the clock, anywhere from its start to its end; the next one begins while orphans may still be saving."""
    few = [*WORDS, "--only", "seed=0"]  # each run is a cold process here
    alone = empty(place)
    document = warm.trial(few, alone).json
    words = [*few, "--jobs", "2"]
    folder, begun = empty(place), time.monotonic()
    whole = finish(spawn(*words, cwd=folder), 600)
    length = time.monotonic() - begun
    assert whole.json == document, whole.err
    draw, told = random.Random(SEED), []
    for number in range(20):
        folder = empty(place)
        process = spawn(*words, cwd=folder)
        time.sleep((number + draw.random()) / 20 * length)  # one in each twentieth
        alive = process.poll() is None
        process.kill()
        done = finished(folder)
        before = stamps(folder, done)
        process.communicate()
        result = finish(spawn(*words, cwd=folder), 600)
        assert result.code == 0, result.err
        assert kept(before, stamps(folder, done)), "a finished run was repeated"
        assert result.json == document
        assert same_runs(folder, alone)
        told.append((alive, len(done)))
        print("killed" if alive else "ended", "with", len(done), "runs finished", flush=True)
    assert sum(alive for alive, _ in told) >= 15
    assert len({done for _, done in told}) > 1  # before and after the first runs, which end side by side, in pairs
