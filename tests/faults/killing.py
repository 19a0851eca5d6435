"""Runs that are killed at random, up to three times, and continued each time by the same command."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

from faultjobs import PER_EPOCH, STEPS
from outcomes import Reference
from warmed import Trial, Warm

PHASES = ("step", "backward", "stepped")


def draw_kill(draw: random.Random, wanted: Reference, inside_a_save: bool) -> dict[str, Any]:
    """The plan of one kill: at a call, in the middle of a write, in a step or an evaluation, or by the clock."""
    kind = "call" if inside_a_save else draw.choice(["call", "moment", "moment", "evaluation", "clock"])
    if kind == "call":
        calls = [e for e in wanted.trace if not inside_a_save or e["path"].startswith("run/state")]
        call = draw.choice(calls)
        blow = "half" if call["call"] == "write" and draw.random() < 0.5 else "kill"
        return {"at": call["n"], "blow": blow}
    if kind == "moment":
        return {"moment": [draw.randrange(STEPS), draw.choice(PHASES)], "blow": "kill"}
    if kind == "evaluation":
        return {"moment": [draw.randint(1, 3), draw.choice(["evaluating", "tick"])], "blow": "kill"}
    return {"signals": [(draw.uniform(0.0, 0.5), int(signal.SIGKILL))]}


def again_in_the_same_epoch(draw: random.Random, trial: Trial) -> dict[str, Any]:
    """A second kill in the epoch in which `trial` was killed."""
    step = max((event["step"] for event in trial.only("struck")), default=0)
    last = (step // PER_EPOCH + 1) * PER_EPOCH - 1
    return {"moment": [min(draw.randint(step, step + 1), last, STEPS - 1), draw.choice(PHASES)], "blow": "kill"}


def killed_run(
    warm: Warm, wanted: Reference, folder: Path, draw: random.Random, inside_a_save: bool = False, **more: Any
) -> list[Trial]:
    """Start `wanted.words` in `folder/run`, kill it one to three times, and let it end; what each start gave.

    Args:
        inside_a_save: the first kill falls on a call that writes a resume state.
        more: a plan for every start, besides the kill.
    """
    words, trials = [*wanted.words, "--out", "run"], []
    for number in range(draw.randint(1, 3)):
        if number and draw.random() < 0.5:
            plan = again_in_the_same_epoch(draw, trials[-1])
        else:
            plan = draw_kill(draw, wanted, inside_a_save and not number)
        trials.append(warm.trial(words, folder, states=True, **plan, **more))
        if trials[-1].code != -signal.SIGKILL:
            break
    if not trials or trials[-1].code != 0:
        trials.append(warm.trial(words, folder, states=True, **more))
    return trials


def kills(trials: list[Trial]) -> int:
    """How many of the starts were killed."""
    return sum(trial.code == -signal.SIGKILL for trial in trials)
