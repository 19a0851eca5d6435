"""`kd sweep`: the runs that a sweep file stands for, as a plan of shell commands or carried out."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kdcli import methods, presets, teachers
from kdcli.commandline import command_line
from kdcli.data.names import canonical as canonical_dataset
from kdcli.errors import KdError, Stopped, UsageError, nearest
from kdcli.flags import Request, parse_seeds
from kdcli.output import Story, envelope
from kdcli.runs import digest_of, directory_for, flat, identity
from kdcli.specs import RunSpec
from kdcli.sweepfile import Entry, Key, Number, Pair, Sweep, keys, load, network, numbers, pair_of

Stage = Literal["backbone", "teacher", "assistant", "student", "probe", "paper"]
STAGES: tuple[Stage, ...] = ("backbone", "teacher", "assistant", "student", "probe")
_ORDER: tuple[Stage, ...] = (*STAGES, "paper")
_Numbers = dict[tuple[str, Key], tuple[Number, ...]]
# What a probe shares with the students of its sweep; the rest of their settings is not about it.
_OF_PROBES = ("probe", "system", "data.data_dir", "data.download", "data.resident_mib")


@dataclass(frozen=True)
class Cell:
    """A place in the sweep's table: a row, a column with what it stands for, and the published numbers there."""

    label: str
    column: str
    pair: str
    published: tuple[Number, ...] = ()
    dataset: str | None = None
    ratio: float | None = None
    probe: str | None = None


@dataclass(frozen=True)
class Planned:
    """One run of a sweep, or a place of its table that has none.

    Attributes:
        stage: what it trains; `paper`: nothing, the number is the paper's alone.
        command: the `kd` command that carries it out.
        spec: resolved; None where there is nothing to run.
        directory: where the run will be; empty for a probe, whose directory depends on the student's weights.
        cells: the places its result takes in the table; a run may stand for several equal ones.
        needs: what has to be shipped before it can be run.
        requires: directories of the runs that must come first.
    """

    stage: Stage
    command: str
    method: str
    spec: RunSpec | None
    directory: str = ""
    cells: tuple[Cell, ...] = ()
    needs: str = ""
    requires: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """The shell command of this run; empty where there is none."""
        return "" if self.spec is None else command_line(self.command, self.spec)


@dataclass(frozen=True)
class _Draft:
    """A point of the product of the axes, before it is resolved."""

    entry: Entry | None
    preset: str | None
    pair: Pair
    dataset: str | None
    ratio: float | None
    seed: int | None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.entry.label if self.entry is not None else self.preset or ""


def _drafts(sweep: Sweep) -> Iterator[_Draft]:
    axes = sweep.axes
    rows: list[tuple[Entry | None, str | None]] = [(None, name) for name in axes.presets]
    rows = rows or [(entry, None) for entry in axes.methods] or [(None, None)]
    paths = list(axes.settings)
    for entry, preset in rows:
        base = sweep.common if preset is None else presets.merge(presets.read(preset), sweep.common)
        pairs = (entry.pairs if entry is not None else None) or axes.pairs or (pair_of(base),)
        points = itertools.product(
            pairs,
            axes.datasets or (None,),
            axes.ratios or (None,),
            itertools.product(*axes.settings.values()),
            axes.seeds or (None,),
        )
        if entry is None and preset is None:
            entry = Entry(name=_method_of(base), label=_method_of(base))
        for pair, dataset, ratio, values, seed in points:
            yield _Draft(entry, preset, pair, dataset, ratio, seed, dict(zip(paths, values, strict=True)))


def _method_of(values: dict[str, Any]) -> str:
    method = values.get("method", "none")
    return str(method.get("name", "none") if isinstance(method, dict) else method)


