"""Accuracy against what a network costs, and bars for the settings that differ between the runs of a method."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

from kdcli.report import charts
from kdcli.report.charts import Series
from kdcli.report.curves import Styles
from kdcli.report.markup import Markup
from kdcli.report.panels import Panel
from kdcli.report.passes import Pass
from kdcli.report.rows import Row, Stat, stat


def costs(panel: Panel, styles: Styles, passes: Mapping[str, Pass]) -> Markup:
    """Top-1 against MACs, parameters, latency and the seconds of training."""

    def latency(row: Row) -> Stat | None:
        # One number for an architecture: its weights do not matter, and a single timing is noise.
        alike = [other for other in panel.rows if row.role == "student"] or [row]
        times = [passes[run.digest].latency_ms for other in alike for run in other.runs if run.digest in passes]
        return stat([statistics.median(times)] if times else [])

    devices = ", ".join(dict.fromkeys(found.device for found in passes.values()))
    pictures = []
    measures: list[tuple[str, Callable[[Row], Stat | None]]] = [
        ("multiply-accumulates an image", lambda row: row.cost("macs")),
        ("parameters", lambda row: row.cost("params")),
        (f"latency of one image, ms ({devices})", latency),
        ("training, seconds", lambda row: row.cost("seconds")),
    ]
    for title, measure in measures:
        series = []
        for row in [*panel.teachers, *panel.rows]:
            x, y = measure(row), row.top1
            if x is not None and y is not None and x.mean > 0:
                series.append(Series(_name(row), styles(row), [x.mean], [y.mean], spread=[y.std]))
        if series:
            told = "; ".join(f"{one.name} {one.ys[0]:.2f} % at {charts.shown(one.xs[0])}" for one in series)
            alt = f"Top-1 against {title}. {told}"
            pictures.append(charts.scatter(alt, title, "test top-1, %", series, log=True))
    if not pictures:
        return Markup("")
    named = charts.legend([(_name(row), styles(row)) for row in [*panel.teachers, *panel.rows]])
    what = (
        "Up and to the left is better. Students of one architecture stand above each other: distillation "
        "changes their accuracy, not what they cost in use."
    )
    return charts.figure("Accuracy against cost", what, named, *pictures)


def _name(row: Row) -> str:
    return f"teacher {row.teacher}" if row.role == "teacher" else row.name


def ablations(panel: Panel, styles: Styles) -> Markup:
    """Bars for the settings of each method of which there are several."""
    methods: dict[str, list[Row]] = {}
    for row in panel.rows:
        if row.top1 is not None and row.method != "none":
            methods.setdefault(row.method, []).append(row)
    marks = []
    alone = [row for row in panel.rows if row.method == "none" and row.top1 is not None]
    if len(alone) == 1 and alone[0].top1 is not None:
        marks.append((f"student alone {alone[0].top1.mean:.2f}", alone[0].top1.mean))
    pictures = []
    for method, rows in methods.items():
        entries = []
        for row in rows:
            found = row.top1
            if found is not None:
                entries.append((row.settings or row.label, found.mean, found.std, styles(row)))
        if len(entries) > 1:
            entries.sort(key=lambda entry: -entry[1])
            told = "; ".join(f"{name} {value:.2f}" for name, value, _, _ in entries)
            pictures.append(
                charts.bars(f"Top-1 of {method} by setting. {told}", f"{method}: test top-1, %", entries, marks)
            )
    if not pictures:
        return Markup("")
    what = (
        "One bar for each variant of a method, mean over the seeds; whiskers are one standard deviation, so "
        "bars whose whiskers overlap are not told apart."
    )
    return charts.figure("Ablations", what, *pictures)
