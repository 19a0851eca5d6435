"""How a planned run of a sweep ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdcli.errors import KdError


@dataclass(frozen=True)
class Outcome:
    """How a planned run ended.

    Attributes:
        done: what the sweep's document keeps of its summary; None if it has none.
        error: what it failed with.
        missing: the directory of a failed run that it requires, so that it was not begun.
    """

    done: dict[str, Any] | None = None
    error: KdError | None = None
    missing: str = ""


def done(summary: dict[str, Any]) -> dict[str, Any]:
    """What the sweep's document keeps of a run's summary: top-1 at the last epoch, the best one named as such."""
    test = summary["metrics"]["test"]
    modes = {mode: test[mode]["top1"] for mode in ("marginal", "aggregate") if mode in test}
    best = summary["best_on_test"].get("top1")
    top1 = {"epoch": "last", "single": test["top1"], **modes, "best_on_test": best, "n": test["n"]}
    return {"status": "done", "run": summary["run"], "top1": top1}