def _request(sweep: Sweep, draft: _Draft, sets: Iterable[str]) -> Request:
    """What a command line would say for a point: common settings, then the point's own, then `--set`."""
    flags = {key: value for key, value in sweep.common.items() if key != "probe"}
    entry = draft.entry
    if entry is not None:
        if sweep.axes.methods:
            flags = presets.merge(flags, {"method": {"name": entry.name, **entry.settings}})
        if not methods.method_class(entry.name).needs_teacher:
            draft = replace(draft, pair=("", draft.pair[1]))
            flags["teacher"] = None
        if entry.assistants:
            flags["assistant"] = entry.assistants
    teacher, student = draft.pair
    named = {"teacher": teacher, "student": student, "data.dataset": draft.dataset, "data.ratio": draft.ratio}
    flags |= {path: value for path, value in {**named, "seed": draft.seed}.items() if value not in (None, "")}
    flags |= draft.settings
    kept = [text for text in sets if not text.startswith("probe.")]
    return Request(flags, [] if draft.preset is None else [draft.preset], kept, False, False, True)


def _cell(sweep: Sweep, draft: _Draft, printed: _Numbers, probe: str | None = None) -> Cell:
    """The place of a point's student, or of a probe of it, in the table."""
    axes = sweep.axes
    key = (draft.pair, draft.ratio, probe)
    pairs = {pair for entry in axes.methods for pair in entry.pairs or ()} | set(axes.pairs)
    parts = ["→".join(filter(None, draft.pair))] if len(pairs) > 1 or not (axes.ratios or axes.probes) else []
    parts += [draft.dataset] if draft.dataset is not None else []
    parts += [f"{100 * draft.ratio:g} %"] if draft.ratio is not None else []
    parts += [f"{path.rpartition('.')[2]} {value}" for path, value in draft.settings.items()]
    if axes.probes:
        own = f"student, {sweep.common.get('data', {}).get('dataset', 'cifar100')}"
        parts += [probe or own]
    numbers_there = printed.get((draft.label, key), ())
    return Cell(draft.label, ", ".join(parts), ":".join(draft.pair), numbers_there, draft.dataset, draft.ratio, probe)


def expand(name: str, only: Sequence[str] = (), sets: Sequence[str] = ()) -> list[Planned]:
    """The runs of a sweep, resolved and without repetition: students, then the probes of them, then numbers without a run.

    Args:
        only: filters `KEY=VALUE[,VALUE]`; a run has to pass all of them.
        sets: `dotted.key=value` for every run.

    Raises:
        UsageError: something in the sweep, a filter or a setting is wrong, or the filters leave nothing.
    """
    return [run for run in steps(name, only, sets) if run.stage in ("student", "probe", "paper")]


def steps(name: str, only: Sequence[str] = (), sets: Sequence[str] = ()) -> list[Planned]:
    """As `expand`, with those who teach the students before them, so that runs of one stage may go in parallel.

    Only the assistants of one chain have to go one after the other; each `requires` the ones before it.
    """
    sweep = load(name)
    _refuse(sweep, sets)
    sweep, sets = _seeded(sweep, sets)
    filters = _filters(sweep, only)
    printed = numbers(sweep)
    stages = filters.pop("stage", None)
    found: dict[str, Planned] = {}
    for draft in _drafts(sweep):
        if _passes(filters, _facts(draft)):
            for planned in _planned(sweep, draft, sets, printed, filters):
                _add(found, planned)
    for planned in _of_paper(sweep, filters, printed):
        _add(found, planned)
    chosen = [run for run in found.values() if stages is None or run.stage.casefold() in stages]
    chosen = sorted(chosen, key=lambda run: _ORDER.index(run.stage))
    if not chosen:
        raise UsageError(f"nothing in {name} passes the filters", field="--only", hint=_choices(sweep))
    return chosen


