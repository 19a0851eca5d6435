"""R6, R20: the same seed gives the same bits, whatever the workers, the clock and the dates of files do."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from faultjobs import METHODS, distil
from outcomes import differences, read
from PIL import Image
from test_kills import Fresh, Whole
from warmed import Warm

from kdcli.runs.progress import FILE, read_now

CLOCKS = ("clock_an_hour_back", "clock_three_years_on", "clock_set_back", "clock_frozen", "clock_jumping")


@pytest.mark.parametrize("method", ["kd", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS[1:])])
def test_the_same_seed_twice(method: str, warm: Warm, whole: Whole, fresh: Fresh) -> None:
    wanted, folder = whole(method), fresh()
    trial = warm.trial([*wanted.words, "--out", "run"], folder, states=True)
    assert differences(wanted, folder / "run", [trial]) == []
    other = fresh()
    assert warm.trial([*wanted.words, "--seed", "1", "--out", "run"], other).code == 0
    assert read(other / "run")[0] != wanted.student


@pytest.fixture(scope="module")
def images(place: Path) -> Path:
    """A folder of PNG images of three classes: read by workers while it trains."""
    draw = np.random.default_rng(7)
    folder = place / "images"
    for split, count in (("train", 14), ("val", 6)):
        for kind in ("ash", "beech", "cedar"):
            (folder / split / kind).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (12, 12, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / kind / f"{number}.png")
    return folder


@pytest.mark.slow
def test_workers_change_nothing(warm: Warm, images: Path, fresh: Fresh) -> None:
    """None, one or two workers, also where the run was killed and goes on with another number of them."""
    words = [
        "distill",
        "--method",
        "none",
        "--student",
        "resnet8",
        "--dataset",
        f"folder:{images}",
        "--image-size",
        "12",
    ]
    words += ["--batch-size", "10", "--epochs", "2", "--device", "cpu", "--threads", "1", "--checkpoint-every", "2"]
    found = []
    for workers in (0, 1, 2):
        folder = fresh()
        trial = warm.trial([*words, "--workers", str(workers), "--out", "run"], folder)
        assert trial.code == 0, trial.err
        found.append(read(folder / "run")[:2])
    folder = fresh()
    words += ["--out", "run"]
    killed = warm.trial([*words, "--workers", "2"], folder, moment=[5, "backward"], blow="kill")
    assert killed.code == -signal.SIGKILL
    assert warm.trial([*words, "--workers", "1"], folder).code == 0
    found.append(read(folder / "run")[:2])
    assert found == found[:1] * 4


@pytest.mark.parametrize("method", ["kd", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS[1:])])
@pytest.mark.parametrize("clock", ["clock_jumping", *(pytest.param(c, marks=pytest.mark.slow) for c in CLOCKS[:-1])])
def test_clocks(clock: str, method: str, warm: Warm, whole: Whole, fresh: Fresh) -> None:
    """Killed under a clock that is wrong and continued under it: the same bits, and no time that makes no sense."""
    wanted, folder = whole(method), fresh()
    words = [*wanted.words, "--out", "run"]
    killed = warm.trial(words, folder, variants=[clock], moment=[5, "step"], blow="kill", states=True)
    trial = warm.trial(words, folder, variants=[clock], states=True)
    assert differences(wanted, folder / "run", [killed, trial]) == []
    told = [float(number) for number in re.findall(r"(-?[\d.]+) s$", trial.err, re.MULTILINE)]
    assert len(told) == 2
    assert all(0 <= number < 86400 for number in told)


def time_left_problems(warm: Warm, words: list[str], folder: Path, *variants: str) -> list[str]:
    """Kill a run in its sixth step; whether the time left that it told for watchers makes no sense."""
    killed = warm.trial([*words, "--out", "run"], folder, moment=[5, "step"], blow="kill", variants=list(variants))
    assert killed.code == -signal.SIGKILL
    now = read_now(folder / "run/state" / FILE)
    if now is None or now.eta_seconds is None:
        return ["nothing that makes sense is told"]
    # Where the clock that counts seconds jumps hours ahead, the rest seems long, but not longer than time.
    most = 10**9 if "clock_jumping" in variants else 60
    return [] if 0 <= now.eta_seconds <= most else [f"{now.eta_seconds} s are left"]


@pytest.mark.parametrize("clock", ["clock_jumping", *(pytest.param(c, marks=pytest.mark.slow) for c in CLOCKS[:-1])])
def test_the_time_left_makes_sense(clock: str, warm: Warm, whole: Whole, fresh: Fresh) -> None:
    assert time_left_problems(warm, whole("kd").words, fresh(), clock) == []


def newest_problems(warm: Warm, words: list[str], folder: Path, *variants: str) -> list[str]:
    """Kill a run at step 7, give the older state the later date, go on; what is wrong with where it goes on."""
    killed = warm.trial([*words, "--out", "run"], folder, moment=[7, "step"], blow="kill", variants=list(variants))
    assert killed.code == -signal.SIGKILL
    os.utime(folder / "run/state/step-000000004.safetensors", (2**31, 2**31))
    os.utime(folder / "run/state/step-000000006.safetensors", (1, 1))
    trial = warm.trial([*words, "--out", "run"], folder, variants=list(variants))
    return [] if "going on at step 6 " in trial.err else [f"it did not go on at step 6: {trial.err[-200:]}"]


def test_the_newest_state_is_not_a_matter_of_dates(warm: Warm, whole: Whole, place: Path, fresh: Fresh) -> None:
    assert whole("kd").states
    assert newest_problems(warm, distil("kd", place), fresh()) == []
