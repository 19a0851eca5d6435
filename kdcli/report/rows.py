"""The rows of a report's table: runs that differ in nothing but their seed, as mean ± sample standard deviation.

The number of a row is that of the last epoch. The best epoch on the test set stands in a place of its own, and a published
number is compared with ours only where both are of the same kind of epoch.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kdcli.report.gathering import Gathered
from kdcli.report.records import Record, number
from kdcli.sweep.file import Number

MODES = ("marginal", "aggregate")


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation (n - 1; None for a single value) of the seeds' values."""

    mean: float
    std: float | None
    n: int
    values: tuple[float, ...]

    def json(self) -> dict[str, Any]:
        """As plain values, rounded to four places."""
        std = None if self.std is None else round(self.std, 4)
        return {"mean": round(self.mean, 4), "std": std, "n": self.n, "values": list(self.values)}


def stat(values: Iterable[float | None]) -> Stat | None:
    """The statistics of the values that are there; None if none is."""
    there = tuple(value for value in values if value is not None)
    if not there:
        return None
    return Stat(statistics.fmean(there), statistics.stdev(there) if len(there) > 1 else None, len(there), there)


@dataclass
class Row:
    """A row of the table.

    Attributes:
        differing: the settings in which it differs from other rows of its method and place, as text by dotted path.
        runs: the finished runs, whose numbers these are.
        missing: planned or begun runs of this row that are not finished, which take part in no number.
        agreement: percent of the test images on which student and teacher name the same class, by seed.
    """

    role: str
    label: str
    method: str
    teacher: str
    student: str
    dataset: str
    ratio: float
    probe: str
    differing: dict[str, str]
    runs: list[Record] = field(default_factory=list)
    missing: list[Record] = field(default_factory=list)
    published: tuple[Number, ...] = ()
    agreement: Stat | None = None

    @property
    def settings(self) -> str:
        """The settings that tell it from its neighbours, in a line."""
        return ", ".join(f"{path.removeprefix('method.')}={value}" for path, value in self.differing.items())

    @property
    def name(self) -> str:
        """What figures call it."""
        if self.label == self.method == "none" and not self.differing:
            return "student alone"
        return f"{self.label} ({self.settings})" if self.differing else self.label

    @property
    def networks(self) -> str:
        """`teacher → student`, or the one network there is."""
        return " → ".join(filter(None, (self.teacher, self.student)))

    @property
    def place(self) -> str:
        """Networks, data set, ratio and probe, in a line."""
        parts = [self.networks, self.dataset]
        parts += [f"{100 * self.ratio:g} % of the training images"] if self.ratio != 1 else []
        parts += [f"probed on {self.probe}"] if self.probe else []
        return ", ".join(filter(None, parts))

    def of(self, *keys: str) -> Stat | None:
        """Statistics of a test metric of the last epoch over the seeds."""
        return stat(run.test(*keys) for run in self.runs)

    def cost(self, key: str) -> Stat | None:
        """Statistics of a cost over the seeds: params, macs, seconds, images_per_second, peak_mib."""
        return stat(number(run.summary, "cost", key) for run in self.runs)

    @property
    def top1(self) -> Stat | None:
        """Top-1 on the test images in percent, last epoch."""
        return self.of("top1")

    @property
    def best(self) -> Stat | None:
        """Top-1 in percent of the best epoch on the test images: chosen by what it is measured on."""
        return stat(number(run.summary, "best_on_test", "top1") for run in self.runs)

    @property
    def teacher_top1(self) -> Stat | None:
        """Top-1 in percent of the teachers, each counted once."""
        if self.role == "teacher":
            return self.top1
        told = {str(run.told_teacher.get("digest")): number(run.told_teacher, "top1") for run in self.runs}
        return stat(told.values())

    def compared(self) -> list[dict[str, Any]]:
        """The published numbers, each with its difference to ours of the same kind of epoch."""
        compared = []
        for published in self.published:
            # Of an unknown epoch: beside the last one, and said to be unknown.
            ours, against = (self.best, "best_on_test") if published.epoch == "best" else (self.top1, "last")
            compared.append(
                {
                    "value": published.value,
                    "epoch": published.epoch,
                    "teachers": published.teachers,
                    "source": published.source,
                    "difference": None if ours is None else round(ours.mean - published.value, 4),
                    "compared_with": against,
                    "teacher_differs": bool(self.runs) and published.teachers not in ("none", ""),
                }
            )
        return compared

    def json(self) -> dict[str, Any]:
        """The row as a JSON document keeps it."""
        names = ("role", "label", "method", "teacher", "student", "dataset", "ratio", "probe")
        told: dict[str, Any] = {name: getattr(self, name) or None for name in names}
        told |= {"settings": self.differing, "seeds": [run.seed for run in self.runs], "n": len(self.runs)}
        told |= {"epoch": "last", "unfinished": len(self.missing)}
        parts: dict[str, Stat | None] = {"top1": self.top1, "top5": self.of("top5")}
        parts |= {mode: self.of(mode, "top1") for mode in MODES}
        parts |= {"nll": self.of("nll"), "ece": self.of("ece"), "agreement": self.agreement}
        parts |= {"best_on_test": self.best, "teacher_top1": self.teacher_top1}
        told |= {name: None if value is None else value.json() for name, value in parts.items()}
        costs = {key: self.cost(key) for key in ("params", "macs", "seconds", "images_per_second", "peak_mib")}
        told["cost"] = {key: value and round(value.mean, 4) for key, value in costs.items()}
        told["images"] = sorted({int(n) for run in self.runs if (n := run.test("n")) is not None})
        told["published"] = self.compared()
        told["runs"] = [run.directory for run in self.runs]
        return told


