"""Which runs a report is about: run directories, folders of runs, checkpoints of runs, and the plan of a sweep."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kdcli import checkpoint, presets
from kdcli.errors import InputError, KdError, UsageError
from kdcli.report.records import Record, named_arch, read, settings_of


@dataclass
class Gathered:
    """What a report is made of.

    Attributes:
        title: of the sweep, or a plain one.
        source: the paper and table, if a sweep says so.
        rescaled: what `--set` changed about a sweep's runs, as typed.
        records: runs in the order in which tables show them.
    """

    title: str
    source: str = ""
    rescaled: tuple[str, ...] = ()
    records: list[Record] = field(default_factory=list)


def gather(targets: Sequence[str], only: Sequence[str] = (), sets: Sequence[str] = ()) -> Gathered:
    """The runs that `targets` stand for: any number of run directories and folders of runs, or one sweep.

    Raises:
        UsageError: `--only` or `--set` without a sweep, or a sweep together with something else.
        InputError: a path does not exist, or holds no run.
    """
    sweeps = [name for name in targets if _is_sweep(name)]
    if sweeps and len(targets) > 1:
        raise UsageError(f"{sweeps[0]} is a sweep, which is reported on alone", hint="one sweep, or any number of runs")
    if sweeps:
        return _of_sweep(sweeps[0], only, sets)
    if only or sets:
        raise UsageError("goes with a sweep", field="--only" if only else "--set", hint="name the sweep")
    return Gathered("Distillation report", records=_named_probes(_of_runs(targets)))


def _is_sweep(name: str) -> bool:
    return name in presets.sweeps() or (name.endswith(".toml") and not os.path.isdir(name))


def _of_runs(targets: Iterable[str]) -> list[Record]:
    directories: dict[str, str] = {}  # by real path, so that a run named twice counts once
    for name in targets:
        found = runs_below(name)
        if not found:
            raise InputError(
                f"{name} holds no run" if os.path.exists(name) else f"{name} does not exist",
                hint="name run directories, a folder of them, or a sweep",
            )
        for path in found:
            directories.setdefault(os.path.realpath(path), path)
    return [read(path) for path in directories.values()]


def runs_below(name: str) -> list[str]:
    """The run directories that a path stands for: itself, that of a file in it, or all below it, in the order of names.

    Links are followed where they are named, not where they are met.
    """
    path = Path(name)
    if path.is_file() and (path.parent / "spec.json").is_file():
        return [str(path.parent)]
    found = []
    for folder, inner, files in os.walk(path):
        if "spec.json" in files:
            found.append(folder)
            inner.clear()
        inner[:] = sorted(entry for entry in inner if not entry.startswith("."))
    return found


def _named_probes(records: list[Record]) -> list[Record]:
    """Probes with the method and networks of the student whose features they probe, where that is among the runs."""
    students = {record.digest: record for record in records if record.role == "student" and record.digest}
    named = []
    for record in records:
        student = students.get(record.digest) if record.role == "probe" else None
        if student is not None:
            taken: dict[str, Any] = {"label": student.label, "method": student.method, "teacher": student.teacher}
            taken |= {"dataset": student.dataset, "ratio": student.ratio, "seed": student.seed}
            record = replace(record, **taken)
        elif record.role == "probe":
            record = replace(record, label="probe", method="?")
        named.append(record)
    return named


def _of_sweep(name: str, only: Sequence[str], sets: Sequence[str]) -> Gathered:
    from kdcli.sweep.file import load
    from kdcli.sweep.planning import steps

    loaded = load(name)
    about = loaded.about
    usual = str(loaded.common.get("data", {}).get("dataset", "cifar100"))
    found = Gathered(about.title or name, about.source, tuple(sets))
    cache: dict[str, Record] = {}
    for planned in steps(name, only, sets):
        if planned.spec is None:
            status, note = ("paper", "") if planned.stage == "paper" else ("not run", f"needs {planned.needs}")
            base = Record(status, "student", "", planned.method, note=note)
        else:
            directory = planned.directory or _probe_directory(planned)
            if directory not in cache or not directory:
                cache[directory] = _planned(directory, planned)
            base = cache[directory]
        if planned.stage in ("backbone", "teacher", "assistant"):
            found.records.append(base)
        for cell in planned.cells:
            teacher, _, student = cell.pair.partition(":")
            place: dict[str, Any] = {"label": cell.label, "published": cell.published, "probe": cell.probe or ""}
            place |= {"ratio": cell.ratio or base.ratio, "dataset": cell.dataset or base.dataset or usual}
            place |= {"teacher": base.teacher or teacher, "student": base.student or student}
            found.records.append(replace(base, role="probe" if cell.probe else "student", **place))
    return found


def _planned(directory: str, planned: Any) -> Record:
    """A planned run: what its directory holds, or that it has not begun."""
    if directory and (Path(directory) / "spec.json").is_file():
        return read(directory)
    spec = planned.spec
    role = "teacher" if spec.command == "pretrain-teacher" else "student"
    base = Record("not run", role, planned.method, planned.method, directory, note=planned.line, spec=spec)
    return replace(
        base,
        teacher=named_arch(spec.teacher) if spec.teacher else "",
        student=spec.student or "",
        dataset=spec.data.dataset,
        ratio=spec.data.ratio,
        seed=spec.seed,
        settings=settings_of(spec),
    )


def _probe_directory(planned: Any) -> str:
    """Where a planned probe is, which depends on the weights it probes; empty while there are none."""
    from kdcli.runs.identity import digest_of, directory_for, identity

    spec = planned.spec
    try:
        encoder = checkpoint.read_metadata(checkpoint.locate(spec.encoder))["digest"]
    except KdError:
        return ""
    return str(directory_for(spec, digest_of(identity(spec, {str(spec.encoder): encoder}))))
