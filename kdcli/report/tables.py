"""The tables that commands print: last-epoch test accuracy in percent, never mixed with the best epoch."""

from __future__ import annotations

from typing import Any

from kdcli.output import table

_HEADER = ("network", "single", "marginal", "aggregate", "images", "run")


def _row(label: str, test: dict[str, Any], run: str) -> list[Any]:
    modes = [test.get("top1"), test.get("marginal", {}).get("top1"), test.get("aggregate", {}).get("top1")]
    return [label, *modes, test.get("n"), run]


def _label(run: dict[str, Any]) -> str:
    name = f"{run['network']}, {run['method']}" if run["method"] != "none" else f"{run['network']} alone"
    return f"{run['role']} {name}, seed {run['seed']}"


def runs_table(runs: list[dict[str, Any]]) -> str:
    """One row a run, after a row for each teacher they had."""
    rows: list[list[Any]] = []
    seen = set()
    for run in runs:
        told = run.get("teacher")
        if told and told["digest"] not in seen:
            seen.add(told["digest"])
            rows.append(_row(f"teacher {told['arch']}", told, told["checkpoint"]))
        rows.append(_row(_label(run), run["metrics"]["test"], run["run"]))
    return "top-1 on the test images, %, last epoch\n" + table(rows, _HEADER)


def distill_table(document: dict[str, Any]) -> str:
    """One run, or several with mean ± std by method."""
    if "runs" not in document:
        return runs_table([document])
    text = runs_table(document["runs"])
    rows = [_mean_row(entry) for entry in document["aggregate"] if entry["n"] > 1]
    return text if not rows else f"{text}\n\n" + table(rows, ("method", "inference", "mean", "std", "n"))


def _mean_row(entry: dict[str, Any]) -> list[Any]:
    return [entry["method"], entry["inference"], entry["top1_mean"], entry["top1_std"], entry["n"]]


def fewshot_table(document: dict[str, Any]) -> str:
    """One row a ratio."""
    rows = [
        [f"{100 * part['ratio']:g} %", *_mean_row(entry)] for part in document["ratios"] for entry in part["aggregate"]
    ]
    header = ("ratio", "method", "inference", "top-1", "std", "n")
    return "top-1 on the test images, %, last epoch, by share of the training images\n" + table(rows, header)


def probe_table(document: dict[str, Any]) -> str:
    """One row a data set."""
    rows = [
        [
            run["dataset"],
            run["metrics"]["test"]["top1"],
            run["metrics"]["test"].get("top5"),
            run["metrics"]["test"]["n"],
        ]
        for run in document["runs"]
    ]
    return "linear probe, top-1 on the test images, %, last epoch\n" + table(
        rows, ("data set", "top-1", "top-5", "images")
    )


def evaluation_table(document: dict[str, Any]) -> str:
    """One row an inference mode."""
    rows = []
    for mode, values in document["inference"].items():
        row = [mode, values["top1"], values.get("top5"), values["nll"], values["ece"]]
        rows.append([*row, values.get("agreement"), values["n"]])
    header = ("inference", "top-1", "top-5", "NLL", "ECE", "agreement", "images")
    speed = document["cost"]["images_per_second"]
    return f"{document['checkpoint']} on {document['dataset']}, {speed:.0f} images/s\n" + table(rows, header)
