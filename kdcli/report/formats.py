"""A report's table as Markdown, CSV, LaTeX: last-epoch numbers, the best epoch only in a column that says so."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from kdcli.output import one_line
from kdcli.report.rows import Row, Stat

Format = Literal["markdown", "csv", "latex", "json"]


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        title: with the unit.
        text: a row's cell; empty where there is nothing to say, and a column without any text is left out.
        number: whether it is set to the right, and what it sorts by.
    """

    title: str
    text: Callable[[Row], str]
    number: Callable[[Row], float | None] | None = None


def _of(title: str, value: Callable[[Row], Stat | None], places: int = 2) -> Column:
    def text(row: Row) -> str:
        found = value(row)
        return "" if found is None else spread(found, places)

    return Column(title, text, lambda row: None if (found := value(row)) is None else found.mean)


def spread(found: Stat, places: int = 2) -> str:
    """`mean ± std`, or the one value."""
    return f"{found.mean:.{places}f}" + ("" if found.std is None else f" ± {found.std:.{places}f}")


def _scaled(title: str, key: str, unit: float) -> Column:
    def value(row: Row) -> float | None:
        found = row.cost(key)
        return None if found is None else found.mean / unit

    def text(row: Row) -> str:
        found = value(row)
        return "" if found is None else f"{found:.0f}" if found >= 100 else f"{found:.3g}"

    return Column(title, text, value)


def _count(row: Row) -> str:
    waiting = f" (+{len(row.missing)} unfinished)" if row.missing else ""
    return f"{len(row.runs)}{waiting}" if row.runs or row.missing else ""


def _published(row: Row) -> str:
    marks = {"best": " (best epoch)", "unknown": " (epoch not stated)"}
    told = [
        f"{one['value']:.2f}{marks.get(one['epoch'], '')}{' †' if one['teacher_differs'] else ''}"
        for one in row.compared()
    ]
    return "; ".join(told)


def _difference(against: str) -> Column:
    def values(row: Row) -> list[float]:
        found = [one["difference"] for one in row.compared() if one["compared_with"] == against]
        return [value for value in found if value is not None]

    name = "last" if against == "last" else "best on test"
    return Column(
        f"ours ({name}) − published",
        lambda row: "; ".join(f"{value:+.2f}" for value in values(row)),
        lambda row: next(iter(values(row)), None),
    )


def columns(rows: Sequence[Row], *, best: bool) -> list[Column]:
    """The columns that say something about these rows."""
    every = [
        Column("method", lambda row: row.label),
        Column("settings", lambda row: row.settings),
        Column("teacher → student", lambda row: row.networks),
        Column("data set", lambda row: f"{row.dataset}, probed on {row.probe}" if row.probe else row.dataset),
        Column("ratio, %", lambda row: "" if row.ratio == 1 else f"{100 * row.ratio:g}", lambda row: 100 * row.ratio),
        _of("teacher top-1, %", lambda row: row.teacher_top1),
        _of("top-1 (last epoch), %", lambda row: row.top1),
        Column("n", _count, lambda row: len(row.runs)),
        *([_of("top-1 (best epoch on test), %", lambda row: row.best)] if best else []),
        _of("marginal, %", lambda row: row.of("marginal", "top1")),
        _of("aggregate, %", lambda row: row.of("aggregate", "top1")),
        Column("published, %", _published, lambda row: next((one["value"] for one in row.compared()), None)),
        _difference("last"),
        *([_difference("best_on_test")] if best else []),
        _of("agreement, %", lambda row: row.agreement),
        _of("NLL, nats", lambda row: row.of("nll"), 3),
        _of("ECE, %", lambda row: row.of("ece")),
        _scaled("parameters, M", "params", 1e6),
        _scaled("MACs, M", "macs", 1e6),
        _scaled("training, s", "seconds", 1),
        _scaled("training, images/s", "images_per_second", 1),
        _scaled("peak memory, MiB", "peak_mib", 1),
    ]
    return [column for column in every if any(column.text(row) for row in rows)]


def lines_of(rows: Sequence[Row], *, best: bool) -> list[list[str]]:
    """The header, then a list of cells for each row."""
    shown = columns(rows, best=best)
    return [[column.title for column in shown], *([column.text(row) or "-" for column in shown] for row in rows)]


