"""t-SNE of the penultimate features (SLKD Fig. 5): a stratified, seeded sample of the test images, one "
"picture a network."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kdcli import durable
from kdcli.errors import KdError
from kdcli.output import Story
from kdcli.report import charts
from kdcli.report.classes import passes_of
from kdcli.report.markup import Markup, tag
from kdcli.report.panels import Panel
from kdcli.report.passes import Images, Pass

_NETWORKS = 9  # that are drawn in a panel, teachers first
_LEAST = 20  # images below which a picture says nothing


def embeddings(
    panel: Panel, images: Images, passes: Mapping[str, Pass], teachers: Mapping[str, Pass], cache: Path, story: Story
) -> Markup:
    """The features of teachers and students in two dimensions, with how separable they were before."""
    labels = images.split.labels[images.sample].numpy()
    if len(labels) < _LEAST or len(set(labels.tolist())) < 2:
        return Markup("")
    networks = [(f"teacher {name}", found) for name, found in teachers.items()]
    networks += [(row.name, found[0]) for row in panel.rows if (found := passes_of(row, passes))]
    drawn = []
    for name, found in networks[:_NETWORKS]:
        points, score = _embedded(found.features, labels, cache, story, name)
        alt = f"t-SNE of {name}: {len(labels)} test images of {len(set(labels.tolist()))} classes, silhouette {score:.3f}."
        picture = charts.cloud(alt, points, labels, images.dataset.classes)
        told = tag("p", f"silhouette of the features {score:+.3f}")
        drawn.append(tag("div", tag("h4", name), picture, told, class_="titled"))
    if not drawn:
        return Markup("")
    chosen = list(dict.fromkeys(labels.tolist()))
    named = charts.legend(
        [(images.dataset.classes[label], f"s{at % charts.COLOURS}") for at, label in enumerate(chosen)]
    )
    left = f" Not drawn: {', '.join(name for name, _ in networks[_NETWORKS:])}." if len(networks) > _NETWORKS else ""
    what = (
        f"Penultimate features of {len(labels)} test images of {len(chosen)} classes, chosen by a fixed "
        "seed; first seed of each "
        "method. Tight, separate clouds are separable features; distances between clouds mean nothing. The "
        "silhouette (-1 to 1, "
        f"higher is more separable) is that of the features themselves, before t-SNE.{left}"
    )
    return charts.figure("t-SNE of penultimate features", what, named, *drawn)


def _embedded(
    features: np.ndarray, labels: np.ndarray, cache: Path, story: Story, name: str
) -> tuple[np.ndarray, float]:
    """Points [S,2] and the silhouette of the features, from the cache where they are there."""
    path = cache / f"tsne-{hashlib.sha256(features.tobytes() + labels.tobytes()).hexdigest()[:24]}.npz"
    try:
        with open(durable.open_regular(path), "rb") as file, np.load(file, allow_pickle=False) as parts:
            points, score = parts["points"], float(parts["score"])
            if points.shape == (len(labels), 2):
                return points, score
    except (KdError, OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score

    story.note(f"t-SNE of {name}: {len(labels)} images")
    perplexity = min(30.0, (len(labels) - 1) / 3)
    points = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(features.astype(np.float64))
    score = float(silhouette_score(features, labels))
    content = io.BytesIO()
    np.savez_compressed(content, points=points, score=np.array(score))
    durable.write_bytes(path, content.getvalue())
    return points, score
