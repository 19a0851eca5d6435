"""Test images with what teacher and students take them for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kdcli.report import charts
from kdcli.report.classes import passes_of
from kdcli.report.markup import Markup, tag
from kdcli.report.panels import Panel
from kdcli.report.passes import Images, Pass, pictures

_EACH = 6  # images of each kind
_SIDE = 96  # pixels; larger images are shrunk for the page


def samples(panel: Panel, images: Images, passes: Mapping[str, Pass], teachers: Mapping[str, Pass]) -> Markup:
    """Images by chance, then some on which teacher and student disagree, each with everyone's class and confidence."""
    labels, names = images.split.labels.numpy(), images.dataset.classes
    networks = [(f"teacher {name}", found) for name, found in teachers.items()]
    networks += [(row.name, found[0]) for row in panel.rows if (found := passes_of(row, passes))]
    if not networks:
        return Markup("")
    kinds = [("chosen by chance", np.ones(len(labels), bool))]
    student = next((row for row in panel.rows if row.method != "none" and passes_of(row, passes)), None)
    if teachers and student is not None:
        theirs = next(iter(teachers.values())).predicted == labels
        ours = passes_of(student, passes)[0].predicted == labels
        kinds += [(f"teacher right, {student.name} wrong", theirs & ~ours)]
        kinds += [(f"{student.name} right, teacher wrong", ours & ~theirs)]
    chance = np.random.default_rng(0)
    groups = []
    for title, mask in kinds:
        at = np.flatnonzero(mask)
        chosen = np.sort(chance.permutation(at)[:_EACH]).tolist()
        if not chosen:
            continue
        cards = [
            _card(image, position, labels, names, networks)
            for image, position in zip(pictures(images, chosen), chosen, strict=True)
        ]
        share = f" ({100 * len(at) / len(labels):.1f} % of the test images)" if mask.mean() < 1 else ""
        groups.append(tag("div", tag("h4", f"{title}{share}"), tag("div", *cards, class_="cards"), class_="group"))
    what = (
        "✓ is right, ✗ is wrong; the number is the network's confidence in the class it names. A wrong "
        "answer with high confidence is worse than one in doubt. First seeds."
    )
    return charts.figure("Sample images", what, *groups, wide=True)


def _card(
    image: np.ndarray, position: int, labels: np.ndarray, names: tuple[str, ...], networks: list[tuple[str, Pass]]
) -> Markup:
    true = names[int(labels[position])]
    rows = []
    for name, found in networks:
        right = found.predicted[position] == labels[position]
        mark = tag(
            "span",
            "✓" if right else "✗",
            class_="right" if right else "wrong",
            aria_label="right" if right else "wrong",
        )
        said = names[int(found.predicted[position])]
        told = [
            tag("td", mark, " ", said, title=said),
            tag("td", f"{100 * float(found.confidence[position]):.0f} %", class_="number"),
        ]
        rows.append(tag("tr", tag("th", name, scope="row"), *told))
    alt = f"Test image of class {true}"
    picture = tag("img", src=charts.png(_shrunk(image)), alt=alt, class_="sample", width=96, height=96)
    head = tag("header", picture, tag("strong", true))
    return tag("div", head, tag("table", tag("tbody", *rows)), class_="card")


def _shrunk(image: np.ndarray) -> np.ndarray:
    if len(image) <= _SIDE:
        return image
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))
