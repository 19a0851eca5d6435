"""`kd sweep --jobs N`: several runs of a sweep at a time, each in a process of its own.

A run starts once the runs that it requires are finished. The processor's cores are shared out between the jobs and so are
the GPUs, where there are several; on one GPU the jobs are side by side. Each process carries out the command that the plan
names, so a run is the same in whichever way it is made.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from kdcli import checkpoint, teachers
from kdcli.commandline import command_line
from kdcli.engine.signals import StopFlag, listening, stopped
from kdcli.errors import BusyError, KdError, Stopped, WorkerError
from kdcli.output import Story
from kdcli.runs.directory import open_run
from kdcli.runs.identity import digest_of, directory_for, identity
from kdcli.specs import RunSpec
from kdcli.sweep.outcome import Outcome, done
from kdcli.sweep.planned import Planned

_CHILD = ("-m", "kdcli.sweep.child")
_LOOK_EVERY = 0.1  # seconds
_ONE_WISH = 1.0  # seconds within which signals are one: `timeout` sends its own twice, to the process and to its group
_LONGEST_WAIT = 30.0  # seconds between two attempts at a directory that is in use
_PATIENCE = 20.0  # seconds for the runs to save when the sweep itself fails
_AS_SIGNAL = {130: signal.SIGINT, 143: signal.SIGTERM, 75: signal.SIGUSR1}


def side_by_side(planned: list[Planned], jobs: int, minutes: float | None, story: Story) -> list[Outcome]:
    """Carry out planned runs, up to `jobs` at a time; how each ended, in the order of the plan.

    Args:
        minutes: the time of the whole sweep.

    Raises:
        Stopped: a signal came (it was passed on to the runs, which saved), or the time is up.
        WorkerError: no process could be started.
    """
    asked = _Asked(minutes, any(run.spec is not None and run.spec.system.requeue for run in planned))
    crew = _Crew(planned, jobs, asked, story)
    with listening(asked):
        try:
            crew.work()
        finally:
            crew.dismiss()
    return [crew.ended[position] for position in range(len(planned))]


class _Asked(StopFlag):
    """The stop flag of the sweep: it also knows which signal came, and whether another one followed it."""

    def __init__(self, max_minutes: float | None, requeue: bool) -> None:
        super().__init__(max_minutes, requeue)
        self.number, self.again = 0, False
        self._first = 0.0

    def receive(self, number: int, frame: Any) -> None:
        """The signal handler: the first signal asks the runs to save and stop, a later one has no patience."""
        super().receive(number, frame)
        now = time.monotonic()
        if not self.number:
            self.number, self._first = number, now
        elif now - self._first > _ONE_WISH:
            self.again = True


@dataclass
class _Worker:
    """A run at work. Its answer and its story go to files without a name, which no kill leaves behind."""

    position: int
    process: subprocess.Popen[bytes]
    claims: set[str]
    out: IO[bytes]
    err: IO[bytes]
    begun: float = field(default_factory=time.monotonic)

    def said(self) -> tuple[str, str]:
        """stdout and stderr of the process that has ended."""
        texts = []
        for file in (self.out, self.err):
            with file:
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        return texts[0], texts[1]


class _Crew:
    """The state of one call of `side_by_side`.

    Attributes:
        ended: by position in the plan; complete when the sweep is.
        at_work: by slot, of which there are as many as jobs; a slot has its GPU.
        code: of a run that was stopped by somebody else, which stops the sweep.
    """

    def __init__(self, planned: list[Planned], jobs: int, asked: _Asked, story: Story) -> None:
        self.planned, self.jobs, self.asked, self.story = planned, jobs, asked, story
        self.ended: dict[int, Outcome] = {i: Outcome() for i, run in enumerate(planned) if run.spec is None}
        self.at_work: dict[int, _Worker] = {}
        self.code = 0
        self._places = {run.directory: i for i, run in enumerate(planned) if run.spec is not None and run.directory}
        self._lost: set[str] = set()  # directories of the runs that failed or were not begun
        self._fetched: set[str] = set()  # data sets that are there, since a run on them is finished
        self._waits: dict[int, tuple[float, float]] = {}  # position → not before, and how long it waited for that
        self._told = False
        self._gpus = gpus()
        self._threads = max(1, _cores() // jobs)

    # ---------------------------------------------------------------------------------------------------- the whole

    def work(self) -> None:
        """Start, follow and stop the runs, until all have ended or those at work have stopped.

        Raises:
            Stopped: not all have ended.
        """
        while self.at_work or not (self._stopping() or len(self.ended) == len(self.planned)):
            if self._stopping():
                self._pass_on()
            else:
                self._start_all()
            if self.at_work or len(self.ended) < len(self.planned):
                time.sleep(_LOOK_EVERY)
            self._collect()
        if len(self.ended) < len(self.planned):
            raise stopped(self.asked.code or self.code, "what the runs at work had done")

    def dismiss(self) -> None:
        """Leave no process behind: for a sweep that itself failed, since otherwise none is left."""
        for worker in self.at_work.values():
            worker.process.terminate()
        until = time.monotonic() + _PATIENCE
        for worker in self.at_work.values():
            try:
                worker.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()

    def _stopping(self) -> bool:
        return bool(self.asked.code or self.code)

    def _pass_on(self) -> None:
        """Hand the first signal to the runs, once, and end them at a second one. That time is up they know by themselves."""
        number = self.asked.number or (0 if self.asked.code else _AS_SIGNAL.get(self.code, signal.SIGTERM))
        if number and not self._told:
            self._told = True
            self.story.note(f"stopping: {_count(len(self.at_work))} at work to save; a second signal kills")
            for worker in self.at_work.values():
                worker.process.send_signal(number)
        if self.asked.again:
            for worker in self.at_work.values():
                worker.process.kill()

    # ----------------------------------------------------------------------------------------------------- starting

    def _start_all(self) -> None:
        """Start whatever may start, in the order of the plan, as long as there are free slots."""
        busy = {worker.position for worker in self.at_work.values()}
        for position, run in enumerate(self.planned):
            free = next((slot for slot in range(self.jobs) if slot not in self.at_work), None)
            if free is None:
                return
            if position in self.ended or position in busy or time.monotonic() < self._waits.get(position, (0, 0))[0]:
                continue
            if missing := [path for path in run.requires if path in self._lost]:
                self._lose(position, Outcome(missing=missing[0]))
            elif all(self._places[path] in self.ended for path in run.requires if path in self._places):
                claims = self._claims(run)
                if not any(claims & worker.claims for worker in self.at_work.values()):
                    self._start(free, position, claims)

    def _claims(self, run: Planned) -> set[str]:
        """What a run makes on its way beside its own directory, and no other run may make at the same time."""
        assert run.spec is not None
        claims = {path for path in run.requires if path not in self._places and not _is_finished(path)}
        data = run.spec.data
        if data.download and data.dataset not in self._fetched:
            claims.add(f"download {data.dataset}")
        return claims

    def _start(self, slot: int, position: int, claims: set[str]) -> None:
        """Start a run's process, unless the run turns out to be finished."""
        run = self.planned[position]
        assert run.spec is not None
        system = run.spec.system
        directory, contents = _place(run.spec)
        if directory is not None and _is_finished(directory) and not (system.overwrite or run.spec.baseline):
            try:
                with open_run(run.spec, contents) as opened:
                    self.ended[position] = Outcome(done(opened.summary()))
            except (KdError, KeyError, TypeError):  # its own process is the one to say what is wrong
                pass
            else:
                self._fetched.add(run.spec.data.dataset)
                self.story.note(f"{directory} is finished already")
                return
        changes: dict[str, Any] = {}
        recorded = directory is not None and (directory / "env.json").exists() and not system.overwrite
        if system.threads is None and not recorded:  # an unfinished run goes on with the threads that it began with
            changes["threads"] = self._threads
        if self.asked.deadline is not None:
            changes["max_minutes"] = max(0.001, (self.asked.deadline - time.monotonic()) / 60)
        spec = run.spec.model_copy(update={"system": system.model_copy(update=changes)})
        if position not in self._waits:
            self.story.note(f"{self._name(position)}: {run.line}")
        self.at_work[slot] = _begin(position, run.command, spec, claims, self._environment(slot, system.device))

    def _environment(self, slot: int, device: str) -> dict[str, str]:
        """The environment of a slot's process: its GPU, where there are several and the run may be on any."""
        if not self._gpus or device not in ("auto", "cuda"):
            return dict(os.environ)
        return {**os.environ, "CUDA_VISIBLE_DEVICES": self._gpus[slot % len(self._gpus)]}

    # ------------------------------------------------------------------------------------------------------- ending

    def _collect(self) -> None:
        """Take in the runs whose processes have ended."""
        for slot, worker in list(self.at_work.items()):
            if worker.process.poll() is not None:
                del self.at_work[slot]
                self._end(worker)

    def _end(self, worker: _Worker) -> None:
        position, code = worker.position, worker.process.returncode
        run = self.planned[position]
        assert run.spec is not None
        found = outcome(code, *worker.said())
        error = found.error
        if isinstance(error, Stopped) or (code < 0 and self._stopping()):
            self.code = self.code or (error.code if isinstance(error, Stopped) else 0)
        elif isinstance(error, BusyError):
            self._wait(position, error)
        elif error is not None:
            self.story.note(f"{self._name(position)} failed: {error.line()}")
            self._lose(position, found)
        else:
            assert found.done is not None
            self.ended[position] = found
            self._fetched.add(run.spec.data.dataset)
            seconds = time.monotonic() - worker.begun
            self.story.note(f"{self._name(position)} done: top-1 {found.done['top1']['single']:.2f} %, {seconds:.0f} s")

    def _lose(self, position: int, found: Outcome) -> None:
        """Take in a run that failed, or that is not begun since one that it requires did."""
        self.ended[position] = found
        self._lost.add(self.planned[position].directory)
        if found.missing:
            self.story.note(f"{self._name(position)} is not run: {found.missing} failed")

    def _wait(self, position: int, error: BusyError) -> None:
        """Try a run again later: another process is making it, perhaps one that a killed sweep left to save."""
        if position not in self._waits:
            self.story.note(f"{self._name(position)} waits: {error.message}")
        pause = min(_LONGEST_WAIT, 2 * self._waits.get(position, (0.0, 0.5))[1])
        self._waits[position] = (time.monotonic() + pause, pause)

    def _name(self, position: int) -> str:
        return f"run {position + 1} of {len(self.planned)}"


