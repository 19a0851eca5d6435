"""What the training commands do with a spec: one run or several, and the document they answer with."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from typing import Any

from kdcli import methods
from kdcli.engine import distributed
from kdcli.engine.device import begin_run
from kdcli.engine.signals import StopFlag, listening
from kdcli.errors import UsageError
from kdcli.output import Story, envelope
from kdcli.specs import RunSpec


@contextlib.contextmanager
def _joined(spec: RunSpec, story: Story) -> Iterator[StopFlag]:
    """Join the other ranks, if any, start the clock of `--max-minutes`, and mind the stop signals."""
    stop = StopFlag(spec.system.max_minutes, spec.system.requeue)
    with listening(stop, at_once=True):
        try:
            distributed.start(spec.system)
            with distributed.watching():
                yield stop
        finally:
            story.end()
            distributed.stop()


def teacher(spec: RunSpec, story: Story) -> dict[str, Any]:
    """`kd pretrain-teacher`."""
    from kdcli.training import pretrain_teacher

    with _joined(spec, story) as stop:
        begin_run()
        return pretrain_teacher(spec, story, stop)


def students(spec: RunSpec, seeds: list[int], story: Story, *, auto_teacher: bool) -> dict[str, Any]:
    """`kd distill`: a run a seed, each with its student-alone run if `baseline` asks for it.

    One seed without a baseline answers with the run's own summary; otherwise with `runs` and their aggregate.
    """
    with _joined(spec, story) as stop:
        runs = _runs(spec, seeds, story, stop, auto_teacher)
    if len(runs) == 1:
        return runs[0]
    return envelope("distill", runs=runs, aggregate=aggregate(runs))


def fewshot(
    spec: RunSpec, ratios: list[float], seeds: list[int], story: Story, *, auto_teacher: bool
) -> dict[str, Any]:
    """`kd fewshot`: the same distillation on several stratified fractions."""
    parts = [at_ratio(spec, ratio) for ratio in ratios]
    if spec.system.out is not None and len(ratios) > 1:
        raise UsageError("names one directory, and there are several ratios", field="--out", hint="use --runs-dir")
    table = []
    with _joined(spec, story) as stop:
        for part in parts:
            runs = _runs(part, seeds, story, stop, auto_teacher)
            table.append({"ratio": part.data.ratio, "runs": runs, "aggregate": aggregate(runs)})
    return envelope("fewshot", ratios=table)


def at_ratio(spec: RunSpec, ratio: float) -> RunSpec:
    """The spec on a stratified fraction of its training images. Raises UsageError if it is none."""
    if not 0 < ratio <= 1:
        raise UsageError("a ratio lies between 0 and 1", field="--ratio", hint="for example --ratio 0.25")
    return spec.model_copy(update={"data": spec.data.model_copy(update={"ratio": ratio})})


def probes(specs: list[RunSpec], story: Story) -> dict[str, Any]:
    """`kd linear-probe`: a probe a data set."""
    from kdcli.probe import probe

    if specs[0].system.out is not None and len(specs) > 1:
        raise UsageError("names one directory, and there are several data sets", field="--out", hint="use --runs-dir")
    runs = []
    with _joined(specs[0], story) as stop:
        for spec in specs:
            begin_run()
            runs.append(probe(spec, story, stop))
    return envelope("linear-probe", runs=runs)


def _runs(spec: RunSpec, seeds: list[int], story: Story, stop: StopFlag, auto_teacher: bool) -> list[dict[str, Any]]:
    from kdcli.training import distill

    several = len(seeds) > 1 or spec.baseline
    if several and spec.system.out is not None:
        raise UsageError("names one directory, and there are several runs", field="--out", hint="use --runs-dir")
    runs = []
    for seed in seeds:
        one = spec.model_copy(update={"seed": seed})
        if spec.baseline and spec.method["name"] != "none":
            alone = {"method": {"name": "none"}, "teacher": None, "teacher_taps": None, "assistant": ()}
            begin_run()
            runs.append(distill(methods.resolve(one.model_copy(update=alone)), story, stop))
        begin_run()
        runs.append(distill(one, story, stop, auto_teacher=auto_teacher))
    return runs


def aggregate(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, standard deviation (n-1) and n of the last epoch's test top-1, by method and inference mode."""
    groups: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        test = run["metrics"]["test"]
        groups.setdefault((run["method"], "single"), []).append(test["top1"])
        for mode in ("marginal", "aggregate"):
            if mode in test:
                groups.setdefault((run["method"], mode), []).append(test[mode]["top1"])
    return [
        {
            "method": method,
            "inference": mode,
            "top1_mean": round(statistics.fmean(values), 4),
            "top1_std": round(statistics.stdev(values), 4) if len(values) > 1 else None,
            "n": len(values),
        }
        for (method, mode), values in groups.items()
    ]
