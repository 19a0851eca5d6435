"""Class by class: who gains, what is confused with what, and how the students' logits hang together like "
"the teacher's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kdcli.report import charts
from kdcli.report.curves import Styles
from kdcli.report.markup import Markup, tag
from kdcli.report.panels import Panel
from kdcli.report.passes import Images, Pass
from kdcli.report.rows import Row

_CONFUSED = 12  # pairs of classes that are listed


def passes_of(row: Row, passes: Mapping[str, Pass]) -> list[Pass]:
    """The passes of a row's seeds, as far as there are any."""
    return [passes[run.digest] for run in row.runs if run.digest in passes]


def per_class(found: list[Pass], labels: np.ndarray, classes: int) -> np.ndarray:
    """Accuracy of each class in percent, mean over the seeds; NaN for a class without test images."""
    counts = np.bincount(labels, minlength=classes)
    hits = [np.bincount(labels[one.predicted == labels], minlength=classes) for one in found]
    with np.errstate(invalid="ignore", divide="ignore"):
        return 100 * np.mean(hits, axis=0) / counts


def gains(panel: Panel, images: Images, passes: Mapping[str, Pass]) -> Markup:
    """Accuracy of each class against that of the student alone (or plain distillation), sorted."""
    base = panel.alone
    if base is None or not passes_of(base, passes):
        return Markup("")
    labels, names = images.split.labels.numpy(), images.dataset.classes
    before = per_class(passes_of(base, passes), labels, len(names))
    pictures = []
    for row in panel.rows:
        found = passes_of(row, passes)
        if row is base or not found:
            continue
        gain = per_class(found, labels, len(names)) - before
        order = [at for at in np.argsort(-gain) if np.isfinite(gain[at])]
        values = [float(gain[at]) for at in order]
        better, worse = sum(v > 0 for v in values), sum(v < 0 for v in values)
        most = ", ".join(f"{names[at]} {gain[at]:+.1f}" for at in order[:3])
        least = ", ".join(f"{names[at]} {gain[at]:+.1f}" for at in order[-3:][::-1])
        told = f"{better} classes gain, {worse} lose. Most: {most}. Least: {least}."
        alt = f"Gain of each class with {row.name} over {base.name}. {told}"
        picture = charts.columns(alt, "classes, sorted", "gain, percentage points", values, [names[at] for at in order])
        pictures.append(tag("div", tag("h4", f"{row.name} − {base.name}"), picture, tag("p", told), class_="titled"))
    if not pictures:
        return Markup("")
    what = (
        f"Accuracy of each class less that of {base.name}, means over the seeds. Bars below zero are "
        "classes that pay for the gain of others."
    )
    return charts.figure("Gain by class", what, *pictures)


def confusion(panel: Panel, images: Images, passes: Mapping[str, Pass], teachers: Mapping[str, Pass]) -> Markup:
    """Confusion matrices of teachers and students."""
    drawn = []
    for title, matrix in _matrices(panel, images, passes, teachers).items():
        # Each row as shares of its class; the root makes rare confusions visible.
        shares = np.sqrt(matrix / np.clip(matrix.sum(1, keepdims=True), 1, None))
        right = 100 * np.trace(matrix) / max(matrix.sum(), 1)
        alt = f"Confusion matrix of {title}: {right:.2f} % of the images lie on the diagonal."
        picture = charts.heat(alt, shares, 1.0, "true class", "predicted class")
        drawn.append(tag("div", tag("h4", title), picture, class_="titled"))
    what = (
        "Strong marks off the diagonal are confusions (the shade is the square root of a class's share). "
        "Columns that stand out "
        "are classes that a network names too often."
    )
    return charts.figure("Confusion", what, *drawn) if drawn else Markup("")


