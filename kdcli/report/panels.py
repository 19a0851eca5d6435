"""The panels of a page: the rows that may be compared with each other, and what their networks said about the test images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kdcli import checkpoint
from kdcli.data.names import default_size
from kdcli.errors import KdError
from kdcli.report.records import Record
from kdcli.report.rows import Row


@dataclass
class Panel:
    """A student's architecture on images of a data set and size, with one architecture that taught it.

    Attributes:
        size: side in pixels of the images that the students saw, which are also those that their teachers were shown.
        rows: of students, those without a teacher first.
        teachers: rows of their teachers.
    """

    teacher: str
    student: str
    dataset: str
    ratio: float
    size: int
    rows: list[Row] = field(default_factory=list)
    teachers: list[Row] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Networks, data set, size and ratio, in a line."""
        networks = " → ".join(filter(None, (self.teacher, self.student)))
        size = "" if self.size == default_size(self.dataset) else f" at {self.size} pixels"
        part = "" if self.ratio == 1 else f", {100 * self.ratio:g} % of the training images"
        return f"{networks}, {self.dataset}{size}{part}"

    @property
    def alone(self) -> Row | None:
        """The row to compare with: the student alone, else plain distillation."""
        for method in ("none", "kd"):
            for row in self.rows:
                if row.method == method and row.runs:
                    return row
        return None


def panels_of(rows: Sequence[Row]) -> list[Panel]:
    """One panel for each teacher, student, data set, ratio and image size, of the rows with finished runs.

    Students without a teacher stand in every panel of their architecture, data, ratio and size. Sizes are kept apart
    because answers can be compared only where they are about the same pixels.
    """
    panels: dict[tuple[str, str, str, float, int], Panel] = {}
    alone = []
    for row in rows:
        if row.role != "student" or not row.runs:
            continue
        if any(run.told_teacher for run in row.runs):
            key = (row.teacher, row.student, row.dataset, row.ratio, _size(row))
            panels.setdefault(key, Panel(*key)).rows.append(row)
        elif all(_directories(row) != _directories(other) for other in alone):
            alone.append(row)  # once: in a sweep's table it stands beside every teacher
    for row in alone:
        found = [panel for key, panel in panels.items() if key[1:] == (row.student, row.dataset, row.ratio, _size(row))]
        if not found:
            key = ("", row.student, row.dataset, row.ratio, _size(row))
            found = [panels.setdefault(key, Panel(*key))]
        for panel in found:
            panel.rows.append(row)
    for panel in panels.values():
        digests = {str(run.told_teacher.get("digest")) for row in panel.rows for run in row.runs if run.told_teacher}
        for row in rows:
            if row.role == "teacher" and any(run.digest in digests for run in row.runs):
                panel.teachers.append(row)
        panel.rows.sort(key=lambda row: row.method != "none")
    return list(panels.values())


def _size(row: Row) -> int:
    """Side in pixels of the images that a row's runs saw: one for all of them, because it is a setting of the row."""
    spec = row.runs[0].spec
    assert spec is not None
    return spec.data.image_size or default_size(spec.data.dataset)


def _directories(row: Row) -> set[str]:
    return {run.directory for run in row.runs}


def teacher_file(run: Record, records: Sequence[Record]) -> Path | None:
    """The checkpoint of the teacher that a run names, wherever it lies now; None where it is not found.

    It is known by the digest of its weights: among the gathered runs, at the path the run recorded, and at that path
    from where the run was started, as far as the run's own recorded path tells.
    """
    told = run.told_teacher
    digest = told.get("digest")
    places = [record.file for record in records if record.role == "teacher" and record.directory]
    named = Path(str(told.get("checkpoint", "")))
    places.append(named)
    here, recorded = Path(run.directory).resolve(), Path(str(run.summary.get("run", "")))
    if not recorded.is_absolute() and here.parts[-len(recorded.parts) :] == recorded.parts:
        places.append(here.parents[len(recorded.parts) - 1] / named)
    for place in places:
        try:
            if checkpoint.read_metadata(place)["digest"] == digest:
                return place
        except KdError:
            continue
    return None
