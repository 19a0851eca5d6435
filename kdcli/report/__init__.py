"""Answers as text: one small table a command."""

from kdcli.report.sweeps import missing_lines, plan_lines, sweep_table
from kdcli.report.tables import distill_table, evaluation_table, fewshot_table, probe_table, runs_table

__all__ = [
    "distill_table",
    "evaluation_table",
    "fewshot_table",
    "missing_lines",
    "plan_lines",
    "probe_table",
    "runs_table",
    "sweep_table",
]