def _matrices(
    panel: Panel, images: Images, passes: Mapping[str, Pass], teachers: Mapping[str, Pass]
) -> dict[str, np.ndarray]:
    """Name → counts [K,K], true by predicted, mean over the seeds."""
    labels, classes = images.split.labels.numpy(), len(images.dataset.classes)
    networks = [(f"teacher {name}", [one]) for name, one in teachers.items()]
    networks += [(row.name, found) for row in panel.rows if (found := passes_of(row, passes))]
    matrices = {}
    for title, found in networks:
        counts = [np.bincount(labels * classes + one.predicted, minlength=classes**2) for one in found]
        matrices[title] = np.mean(counts, axis=0).reshape(classes, classes)
    return matrices


def confused(panel: Panel, images: Images, passes: Mapping[str, Pass], teachers: Mapping[str, Pass]) -> Markup:
    """The pairs (true, predicted) that are confused most, in sum over the networks, with everyone's counts."""
    matrices, names = _matrices(panel, images, passes, teachers), images.dataset.classes
    if not matrices:
        return Markup("")
    total = np.sum(list(matrices.values()), axis=0)
    np.fill_diagonal(total, 0)
    order = np.argsort(-total, axis=None)[:_CONFUSED]
    body = []
    for flat in order:
        true, predicted = divmod(int(flat), len(names))
        if total[true, predicted] > 0:
            counts = [f"{matrix[true, predicted]:g}" for matrix in matrices.values()]
            cells = [tag("td", names[true]), tag("td", names[predicted])]
            body.append(tag("tr", *cells, *(tag("td", count, class_="number") for count in counts)))
    head = tag("tr", *(tag("th", title, scope="col") for title in ("true class", "taken for", *matrices)))
    table = tag("table", tag("thead", head), tag("tbody", *body), class_="sortable")
    caption = tag(
        "figcaption",
        tag("h3", "Most confused pairs"),
        "Images of the one class taken for the other, means over the seeds.",
    )
    return tag(
        "figure",
        caption,
        tag("div", table, class_="scroll", tabindex="0", role="region", aria_label="Most confused pairs"),
    )


def correlations(panel: Panel, passes: Mapping[str, Pass], teachers: Mapping[str, Pass]) -> Markup:
    """Where the correlation matrix of a student's logits differs from the teacher's (VSD Fig. 5, SLKD Fig. 6)."""
    drawn = []
    for teacher, theirs in teachers.items():
        found = []
        for row in panel.rows:
            ours = [one for one in passes_of(row, passes) if one.correlation.shape == theirs.correlation.shape]
            if ours and theirs.correlation.size:
                found.append((row, [np.abs(one.correlation - theirs.correlation) for one in ours]))
        high = max((float(np.quantile(parts[0], 0.995)) for _, parts in found), default=0.0)
        for row, parts in found:
            off = ~np.eye(len(parts[0]), dtype=bool)
            mean = float(np.mean([part[off].mean() for part in parts]))
            title = f"|{row.name} − teacher {teacher}|"
            alt = (
                f"Difference of the correlation matrices of logits, {row.name} and teacher {teacher}: mean {mean:.4f}."
            )
            picture = charts.heat(alt, parts[0], high, "class", "class")
            told = tag("p", f"mean off the diagonal {mean:.4f}; full shade {high:.2f}")
            drawn.append((mean, tag("div", tag("h4", title), picture, told, class_="titled")))
    if not drawn:
        return Markup("")
    what = (
        "Pearson correlations between the classes' logits over the test images: absolute difference of "
        "student and teacher, "
        "first seed; the mean under each is over all seeds. All share one scale: the fainter, the more like the teacher."
    )
    return charts.figure("Correlation of logits: student against teacher", what, *(made for _, made in drawn))


def agreement(panel: Panel, styles: Styles) -> Markup:
    """How often student and teacher name the same class."""
    entries = [(row.name, row.agreement.mean, row.agreement.std, styles(row)) for row in panel.rows if row.agreement]
    if not entries:
        return Markup("")
    told = "; ".join(f"{name} {value:.2f}" for name, value, _, _ in entries)
    picture = charts.bars(
        f"Agreement with the teacher. {told}", "images on which both name one class, %", entries, [], zero=True
    )
    what = "A student may gain accuracy without coming nearer to its teacher, and the other way round."
    return charts.figure("Agreement with the teacher", what, picture)
