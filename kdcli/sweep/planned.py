"""A run of a sweep as it is planned: its command, its spec, and the places its result takes in the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kdcli.commandline import command_line
from kdcli.specs import RunSpec
from kdcli.sweep.file import Number

Stage = Literal["backbone", "teacher", "assistant", "student", "probe", "paper"]
STAGES: tuple[Stage, ...] = ("backbone", "teacher", "assistant", "student", "probe")
"""What a run may train, in the order in which it must be done."""
ORDER: tuple[Stage, ...] = (*STAGES, "paper")


@dataclass(frozen=True)
class Cell:
    """A place in the sweep's table: a row, a column with what it stands for, and the published numbers there."""

    label: str
    column: str
    pair: str
    published: tuple[Number, ...] = ()
    dataset: str | None = None
    ratio: float | None = None
    probe: str | None = None


@dataclass(frozen=True)
class Planned:
    """One run of a sweep, or a place of its table that has none.

    Attributes:
        stage: what it trains; `paper`: nothing, the number is the paper's alone.
        command: the `kd` command that carries it out.
        spec: resolved; None where there is nothing to run.
        directory: where the run will be; empty for a probe, whose directory depends on the student's weights.
        cells: the places its result takes in the table; a run may stand for several equal ones.
        needs: what has to be shipped before it can be run.
        requires: directories of the runs that must come first.
    """

    stage: Stage
    command: str
    method: str
    spec: RunSpec | None
    directory: str = ""
    cells: tuple[Cell, ...] = ()
    needs: str = ""
    requires: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """The shell command of this run; empty where there is none."""
        return "" if self.spec is None else command_line(self.command, self.spec)


def described(run: Planned) -> dict[str, Any]:
    """A planned run for people and programs, without its spec."""
    cells = [
        {
            "label": cell.label,
            "column": cell.column,
            "pair": cell.pair,
            "published": [vars(number) for number in cell.published],
        }
        for cell in run.cells
    ]
    known = {"stage": run.stage, "method": run.method, "command": run.line, "cells": cells}
    return {**known, "run": run.directory or None, "needs": run.needs or None}