def markdown(rows: Sequence[Row], notes: Sequence[str], *, best: bool) -> str:
    """A GitHub table, and the notes as a list."""
    shown = columns(rows, best=best)
    header, *body = lines_of(rows, best=best)
    rule = ["---:" if column.number is not None else "---" for column in shown]
    table = [
        "| " + " | ".join(cells) + " |"
        for cells in [list(map(_markdown, header)), rule, *(list(map(_markdown, line)) for line in body)]
    ]
    return "\n".join([*table, "", *(f"- {_markdown(note)}" for note in notes)]).rstrip() + "\n"


def _markdown(text: str) -> str:
    """Text that Markdown and the HTML inside it leave as it is; underscores inside words need no escape."""
    text = re.sub(r"([\\`*\[\]<>|&~])", r"\\\1", one_line(text))
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
    return re.sub(r"://", r"\\://", text)


def as_csv(rows: Sequence[Row], *, best: bool) -> str:
    """Comma-separated values with plain numbers: mean, std and n apart."""
    header = ["method", "settings", "teacher", "student", "dataset", "probe", "ratio", "n", "unfinished", "seeds"]
    header += ["teacher_top1", "top1_last_mean", "top1_last_std", "marginal_mean", "marginal_std"]
    header += ["aggregate_mean", "aggregate_std", *(["top1_best_on_test_mean", "top1_best_on_test_std"] * best)]
    header += ["agreement_mean", "nll_mean", "ece_mean", "params", "macs", "seconds", "images_per_second", "peak_mib"]
    header += ["published", "published_epoch", "published_teachers", "difference_last"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        seeds = " ".join(str(run.seed) for run in row.runs)
        names = [row.label, row.settings, row.teacher, row.student, row.dataset, row.probe]
        cells: list[object] = [*map(_cell, names), row.ratio, len(row.runs), len(row.missing), seeds]
        cells += [_mean(row.teacher_top1)]
        for found in (row.top1, row.of("marginal", "top1"), row.of("aggregate", "top1"), *([row.best] * best)):
            cells += [_mean(found), "" if found is None or found.std is None else f"{found.std:.4f}"]
        cells += [_mean(found) for found in (row.agreement, row.of("nll"), row.of("ece"))]
        costs = (row.cost(key) for key in ("params", "macs", "seconds", "images_per_second", "peak_mib"))
        cells += [
            "" if found is None else f"{found.mean:g}" if found.mean < 1e6 else int(found.mean) for found in costs
        ]
        compared = row.compared()
        cells += [_joined([one[key] for one in compared]) for key in ("value", "epoch", "teachers")]
        cells += [_joined([one["difference"] for one in compared if one["compared_with"] == "last"])]
        writer.writerow(cells)
    return out.getvalue()


def _mean(found: Stat | None) -> str:
    return "" if found is None else f"{found.mean:.4f}"


def _joined(values: Sequence[object]) -> str:
    return "; ".join(str(value) for value in values if value is not None)


def _cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula."""
    text = one_line(text)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


_LATEX = {
    **{char: f"\\{char}" for char in "{}$&#_%"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "→": r"$\rightarrow$",
    "±": r"$\pm$",
    "−": r"$-$",
    "†": r"$\dagger$",
    "<": r"$<$",
    ">": r"$>$",
}


def latex(rows: Sequence[Row], notes: Sequence[str], *, best: bool) -> str:
    """A tabular in the style of booktabs, the notes as comments."""
    shown = columns(rows, best=best)
    header, *body = lines_of(rows, best=best)
    lines = ["% needs \\usepackage{booktabs}", *(f"% {one_line(note)}" for note in notes)]
    lines += [
        f"\\begin{{tabular}}{{{''.join('l' if column.number is None else 'r' for column in shown)}}}",
        "\\toprule",
    ]
    lines += [" & ".join(map(_latex, header)) + r" \\", "\\midrule"]
    lines += [" & ".join(map(_latex, line)) + r" \\" for line in body]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _latex(text: str) -> str:
    return "".join(_LATEX.get(char, char) for char in one_line(text))