def _add(found: dict[str, Planned], planned: Planned) -> None:
    """Take up a run once; an equal one brings its places in the table along, and its stage if that is earlier."""
    if planned.spec is None:
        key = f"{planned.stage} {planned.needs} {planned.cells}"
    else:
        key = planned.directory or digest_of(identity(planned.spec))
    old = found.get(key)
    if old is None:
        found[key] = planned
    else:
        fresh = tuple(cell for cell in planned.cells if cell not in old.cells)
        stage = min(old.stage, planned.stage, key=_ORDER.index)
        found[key] = replace(old, stage=stage, cells=(*old.cells, *fresh))


def _planned(
    sweep: Sweep, draft: _Draft, sets: Sequence[str], printed: _Numbers, filters: dict[str, set[str]]
) -> Iterator[Planned]:
    """The runs of a point: its teachers, its student, its probes; or what it waits for."""
    probes = [probe for probe in sweep.axes.probes if "probe" not in filters or probe in filters["probe"]]
    cells = [_cell(sweep, draft, printed, probe) for probe in (None, *probes)]
    entry = draft.entry
    if entry is not None and entry.needs and entry.needs not in methods.known():
        for cell in cells[1:] if probes else cells:
            yield Planned("student", "distill", entry.name, None, "", (cell,), entry.needs)
        return
    spec = methods.resolve(presets.resolve("distill", _request(sweep, draft, sets)))
    required = tuple(_before(spec))
    yield from required
    directory = _directory(spec)
    command = "distill" if draft.ratio is None else "fewshot"
    before = tuple(run.directory for run in required)
    yield Planned("student", command, spec.method["name"], spec, directory, (cells[0],), requires=before)
    for probe, cell in zip(probes, cells[1:], strict=True):
        asked = _probe(sweep, draft, directory, probe, sets)
        yield Planned("probe", "linear-probe", spec.method["name"], asked, "", (cell,), requires=(directory,))


def _before(spec: RunSpec) -> Iterator[Planned]:
    """The runs that make a resolved spec's teacher, assistants and networks taught beforehand, in order; none for files."""
    if spec.teacher is None:
        return
    method, _ = methods.settings(spec)
    chain = method.assistants == "last" and bool(spec.assistant)
    if not chain and teachers.named_file(spec.teacher) is None:
        yield from _teacher(spec)
    # Of a chain the last one teaches; those before it teach it.
    positions = range(len(spec.assistant))[-1 if chain else 0 :]
    named = [i for i in positions if teachers.named_file(spec.assistant[i], "--assistant") is None]
    wanted = [teachers.assistant_for(spec, i) for i in named]
    for other in [*wanted, *teachers.prepared_for(spec, methods.architecture(spec.teacher))]:
        before = tuple(_before(other))
        yield from before
        required = tuple(run.directory for run in before)
        yield Planned("assistant", "distill", other.method["name"], other, _directory(other), requires=required)


def _teacher(spec: RunSpec) -> Iterator[Planned]:
    """The run of a resolved spec's teacher, after that of the backbone it may build on."""
    wanted = teachers.spec_for(spec)
    backbone = teachers.backbone_for(wanted)
    before = ()
    if backbone is not None:
        before = (_directory(backbone),)
        yield Planned("backbone", "pretrain-teacher", backbone.method["name"], backbone, before[0])
    yield Planned("teacher", "pretrain-teacher", wanted.method["name"], wanted, _directory(wanted), requires=before)


def _directory(spec: RunSpec) -> str:
    return str(directory_for(spec, digest_of(identity(spec, teachers.contents(spec)))))


def _probe(sweep: Sweep, draft: _Draft, encoder: str, probe: str, sets: Sequence[str]) -> RunSpec:
    """The probe of a student: the students' settings that are about it, and the `--set`s that may be."""
    shared = {path: value for path, value in flat(sweep.common).items() if path.startswith(_OF_PROBES)}
    flags = {**shared, "encoder": encoder, "data.dataset": probe}
    flags |= {} if draft.seed is None else {"seed": draft.seed}
    kept = [text for text in sets if text.startswith((*_OF_PROBES, "train.", "seed="))]
    return presets.resolve("linear-probe", Request(flags, [], kept, False, False, True))


