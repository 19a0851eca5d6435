"""The benchmark itself: rounds of steps, what they are made of, and how far they are from what the device can do."""

from __future__ import annotations

import platform
import statistics
from dataclasses import replace
from typing import Any

import torch

from kdcli import methods
from kdcli.bench.alone import Alone
from kdcli.bench.ceilings import Ceilings, Prober
from kdcli.bench.count import counted_step, least_bytes
from kdcli.bench.images import images_for
from kdcli.bench.naive import Naive, refuse
from kdcli.bench.ours import Ours, Round
from kdcli.bench.parts import architectures, build
from kdcli.data.dataset import DataSet
from kdcli.engine.device import Device, guarded, open_device
from kdcli.output import Story, envelope
from kdcli.specs import RunSpec

_SECONDS = 2.0  # of a round, about
_FEWEST = 3  # steps of a round
_ALONE = 4  # teacher and student alone take this part of a round's steps


def bench(
    spec: RunSpec, story: Story, *, against: str | None = None, steps: int | None = None, rounds: int = 5
) -> dict[str, Any]:
    """Time the training that `spec` (a resolved `distill` spec) describes; the document that `--json` prints.

    Args:
        against: `naive` to time the incumbents' way too, a round of it before each of ours.
        steps: of a round; default: as many as take two seconds, at least 3.
        rounds: of each path.

    Raises:
        UsageError: there is no full batch, or the naive loop does not have what the spec asks for.
        KdError: whatever would stop the run before its first step.
    """
    if against is not None:
        refuse(spec)
    with guarded():
        still = _still(architectures(spec))
        device = open_device(still.system)
        dataset, made_up = images_for(still, story)
        with device.stream():
            try:
                document = _measured(
                    still, dataset, device, story, naive=against is not None, steps=steps, rounds=rounds
                )
            finally:
                story.end()
    return envelope("bench", configuration=_configuration(still, dataset, device, made_up=made_up), **document)


def _still(spec: RunSpec) -> RunSpec:
    """The spec with a learning rate at which nothing moves: noise and untrained teachers could drive losses to infinity."""
    lr = (spec.train.lr or spec.train.base_lr) * 1e-6
    return spec.model_copy(update={"train": spec.train.model_copy(update={"lr": lr})})


def _measured(
    spec: RunSpec, dataset: DataSet, device: Device, story: Story, *, naive: bool, steps: int | None, rounds: int
) -> dict[str, Any]:
    if spec.system.compile:
        story.note("compiling the step")
    ours = Ours(spec, dataset, build(spec, dataset, device, fold=True), device, story.note)
    try:
        first, later = ours.warm_up()
        count = steps or _round(later)
        peak = device.peak_mib()  # before anything that training does not have takes memory
        macs, traffic = counted_step(ours)
        least = least_bytes(ours)
        alone = Alone(ours, compiled=spec.system.compile)
        for passes in (alone.teacher, alone.student):
            passes(1)
        prober = Prober(device)
        other, other_count = None, 0
        if naive:
            plain = replace(device, precision="fp32")
            other = Naive(spec, dataset, build(spec, dataset, plain, fold=False), plain)
            other_count = steps or _round(other.warm_up())
        seen: list[Round] = []
        splits: list[dict[str, float]] = []
        theirs: list[float] = []
        story.begin(f"bench {spec.method['name']}", rounds)
        for number in range(1, rounds + 1):
            prober.probe()
            if other is not None:
                theirs.append(other.round(other_count))
            seen.append(ours.round(count))
            few = max(1, count // _ALONE)
            splits.append(_split(seen[-1], alone.teacher(few), alone.student(few)))
            told = f"round {number} of {rounds}: {1e3 * seen[-1].step:.2f} ms a step"
            story.note(told + (f", naive {1e3 * theirs[-1]:.2f}" if theirs else ""))
            story.step(number)
    finally:
        ours.close()
    times = [one.step for one in seen]
    wholes = [one.whole for one in seen]
    middle = wholes.index(statistics.median_low(wholes))
    size, step = spec.train.batch_size, statistics.median(times)
    document: dict[str, Any] = {
        "rounds": rounds,
        "ours": {
            **_speed(times, size),
            "steps_per_round": count,
            "first_step_ms": _ms(first),
            "peak_mib": peak,
            "split_ms": {name: _ms(seconds) for name, seconds in splits[middle].items()},
            "split_step_ms": _ms(wholes[middle]),
        },
        **_limits(step, macs, traffic, least, prober.best),
    }
    if theirs:
        ratios = [b / a for a, b in zip(times, theirs, strict=True)]
        document["naive"] = {**_speed(theirs, size), "steps_per_round": other_count, "workers": spec.system.workers}
        document["ratio"] = {name: round(value, 3) for name, value in _spread(ratios).items()}
    return document


def _round(seconds: float) -> int:
    return max(_FEWEST, round(_SECONDS / seconds))


def _split(one: Round, teacher: float, student: float) -> dict[str, float]:
    """Seconds of each part of a step; they add up to `one.whole`."""
    data, compute, optimiser = (one.parts[name] for name in ("data", "compute", "optimiser"))
    return {
        "data": data,
        "teacher": teacher,
        "student": student,
        "method": compute - teacher - student,
        "optimiser": optimiser,
        "loop": one.whole - data - compute - optimiser,
    }


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 4)


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _speed(times: list[float], batch_size: int) -> dict[str, Any]:
    return {
        "images_per_second": round(batch_size / statistics.median(times), 2),
        "ms_per_step": {name: _ms(value) for name, value in _spread(times).items()},
    }


def _limits(step: float, macs: int, traffic: int, least: int, ceilings: Ceilings) -> dict[str, Any]:
    """What a step of `step` seconds does, what the device could do at best, and the time that no step can go below."""
    arithmetic, memory = macs / ceilings.macs, least / ceilings.bytes
    floor = max(arithmetic, memory)
    return {
        "work": {"macs": macs, "unfused_bytes": traffic, "least_bytes": least},
        "ceilings": {
            "macs_per_second": round(ceilings.macs),
            "matrix_side": ceilings.side,
            "bytes_per_second": round(ceilings.bytes),
        },
        "reached": {
            "macs_per_second": round(macs / step),
            "arithmetic": round(arithmetic / step, 4),
            "unfused_bytes_per_second": round(traffic / step),
            "bandwidth": round(traffic / ceilings.bytes / step, 4),
        },
        "floor": {
            "arithmetic_ms": _ms(arithmetic),
            "memory_ms": _ms(memory),
            "ms": _ms(floor),
            "fraction": round(floor / step, 4),
        },
    }


def _configuration(spec: RunSpec, dataset: DataSet, device: Device, *, made_up: bool) -> dict[str, Any]:
    """What was timed, and on what."""
    name = torch.cuda.get_device_name(device.torch) if device.cuda else platform.machine()
    _, values = methods.settings(spec)
    return {
        "method": values.model_dump(mode="json"),
        "teacher": spec.teacher,
        "assistants": list(spec.assistant),
        "student": spec.student,
        "dataset": dataset.name,
        "made_up": made_up,
        "classes": len(dataset.classes),
        "image_size": dataset.image_size,
        "batch_size": spec.train.batch_size,
        "optimizer": spec.train.optimizer,
        "precision": device.precision,
        "compile": spec.system.compile,
        "cuda_graphs": device.cuda and spec.system.cuda_graphs,
        "device": str(device.torch),
        "device_name": name,
        "threads": device.threads,
        "torch": torch.__version__,
    }