def rows_of(gathered: Gathered, agreement: Mapping[str, float] | None = None) -> list[Row]:
    """The rows of a report, teachers first.

    Args:
        agreement: percent agreement with the teacher by directory of a student's run.
    """
    records = [*_untrained_here(gathered.records), *gathered.records]
    families: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        families.setdefault(_family(record), []).append(record)
    rows = [row for family in families.values() for row in _split(family)]
    for row in rows:
        row.agreement = stat((agreement or {}).get(run.directory) for run in row.runs)
    # Teachers first; otherwise as they came, which is a sweep's order, with the places of plain runs kept together.
    places = {key: at for at, key in enumerate(dict.fromkeys((row.student, row.dataset, row.ratio) for row in rows))}
    alone = {"none": 0}
    return sorted(
        rows,
        key=lambda row: (
            row.role != "teacher",
            bool(row.probe),
            places[row.student, row.dataset, row.ratio],
            alone.get(row.method, 1),
        ),
    )


def _untrained_here(records: list[Record]) -> list[Record]:
    """A record for each teacher of which only its students tell, so that its accuracy is in the table all the same."""
    known = {record.digest for record in records if record.role == "teacher"}
    found = {}
    for record in records:
        told = record.told_teacher
        digest = str(told.get("digest"))
        if not told or digest in known or digest in found:
            continue
        test = {key: told[key] for key in ("top1", "n", *MODES) if key in told}
        summary = {"metrics": {"test": test}}
        arch = str(told["arch"])
        dataset = record.dataset
        found[digest] = Record(
            "finished", "teacher", "teacher", "", "", arch, "", dataset, digest=digest, summary=summary
        )
    return list(found.values())


def _family(record: Record) -> tuple[Any, ...]:
    """What must be equal before settings are compared."""
    label = "teacher" if record.role == "teacher" else record.label
    return (record.role, label, record.teacher, record.student, record.dataset, record.ratio, record.probe)


def _split(family: list[Record]) -> list[Row]:
    """The rows of one family: runs with equal settings, teachers and published numbers share one."""
    rows: dict[tuple[Any, ...], Row] = {}
    varying = _varying([record for record in family if record.settings or record.done])
    for record in sorted(family, key=lambda record: not record.done):
        differing = {path: _text(_value(record, path)) for path in varying}
        key = tuple(differing.items())
        row = rows.get(key)
        if row is None:
            label = "teacher" if record.role == "teacher" else record.label
            names = (record.method, record.teacher, record.student, record.dataset, record.ratio, record.probe)
            row = rows[key] = Row(record.role, label, *names, differing)
        if record.status != "paper":
            (row.runs if record.done else row.missing).append(record)
        row.published = tuple(dict.fromkeys((*row.published, *record.published)))
    return list(rows.values())


def _varying(records: list[Record]) -> list[str]:
    """The settings in which runs of one family differ, and `teacher` where they had different ones of one architecture."""
    paths = dict.fromkeys(path for record in records for path in record.settings)
    varying = [path for path in paths if len({_text(_value(record, path)) for record in records}) > 1]
    teachers = {_value(record, "teacher") for record in records if record.done}
    return [*varying, "teacher"] if len(teachers) > 1 else varying


def _value(record: Record, path: str) -> Any:
    if path == "teacher":
        return record.digest[:8] if record.role == "teacher" else str(record.told_teacher.get("digest", ""))[:8]
    return record.settings.get(path)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value)) or "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def uneven(rows: list[Row]) -> dict[str, list[str]]:
    """Settings of recipe and data that are not the same in all students of a report, with their values: no like for like."""
    students = [run for row in rows if row.role == "student" for run in row.runs]
    paths = dict.fromkeys(path for run in students for path in run.settings if path.startswith(("train.", "data.")))
    for unused in (
        "train.teacher_lr",
        "train.base_lr",
        "train.light_lr",
    ):  # what they gave a student stands in train.lr
        paths.pop(unused, None)
    values = {path: sorted({_text(run.settings.get(path)) for run in students}) for path in paths}
    return {path: found for path, found in values.items() if len(found) > 1}
