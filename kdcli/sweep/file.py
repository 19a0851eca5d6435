"""Sweep files: one TOML file that stands for many runs, such as a paper's table. Imports no torch.

A sweep is a preset (its ordinary settings hold for every run) with a `[sweep]` table of axes, whose product is run:
`pairs`, `methods`, `presets`, `datasets`, `ratios` (few-shot), `probes` (linear probes of the students), `seeds`, and a list
of values under any dotted setting (`"train.batch_size" = [64, 128]`). `[[published]]` rows are a paper's numbers, in the
order of pairs, then ratios, then probes; a row with `run = false` has no run beside it. A method with `needs` waits for
another method to be shipped, and is listed as not available until then.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from kdcli import presets
from kdcli.data.names import canonical as canonical_dataset
from kdcli.errors import UsageError, nearest
from kdcli.models.names import canonical as canonical_model
from kdcli.runs.identity import flat
from kdcli.specs import Section, field_paths, validate

Pair = tuple[str, str]
Key = tuple[Pair, float | None, str | None]
"""The place of a published number: pair, ratio, probe."""
Epoch = Literal["last", "best", "unknown"]
_NAMED = {
    "method": "methods",
    "teacher": "pairs",
    "student": "pairs",
    "seed": "seeds",
    "data.dataset": "datasets",
    "data.ratio": "ratios",
}


class About(Section):
    """What a sweep is, for people and for the tables made from it."""

    title: str = ""
    """One line."""
    source: str = ""
    """Paper and table."""
    kind: Literal["table", "sweep"] = "sweep"
    """table: a paper's table; sweep: runs of one's own."""
    teachers: str = "own"
    """Whose teachers the published numbers come from, where a row does not say."""
    epoch: Epoch = "unknown"
    """Which epoch the published numbers are of, where a row does not say: the last, or the best on the test set."""


class Entry(Section):
    """One method of a sweep. Every other key of its table is a setting of the method; those under `settings` are too, for
    settings that are named like one of these."""

    name: str
    """The method's name."""
    label: str = ""
    """What the paper calls it; default: its name."""
    needs: str = ""
    """The method that must be shipped before this can be run."""
    pairs: tuple[Pair, ...] | None = None
    """Its own pairs, instead of the sweep's."""
    assistants: tuple[str, ...] = ()
    """Networks between teacher and student, for methods that have some."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The method's settings."""


class Axes(Section):
    """The `[sweep]` table: axes whose product is run."""

    pairs: tuple[Pair, ...] = ()
    """Teacher and student."""
    methods: tuple[Entry, ...] = ()
    """Methods, by name or as tables with settings."""
    presets: tuple[str, ...] = ()
    """Presets, each with its own networks and method."""
    datasets: tuple[str, ...] = ()
    """Data sets of the students."""
    ratios: tuple[float, ...] = ()
    """Shares of the training images that the student sees (few-shot)."""
    probes: tuple[str, ...] = ()
    """Data sets on which every student's frozen features are probed."""
    seeds: tuple[int, ...] = ()
    """Seeds."""
    settings: dict[str, list[Any]] = Field(default_factory=dict)
    """Values of other settings, by dotted path."""


class Published(Section):
    """A paper's numbers for one method."""

    label: str
    """The method's label."""
    values: tuple[float, ...] = Field(min_length=1)
    """Top-1 in percent, in the order of pairs, then ratios, then probes."""
    pairs: tuple[Pair, ...] | None = None
    """The pairs of these values; default: the sweep's."""
    ratios: tuple[float, ...] | None = None
    """The ratios of these values; default: the sweep's."""
    teachers: str | None = None
    """Whose teachers; default: the sweep's."""
    epoch: Epoch | None = None
    """Which epoch; default: the sweep's."""
    source: str = ""
    """Where the numbers come from, if the paper copied them."""
    run: bool = True
    """Whether the sweep has a run beside them."""


class Sweep(Section):
    """A sweep file, read and checked, without its runs."""

    name: str
    """Its name or path."""
    about: About = About()
    """What it is."""
    axes: Axes = Axes()
    """Its axes."""
    published: tuple[Published, ...] = ()
    """A paper's numbers."""
    common: dict[str, Any] = Field(default_factory=dict)
    """Settings of every run."""


@dataclass(frozen=True)
class Number:
    """A published top-1 in percent, with whose teachers and which epoch it is of."""

    value: float
    epoch: str
    teachers: str
    source: str


def load(name: str) -> Sweep:
    """A sweep by name (`tables/vsd-2`) or path, checked as far as it can be without its methods.

    Raises:
        UsageError: no such file, not a sweep, or something in it is wrong.
        InputError: it cannot be read.
    """
    values = presets.read_sweep(name)
    if "sweep" not in values:
        raise UsageError(f"{name} has no [sweep] table, so it is one run", hint=f"kd distill --preset {name}")
    about = validate(About, values.pop("about", {}), prefix="about")
    axes = validate(Axes, _axes(values.pop("sweep")), prefix="sweep")
    rows = _listed(values.pop("published", []), "published")
    published = tuple(_row(row) for row in rows)
    values.pop("command", None)
    sweep = Sweep(name=name, about=about, axes=_canonical(axes), published=published, common=values)
    _check(sweep)
    return sweep


def _row(given: Any) -> Published:
    row: Published = validate(Published, given, prefix="published")
    return row.model_copy(update={"pairs": None if row.pairs is None else _spelled(row.pairs)})


