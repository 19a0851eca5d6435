"""R4: whatever the system refuses to write, a run says so in one line, leaves with 5, and loses nothing."""

from __future__ import annotations

import errno
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faultjobs import METHODS
from outcomes import Reference, differences, lost
from test_kills import Fresh, Whole, resume_all, strike_every_call
from warmed import Warm

REASONS = ("ENOSPC", "EIO", "EDQUOT", "EFBIG", "EROFS")


def complaints(event: dict[str, Any]) -> list[str]:
    """What is wrong with how a run took an error at a call."""
    errors = [line for line in event["err"].splitlines() if line.startswith("error:")]
    if event["code"] == 0 and not errors and harmless(event):
        return []
    found = [] if event["code"] == 5 else [f"exit code {event['code']}"]
    if len(errors) != 1 or event["err"].splitlines()[-1] != errors[0] or "Traceback" in event["err"]:
        found.append(f"not one line: {event['err'][-300:]!r}")
    else:
        reason = event["branch"].removeprefix("half-")
        if os.strerror(getattr(errno, reason)) not in errors[0] or f"[{reason}]" not in errors[0]:
            found.append(f"the reason is not told: {errors[0]}")
        if "run" not in errors[0]:
            found.append(f"the path is not told: {errors[0]}")
    return found


def harmless(event: dict[str, Any]) -> bool:
    """Whether the run may go on: the number in the lock and the file for watchers are a courtesy, as is clearing up."""
    # A disk that is full has room to remove something.
    room = event["branch"].removeprefix("half-") in ("ENOSPC", "EDQUOT", "EFBIG")
    if room and event["call"] in ("unlink", "rmdir", "ftruncate"):
        return True
    if "progress.json" in event["path"]:
        return True
    if event["path"] == "run/.lock":
        return event["call"] in ("ftruncate", "pwrite")
    return (
        event["path"].startswith("run/state") and event["call"] in ("unlink", "rmdir") and event["n"] > event["summary"]
    )


def fail_at_every_call(warm: Warm, wanted: Reference, fresh: Fresh, blows: list[str], every: int, **more: bool) -> None:
    """R4 for one job."""
    struck, keep = strike_every_call(warm, wanted, fresh, blows, every, wanted.words, **more)
    done = next(e["n"] for e in wanted.trace if e["call"] == "rename" and e["path"] == "run/summary.json")
    wrong = {}
    for event in struck:
        if problems := complaints({**event, "summary": done}):
            wrong[event["n"], event["call"], event["path"], event["branch"]] = problems
    assert wrong == {}
    keys = {event["key"]: event for event in struck}
    for key, event in keys.items():
        assert lost(keep / key, wanted, event["n"]) == []
    assert resume_all(warm, wanted, fresh, wanted.words, keep, set(keys)) == {}
    codes = dict(Counter(event["code"] for event in struck))
    calls = len({event["n"] for event in struck})
    print(f"R4: {len(struck)} errors at {calls} calls, exit codes {codes}; {len(keys)} directories, all resumed alike")


def test_errors_at_some_calls(warm: Warm, whole: Whole, fresh: Fresh) -> None:
    fail_at_every_call(warm, whole("kd"), fresh, ["ENOSPC", "half-ENOSPC", "EROFS"], 37)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_error_at_every_call(method: str, warm: Warm, whole: Whole, fresh: Fresh) -> None:
    fail_at_every_call(warm, whole(method), fresh, [*REASONS, "half-ENOSPC"], 1)


@pytest.mark.parametrize("every", [149, pytest.param(1, marks=pytest.mark.slow)])
def test_errors_that_stay(every: int, warm: Warm, whole: Whole, fresh: Fresh) -> None:
    """From one call on the disk is full, or failing, or read-only: nothing can be tidied up either, and nothing is lost."""
    fail_at_every_call(warm, whole("kd"), fresh, ["ENOSPC", "EIO", "EROFS"], every, onward=True)


@pytest.mark.parametrize("size", [2000, 100_000, pytest.param(300_000, id="more than any file needs")])
def test_a_file_size_limit(size: int, warm: Warm, whole: Whole, fresh: Fresh) -> None:
    """RLIMIT_FSIZE, in bytes, the system's own EFBIG."""
    wanted, folder = whole("kd"), fresh()
    words = [*wanted.words, "--out", "run"]
    # What the trial reports goes into files too, and stays below the limit.
    trial = warm.trial(words, folder, limits={"RLIMIT_FSIZE": size})
    biggest = max(int(event["size"]) + int(event["offset"]) for event in wanted.trace if event["call"] == "write")
    if size > biggest:
        assert trial.code == 0
    else:
        assert trial.code == 5
        assert "[EFBIG]" in trial.error
    trial = warm.trial(words, folder, states=True)
    assert differences(wanted, folder / "run", [trial]) == []


@pytest.fixture
def small_disk(fresh: Fresh) -> Iterator[Callable[[int], Path]]:
    """Gives a file system of its own that holds so many KiB, or another size of the same one."""
    folder = fresh()

    def resize(kib: int) -> Path:
        how = [f"remount,size={kib}k"] if os.path.ismount(folder) else [f"size={kib}k"]
        words = ["mount", "-t", "tmpfs", "-o", *how, "tmpfs", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip("this user may not mount a file system")
        return folder

    yield resize
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kib", [8, 400, 600, *(pytest.param(n, marks=pytest.mark.slow) for n in range(40, 900, 40))])
def test_a_small_disk(kib: int, warm: Warm, whole: Whole, small_disk: Callable[[int], Path]) -> None:
    """A file system that really fills up, at some point of the run; with room again the run goes on."""
    wanted, folder = whole("kd"), small_disk(kib)
    words = [*wanted.words, "--out", "run"]
    trial = warm.trial(words, folder)
    assert trial.code in (0, 5)
    if trial.code == 5:
        assert "[ENOSPC]" in trial.error
        assert lost(folder, wanted, 0) == []
    small_disk(4096)
    trial = warm.trial(words, folder, states=True)
    assert differences(wanted, folder / "run", [trial]) == []
