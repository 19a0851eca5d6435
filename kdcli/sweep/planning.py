"""The runs that a sweep file stands for: resolved, without repetition, those who teach before those who learn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from kdcli import methods, presets, teachers
from kdcli.errors import UsageError
from kdcli.request import Request, parse_seeds
from kdcli.runs.identity import digest_of, directory_for, flat, identity
from kdcli.specs import RunSpec
from kdcli.sweep import filters
from kdcli.sweep.draft import Draft, drafts
from kdcli.sweep.file import Entry, Key, Number, Sweep, keys, load, numbers
from kdcli.sweep.planned import ORDER, Cell, Planned

_Numbers = dict[tuple[str, Key], tuple[Number, ...]]
# What a probe shares with the students of its sweep; the rest of their settings is not about it.
_OF_PROBES = ("probe", "system", "data.data_dir", "data.download", "data.resident_mib")

_ONE_PLACE = "names one directory, and there are several runs"


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
    return steps_of(load(name), only, sets)


def steps_of(sweep: Sweep, only: Sequence[str] = (), sets: Sequence[str] = ()) -> list[Planned]:
    """As `steps`, of a sweep that is loaded already."""
    _refuse(sweep, sets)
    sweep, sets = _seeded(sweep, sets)
    wanted = filters.parse(sweep, only)
    printed = numbers(sweep)
    stages = wanted.pop("stage", None)
    found: dict[str, Planned] = {}
    for draft in drafts(sweep):
        if filters.passes(wanted, filters.facts(draft)):
            for planned in _planned(sweep, draft, sets, printed, wanted):
                _add(found, planned)
    for planned in _of_paper(sweep, wanted, printed):
        _add(found, planned)
    chosen = [run for run in found.values() if stages is None or run.stage.casefold() in stages]
    chosen = sorted(chosen, key=lambda run: ORDER.index(run.stage))
    if not chosen:
        raise UsageError(f"nothing in {sweep.name} passes the filters", field="--only", hint=filters.choices(sweep))
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
        stage = min(old.stage, planned.stage, key=ORDER.index)
        found[key] = replace(old, stage=stage, cells=(*old.cells, *fresh))


def _planned(
    sweep: Sweep, draft: Draft, sets: Sequence[str], printed: _Numbers, wanted: dict[str, set[str]]
) -> Iterator[Planned]:
    """The runs of a point: its teachers, its student, its probes; or what it waits for."""
    probes = [probe for probe in sweep.axes.probes if "probe" not in wanted or probe in wanted["probe"]]
    cells = [_cell(sweep, draft, printed, probe) for probe in (None, *probes)]
    entry = draft.entry
    if entry is not None and entry.needs and entry.needs not in methods.known():
        for cell in cells[1:] if probes else cells:
            yield Planned("student", "distill", entry.name, None, "", (cell,), entry.needs)
        return
    spec = methods.resolve(presets.resolve("distill", _request(sweep, draft, sets)))
    if spec.system.out is not None:  # of the file, a preset of it, or an axis; the runs of a plan are told by directory
        raise UsageError(f"{sweep.name} {_ONE_PLACE}", field="system.out", hint="set system.runs_dir")
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


def _probe(sweep: Sweep, draft: Draft, encoder: str, probe: str, sets: Sequence[str]) -> RunSpec:
    """The probe of a student: the students' settings that are about it, and the `--set`s that may be."""
    shared = {path: value for path, value in flat(sweep.common).items() if path.startswith(_OF_PROBES)}
    flags = {**shared, "encoder": encoder, "data.dataset": probe}
    flags |= {} if draft.seed is None else {"seed": draft.seed}
    kept = [text for text in sets if text.startswith((*_OF_PROBES, "train.", "seed="))]
    return presets.resolve("linear-probe", Request(flags, [], kept, False, False, True))


def _of_paper(sweep: Sweep, wanted: dict[str, set[str]], printed: _Numbers) -> Iterator[Planned]:
    """The rows that stand in the paper alone."""
    for row in sweep.published:
        if row.run:
            continue
        for pair, ratio, probe in keys(sweep, row):
            entry = Entry(name=row.label, label=row.label)
            draft = Draft(entry, None, pair, None, ratio, None)
            facts = filters.facts(draft) | ({"probe": {probe}} if probe else {})
            if filters.passes(wanted, facts):
                yield Planned("paper", "", "", None, "", (_cell(sweep, draft, printed, probe),))


def _request(sweep: Sweep, draft: Draft, sets: Iterable[str]) -> Request:
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


def _cell(sweep: Sweep, draft: Draft, printed: _Numbers, probe: str | None = None) -> Cell:
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
            raise UsageError(_ONE_PLACE, field=path, hint="set system.runs_dir")
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
