"""What the system gives a process: cores, memory, shared memory, open files, a place for temporary files, clock, terminal."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kdcli.doctor.finding import Finding, size

CGROUP = Path("/sys/fs/cgroup")
SHARED = Path("/dev/shm")
MEMORY = 2 << 30  # bytes; torch, the images and a small network take about one
SHARED_MEMORY = 256 << 20  # bytes; batches wait there between workers and the training
OPEN_FILES = 512  # each worker takes a few, and each batch on its way one or two


def machine() -> list[Finding]:
    """Everything about the system that a run depends on."""
    looks: list[Callable[[], Finding]] = [cores, memory, shared_memory, open_files, temporary, clock, terminal]
    return [look() for look in looks]


def cores() -> Finding:
    """The cores that this process may use, and the share that a container is given of them."""
    there = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    quota = _quota()
    wanted = os.environ.get("OMP_NUM_THREADS")
    facts = {"cores": there, "usable": usable, "quota": quota, "omp_num_threads": wanted}
    text = f"{usable} of {there} usable; kd takes as many threads unless --threads says otherwise"
    if quota is not None and quota < usable - 0.01:
        text = f"{usable} of {there} usable, but the container gets the time of {quota:g}"
        return Finding("cores", text, "warning", f"--threads {max(1, int(quota))}", facts=facts)
    return Finding("cores", text, facts=facts)


def _quota() -> float | None:
    """The processor time that a cgroup grants, in cores; None if it grants all."""
    try:
        words = (CGROUP / "cpu.max").read_text().split()
    except OSError:
        try:
            words = [(CGROUP / "cpu" / f"cpu.cfs_{key}_us").read_text().strip() for key in ("quota", "period")]
        except OSError:
            return None
    try:
        allowed, period = (int(word) for word in words)
    except ValueError:  # "max"
        return None
    return allowed / period if allowed > 0 and period > 0 else None


def memory() -> Finding:
    """What is free of the main memory, under a container's limit and the process's own."""
    facts: dict[str, int | None] = {"total": None, "free": None, "limit": None}
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
        facts["total"] = int(lines["MemTotal"].split()[0]) * 1024
        facts["free"] = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return Finding("memory", "the system does not tell how much is free", facts=facts)
    free, total = facts["free"], facts["total"]
    limits = [_number(CGROUP / "memory.max"), _number(CGROUP / "memory" / "memory.limit_in_bytes")]
    used = _used()
    limits = [limit - used for limit in limits if limit is not None and limit < total]
    own = resource.getrlimit(resource.RLIMIT_AS)[0]
    if own != resource.RLIM_INFINITY:
        limits.append(own)
    text = f"{size(free)} of {size(total)} free"
    if limits:
        facts["limit"] = max(0, min(limits))
        free = min(free, facts["limit"])
        text = f"{size(free)} may be used (a limit is in force; the machine has {size(total)})"
    if free < MEMORY:
        return Finding("memory", text, "warning", "use a smaller --batch-size and --resident-mib", facts=facts)
    return Finding("memory", text, facts=facts)


def _used() -> int:
    """What the container has in use, in bytes, without the copies of files that the system gives back when it has to."""
    found = _number(CGROUP / "memory.current")
    folder, cached = (CGROUP, "inactive_file") if found is not None else (CGROUP / "memory", "total_inactive_file")
    if found is None:
        found = _number(folder / "memory.usage_in_bytes") or 0
    try:
        told = dict(line.split(None, 1) for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, found - int(told[cached]))
    except (OSError, KeyError, ValueError):
        return found


def shared_memory() -> Finding:
    """Where data workers hand over their batches; containers often have 64 MiB."""
    try:
        free = shutil.disk_usage(SHARED).free
    except OSError:
        return Finding("shared memory", f"there is no {SHARED}", "warning", "with data that streams: --workers 0")
    facts = {"free": free}
    if free < SHARED_MEMORY:
        hint = "a larger /dev/shm (docker run --shm-size 2g), or --workers 0"
        return Finding("shared memory", f"{size(free)} for data workers", "warning", hint, facts=facts)
    return Finding("shared memory", f"{size(free)} for data workers", facts=facts)


def open_files() -> Finding:
    """How many files a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    facts = {"soft": soft, "hard": hard}
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        text = f"{soft} at a time, few for data workers"
        return Finding("open files", text, "warning", f"ulimit -n {4 * OPEN_FILES}, or --workers 0", facts=facts)
    return Finding("open files", f"{'any number' if soft == resource.RLIM_INFINITY else soft} at a time", facts=facts)


def temporary() -> Finding:
    """Where temporary files go; `kd import` and the workers need a place."""
    try:
        folder = tempfile.gettempdir()
        with tempfile.TemporaryFile() as file:
            file.write(b"kd")
            file.flush()
    except OSError as problem:
        text = f"no temporary file can be written: {problem.strerror or problem}"
        return Finding("temporary", text, "problem", "free some space, or point TMPDIR at a writable directory", code=5)
    return Finding("temporary", f"{folder} takes files", facts={"path": folder})


def clock() -> Finding:
    """Whether the date can be true. No result depends on it, but logs and file dates do."""
    now = time.time()
    installed = max(path.stat().st_mtime for path in Path(__file__).parent.glob("*.py"))
    shown = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now)) if 0 <= now < 2**38 else f"{now:.0f} s"
    before = time.monotonic()
    facts = {"time": round(now, 3)}
    if now < installed - 86400:
        return Finding("clock", f"{shown}, earlier than kd was installed", "warning", "set the clock", facts=facts)
    if now > 4102444800:  # the year 2100
        return Finding("clock", shown, "warning", "set the clock", facts=facts)
    if time.monotonic() < before:
        return Finding("clock", "the monotonic clock goes backwards", "warning", "times will be wrong", facts=facts)
    return Finding("clock", shown, facts=facts)


def terminal() -> Finding:
    """Encoding of names and of the terminal, and whether progress is drawn."""
    names, screen = sys.getfilesystemencoding(), getattr(sys.stderr, "encoding", None) or "ascii"
    drawn = sys.stderr is not None and sys.stderr.isatty()
    facts = {"names": names, "encoding": screen, "tty": drawn, "no_color": "NO_COLOR" in os.environ}
    text = (
        f"{screen}, {'a progress bar' if drawn else 'one line an epoch'}{', no colours' if facts['no_color'] else ''}"
    )
    if names.lower().replace("-", "") != "utf8":
        return Finding("terminal", f"file names are {names}", "warning", "export LC_ALL=C.UTF-8", facts=facts)
    if screen.lower().replace("-", "") != "utf8":
        return Finding("terminal", text, "warning", "export LC_ALL=C.UTF-8", facts=facts)
    return Finding("terminal", text, facts=facts)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