def _of_paper(sweep: Sweep, filters: dict[str, set[str]], printed: _Numbers) -> Iterator[Planned]:
    """The rows that stand in the paper alone."""
    for row in sweep.published:
        if row.run:
            continue
        for pair, ratio, probe in keys(sweep, row):
            entry = Entry(name=row.label, label=row.label)
            draft = _Draft(entry, None, pair, None, ratio, None)
            facts = _facts(draft) | ({"probe": {probe}} if probe else {})
            if _passes(filters, facts):
                yield Planned("paper", "", "", None, "", (_cell(sweep, draft, printed, probe),))


# ------------------------------------------------------------------------------------------------------------- filters

_KEYS = ("method", "label", "pair", "teacher", "student", "preset", "dataset", "ratio", "probe", "seed", "stage")


def _filters(sweep: Sweep, only: Sequence[str]) -> dict[str, set[str]]:
    """`--only` as sets of accepted values by key, in their canonical spelling; a key given twice accepts what both do."""
    known = (*_KEYS, *sweep.axes.settings)
    found: dict[str, set[str]] = {}
    for text in only:
        key, equals, given = text.partition("=")
        if not equals or not given:
            raise UsageError(f"{text!r} is not KEY=VALUE", field="--only", hint="for example --only method=vsd,kd")
        if key not in known:
            raise UsageError(f"no such key: {key}", field="--only", hint=nearest(key, known))
        accepted = {_spelling(key, word.strip()) for word in given.split(",") if word.strip()}
        found[key] = found[key] & accepted if key in found else accepted
    if not found.get("stage", set(STAGES)) <= set(_ORDER):
        raise UsageError("no such stage", field="--only", hint=f"stages: {', '.join(STAGES)}")
    return found


def _spelling(key: str, word: str) -> str:
    """One spelling of a filter's value: registry names of networks and data sets, numbers as Python prints them."""
    if key == "pair" and word.count(":") == 1:
        return ":".join(network(part) for part in word.split(":"))
    if key in ("teacher", "student"):
        return network(word)
    if key in ("dataset", "probe"):
        return canonical_dataset(word, field="--only")
    if key == "ratio":
        try:
            return str(float(word))
        except ValueError:
            raise UsageError(f"{word!r} is no ratio", field="--only", hint="for example --only ratio=0.25") from None
    return word.casefold()


def _facts(draft: _Draft) -> dict[str, set[str]]:
    """What filters see of a point; a key that is missing passes none."""
    teacher, student = (network(name) for name in draft.pair)
    facts = {"label": {draft.label.casefold()}, "pair": {f"{teacher}:{student}"}}
    facts |= {"teacher": {teacher}, "student": {student}}
    facts["method"] = {draft.label.casefold()} | ({draft.entry.name.casefold()} if draft.entry is not None else set())
    for key, value in (("preset", draft.preset), ("dataset", draft.dataset), ("seed", draft.seed)):
        facts[key] = set() if value is None else {str(value).casefold()}
    facts["ratio"] = set() if draft.ratio is None else {str(draft.ratio)}
    return facts | {path: {str(value).casefold()} for path, value in draft.settings.items()}


def _passes(filters: dict[str, set[str]], facts: dict[str, set[str]]) -> bool:
    return all((key == "probe" and key not in facts) or accepted & facts[key] for key, accepted in filters.items())


def _choices(sweep: Sweep) -> str:
    """What there is to filter by, for a filter that left nothing."""
    axes = sweep.axes
    names = list(dict.fromkeys(entry.name for entry in axes.methods))
    return f"methods: {', '.join(names)}; pairs: {', '.join(map(':'.join, axes.pairs))}"


