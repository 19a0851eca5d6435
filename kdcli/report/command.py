"""`kd report`: from run directories or a sweep to a table on stdout and a page for a browser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli import durable
from kdcli.errors import UsageError, nearest
from kdcli.output import Story, document, envelope
from kdcli.report import formats
from kdcli.report.formats import Format
from kdcli.report.gathering import Gathered, gather
from kdcli.report.panels import Panel, panels_of
from kdcli.report.rows import Row, rows_of, uneven
from kdcli.specs import SystemSpec, validate

if TYPE_CHECKING:
    from kdcli.report.page import Section
    from kdcli.report.passing import Seen

_FORMATS: tuple[Format, ...] = ("markdown", "csv", "latex", "json")


@dataclass(frozen=True)
class Wanted:
    """What a report is to hold.

    Attributes:
        out: the folder of the page and its tables; None for the table on stdout alone.
        best: with the column of the best epoch on the test set.
        fast: without what needs passes through the networks.
        samples: with images of the test set.
        limit: pass at most so many test images.
    """

    format: Format = "markdown"
    out: Path | None = None
    best: bool = False
    fast: bool = False
    samples: bool = True
    limit: int | None = None
    data_dir: str | None = None
    device: str = "auto"
    threads: int | None = None
    workers: int = 2


def report(
    targets: Sequence[str], only: Sequence[str], sets: Sequence[str], wanted: Wanted, story: Story
) -> tuple[dict[str, Any], str]:
    """The report's document and its table in the wanted format; writes the page and tables into `wanted.out`.

    Raises:
        UsageError, InputError: as `gather`; an unknown format.
        WriteError: the folder cannot be written.
    """
    if wanted.format not in _FORMATS:
        raise UsageError(f"no format {wanted.format!r}", field="--format", hint=nearest(wanted.format, _FORMATS))
    gathered = gather(targets, only, sets)
    for record in gathered.records:
        if record.status == "failed to read":
            story.note(f"left out: {record.note}")
    rows = rows_of(gathered)
    page: Path | None = None
    sections: list[Section] = []
    if wanted.out is not None:
        page = wanted.out / "report.html"
        cache = durable.make_dir(wanted.out / "cache") if not wanted.fast else wanted.out
        durable.make_dir(wanted.out)
        sections = _sections(gathered, rows, wanted, cache, story)
    notes = notes_of(gathered, rows)
    made = envelope(
        "report",
        title=gathered.title,
        source=gathered.source,
        rows=[row.json() for row in rows],
        unfinished=[
            {
                "status": run.status,
                "label": row.label,
                "of": row.place,
                "seed": run.seed,
                "run": run.directory,
                "note": run.note,
            }
            for row in rows
            for run in row.missing
        ],
        notes=notes,
        page=None if page is None else str(page),
    )
    tables: dict[Format, str] = {
        "markdown": formats.markdown(rows, notes, best=wanted.best),
        "csv": formats.as_csv(rows, best=wanted.best),
        "latex": formats.latex(rows, notes, best=wanted.best),
        "json": document(made) + "\n",
    }
    if wanted.out is not None and page is not None:
        from kdcli.report.page import page as whole

        text = whole(gathered, rows, sections, notes, best=wanted.best)
        endings: dict[Format, str] = {"markdown": "md", "csv": "csv", "latex": "tex", "json": "json"}
        for key, ending in endings.items():
            durable.write_bytes(wanted.out / f"table.{ending}", _bytes(tables[key]))
        durable.write_bytes(page, _bytes(text))
        story.note(f"page: {page}")
    return made, tables[wanted.format]


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def notes_of(gathered: Gathered, rows: Sequence[Row]) -> list[str]:
    """What has to be known to read the table rightly."""
    notes = []
    compared = [one for row in rows for one in row.compared()]
    differing = sorted({one["teachers"] for one in compared if one["teacher_differs"]})
    if differing:
        notes.append(
            f"† published with other teachers than ours ({', '.join(differing)}); the teachers of our runs "
            "stand in the table"
        )
    if any(one["epoch"] == "best" for one in compared):
        notes.append(
            "published numbers marked as best epoch were chosen on the test set; they are compared with our "
            "best epoch (--best) "
            "and not with our last"
        )
    changed = [
        text for text in gathered.rescaled if not text.startswith(("system.", "data.data_dir=", "data.download="))
    ]
    if changed and compared:
        notes.append(f"our runs have {', '.join(changed)}: the published numbers are of the full recipe")
    for path, values in uneven(list(rows)).items():
        notes.append(f"not like for like: {path} is {', '.join(values[:6])} in different runs")
    few = {int(n) for row in rows for run in row.runs if (n := run.test("n")) is not None}
    if len(few) > 1:
        notes.append(f"runs were measured on different numbers of test images: {', '.join(map(str, sorted(few)))}")
    waiting = sum(len(row.missing) for row in rows)
    if waiting:
        notes.append(f"unfinished runs, which take part in no number: {waiting}")
    return notes


# ------------------------------------------------------------------------------------------------------------ the page


def _sections(gathered: Gathered, rows: list[Row], wanted: Wanted, cache: Path, story: Story) -> list[Section]:
    """A section for each panel; the rows get their agreement on the way."""
    from kdcli.report import comparisons, curves
    from kdcli.report.page import Section, lead
    from kdcli.report.passing import Passer

    panels = panels_of(rows)
    styles = _styles(panels)
    passer = None
    if not wanted.fast:
        system = {"device": wanted.device, "threads": wanted.threads, "workers": wanted.workers}
        passer = Passer(gathered.records, validate(SystemSpec, system), wanted.data_dir, wanted.limit, cache, story)
    sections = []
    for panel in panels:
        seen = None if passer is None else passer.panel(panel)
        parts = [lead(panel)]
        parts.append(comparisons.costs(panel, styles, {} if seen is None else seen.every))
        parts.append(comparisons.ablations(panel, styles))
        parts.append(curves.training(panel, styles))
        left_out = "Left out by --fast: what needs passes through the networks." if wanted.fast else ""
        if seen is not None:
            left_out = seen.left_out
            parts += _looked_at(panel, seen, styles, wanted, cache, story)
        parts += [curves.trajectories(panel), curves.terms(panel)]
        sections.append(Section(panel.name, tuple(part for part in parts if part), left_out))
    return sections


def _styles(panels: Sequence[Panel]) -> Callable[[Row], str]:
    """One colour for each method and setting, the same in all panels."""
    from kdcli.report.charts import COLOURS

    names = dict.fromkeys(row.name for panel in panels for row in panel.rows if row.method != "none")
    colours = {name: f"s{at % COLOURS}" for at, name in enumerate(names)}

    def style(row: Row) -> str:
        if row.role == "teacher":
            return "teacher"
        return "alone" if row.method == "none" else colours.get(row.name, "s0")

    return style


def _looked_at(
    panel: Panel, seen: Seen, styles: Callable[[Row], str], wanted: Wanted, cache: Path, story: Story
) -> list[Any]:
    """The figures that need passes."""
    from kdcli.report import classes, embeddings, samples

    if seen.images is None or not seen.students:
        return []
    images, students, teachers = seen.images, seen.students, seen.teachers
    parts: list[Any] = [
        classes.agreement(panel, styles),
        classes.gains(panel, images, students),
        classes.correlations(panel, students, teachers),
        embeddings.embeddings(panel, images, students, teachers, cache, story),
        classes.confusion(panel, images, students, teachers),
        classes.confused(panel, images, students, teachers),
    ]
    if wanted.samples:
        parts.append(samples.samples(panel, images, students, teachers))
    return parts
