"""The points of the product of a sweep's axes, before they are resolved."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kdcli import presets
from kdcli.sweep.file import Entry, Pair, Sweep, pair_of


@dataclass(frozen=True)
class Draft:
    """A point of the product of the axes, before it is resolved."""

    entry: Entry | None
    preset: str | None
    pair: Pair
    dataset: str | None
    ratio: float | None
    seed: int | None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.entry.label if self.entry is not None else self.preset or ""


def drafts(sweep: Sweep) -> Iterator[Draft]:
    """All points, in the order of the file."""
    axes = sweep.axes
    rows: list[tuple[Entry | None, str | None]] = [(None, name) for name in axes.presets]
    rows = rows or [(entry, None) for entry in axes.methods] or [(None, None)]
    paths = list(axes.settings)
    for entry, preset in rows:
        base = sweep.common if preset is None else presets.merge(presets.read(preset), sweep.common)
        pairs = (entry.pairs if entry is not None else None) or axes.pairs or (pair_of(base),)
        points = itertools.product(
            pairs,
            axes.datasets or (None,),
            axes.ratios or (None,),
            itertools.product(*axes.settings.values()),
            axes.seeds or (None,),
        )
        if entry is None and preset is None:
            entry = Entry(name=_method_of(base), label=_method_of(base))
        for pair, dataset, ratio, values, seed in points:
            yield Draft(entry, preset, pair, dataset, ratio, seed, dict(zip(paths, values, strict=True)))


def _method_of(values: dict[str, Any]) -> str:
    method = values.get("method", "none")
    return str(method.get("name", "none") if isinstance(method, dict) else method)
