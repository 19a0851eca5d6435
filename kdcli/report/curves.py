"""What a training's log tells: accuracy, loss terms and learning rate over the epochs, and the values a "
"method follows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from kdcli.report import charts
from kdcli.report.charts import Series
from kdcli.report.markup import Markup, tag
from kdcli.report.panels import Panel
from kdcli.report.records import Record, number
from kdcli.report.rows import Row

Styles = Callable[[Row], str]
Point = tuple[float, float]


def training(panel: Panel, styles: Styles) -> Markup:
    """Test and training accuracy, loss and learning rate."""
    pictures = []
    for title, keys, log in (
        ("test top-1, %", ("test", "single", "top1"), False),
        ("training top-1, %", ("train", "top1"), False),
        ("training loss", ("train", "loss"), True),
        ("learning rate", ("lr",), True),
    ):
        series = [one for row in panel.rows if (one := _mean(row, styles(row), lambda line, k=keys: number(line, *k)))]
        if any(len(one.xs) > 1 for one in series):  # evaluated once, it is no curve
            told = "; ".join(f"{one.name} ends at {one.ys[-1]:.4g}" for one in series)
            pictures.append(charts.lines(f"{title} by epoch. {told}", "epoch", title, series, log=log))
    if not pictures:
        return Markup("")
    named = charts.legend([(row.name, styles(row)) for row in panel.rows])
    what = (
        "Lines are means over the seeds, thin lines single seeds. Where training accuracy rises and test "
        "accuracy does not, it overfits."
    )
    return charts.figure("Training curves", what, named, *pictures)


def terms(panel: Panel) -> Markup:
    """The terms of each method's loss."""
    pictures = [made for row in panel.rows if (made := _terms(row))]
    if not pictures:
        return Markup("")
    what = (
        "The weighted terms that are added up to the loss, first seed, log scale: a term that dwarfs the "
        "others drives the training."
    )
    return charts.figure("Loss terms", what, *pictures)


def _points(run: Record, value: Callable[[dict[str, Any]], float | None]) -> list[Point]:
    """(epoch, value) of each line of a log that has both."""
    found = []
    for line in run.epochs:
        epoch, y = number(line, "epoch"), value(line)
        if epoch is not None and y is not None:
            found.append((epoch, y))
    return found


def _mean(row: Row, style: str, value: Callable[[dict[str, Any]], float | None]) -> Series | None:
    """The mean over a row's seeds at the epochs that all of them have, with the seeds as faint lines."""
    logs = [points for run in row.runs if (points := _points(run, value))]
    if not logs:
        return None
    shared = sorted(set.intersection(*({epoch for epoch, _ in points} for points in logs)))
    if not shared:
        return None
    tables = [dict(points) for points in logs]
    ys = [statistics.fmean(table[epoch] for table in tables) for epoch in shared]
    faint = [tuple(zip(*points, strict=True)) for points in logs] if len(logs) > 1 else []
    return Series(row.name, style, shared, ys, [(xs, seed) for xs, seed in faint])


def _titled(title: str, picture: Markup, series: Sequence[Series]) -> Markup:
    named = charts.legend([(one.name, one.style) for one in series])
    return tag("div", tag("h4", title), named, picture, class_="titled")


def _terms(row: Row) -> Markup | None:
    names = dict.fromkeys(key for line in row.runs[0].epochs for key in _dictionary(line.get("terms")))
    series = []
    for order, name in enumerate(names):
        points = _points(row.runs[0], lambda line, n=name: number(line, "terms", n))
        if points:
            xs, ys = zip(*points, strict=True)
            series.append(Series(name, f"s{order % charts.COLOURS}", xs, ys))
    if not series or not any(y > 0 for one in series for y in one.ys):
        return None
    told = "; ".join(f"{one.name} from {one.ys[0]:.3g} to {one.ys[-1]:.3g}" for one in series)
    picture = charts.lines(f"Loss terms of {row.name} by epoch. {told}", "epoch", "loss term", series, log=True)
    return _titled(row.name, picture, series)


def trajectories(panel: Panel) -> Markup:
    """The values that methods follow without minimising them, in one chart for each kind of value."""
    pictures = []
    for row in panel.rows:
        kinds: dict[str, list[str]] = {}
        for name in dict.fromkeys(key for line in row.runs[0].epochs for key in _dictionary(line.get("followed"))):
            kinds.setdefault(name.partition("_")[0], []).append(name)
        for kind, names in kinds.items():
            series = []
            for order, name in enumerate(names):
                points = _points(row.runs[0], lambda line, n=name: number(line, "followed", n))
                if points:
                    xs, ys = zip(*points, strict=True)
                    series.append(Series(name, f"s{order % charts.COLOURS}", xs, ys))
            if any(y != 0 for one in series for y in one.ys):
                unit = {"top1": "top-1 on training batches, %", "kl": "KL divergence, nats"}.get(kind, kind)
                told = "; ".join(f"{one.name} from {one.ys[0]:.3g} to {one.ys[-1]:.3g}" for one in series)
                picture = charts.lines(f"{unit} of {row.name} by epoch. {told}", "epoch", unit, series)
                pictures.append(_titled(f"{row.name}: {unit}", picture, series))
    if not pictures:
        return Markup("")
    what = (
        "What a method watches and does not minimise, first seed. For slkd: as long as a self-learning "
        "teacher is nearer to the "
        "student than the teacher is, it bridges the gap between them."
    )
    return charts.figure("Learning trajectories", what, *pictures)


def _dictionary(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