def _refuse(sweep: Sweep, sets: Sequence[str]) -> None:
    """Settings that cannot hold for every run."""
    axes = sweep.axes
    swept = set(axes.settings)
    swept |= {"teacher", "student"} if axes.pairs or axes.presets else set()
    swept |= {"method", "method.name"} if axes.methods or axes.presets else set()
    axis = {"data.dataset": axes.datasets, "data.ratio": axes.ratios, "seed": axes.seeds}
    swept |= {path for path, values in axis.items() if values}
    for text in sets:
        path, _ = presets.parse_set(text)
        if path == "system.out":
            raise UsageError("names one directory, and there are several runs", field=path, hint="set system.runs_dir")
        if path in swept:
            raise UsageError("is an axis of this sweep", field=path, hint="choose among its values with --only")


def _seeded(sweep: Sweep, sets: Sequence[str]) -> tuple[Sweep, list[str]]:
    """`--set seed=0,1,2` as an axis of the sweep, and the other settings."""
    given = dict(presets.parse_set(text) for text in sets if text.partition("=")[0].strip() == "seed")
    if not isinstance(given.get("seed"), str):
        return sweep, list(sets)
    seeds = tuple(parse_seeds(given["seed"], "seed"))
    others = [text for text in sets if text.partition("=")[0].strip() != "seed"]
    return sweep.model_copy(update={"axes": sweep.axes.model_copy(update={"seeds": seeds})}), others


# ----------------------------------------------------------------------------------------------------------- documents


def plan(name: str, only: Sequence[str] = (), sets: Sequence[str] = ()) -> dict[str, Any]:
    """`kd sweep --plan`: every run with its command, its resolved spec and the numbers published for it."""
    runs = steps(name, only, sets)
    described = [{**_described(run), "spec": run.spec and run.spec.model_dump(mode="json")} for run in runs]
    return envelope("sweep", table=name, about=load(name).about.model_dump(), runs=described)


def _described(run: Planned) -> dict[str, Any]:
    cells = [
        {
            "label": cell.label,
            "column": cell.column,
            "pair": cell.pair,
            "published": [vars(number) for number in cell.published],
        }
        for cell in run.cells
    ]
    known = {"stage": run.stage, "method": run.method, "command": run.line, "cells": cells}
    return {**known, "run": run.directory or None, "needs": run.needs or None}


@dataclass(frozen=True)
class Outcome:
    """How a planned run ended.

    Attributes:
        done: what the sweep's document keeps of its summary; None if it has none.
        error: what it failed with.
        missing: the directory of a failed run that it requires, so that it was not begun.
    """

    done: dict[str, Any] | None = None
    error: KdError | None = None
    missing: str = ""


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
    planned = steps(name, only, sets)
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
        from kdcli.sweepjobs import side_by_side

        ended = side_by_side(planned, jobs, minutes, story)
    results = [_described(run) | _told(run, outcome) for run, outcome in zip(planned, ended, strict=True)]
    document = envelope("sweep", table=name, about=load(name).about.model_dump(), runs=results)
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
                outcome = Outcome(error=problem if isinstance(problem, KdError) else _bug(problem))
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


def done(summary: dict[str, Any]) -> dict[str, Any]:
    """What the sweep's document keeps of a run's summary: top-1 at the last epoch, the best one named as such."""
    test = summary["metrics"]["test"]
    modes = {mode: test[mode]["top1"] for mode in ("marginal", "aggregate") if mode in test}
    best = summary["best_on_test"].get("top1")
    top1 = {"epoch": "last", "single": test["top1"], **modes, "best_on_test": best, "n": test["n"]}
    return {"status": "done", "run": summary["run"], "top1": top1}


def _bug(problem: Exception) -> KdError:
    import traceback

    where = traceback.extract_tb(problem.__traceback__)[-1]
    place = f"{os.path.basename(where.filename)}:{where.lineno}"
    return KdError(f"a bug in kd: {type(problem).__name__}: {problem} at {place}")