def _listed(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise UsageError(f"is a list, not {value!r}"[:100], field=where)
    return value


def _axes(given: Any) -> dict[str, Any]:
    """The `[sweep]` table as `Axes` takes it: methods as tables, settings by dotted path apart."""
    if not isinstance(given, dict):
        raise UsageError("is a table of axes", field="sweep", hint='for example methods = ["kd", "vsd"]')
    named = {key: value for key, value in given.items() if key in Axes.model_fields and key != "settings"}
    if "methods" in named:
        named["methods"] = [_entry(entry) for entry in _listed(named["methods"], "sweep.methods")]
    others = flat({key: value for key, value in given.items() if key not in named})
    axes = [axis for axis in Axes.model_fields if axis != "settings"]
    known = [*field_paths().values(), *axes]
    for path, values in others.items():
        if path in _NAMED:
            raise UsageError("has an axis of its own", field=f"sweep.{path}", hint=f"write {_NAMED[path]}")
        if not path.startswith("method.") and path not in known:
            raise UsageError("no such setting or axis", field=f"sweep.{path}", hint=nearest(path, known))
        if not isinstance(values, list) or not values:
            raise UsageError("is a list of values", field=f"sweep.{path}")
    return {**named, "settings": others}


def _entry(given: Any) -> Any:
    if isinstance(given, str):
        return {"name": given}
    if not isinstance(given, dict):
        raise UsageError(f"is a name or a table, not {given!r}"[:100], field="sweep.methods")
    own = {key: value for key, value in given.items() if key in Entry.model_fields}
    nested = own.pop("settings", {})
    if not isinstance(nested, dict):
        raise UsageError(f"is a table of settings, not {nested!r}"[:100], field="sweep.methods.settings")
    return {**own, "settings": nested | {key: value for key, value in given.items() if key not in Entry.model_fields}}


def _spelled(pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """Pairs by registry names, so that a row and a run that mean the same pair find each other."""
    return tuple((network(teacher), network(student)) for teacher, student in pairs)


def _canonical(axes: Axes) -> Axes:
    def entry(given: Entry) -> Entry:
        pairs = None if given.pairs is None else _spelled(given.pairs)
        return given.model_copy(update={"label": given.label or given.name, "pairs": pairs})

    update = {
        "pairs": _spelled(axes.pairs),
        "datasets": tuple(canonical_dataset(name) for name in axes.datasets),
        "probes": tuple(canonical_dataset(name) for name in axes.probes),
        "methods": tuple(entry(given) for given in axes.methods),
    }
    return axes.model_copy(update=update)


def _check(sweep: Sweep) -> None:
    """Refuse numbers that have no place, and axes that say the same thing twice."""
    axes = sweep.axes
    if axes.presets and (axes.pairs or axes.methods):
        raise UsageError(
            "presets bring their own networks and methods", field="sweep.presets", hint="leave out the rest"
        )
    if sweep.published and len(axes.datasets) > 1:
        raise UsageError("published numbers do not say of which data set they are", field="sweep.datasets")
    for row in sweep.published:
        places = keys(sweep, row)
        if len(row.values) != len(places):
            raise UsageError(
                f"{row.label}: {len(row.values)} values for {len(places)} places", field="published.values"
            )
        entries = [entry for entry in axes.methods if entry.label == row.label]
        if not row.run:
            if entries:
                raise UsageError(f"{row.label!r} is run, and has run = false", field="published.run")
            continue
        if not entries:
            raise UsageError(f"no method has the label {row.label!r}", field="published.label", hint="or run = false")
        pairs = {pair for entry in entries for pair in entry.pairs or axes.pairs or (pair_of(sweep.common),)}
        ratios = set(axes.ratios) or {None}
        if lost := [key for key in places if key[0] not in pairs or key[1] not in ratios]:
            raise UsageError(f"{row.label} is not run for {lost[0][:2]}", field="published.pairs")


def keys(sweep: Sweep, row: Published) -> list[Key]:
    """The places of a row's values: pairs, then ratios, then probes."""
    axes = sweep.axes
    pairs = row.pairs or axes.pairs or (pair_of(sweep.common),)
    ratios = row.ratios or axes.ratios or (None,)
    return list(itertools.product(pairs, ratios, axes.probes or (None,)))


def pair_of(values: dict[str, Any]) -> Pair:
    """Teacher and student of a partial spec, empty where it names none."""
    return str(values.get("teacher") or ""), str(values.get("student") or "")


def numbers(sweep: Sweep) -> dict[tuple[str, Key], tuple[Number, ...]]:
    """The published numbers by label and place."""
    found: dict[tuple[str, Key], tuple[Number, ...]] = {}
    for row in sweep.published:
        for key, value in zip(keys(sweep, row), row.values, strict=True):
            number = Number(value, row.epoch or sweep.about.epoch, row.teachers or sweep.about.teachers, row.source)
            found[row.label, key] = (*found.get((row.label, key), ()), number)
    return found


def published(method: str) -> Iterator[tuple[Sweep, Published]]:
    """Every published row of a method with its default settings, in the order of the papers' shipped tables."""
    for name in presets.sweeps():
        sweep = load(name)
        if sweep.about.kind != "table":
            continue  # a study repeats them
        labels = {
            e.label for e in sweep.axes.methods if e.name == method and not e.settings and e.needs in ("", method)
        }
        yield from ((sweep, row) for row in sweep.published if row.label in labels)


def network(name: str) -> str:
    """The registry name of a network; what is none (a path, a misspelling) as it is."""
    try:
        return canonical_model(name)
    except UsageError:
        return name
