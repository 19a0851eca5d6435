"""`kd doctor`: whether this machine is fit for a run, in one line a finding, each with its fix.

Nothing is downloaded or changed: the trial files of the write test are removed again. torch is imported (its devices are
tried), so it takes a few seconds.
"""

from __future__ import annotations

from typing import Any

from kdcli.errors import KdError
from kdcli.output import envelope, failure


def examine(data_dir: str | None, runs_dir: str, *, quiet: bool = False) -> tuple[dict[str, Any], str, KdError | None]:
    """Look at everything.

    Args:
        data_dir: where the data sets lie; None: $KD_DATA_DIR, else ./data.
        runs_dir: where runs are to be written.
        quiet: leave what is in order out of the text.

    Returns:
        The document for `--json`, the text, and the first problem as the error to leave with (None if there is none).
    """
    from kdcli.doctor.datasets import datasets
    from kdcli.doctor.devices import devices
    from kdcli.doctor.machine import machine
    from kdcli.doctor.software import software
    from kdcli.doctor.storage import storage

    found = [*software(), *devices(), *machine(), *storage(runs_dir)]
    found += datasets(data_dir)
    problems = [finding for finding in found if finding.level == "problem"]
    warnings = sum(finding.level == "warning" for finding in found)
    document = envelope("doctor", warnings=warnings, problems=len(problems), checks=[f.document for f in found])
    text = "\n".join(finding.line for finding in found if not quiet or finding.level != "ok")
    if not problems:
        return document, text, None
    error = problems[0].error()
    if len(problems) > 1:
        error = type(error)(f"{len(problems)} problems, the first: {error.message}", hint=error.hint)
    return document | failure("doctor", error), text, error