# ------------------------------------------------------------------------------------------------------------- processes


def _begin(position: int, command: str, spec: RunSpec, claims: set[str], environment: dict[str, str]) -> _Worker:
    """Start the process of a run.

    It leads a process group of its own, so that a terminal's Ctrl-C reaches it once, passed on by the sweep.

    Raises:
        WorkerError: it cannot be started.
    """
    words = shlex.split(command_line(command, spec))[1:]
    # The working directory is on its path only where it is on ours (`python -m kdcli`, but not `kd`).
    path = [] if {"", os.getcwd()} & set(sys.path) else ["-P"]
    call = [sys.executable, *path, *_CHILD, str(os.getpid()), *words, "--json", "--quiet"]
    try:
        out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - closed when they have been read
        process = subprocess.Popen(
            call, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, process_group=0
        )
    except OSError as problem:
        raise WorkerError(f"cannot start a process: {problem.strerror}", hint="fewer --jobs") from None
    return _Worker(position, process, claims, out, err)


def outcome(code: int, out: str, err: str) -> Outcome:
    """How a run ended, from its process's exit code (negative: the signal that ended it), stdout and stderr."""
    document: Any = None
    try:
        document = json.loads(out)
        if code == 0:
            return Outcome(done(_summary(document)))
        told = document["error"]
        message, field_, hint = told["message"], told["field"], told["hint"]
    except (ValueError, KeyError, TypeError, IndexError):
        how = f"was ended by signal {-code}" if code < 0 else f"left with exit code {code}"
        lines = [line.strip() for line in err.splitlines() if line.strip()]
        text = f"its process {how}" + (f": {lines[-1]}" if lines else "")
        return Outcome(error=WorkerError(text, hint="run the same command again to go on"))
    if told["kind"] == Stopped.kind:
        return Outcome(error=Stopped(message, code, hint=hint))
    kinds = {kind.kind: kind for kind in KdError.__subclasses__()}
    # A bug's hint is about the command line of its own process.
    cls = kinds.get(told["kind"], KdError)
    return Outcome(error=cls(message, field=field_, hint=None if cls is KdError else hint))


