"""The passes of a panel: which networks are shown which images, and what is said where one of them is not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdcli.engine.device import guarded, open_device
from kdcli.errors import KdError, OutOfMemoryError, Stopped, WriteError
from kdcli.output import Story
from kdcli.report import passes
from kdcli.report.panels import Panel, teacher_file
from kdcli.report.passes import Images, Pass
from kdcli.report.records import Record
from kdcli.report.rows import stat
from kdcli.specs import SystemSpec


@dataclass
class Seen:
    """The passes of a panel.

    Attributes:
        students: by the digest of the weights.
        teachers: by architecture, with a part of the digest where there are several of one.
        every: both, by digest.
    """

    images: Images | None
    students: dict[str, Pass]
    teachers: dict[str, Pass]
    every: dict[str, Pass]
    left_out: str = ""


class Passer:
    """Makes the passes of one panel after the other; data sets are read once."""

    def __init__(
        self,
        records: Sequence[Record],
        system: SystemSpec,
        data_dir: str | None,
        limit: int | None,
        cache: Path,
        story: Story,
    ) -> None:
        self.records, self.system, self.cache, self.story = records, system, cache, story
        self.data_dir, self.limit = data_dir, limit
        self.sets: dict[tuple[str, str | None, int], Images | str] = {}
        self.device = open_device(system)

    def panel(self, panel: Panel) -> Seen:
        """The passes of a panel's students and teachers; what cannot be done is said in `left_out`."""
        seen = Seen(None, {}, {}, {})
        images = self._images(panel)
        if isinstance(images, str):
            seen.left_out = images
            return seen
        seen.images = images
        problems: list[str] = []
        with guarded():
            teachers = self._teachers(panel, images, problems)
            for row in panel.rows:
                for run in row.runs:
                    title = f"{row.name}, seed {run.seed}"
                    found = self._pass(run.file, run.digest, images, title, problems) if run.digest else None
                    if found is not None:
                        seen.students[run.digest] = found
                    elif not run.digest:
                        problems.append(f"{run.file} cannot be read")
        for digest, (arch, found) in teachers.items():
            several = sum(other == arch for other, _ in teachers.values()) > 1
            seen.teachers[f"{arch} {digest[:8]}" if several else arch] = found
        seen.every = {**seen.students, **{digest: found for digest, (_, found) in teachers.items()}}
        _agree(panel, seen.students, {digest: found for digest, (_, found) in teachers.items()})
        if problems:
            seen.left_out = f"Left out: {'; '.join(dict.fromkeys(problems))}."
        return seen

    def _images(self, panel: Panel) -> Images | str:
        """The panel's test images, from the first place that one of its runs had them; or why they are not there."""
        specs = [run.spec for row in panel.rows for run in row.runs if run.spec is not None]
        places = dict.fromkeys((spec.data.dataset, self.data_dir or spec.data.data_dir) for spec in specs)
        found: Images | str = ""
        for dataset, place in places:
            found = self._loaded(dataset, place, panel)
            if not isinstance(found, str):
                break
        return found

    def _loaded(self, dataset: str, data_dir: str | None, panel: Panel) -> Images | str:
        key = (dataset, data_dir, panel.size)
        if key not in self.sets:
            try:
                self.sets[key] = passes.test_images(*key, self.limit)
            except KdError as problem:
                said = f"Left out, because the test images are not there: {problem.message}."
                self.story.note(f"{panel.name}: {said}")
                self.sets[key] = said
        return self.sets[key]

    def _teachers(self, panel: Panel, images: Images, problems: list[str]) -> dict[str, tuple[str, Pass]]:
        """Digest → architecture and pass of each teacher of the panel that is found."""
        teachers = {}
        tried = set()
        for row in panel.rows:
            for run in row.runs:
                digest = str(run.told_teacher.get("digest", ""))
                if not digest or digest in tried:
                    continue
                tried.add(digest)
                file = teacher_file(run, self.records)
                arch = str(run.told_teacher["arch"])
                if file is None:
                    problems.append(f"the teacher {arch} {digest[:8]} is not where the run found it: name its run too")
                    continue
                found = self._pass(file, digest, images, f"teacher {arch}", problems)
                if found is not None:
                    teachers[digest] = (arch, found)
        return teachers

    def _pass(self, file: Path, digest: str, images: Images, title: str, problems: list[str]) -> Pass | None:
        try:
            return passes.passed(file, digest, images, self.device, self.cache, self.story, title, self.system.workers)
        except (WriteError, OutOfMemoryError, Stopped):
            raise
        except KdError as problem:
            self.story.end()
            self.story.note(f"{title}: {problem.line()}")
            problems.append(f"{title}: {problem.message}")
            return None


def _agree(panel: Panel, students: dict[str, Pass], teachers: dict[str, Pass]) -> None:
    """Fill in how often the students of each row agree with their own teacher."""
    for row in panel.rows:
        values = []
        for run in row.runs:
            ours, theirs = students.get(run.digest), teachers.get(str(run.told_teacher.get("digest")))
            if ours is not None and theirs is not None:
                values.append(100 * float((ours.predicted == theirs.predicted).mean()))
        row.agreement = stat(values)
