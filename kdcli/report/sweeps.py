"""Answers of `kd sweep`: the plan as shell commands, and the table of a paper with our numbers beside the published ones.

Ours are last-epoch top-1. Published numbers stand in brackets, and the last column says which epoch they are of and whose
teachers they had, since papers mix both.
"""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

from kdcli.output import table


def plan_lines(document: dict[str, Any]) -> str:
    """One shell command a line: backbones, teachers, students, probes."""
    return "\n".join(run["command"] for run in document["runs"] if run["command"])


def missing_lines(document: dict[str, Any]) -> list[str]:
    """What the plan has no command for, a line each: rows that wait for a method, and how many places of the table."""
    waiting = Counter(
        (cell["label"], run["needs"]) for run in document["runs"] if run["needs"] for cell in run["cells"]
    )
    return [
        f"not available yet: {label} ({count} place{'s' * (count > 1)}) needs {needs}"
        for (label, needs), count in waiting.items()
    ]


def sweep_table(document: dict[str, Any]) -> str:
    """One row a method, one column a pair (or ratio, data set …)."""
    rows: dict[str, dict[str, list[Any]]] = {}
    origins: dict[str, dict[str, None]] = {}
    columns: dict[str, None] = {}
    for run in document["runs"]:
        for cell in run["cells"]:
            label = cell["label"]
            columns[cell["column"]] = None
            rows.setdefault(label, {}).setdefault(cell["column"], []).append((run, cell))
            for number in cell["published"]:
                origins.setdefault(label, {})[f"{number['epoch']} ({number['teachers']})"] = None
            if "aggregate" in run.get("top1", {}):
                averaged = {**run, "top1": {"single": run["top1"]["aggregate"]}}
                of_views = rows.setdefault(f"{label}, aggregate", {}).setdefault(cell["column"], [])
                of_views.append((averaged, {**cell, "published": []}))
    lines = [
        [label, *(_entry(places.get(column, [])) for column in columns), ", ".join(origins.get(label, ())) or "-"]
        for label, places in rows.items()
    ]
    text = f"{document['about']['title'] or document['table']}\n"
    text += "top-1 on the test images, %, last epoch; in brackets as published\n"
    text += table(lines, ("method", *columns, "published: epoch (teachers)"))
    notes = missing_lines(document)
    for run in document["runs"]:
        if run["status"] in ("failed", "not run"):
            notes.append(f"{run['status']}: {run['run'] or run['command']}: {run['error']}")
    return "\n".join([text, *([""] if notes else []), *notes])


def _entry(found: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """`ours (published)`: the mean (and the deviation) of several seeds; `-` where there is no run."""
    if not found:
        return "-"
    ours = [run["top1"]["single"] for run, _ in found if "top1" in run]
    if ours:
        text = f"{statistics.fmean(ours):.2f}"
        if len(ours) > 1:
            text += f" ± {statistics.stdev(ours):.2f}, n {len(ours)}"
    else:
        text = "failed" if any(run["status"] in ("failed", "not run") for run, _ in found) else "-"
    published = {number["value"]: None for _, cell in found for number in cell["published"]}
    return text + "".join(f" ({value:.2f})" for value in published)
