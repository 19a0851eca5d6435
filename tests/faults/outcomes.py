"""What two runs must share to the bit, and what is wrong if they do not."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from warmed import Trial, Warm

from kdcli import checkpoint
from kdcli.errors import InputError

CLOCK = ("seconds", "images_per_second", "peak_mib")  # what a summary tells of this session and not of the result


@dataclass
class Reference:
    """What an uninterrupted run gave.

    Attributes:
        student: the file of the network, byte for byte; its metadata hold the metrics.
        states: step → digest of all tensors of the resume state, and the metadata besides the time.
        trace: every call that changed a file, in order.
        memory: address space at the start and at most, in bytes, if asked for.
    """

    words: list[str]
    student: bytes
    metrics: bytes
    summary: dict[str, Any]
    states: dict[int, dict[str, Any]] = field(default_factory=dict)
    trace: list[dict[str, Any]] = field(default_factory=list)
    memory: tuple[int, int] = (0, 0)


def reference(warm: Warm, words: list[str], folder: Path, **plan: Any) -> Reference:
    """Run `words` to the end, uninterrupted, in `folder/run`."""
    trial = warm.trial([*words, "--out", "run"], folder, trace=True, states=True, **plan)
    assert trial.code == 0, trial.err
    found = read(folder / "run")
    memory = [tuple(event["memory"]) for event in trial.only("memory")] or [(0, 0)]
    return Reference(words, *found, states_of([trial]), trial.only("call"), memory[0])


def read(run: Path) -> tuple[bytes, bytes, dict[str, Any]]:
    """Network, log of the epochs and summary of a finished run."""
    summary = json.loads((run / "summary.json").read_text())
    summary["cost"] = {key: value for key, value in summary["cost"].items() if key not in CLOCK}
    return (run / "student.safetensors").read_bytes(), (run / "metrics.jsonl").read_bytes(), summary


def states_of(trials: list[Trial]) -> dict[int, dict[str, Any]]:
    """The resume states that were written, by step; of one written twice the last."""
    return {event["state"]: event for trial in trials for event in trial.only("state")}


def differences(wanted: Reference, run: Path, trials: list[Trial]) -> list[str]:
    """How a run that was stopped and continued by `trials` differs from the uninterrupted one; nothing, if all is well.

    Every state that a trial wrote is compared, not only the result: networks, optimiser, banks, heads, peers, sums.
    """
    problems = []
    last = trials[-1]
    if last.code != 0:
        return [f"exit code {last.code} in the end: {last.err[-300:]}"]
    student, metrics, summary = read(run)
    if student != wanted.student:
        problems.append("the student differs")
    if metrics != wanted.metrics:
        problems.append("metrics.jsonl differs")
    if summary != wanted.summary:
        problems.append("the summary differs")
    for trial in trials:
        for event in trial.only("state"):
            if wanted.states.get(event["state"], event) != event:
                problems.append(f"the state of step {event['state']} differs")
    return problems + leftovers(run)


def leftovers(run: Path) -> list[str]:
    """Files that a finished run should not have."""
    known = {".lock", "spec.json", "env.json", "metrics.jsonl", "student.safetensors", "summary.json", "MODEL_CARD.md"}
    return [f"{path.relative_to(run)} is left" for path in sorted(run.rglob("*")) if path.name not in known]


def lost(folder: Path, wanted: Reference, call: int) -> list[str]:
    """What is wrong with the resume states in `folder/run` after a blow at `call`, as the traced run counts.

    Each is to the bit one of the uninterrupted run, and once the first was saved there always is one, until the end.
    """
    found, run = [], folder / "run"
    paths = sorted(run.glob("state/step-*.safetensors"))
    for path in paths:
        try:
            digest = checkpoint.verify(path)["digest"]
        except InputError as problem:
            found.append(problem.message)
            continue
        if digest != wanted.states[int(path.stem.removeprefix("step-"))]["digest"]:
            found.append(f"{path.name} differs")
    saved = min(e["n"] for e in wanted.trace if e["call"] == "rename" and e["path"].startswith("run/state/"))
    if not paths and call > saved and not (run / "summary.json").exists():
        found.append("every state is gone")
    return found
