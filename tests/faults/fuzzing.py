"""Hostile-input trials: a command of `kd` in a forked child of this warm process, watched from outside.

A trial is a black box. The child runs `kdcli.__main__.run` with outputs of its own; what it must not do (start programs,
connect, write outside the folders it was given) is written down by an audit hook. `complaints` says in words what was
wrong, so that a test can show both: that nothing is wrong with `kd`, and that a broken `kd` would be found out.
"""

from __future__ import annotations

import atexit
import functools
import gc
import os
import random
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main
from forking import settle
from harness import TINY, Died

from kdcli.__main__ import run
from kdcli.cli import app

_get_command = typer.main.get_command

SEED = 20260814
MOST_WORK = 10.0  # seconds of processor time; more is a hang, however busy the machine is with other things
PATIENCE = 60.0  # seconds by the clock, after which a trial that waits instead of working is a hang too
SPARE_RSS = 512 * 2**20  # bytes beyond twice this process's own
SPARE_MAPPED = 6 * 2**30  # bytes a child may map beyond what it begins with, so that no trial can starve the machine
HARMLESS = 0

KD = ["distill", "--method", "kd", "--student", "resnet8", *TINY]

_EXECUTION = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn", "subprocess.Popen")
_NETWORK = ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname")
_CHANGES = (
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"),
    *("os.chown", "os.utime", "shutil.rmtree", "shutil.move", "shutil.copyfile"),
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass
class Trial:
    """What a command did.

    Attributes:
        code: its exit code; minus the signal that ended it; None if it had to be killed for taking too long.
        seconds: by the clock.
        work: seconds of processor time.
        rss: the most memory it had resident, in bytes.
        forbidden: what it tried and had no business doing, in the words of Python's audit events.
    """

    words: list[str]
    code: int | None
    out: str
    err: str
    seconds: float
    work: float
    rss: int
    forbidden: list[str]

    @property
    def errors(self) -> list[str]:
        """The lines of stderr that begin with `error:`."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]


def trial(
    words: Iterable[object],
    folder: Path,
    *,
    before: Callable[[], object] | None = None,
    writable: Collection[str] = (),
    executes: bool = False,
    patience: float = PATIENCE,
) -> Trial:
    """Run a command in a forked child with `folder` as its working directory.

    Args:
        before: called in the child first: patches that break `kd`, or that inject a fault into it.
        writable: names in `folder` below which it may write; `folder/.tmp` is its temporary directory and always may be.
        executes: it may start programs (`kd import` reads in a process of its own).
        patience: seconds after which it is killed.
    """
    parser()
    arguments = [str(word) for word in words]
    folder = Path(os.path.realpath(folder))
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as told:
        began = time.monotonic()
        child = os.fork()
        if not child:
            _child(arguments, folder, before, [folder / name for name in (*writable, ".tmp")], executes, out, err, told)
        handle = os.pidfd_open(child)
        in_time = bool(select.select([handle], [], [], patience)[0])
        os.close(handle)
        if not in_time:
            os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
        seconds = time.monotonic() - began
        code = os.waitstatus_to_exitcode(status) if in_time else None
        texts = [_content(file) for file in (out, err, told)]
    work = usage.ru_utime + usage.ru_stime
    return Trial(arguments, code, texts[0], texts[1], seconds, work, usage.ru_maxrss * 1024, texts[2].splitlines())


@functools.cache
def parser() -> Any:
    """Typer's parser of the command line, which takes as long to make as all the rest of a small command."""
    return _get_command(app)


def _content(file: Any) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def _child(
    words: list[str],
    folder: Path,
    before: Callable[[], object] | None,
    writable: list[Path],
    executes: bool,
    out: Any,
    err: Any,
    told: Any,
) -> None:
    """Never returns."""
    code = 71
    try:
        # One's own core limit and signals; the parent's captured streams are none of the child's.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open("/proc/self/statm") as file:
            most = int(file.read().split()[0]) * resource.getpagesize() + SPARE_MAPPED
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (out.fileno(), 1), (err.fileno(), 2)):
            os.dup2(source, target)
        sys.stdin = os.fdopen(0, "r", encoding="utf-8", closefd=False)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        (folder / ".tmp").mkdir(exist_ok=True)
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder / ".tmp")
        os.chdir(folder)
        typer.main.get_command = lambda _: parser()
        if before is not None:
            before()
        sys.addaudithook(_watch(writable, executes, told.fileno()))
        code = run(words)
        sys.stdout.flush()
    except BaseException:
        sys.stderr.write(traceback.format_exc())
    finally:
        sys.stderr.flush()
        os._exit(code)