def _summary(document: dict[str, Any]) -> dict[str, Any]:
    """The summary of the run that a command was about: the last one, where it tells of several."""
    if "ratios" in document:
        document = document["ratios"][-1]
    return document["runs"][-1] if "runs" in document else document


# ---------------------------------------------------------------------------------------------------- what there is


def _place(spec: RunSpec) -> tuple[Path | None, dict[str, str]]:
    """The directory of a run and the content digests of what it names by path; None where something is wrong with those."""
    try:
        contents = teachers.contents(spec)
        if spec.encoder is not None:
            contents[spec.encoder] = checkpoint.digest(checkpoint.locate(spec.encoder))
    except (KdError, OSError):
        return None, {}
    return directory_for(spec, digest_of(identity(spec, contents))), contents


def _is_finished(directory: str | Path) -> bool:
    return (Path(directory) / "summary.json").is_file()


def gpus() -> list[str]:
    """The GPUs over which to spread jobs, as `CUDA_VISIBLE_DEVICES` names them; empty where there are fewer than two."""
    import torch

    count = torch.cuda.device_count()  # opens none of them
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in visible.split(",")] if visible else [str(i) for i in range(count)]
    return names[:count] if count > 1 else []


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _count(number: int) -> str:
    return f"{number} run" if number == 1 else f"{number} runs"
