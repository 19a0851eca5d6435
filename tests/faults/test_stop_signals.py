"""R5: a stop signal at any time is obeyed at a step's end, with the right code, and costs nothing."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from faultjobs import METHODS, STEPS
from harness import Result, finish, spawn
from outcomes import Reference, differences
from test_kills import SEED, Fresh, Whole
from warmed import Trial, Warm

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75}
SECONDS = 2.0


def draw_stop(draw: random.Random, wanted: Reference) -> tuple[list[signal.Signals], bool, dict[str, Any]]:
    """One or two signals, whether the run is to be requeued, and when they come."""
    numbers = [draw.choice(list(CODES))] + ([draw.choice(list(CODES))] if draw.random() < 0.4 else [])
    blow = "signal-" + "-".join(str(int(number)) for number in numbers)
    kind = draw.choice(["start", "step", "step", "evaluation", "save", "call", "export"])
    if kind == "start":
        plan: dict[str, Any] = {"moment": [0, "data"], "blow": blow}
    elif kind == "step":
        plan = {"moment": [draw.randrange(STEPS), draw.choice(["step", "backward", "stepped"])], "blow": blow}
    elif kind == "evaluation":
        plan = {"moment": [draw.randint(1, 3), draw.choice(["evaluating", "tick"])], "blow": blow}
    elif kind == "export":
        plan = {"moment": [0, "export"], "blow": blow}
    else:
        calls = [e["n"] for e in wanted.trace if kind == "call" or e["path"].startswith("run/state/")]
        plan = {"at": draw.choice(calls), "blow": blow}
    return numbers, draw.random() < 0.5, plan


def complaints(result: Result, seconds: float, numbers: list[signal.Signals], requeue: bool, bound: float) -> list[str]:
    """What is wrong with how a run was stopped: `seconds` after the signal, `bound` at most."""
    codes = {75 if requeue and number == signal.SIGTERM else CODES[number] for number in numbers}
    found = []
    if result.code not in codes:  # of two signals at once, either may come first
        found.append(f"exit code {result.code}, not {codes}: {result.err[-300:]}")
    elif len(result.errors) != 1 or "Traceback" in result.err or "same command" not in result.errors[0]:
        found.append(f"not one line that says how to go on: {result.err[-300:]}")
    if seconds > bound:
        found.append(f"it took {seconds:.2f} s to stop, of {bound:.2f} s")
    return found


def not_saved(run: Path, step: int) -> list[str]:
    """Whether the state of `step`, the last one done, is missing after a stop."""
    return [] if (run / f"state/step-{step:09d}.safetensors").exists() else [f"the state of step {step} was not saved"]


def stop_at_random(warm: Warm, wanted: Reference, fresh: Fresh, seed: str, count: int) -> None:
    """R5 for one job. Two steps and a save are far less than a whole run, which is timed on the machine as it is."""
    draw, waits, kinds = random.Random(seed), [], set()
    bound = max(SECONDS, warm.trial([*wanted.words, "--out", "run"], fresh()).seconds)
    for number in range(count):
        numbers, requeue, plan = draw_stop(draw, wanted)
        folder = fresh()
        words = [*wanted.words, *(["--requeue"] if requeue else []), "--out", "run"]
        stopped = warm.trial(words, folder, states=True, trace=True, **plan)
        struck = stopped.only("struck")
        assert struck, f"seed {seed}, trial {number}: {plan}"
        after_the_end = stopped.code == 0 and struck[0]["n"] >= _last_write(wanted)
        waits.append(stopped.ended - struck[0]["time"])
        if not after_the_end:
            assert complaints(stopped, waits[-1], numbers, requeue, bound) == [], f"seed {seed}, trial {number}: {plan}"
        if not after_the_end and "moment" in plan and plan["moment"][1] in ("step", "backward", "stepped"):
            assert not_saved(folder / "run", plan["moment"][0] + 1) == [], f"seed {seed}, trial {number}: {plan}"
        again = warm.trial(words, folder, states=True)
        assert differences(wanted, folder / "run", [stopped, again]) == [], f"seed {seed}, trial {number}: {plan}"
        kinds.add(struck[0]["call"])
    print(f"R5: seed {seed!r}: {count} stops at {len(kinds)} kinds of places; the longest took {max(waits):.2f} s")


def _last_write(wanted: Reference) -> int:
    return next(e["n"] for e in wanted.trace if e["call"] == "rename" and e["path"] == "run/summary.json")


def test_stopped_at_random(warm: Warm, whole: Whole, fresh: Fresh) -> None:
    stop_at_random(warm, whole("kd"), fresh, f"{SEED}-quick", 6)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_stopped_at_random_often(method: str, warm: Warm, whole: Whole, fresh: Fresh) -> None:
    stop_at_random(warm, whole(method), fresh, f"{SEED}-{method}", 50)


@pytest.mark.slow
@pytest.mark.parametrize("number", list(CODES))
def test_true_processes_from_their_first_second_on(number: signal.Signals, whole: Whole, fresh: Fresh) -> None:
    """Also while the libraries are still being imported, the code and the one line are there."""
    wanted, waits = whole("kd"), []
    for after in (0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 4.0):
        folder = fresh()
        process = spawn(*wanted.words, "--out", "run", cwd=folder)
        time.sleep(after)
        process.send_signal(number)
        sent = time.monotonic()
        result = finish(process, 300)
        waits.append(time.monotonic() - sent)
        if result.code != 0:  # it may have been done already
            assert complaints(result, 0.0, [number], False, SECONDS) == [], f"after {after} s"
        assert finish(spawn(*wanted.words, "--out", "run", cwd=folder), 300).code == 0
        assert (folder / "run/student.safetensors").read_bytes() == wanted.student
    print(f"R5, true processes: {number.name}: the longest took {max(waits):.2f} s")


def test_a_second_signal_while_it_leaves_does_no_harm(warm: Warm, whole: Whole, fresh: Fresh) -> None:
    """The first finds a run that has not begun, the second its clearing up: the directory is gone, or still a run."""
    wanted = whole("kd")
    folder: Path = fresh()
    words = [*wanted.words, "--out", "run"]
    first = warm.trial(words, folder, moment=[0, "data"], blow="signal-15", trace=True)
    assert first.code == 143
    assert not (folder / "run").exists()
    clearing = [event["n"] for event in first.only("call") if event["call"] == "unlink"]
    assert len(clearing) >= 3
    for number in clearing:
        folder = fresh()
        plan = {"variants": ["stopped_while_reading"], "at": number, "blow": "kill"}
        assert warm.trial(words, folder, **plan).code == -signal.SIGKILL
        again: Trial = warm.trial(words, folder, states=True)
        assert differences(wanted, folder / "run", [again]) == []
