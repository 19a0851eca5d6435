"""`report.html`: one file with everything in it, for any browser, without a network.

A policy in its head forbids the browser to load anything or to run any script but the page's own, whatever names runs have.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdcli import __version__
from kdcli.report.formats import columns
from kdcli.report.gathering import Gathered
from kdcli.report.markup import Markup, join, tag, text
from kdcli.report.panels import Panel
from kdcli.report.rows import Row

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        content: its figures and paragraphs; those with a heading stand in the table of contents.
        left_out: one line on what is missing, and why; empty if nothing is.
    """

    title: str
    content: tuple[Markup, ...]
    left_out: str = ""


def page(
    gathered: Gathered, rows: Sequence[Row], sections: Sequence[Section], notes: Sequence[str], *, best: bool
) -> str:
    """The whole document."""
    script = (_HERE / "page.js").read_text("utf-8")
    style = (_HERE / "page.css").read_text("utf-8")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    finished = len({run.directory for row in rows for run in row.runs if run.directory})
    parts = [
        Section("Results", (results(rows, best=best), _notes(notes))),
        *sections,
        Section("Unfinished runs", (_unfinished(rows),)),
        Section("How these numbers were made", (_provenance(rows),)),
    ]
    parts = [part for part in parts if any(part.content) or part.left_out]
    entries = [_entry(part, at) for at, part in enumerate(parts)]
    body = [
        tag("header", tag("h1", gathered.title), tag("p", gathered.source, class_="soft") if gathered.source else None),
        tag(
            "p",
            f"{finished} finished runs. Top-1 is in percent of the test images, at the last epoch unless a "
            "column says otherwise.",
        ),
        tag("nav", tag("ul", *entries), aria_label="Contents"),
    ]
    for at, part in enumerate(parts):
        content = [tag("div", piece, id=f"part-{at}-{number}") for number, piece in enumerate(part.content)]
        left_out = tag("p", part.left_out, class_="soft") if part.left_out else None
        body.append(tag("section", tag("h2", part.title), *content, left_out, id=f"part-{at}"))
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", gathered.title),
        tag("style", Markup(style)),
    ]
    footer = tag("footer", tag("p", f"Made by kd report, version {__version__}."))
    document = tag("html", tag("head", *head), tag("body", *body, footer, tag("script", Markup(script))), lang="en")
    return f"<!doctype html>\n{document}\n"


def _entry(part: Section, at: int) -> Markup:
    """A part in the table of contents, with its figures."""
    below = []
    for number, piece in enumerate(part.content):
        found = re.search(r"<h3>(.*?)</h3>", piece)
        if found:
            below.append(tag("li", tag("a", Markup(found[1]), href=f"#part-{at}-{number}")))
    return tag("li", tag("a", part.title, href=f"#part-{at}"), tag("ul", *below) if below else None)


def results(rows: Sequence[Row], *, best: bool) -> Markup:
    """The table, sortable."""
    shown = columns(rows, best=best)
    head = tag("tr", *(tag("th", column.title, scope="col") for column in shown))
    body = []
    for row in rows:
        cells = []
        for column in shown:
            told = column.text(row) or "-"
            if column.number is None:
                cells.append(tag("td", told, class_="settings" if column.title == "settings" else None))
            else:
                cells.append(tag("td", told, class_="number", data_value=column.number(row) if told != "-" else ""))
        body.append(tag("tr", *cells, class_="teacher" if row.role == "teacher" else None))
    table = tag("table", tag("thead", head), tag("tbody", *body), class_="sortable")
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label="Results")


def lead(panel: Panel) -> Markup:
    """What a panel's numbers say, in a sentence: everyone against the student alone."""
    base = panel.alone
    told = []
    if base is not None and base.top1 is not None:
        for row in panel.rows:
            if row is not base and row.top1 is not None:
                told.append((row.top1.mean - base.top1.mean, row))
    if base is None or base.top1 is None or not told:
        return Markup("")
    told.sort(key=lambda entry: -entry[0])
    parts = ", ".join(f"{row.name} {gain:+.2f} (n {len(row.runs)})" for gain, row in told)
    teachers = [f"teacher {row.teacher} {row.top1.mean:.2f} %" for row in panel.teachers if row.top1 is not None]
    name = "the student alone" if base.method == "none" else base.name
    against = f"Against {name} ({base.top1.mean:.2f} %, n {len(base.runs)}), in percentage points: {parts}."
    return tag("p", against, f" For comparison: {', '.join(teachers)}." if teachers else "")


def _notes(notes: Sequence[str]) -> Markup:
    return tag("ul", *(tag("li", note) for note in notes), class_="soft") if notes else Markup("")


def _unfinished(rows: Sequence[Row]) -> Markup:
    body = [
        tag(
            "tr",
            *(tag("td", cell) for cell in (run.status, row.label, row.place, run.seed, run.directory)),
            tag("td", run.note, class_="long"),
        )
        for row in rows
        for run in row.missing
    ]
    if not body:
        return Markup("")
    head = tag("tr", *(tag("th", title, scope="col") for title in ("state", "method", "of", "seed", "directory", "")))
    said = tag("p", "They take part in no number on this page.")
    table = tag("table", tag("thead", head), tag("tbody", *body))
    return join(said, tag("div", table, class_="scroll", tabindex="0", role="region", aria_label="Unfinished runs"))


def _provenance(rows: Sequence[Row]) -> Markup:
    """The command, spec, weights and versions of every run."""
    body = []
    seen = set()
    for row in rows:
        for run in row.runs:
            if not run.directory or run.directory in seen:
                continue
            seen.add(run.directory)
            versions = run.environment.get("versions")
            told = ", ".join(f"{key} {value}" for key, value in versions.items()) if isinstance(versions, dict) else "-"
            cells = [tag("td", run.directory), tag("td", row.name), tag("td", run.seed)]
            cells += [
                tag("td", tag("code", run.spec_digest[:12] or "-")),
                tag("td", tag("code", run.digest[:12] or "-")),
            ]
            cells += [tag("td", tag("code", run.command or "-"), class_="long"), tag("td", told, class_="long")]
            body.append(tag("tr", *cells))
    if not body:
        return Markup("")
    titles = ("run", "method", "seed", "spec digest", "weights digest", "command", "versions")
    head = tag("tr", *(tag("th", title, scope="col") for title in titles))
    table = tag("table", tag("thead", head), tag("tbody", *body), class_="sortable")
    told = [
        "Means are over seeds, ± is the sample standard deviation (n − 1). Top-1, NLL and ECE (15 bins) are "
        "those of the last "
        "epoch, single inference, from each run's summary; marginal and aggregate inference stand apart.",
        "Multiply-accumulates count convolutions, linear layers and matrix products of one image; training "
        "times are of the "
        "machine that trained, and images/s counts training images.",
    ]
    details = tag(
        "details",
        tag("summary", f"{len(body)} runs with commands, digests and versions"),
        tag("div", table, class_="scroll", tabindex="0", role="region", aria_label="Runs"),
    )
    return join(*(tag("p", text(line)) for line in told), details)