def _watch(writable: list[Path], executes: bool, told: int) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that writes down what a command must not do, and lets it go on."""
    roots = [os.path.realpath(path) for path in writable]

    def within(path: Any, holder: int = -1) -> bool:
        if isinstance(path, int) or path is None:  # a descriptor; whatever opened it was seen
            return True
        if holder >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{holder}"), path)
        real = os.path.realpath(os.fsdecode(path))
        # The second is no file: a run asks there that the peak of its process's memory be forgotten.
        if real in (os.devnull, f"/proc/{os.getpid()}/clear_refs"):
            return True
        return any(real == root or real.startswith(root + os.sep) for root in roots)

    def tell(event: str, args: tuple[Any, ...]) -> None:
        os.write(told, f"{event} {args!r}"[:200].replace("\n", " ").encode("utf-8", "replace") + b"\n")

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            writes = (isinstance(flags, int) and flags & _WRITES) or (isinstance(mode, str) and set(mode) & set("wax+"))
            if writes and not within(path):
                tell(event, args)
        elif event in _CHANGES:
            holder = args[1] if event in ("os.remove", "os.rmdir") else -1
            paths = {"os.rename": args[:2], "os.symlink": args[1:2], "os.link": args[1:2]}.get(event, args[:1])
            if not all(within(path, holder) for path in paths):
                tell(event, args)
        elif event in _NETWORK:
            if getattr(args[0], "family", None) != socket.AF_UNIX:  # workers talk through those
                tell(event, args)
        elif event in _EXECUTION and not executes:
            tell(event, args)

    return watch


@functools.cache
def own_rss() -> int:
    """The most memory this process has had resident, in bytes: a forked child begins with as much."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def complaints(found: Trial, codes: Collection[int]) -> list[str]:
    """What is wrong with how a command ended, in words; nothing if it ended as it should.

    Args:
        codes: the exit codes that are right.
    """
    wrong = []
    if found.code is None:
        wrong.append(f"still running after {found.seconds:.0f} s")
    elif found.code < 0:
        wrong.append(f"ended by signal {-found.code}")
    elif found.code not in codes:
        wrong.append(f"exit code {found.code}")
    if found.work > MOST_WORK:
        wrong.append(f"{found.work:.0f} s of work")
    if "Traceback" in found.err + found.out:
        wrong.append("a traceback")
    if found.code is not None and found.code >= 0:
        expected = min(found.code, 1)
        if len(found.errors) != expected:
            wrong.append(f"{len(found.errors)} error lines")
        elif expected and found.err.splitlines()[-1] != found.errors[0]:
            wrong.append("the error line is not the last one")
    if found.rss > 2 * own_rss() + SPARE_RSS:
        wrong.append(f"{found.rss >> 20} MiB resident")
    if odd := {c for c in found.out + found.err if not c.isprintable() and c not in "\n\t\ufffd"}:
        wrong.append(f"control characters {odd}")
    wrong += [f"forbidden: {event}" for event in found.forbidden]
    return wrong


def told(found: Trial, wrong: list[str]) -> str:
    """A failed trial as one readable paragraph."""
    return f"kd {' '.join(found.words)}: {'; '.join(wrong)}\n{found.err[-600:]}"


