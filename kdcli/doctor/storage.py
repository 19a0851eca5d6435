"""Where runs are written: space, limits, and a trial of everything that a run does to its directory."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

from kdcli import durable
from kdcli.doctor.finding import Finding, Level, size
from kdcli.errors import BusyError, KdError
from kdcli.runs.lock import hold

LITTLE, TOO_LITTLE = 2 << 30, 64 << 20  # bytes free; a run of small networks keeps up to a few hundred MiB
FEW, TOO_FEW = 1000, 20  # files that can still be made; a run has about a dozen
SLOW = 1.0  # seconds for a small durable write; a state is one, every 30 s
SKEW = 300.0  # seconds between the clock of the disk and ours
_TRIAL = 1 << 20  # bytes


def storage(runs_dir: str) -> list[Finding]:
    """The disk of the runs folder; nothing is left behind, and the folder is not made if it is not there."""
    wanted = Path(runs_dir)
    place = wanted
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        text = f"{place} is in the way of {wanted}" if place != wanted else f"{wanted} is not a directory"
        return [Finding("write", text, "problem", "choose another --runs-dir", code=5)]
    return [_trial(wanted, place), _space(place), _file_size()]


def _trial(wanted: Path, place: Path) -> Finding:
    """Write, replace, append, sync and lock in a directory of its own, the way a run does."""
    scratch = None
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".kd-doctor-", dir=place))
        began = time.monotonic()
        durable.write_bytes(scratch / "trial", bytes(_TRIAL))
        seconds = time.monotonic() - began
        durable.write_bytes(scratch / "trial", b"again")
        durable.append_line(scratch / "log", "a line")
        skew = (scratch / "trial").stat().st_mtime - time.time()
        with hold(scratch):
            kept = _is_locked(scratch)
    except KdError as problem:
        return Finding("write", problem.message, "problem", problem.hint, code=5)
    except OSError as problem:
        error = durable.write_error(place, problem)
        return Finding("write", error.message, "problem", "choose another --runs-dir", code=5)
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    facts = {"path": str(wanted), "seconds": round(seconds, 4), "skew_seconds": round(skew, 1)}
    there = "" if place == wanted else f" (in {place}; it will be made)"
    text = f"{wanted}{there} takes files; 1 MiB is safe after {1000 * seconds:.0f} ms"
    if not kept:
        text = f"{wanted} does not keep locks: two runs could write to one directory"
        return Finding("write", text, "problem", "choose a --runs-dir on another disk", code=5, facts=facts)
    if seconds > SLOW:
        return Finding("write", text, "warning", "slow: choose a nearer disk or save less often", facts=facts)
    if abs(skew) > SKEW:
        text = f"{wanted}: the disk's clock is {skew:+.0f} s from ours"
        return Finding("write", text, "warning", "nothing depends on it, but file dates mislead", facts=facts)
    return Finding("write", text, facts=facts)


def _is_locked(directory: Path) -> bool:
    """Whether a second attempt at a lock that is held is refused, as it has to be."""
    with contextlib.suppress(BusyError), hold(directory):
        return False
    return True


def _space(place: Path) -> Finding:
    try:
        about = os.statvfs(place)
    except OSError as problem:
        return Finding("disk", f"its free space is unknown: {problem.strerror}", "warning", "check the disk")
    free, total = about.f_bavail * about.f_frsize, about.f_blocks * about.f_frsize
    files = about.f_favail if about.f_files else None  # some file systems have no fixed number
    facts = {"free": free, "total": total, "free_files": files}
    text = f"{size(free)} of {size(total)} free" + ("" if files is None else f", room for {files:,} files")
    few, too_few = files is not None and files < FEW, files is not None and files < TOO_FEW
    if free < TOO_LITTLE or too_few:
        return Finding("disk", text, "problem", "free some space, or choose another --runs-dir", code=5, facts=facts)
    level: Level = "warning" if free < LITTLE or few else "ok"
    return Finding("disk", text, level, "free some space before long runs" if level == "warning" else None, facts=facts)


def _file_size() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft == resource.RLIM_INFINITY:
        return Finding("file size", "no limit", facts={"limit": None})
    level: Level = "problem" if soft < TOO_LITTLE else "warning" if soft < LITTLE else "ok"
    hint = None if level == "ok" else "raise it: ulimit -f unlimited"
    return Finding("file size", f"files may have {size(soft)}", level, hint, code=5, facts={"limit": soft})
