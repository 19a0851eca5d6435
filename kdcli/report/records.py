"""Runs as a report sees them: what a run directory says about itself, read without torch and without trust.

A run is `finished` where its summary is there. Everything else is listed as what it is and takes part in no number:
`unfinished`, `not run` (planned by a sweep), `failed to read`, `paper` (a published number without a run).
"""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kdcli import checkpoint, durable
from kdcli.errors import InputError, KdError
from kdcli.metadata import require_summary
from kdcli.models.names import canonical
from kdcli.runs.identity import flat
from kdcli.specs import RunSpec, validate
from kdcli.sweep.file import Number

Status = Literal["finished", "unfinished", "not run", "failed to read", "paper"]
Role = Literal["student", "teacher", "probe"]
LOG_LIMIT = 64 * 2**20  # bytes of metrics.jsonl; a line an epoch is a few hundred

_LARGEST = 1e18  # far above any count or cost; a file may say anything

# Settings that have a column of their own, or that only say where a run is.
_NAMED = ("command", "seed", "teacher", "student", "encoder", "baseline", "method.name", "data.dataset", "data.ratio")


@dataclass(frozen=True)
class Record:
    """One run, or a place of a table that has none.

    Attributes:
        label: what the table calls its method.
        teacher, student: architectures; empty where there is none.
        ratio: share of the training images that the student saw.
        probe: the data set on which frozen features were probed; empty for other runs.
        settings: every setting of its identity that has no column of its own, by dotted path.
        summary: its answer; empty unless it is finished.
        epochs: the parsed lines of its log.
        digest: of its weights; empty without a checkpoint.
        published: the numbers that stand in its place of a paper's table.
        note: why it is not finished.
    """

    status: Status
    role: Role
    label: str
    method: str
    directory: str = ""
    teacher: str = ""
    student: str = ""
    dataset: str = ""
    ratio: float = 1.0
    probe: str = ""
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    spec: RunSpec | None = None
    digest: str = ""
    spec_digest: str = ""
    published: tuple[Number, ...] = ()
    note: str = ""

    @property
    def done(self) -> bool:
        """Whether it is finished."""
        return self.status == "finished"

    @property
    def file(self) -> Path:
        """Its network's checkpoint, by the directory it was found in and not by what its summary says."""
        return Path(self.directory) / f"{'teacher' if self.role == 'teacher' else 'student'}.safetensors"

    @property
    def told_teacher(self) -> dict[str, Any]:
        """What its summary says about its teacher: arch, digest, checkpoint, accuracy; empty without one."""
        return self.summary.get("teacher") or {}

    def test(self, *keys: str) -> float | None:
        """A number of its test metrics at the last epoch, such as `test("aggregate", "top1")`."""
        return number(self.summary, "metrics", "test", *keys)

    @property
    def command(self) -> str:
        """The command that was typed, as the run recorded it; empty where it did not."""
        words = self.environment.get("argv")
        return shlex.join(["kd", *map(str, words)]) if isinstance(words, list) and words else ""


def number(values: Any, *keys: str) -> float | None:
    """The number at a path of nested dictionaries; None where there is none, or one that no run can have measured."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    fine = isinstance(values, int | float) and not isinstance(values, bool) and abs(values) <= _LARGEST
    return values if fine else None


def read(directory: str | os.PathLike[str]) -> Record:
    """The run in a directory that holds a spec.json; one that cannot be read says so in its `note`, and is no error."""
    path = Path(directory)
    try:
        return _read(path)
    except KdError as problem:
        return Record("failed to read", "student", path.name, "?", str(path), note=problem.line())


def _read(path: Path) -> Record:
    told = durable.read_json(path / "spec.json")
    if not isinstance(told, dict):
        raise InputError(f"{path / 'spec.json'} is not a spec", hint="restore it or remove it")
    spec: RunSpec = validate(RunSpec, told)
    summary: dict[str, Any] = {}
    finished = os.path.lexists(path / "summary.json")
    if finished:
        summary = require_summary(durable.read_json(path / "summary.json"), path / "summary.json")
    epochs = _log(path / "metrics.jsonl")
    role: Role = "student"
    if spec.command != "distill":
        role = "teacher" if spec.command == "pretrain-teacher" else "probe"
    student = spec.student or ""
    teacher = summary.get("teacher", {}).get("arch", "") if role == "student" else ""
    if role == "probe":
        student = str((summary.get("encoder") or {}).get("arch", "")) or Path(str(spec.encoder)).name
    elif role == "teacher":
        student, teacher = "", str(summary.get("network") or spec.teacher)
    elif not teacher and spec.teacher is not None:
        teacher = named_arch(spec.teacher)
    return Record(
        "finished" if finished else "unfinished",
        role,
        label=str(spec.method.get("name", "none")),
        method=str(spec.method.get("name", "none")),
        directory=str(path),
        teacher=_arch(teacher),
        student=_arch(student),
        dataset=spec.data.dataset if role != "probe" else "",
        ratio=spec.data.ratio,
        probe=spec.data.dataset if role == "probe" else "",
        seed=spec.seed,
        settings=settings_of(spec),
        summary=summary,
        environment=_environment(path / "env.json"),
        epochs=epochs,
        spec=spec,
        digest=_digest(path, role, summary) if finished else "",
        spec_digest=str(summary.get("spec_digest", "")),
        note="" if finished else f"{_last(epochs)} of {spec.train.epochs} epochs",
    )


def settings_of(spec: RunSpec) -> dict[str, Any]:
    """The settings of a spec's identity that have no column of their own, by dotted path."""
    return {key: value for key, value in flat(spec.identity()).items() if key not in _NAMED}


def named_arch(name: str) -> str:
    """The architecture that a spec's teacher means: that of the checkpoint where it names one that can be read."""
    if "/" not in name and not os.path.exists(name):
        return name
    try:
        return str(checkpoint.read_metadata(checkpoint.locate(name))["arch"]["name"])
    except (KdError, KeyError, TypeError):
        return Path(name.rstrip("/")).name


def _arch(name: str) -> str:
    """One spelling of an architecture; what is none as it is."""
    try:
        return canonical(name)
    except KdError:
        return name


def _last(epochs: list[dict[str, Any]]) -> int:
    last = number(epochs[-1], "epoch") if epochs else None
    return int(last or 0)


def _digest(path: Path, role: Role, summary: dict[str, Any]) -> str:
    """The digest of a run's weights (of a probe: of its encoder), from the checkpoint's header."""
    if role == "probe":
        return str((summary.get("encoder") or {}).get("digest", ""))
    try:
        return str(checkpoint.read_metadata(path / f"{role}.safetensors")["digest"])
    except KdError:  # moved away or damaged: its numbers are still those of its summary
        return ""


def _environment(path: Path) -> dict[str, Any]:
    try:
        values = durable.read_json(path)
    except KdError:
        return {}
    return values if isinstance(values, dict) else {}


def _log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that are JSON objects; a torn last line, as a running run may have, is left out."""
    try:
        with open(durable.open_regular(path), "rb") as file:
            content = file.read(LOG_LIMIT)
    except (KdError, OSError):
        return []
    lines = []
    for line in content.splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict):
            lines.append(values)
    return lines
