"""Whether the run in a directory is the one that is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdcli import durable
from kdcli.errors import IncompatibleError, InputError, UsageError
from kdcli.metadata import require_summary
from kdcli.runs.identity import digest_of, flat
from kdcli.specs import RunSpec, validate

_ANEW = "use another directory, or --overwrite to start anew"


def refuse_drift(directory: Path, spec: RunSpec, mine: dict[str, Any]) -> None:
    """Refuse a directory that holds a run with another identity than `mine`.

    Raises:
        IncompatibleError: with every differing field. InputError: its spec or summary is damaged.
    """
    file = directory / "spec.json"
    try:
        stored = validate(RunSpec, durable.read_json(file))
    except UsageError as problem:
        raise InputError(f"{file} is not the spec of a run: {problem.line()}", hint="name another directory") from None
    old, new = flat(stored.identity()), flat(mine)
    lone = {*old} ^ {*new}  # a setting that counts at some of its values only is told all the same
    for given, values in ((stored, old), (spec, new)):
        everything = flat(given.model_dump(mode="json"))
        values |= {key: everything.get(key) for key in lone - {*values}}
    by_content = [key for key, value in new.items() if "content:" in str(value) and key in old]
    old |= {key: new[key] for key in by_content}  # by another path, perhaps: the content is what counts
    differing = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if differing:
        shown = "; ".join(f"{key} was {_short(old.get(key))}, is {_short(new.get(key))}" for key in differing[:6])
        raise IncompatibleError(
            f"{directory} holds a run with another spec: {shown}",
            field="--out",
            hint=_ANEW,
        )
    if by_content and (directory / "summary.json").exists():  # of an unfinished run, the resume state tells
        _refuse_other_content(directory, mine, by_content)


def _refuse_other_content(directory: Path, mine: dict[str, Any], named: list[str]) -> None:
    """Refuse a finished run that was made of other files than those `mine` names by content.

    Args:
        named: dotted names of the settings that name a file, for the message.
    """
    path = directory / "summary.json"
    summary = require_summary(durable.read_json(path), path)
    if "spec_digest" in summary:
        same = summary["spec_digest"] == digest_of(mine)
    else:  # a probe of an earlier kd
        encoder = summary.get("encoder")
        same = isinstance(encoder, dict) and mine["encoder"] == f"content:{encoder.get('digest')}"
    if not same:
        raise IncompatibleError(
            f"{directory} holds a run with another spec: it was made with another {' or '.join(named)}",
            field="--out",
            hint=_ANEW,
        )


def _short(value: Any) -> str:
    return json.dumps(value)[:40]
