"""Carrying out a sweep: its runs one after another in this process, or side by side; the document about them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from kdcli.errors import KdError, Stopped, UsageError, unforeseen
from kdcli.output import Story, envelope
from kdcli.sweep.file import load
from kdcli.sweep.outcome import Outcome, done
from kdcli.sweep.planned import Planned, described
from kdcli.sweep.planning import steps_of


def plan(name: str, only: Sequence[str] = (), sets: Sequence[str] = ()) -> dict[str, Any]:
    """`kd sweep --plan`: every run with its command, its resolved spec and the numbers published for it."""
    sweep = load(name)
    runs = steps_of(sweep, only, sets)
    documents = [{**described(run), "spec": run.spec and run.spec.model_dump(mode="json")} for run in runs]
    return envelope("sweep", table=name, about=sweep.about.model_dump(), runs=documents)


def carry_out(
    name: str, only: Sequence[str], sets: Sequence[str], story: Story, jobs: int = 1
) -> tuple[dict[str, Any], KdError | None]:
    """Do the runs of a sweep; its document, with the runs in the order of the plan, and the first failure in that order.

    A finished run is not repeated. A run that fails does not keep the others from being done, except those that need it.
    A stop signal, or the end of `system.max_minutes` (which is that of the whole sweep), stops the sweep.

    Args:
        jobs: 1: one after another in this process; more: up to so many at a time, each in a process of its own.

    Raises:
        Stopped: after saving; the same command goes on.
    """
    sweep = load(name)  # once: by the end of a long sweep the file may say something else
    planned = steps_of(sweep, only, sets)
    for run in planned:
        if run.spec is not None and (run.spec.system.nproc > 1 or "RANK" in os.environ):
            raise UsageError(
                "a run of a sweep has one process",
                field="system.nproc",
                hint=f"run the lines of kd sweep {name} --plan",
            )
    minutes = next((run.spec.system.max_minutes for run in planned if run.spec is not None), None)
    if jobs == 1:
        ended = _one_by_one(planned, minutes, story)
    else:
        from kdcli.sweep.side_by_side import side_by_side

        ended = side_by_side(planned, jobs, minutes, story)
    results = [described(run) | _told(run, outcome) for run, outcome in zip(planned, ended, strict=True)]
    document = envelope("sweep", table=name, about=sweep.about.model_dump(), runs=results)
    return document, next((outcome.error for outcome in ended if outcome.error is not None), None)


def _told(run: Planned, outcome: Outcome) -> dict[str, Any]:
    """What the sweep's document says about the end of a run."""
    if run.spec is None:
        return {"status": "not available" if run.needs else "paper"}
    if outcome.missing:
        return {"status": "not run", "error": f"{outcome.missing} failed"}
    if outcome.error is not None:
        return {"status": "failed", "error": outcome.error.line(), "exit_code": outcome.error.code}
    return outcome.done or {}


def _one_by_one(planned: list[Planned], minutes: float | None, story: Story) -> list[Outcome]:
    """Carry out the runs one after another in this process; how each ended."""
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    failed: set[str] = set()
    ended = []
    for position, run in enumerate(planned):
        outcome = Outcome()
        if run.spec is not None and (missing := [path for path in run.requires if path in failed]):
            outcome = Outcome(missing=missing[0])
        elif run.spec is not None:
            story.note(f"run {position + 1} of {len(planned)}: {run.line}")
            try:
                outcome = Outcome(done(_carried_out(run, deadline, story)))
            except Stopped:
                raise
            except Exception as problem:  # a bug in one method shall not cost the night the others would have used
                outcome = Outcome(error=_bare(problem if isinstance(problem, KdError) else unforeseen(problem)))
                story.note(f"failed: {outcome.error.line() if outcome.error else ''}")
        if outcome.missing or outcome.error is not None:
            failed.add(run.directory)
        ended.append(outcome)
    return ended


def _carried_out(run: Planned, deadline: float | None, story: Story) -> dict[str, Any]:
    """One run through the command that it belongs to; its summary."""
    from kdcli import jobs

    spec = run.spec
    assert spec is not None
    if deadline is not None:
        left = (deadline - time.monotonic()) / 60
        if left <= 0:
            raise Stopped("stopped as asked, between two runs", 75, hint="run the same command again to go on")
        spec = spec.model_copy(update={"system": spec.system.model_copy(update={"max_minutes": left})})
    if run.command == "pretrain-teacher":
        return jobs.teacher(spec, story)
    if run.command == "linear-probe":
        return jobs.probes([spec], story)["runs"][0]
    document = jobs.students(spec, [spec.seed], story, auto_teacher=True)
    return document["runs"][-1] if "runs" in document else document  # with a baseline, which comes first


def _bare(error: KdError) -> KdError:
    """The error without the frames it came through: they would keep the failed run's networks to the end of the sweep."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