@dataclass(frozen=True)
class Stock:
    """Real files made by real commands, for trials to copy and to damage.

    Attributes:
        teacher: of the methods kd, crd and slkd.
        joint: the teacher of vsd.
        student: distilled with kd.
        runs: method to a run directory that was left at step 14 of 16 with the states of steps 9 and 12.
        whole: method to the finished run of the same command.
    """

    teacher: Path
    joint: Path
    student: Path
    runs: dict[str, Path]
    whole: dict[str, Path]

    def words(self, method: str) -> list[str]:
        """The command that made `runs[method]`, without its `--out`."""
        teacher = self.joint if method == "vsd" else self.teacher
        settings = {"crd": ["--set", "method.negatives=32"], "slkd": ["--set", "method.self_teachers=1"]}
        return [
            *("distill", "--method", method, "--teacher", str(teacher), "--student", "resnet8", *TINY),
            *("--max-steps", "16", "--checkpoint-every", "3", *settings.get(method, [])),
        ]


METHODS = ("kd", "vsd", "crd", "slkd")


@functools.cache
def stock() -> Stock:
    """Made once a process; it also warms the process, so that a forked child has nothing left to import."""
    folder = Path(tempfile.mkdtemp(prefix="kd-faults-"))
    for method in ("kd", "vsd"):
        words = ["pretrain-teacher", "--method", method, "--teacher", "resnet14", *TINY, "--max-steps", "6", "--quiet"]
        assert run([*words, "--out", str(folder / f"teacher-{method}")]) == 0
    student = folder / "student"
    teacher, joint = (folder / f"teacher-{method}/teacher.safetensors" for method in ("kd", "vsd"))
    made = Stock(teacher, joint, student / "student.safetensors", {}, {})
    assert run([*KD, "--teacher", str(teacher), "--max-steps", "4", "--quiet", "--out", str(student)]) == 0
    for method in METHODS:
        made.runs[method], made.whole[method] = folder / f"run-{method}", folder / f"whole-{method}"
        left = trial([*made.words(method), "--out", made.runs[method]], folder, before=dies_at(14), patience=600)
        assert left.code == 71, left.err
        whole = trial([*made.words(method), "--out", made.whole[method]], folder, patience=600)
        assert whole.code == 0, whole.err
    settle()
    atexit.register(gc.unfreeze)
    return made


def dies_at(step: int) -> Callable[[], None]:
    """A patch: the process "dies" when it is about to train `step`."""

    def patch() -> None:
        from kdcli.engine import fit

        original = fit.Training.step

        def train(self: Any, epoch: int, batch: Any) -> None:
            if self.at == step:
                raise Died
            original(self, epoch, batch)

        fit.Training.step = train  # type: ignore[method-assign]

    return patch


def fresh(folder: Path) -> Path:
    """`folder`, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def campaign(
    name: str, count: int, folder: Path, one: Callable[[random.Random, Path], tuple[Trial, Collection[int]]]
) -> list[str]:
    """`count` seeded trials; a line for each that did not end as it should.

    Args:
        one: makes the input of a trial in an empty folder and runs it; the trial, and the exit codes that are right.
    """
    stock()
    failures, ended, longest = [], Counter[int | None](), 0.0
    for number in range(count):
        found, codes = one(random.Random(f"{SEED} {name} {number}"), fresh(folder / "trial"))
        ended[found.code] += 1
        longest = max(longest, found.work)
        if wrong := complaints(found, codes):
            failures.append(f"{name} {number}: {told(found, wrong)}")
    print(f"R11: seed '{SEED} {name}': {count} mutations, {len(failures)} failures; exit code → times {dict(ended)};")
    print(f"     at most {longest:.1f} s of processor time each")
    return failures


def shown(failures: list[str], most: int = 8) -> str:
    """The first failures of a campaign, for an assertion's message."""
    return f"{len(failures)} failures\n" + "\n".join(failures[:most])
