"""The suite has teeth: each of its checks finds fault with a `kd` that is broken in the way it looks for."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
import test_io_errors
import test_stop_signals
from branches import unpack
from killing import draw_kill
from outcomes import Reference, differences, lost
from powercut import violations
from test_kills import Fresh, Whole, killed_in_every_step
from test_limits import WIDE, memory_complaints, need, second_start
from test_order import cut_everywhere, not_loadable, recorded
from test_planted import planted
from test_same_bits import newest_problems, time_left_problems
from warmed import Warm


def killed_and_resumed(warm: Warm, wanted: Reference, folder: Path, *variants: str) -> list[str]:
    """Kill a run of a broken `kd` in the middle of its second epoch, and go on with it."""
    words, plan = [*wanted.words, "--out", "run"], {"variants": list(variants), "states": True}
    killed = warm.trial(words, folder, moment=[5, "step"], blow="kill", **plan)
    assert killed.code == -signal.SIGKILL
    return differences(wanted, folder / "run", [killed, warm.trial(words, folder, **plan)])


@pytest.mark.parametrize(
    ("variant", "found"),
    [
        ("optimizer_forgotten", "student differs"),
        ("weights_loaded_loosely", "student differs"),
        ("epoch_begun_again", "student differs"),
        ("sums_forgotten", "metrics.jsonl differs"),
        ("unseeded", "student differs"),
    ],
)
def test_a_state_not_restored_is_found(variant: str, found: str, warm: Warm, whole: Whole, fresh: Fresh) -> None:
    """R1, R2, R6: each part of the state matters to the comparison."""
    wanted = whole("kd")
    assert killed_and_resumed(warm, wanted, fresh()) == []
    assert any(found in problem for problem in killed_and_resumed(warm, wanted, fresh(), variant))


def test_a_count_from_each_start_is_found(warm: Warm, whole: Whole, fresh: Fresh) -> None:
    """R1: right where an epoch is interrupted once, and so found by the second kill in one."""
    wanted = whole("kd")
    assert killed_and_resumed(warm, wanted, fresh(), "counted_from_each_start") == []
    assert killed_in_every_step(warm, wanted, fresh, "counted_from_each_start")


@pytest.mark.parametrize(
    ("variant", "first", "every"),
    [("delete_before_save", 260, 9), ("in_place", 120, 60), ("temporary_files_left", 60, 40)],
)
def test_unsafe_writing_is_found_by_kills(
    variant: str, first: int, every: int, warm: Warm, whole: Whole, fresh: Fresh
) -> None:
    """R2: killed at some of its calls, a broken `kd` leaves what it cannot go on from, starts anew, or leaves litter."""
    wanted, folder, keep = whole("kd"), fresh(), fresh()
    branch = {"blows": ["half"], "keep": str(keep), "every": every, "first": first}
    trunk = warm.trial(
        [*wanted.words, "--out", "run"], folder, branch=branch, states=True, variants=[variant], limit=600
    )
    struck = {event["key"]: event for event in trunk.only("branch")}
    assert len(struck) >= 2
    wrong = {}
    for key, event in struck.items():
        problems = resume_with(warm, wanted, fresh, keep / key, variant) + lost(keep / key, wanted, event["n"])
        if problems:
            wrong[key] = problems
    assert wrong
    print(f"{variant}: {wrong}")


def resume_with(warm: Warm, wanted: Reference, fresh: Fresh, kept: Path, variant: str) -> list[str]:
    """What is wrong after a broken `kd` went on from a kept directory."""
    folder = fresh()
    unpack(kept, folder)
    trial = warm.trial([*wanted.words, "--out", "run"], folder, states=True, variants=[variant])
    return differences(wanted, folder / "run", [trial])


@pytest.mark.parametrize("variant", ["no_fsync", "no_directory_sync"])
def test_missing_syncs_are_found(variant: str, warm: Warm, whole: Whole, fresh: Fresh) -> None:
    """R3: by the order of the calls, and by what a power cut would leave."""
    wanted, keep = whole("kd"), fresh()
    record = recorded(warm, wanted, fresh, variants=[variant])
    assert violations(record.trace)
    if variant == "no_fsync":
        _, keys = cut_everywhere(record.trace, keep)
        assert not_loadable(keep, keys, wanted, record.trace)


@pytest.mark.parametrize("variant", ["swallowed_errors", "traceback_for_errors"])
def test_errors_not_told_are_found(variant: str, warm: Warm, whole: Whole, fresh: Fresh) -> None:
    """R4: a run that goes on as if nothing had happened, and one that leaves with a traceback or another code."""
    wanted, keep = whole("kd"), fresh()
    branch = {"blows": ["ENOSPC"], "keep": str(keep), "every": 40, "first": 230}
    words = [*wanted.words, "--out", "run"]
    trunk = warm.trial(words, fresh(), branch=branch, variants=[variant], limit=600)
    found = [test_io_errors.complaints({**event, "summary": 10**6}) for event in trunk.only("branch")]
    assert sum(map(bool, found)) >= len(found) // 2 > 1


@pytest.mark.parametrize("variant", ["signals_ignored", "stopped_at_once"])
def test_signals_not_minded_are_found(variant: str, warm: Warm, whole: Whole, fresh: Fresh) -> None:
    """R5: a run that goes on, and one that leaves a message saying it saved, but without having saved."""
    wanted, folder = whole("kd"), fresh()
    words = [*wanted.words, "--out", "run"]
    plan = {"moment": [5, "backward"], "blow": "signal-15"}
    sound = warm.trial(words, fresh(), **plan)
    assert test_stop_signals.complaints(sound, 0.0, [signal.SIGTERM], False, 1.0) == []
    trial = warm.trial(words, folder, variants=[variant], **plan)
    found = test_stop_signals.complaints(trial, 0.0, [signal.SIGTERM], False, 1.0)
    if variant == "stopped_at_once":
        found += test_stop_signals.not_saved(folder / "run", 6)
    assert found


def test_a_spec_withdrawn_first_is_found(warm: Warm, whole: Whole, fresh: Fresh) -> None:
    """R2, R5: killed while it clears up, a run that did not begin leaves a directory that refuses the same command."""
    wanted, codes = whole("kd"), []
    for number in range(15, 20):
        folder = fresh()
        words = [*wanted.words, "--out", "run"]
        variants = ["stopped_while_reading", "spec_withdrawn_first"]
        warm.trial(words, folder, variants=variants, at=number, blow="kill")
        codes.append(warm.trial(words, folder).code)
    assert 4 in codes


def test_links_that_are_followed_are_found(warm: Warm, whole: Whole, fresh: Fresh) -> None:
    """R15: the victim of a planted link changes."""
    _, found = planted(warm, whole("kd"), fresh(), "student.safetensors", "symlink", "follows_links")
    assert found == ["the victim changed"]


def test_dates_that_decide_are_found(warm: Warm, whole: Whole, fresh: Fresh) -> None:
    """R20: the older state has the later date."""
    assert newest_problems(warm, whole("kd").words, fresh(), "newest_by_date")


def test_a_negative_time_left_is_found(warm: Warm, whole: Whole, fresh: Fresh) -> None:
    """R20: what is left is told by the wall clock, which goes back."""
    assert time_left_problems(warm, whole("kd").words, fresh(), "clock_set_back", "time_left_by_the_wall_clock")


@pytest.mark.slow
def test_memory_errors_that_nobody_knows_are_found(warm: Warm, fresh: Fresh) -> None:
    """R21: code 1 and a bug, not 7."""
    warm.learn([*WIDE, "--out", "run"], fresh())
    before, more, _ = need(warm, WIDE, fresh())
    limits = {"RLIMIT_AS": before + more // 3}
    trial = warm.trial([*WIDE, "--out", "run"], fresh(), limits=limits, variants=["memory_errors_unknown"])
    assert memory_complaints(trial)


@pytest.mark.slow
def test_a_lock_that_nobody_takes_is_found(warm: Warm, whole: Whole, fresh: Fresh) -> None:
    """R22: the second run does not leave."""
    first, second = second_start(warm, whole("kd"), fresh(), "no_lock")
    assert (first.code, second.code) != (0, 9)


@pytest.mark.slow
def test_a_broken_kd_is_found_by_random_kills(warm: Warm, whole: Whole, fresh: Fresh) -> None:
    """R1: of ten random kills, most are such that a forgotten optimiser shows."""
    wanted, draw, found = whole("kd"), random.Random("teeth"), 0
    for _ in range(10):
        folder, plan = fresh(), draw_kill(draw, wanted, False)
        more = {"variants": ["optimizer_forgotten"], "states": True}
        words = [*wanted.words, "--out", "run"]
        killed = warm.trial(words, folder, **plan, **more)
        found += bool(differences(wanted, folder / "run", [killed, warm.trial(words, folder, **more)]))
    assert found >= 4
