"""Whether one file is sound: a checkpoint, a resume state, a spec, a preset, a sweep, or what else a run leaves.

Files are told apart by their names: `.toml` (preset or sweep), `.json` (spec, summary, environment), `.jsonl` (log), and
anything else is a checkpoint or nothing of ours. Nothing here imports torch, so a method's own settings are not checked,
and no method's file is run.
"""

from __future__ import annotations

import json
import os
import tomllib
import typing
from collections.abc import Callable
from typing import Any

from kdcli import checkpoint, durable
from kdcli.errors import IncompatibleError, InputError, KdError, NotFiniteError, UsageError, nearest
from kdcli.metadata import require_network, require_state, require_summary
from kdcli.output import SCHEMA
from kdcli.verify.finite import finite

Facts = dict[str, Any]
_ANEW = "restore it from a copy, or run its command again with --overwrite"
_SUMS = "sum."  # a resume state's running sums: what a method only follows may be infinite there, and is reported so


def check(path: str) -> Facts:
    """What a sound file is: `kind` and what goes with it (for checkpoints `role`, `digest`, `tensors`, `bytes`).

    Raises:
        InputError: it is missing, damaged, or nothing that kd reads.
        NotFiniteError: a checkpoint's bytes are as they were written, but hold NaN or infinity.
        IncompatibleError: a newer kd wrote it.
    """
    name = os.path.basename(path)
    checks: dict[str, Callable[[str], Facts]] = {".toml": _toml, ".json": _json, ".jsonl": _log}
    return checks.get(os.path.splitext(name)[1], _checkpoint)(path)


def _checkpoint(path: str) -> Facts:
    bad: list[str] = []

    def look(entry: checkpoint.Entry, part: memoryview) -> None:
        if not bad and not entry.name.startswith(_SUMS) and not finite(entry.dtype, part):
            bad.append(entry.name)

    facts = checkpoint.verify(path, look)
    if bad:
        raise NotFiniteError(f"{path} holds NaN or infinity in {bad[0][:80]}", hint="train it again")
    # Nothing is signed: a file may be whole and yet say of itself what no kd has written.
    require = require_state if facts["role"] == "state" else require_network
    require(checkpoint.read_metadata(path), path)
    for key in ("path", "ok", "seal"):
        del facts[key]
    return {"kind": "checkpoint", **facts}


def _toml(path: str) -> Facts:
    text = _text(path)
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as problem:
        raise InputError(f"{path} is not valid TOML: {_reason(problem)}", hint="restore it") from None
    if "sweep" in values:
        from kdcli.sweep.file import load

        _as_input(path, "sweep", lambda: load(path if "/" in path else f"./{path}"))
        return {"kind": "sweep"}
    values.pop("about", None)
    _as_input(path, "preset", lambda: _spec(values))
    return {"kind": "preset"}


def _json(path: str) -> Facts:
    try:
        values = json.loads(_text(path), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as problem:
        raise InputError(f"{path} is not valid JSON: {_reason(problem)}", hint="restore it") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no JSON object", hint="restore it")
    if os.path.basename(path) == "env.json":
        return {"kind": "environment"}
    if {"schema", "command"} <= set(values):
        return _summary(path, values)
    _as_input(path, "spec", lambda: _spec(values))
    return {"kind": "spec" if "command" in values else "preset"}


def _spec(values: dict[str, Any]) -> None:
    """Validate a whole spec (it names its command), or a partial one: a preset may leave the networks to the flags."""
    from kdcli import methods, presets
    from kdcli.specs import Command, RunSpec, validate

    if "command" not in values:
        data = values.get("data")
        name = data.get("dataset", "cifar100") if isinstance(data, dict) else "cifar100"
        recipe = presets.read(f"recipes/{presets.recipe_for(str(name))}")
        values = {"student": "resnet8", "teacher": "resnet8", **presets.merge(recipe, values), "command": "distill"}
    elif values["command"] not in typing.get_args(Command):
        raise UsageError(f"no command {str(values['command'])[:40]!r} has a spec", field="command")
    spec: RunSpec = validate(RunSpec, values)
    method = spec.method["name"]
    if not method.endswith(".py") and method not in methods.known():
        raise UsageError(f"no method named {method[:40]!r}", field="method", hint=nearest(method, methods.known()))


def _summary(path: str, values: dict[str, Any]) -> Facts:
    """A run's answer. The network that it speaks of lies beside it, and was written by the same run; not so a probe's,
    which is the encoder where it was named."""
    if values["schema"] != SCHEMA:
        raise IncompatibleError(f"{path} has schema {str(values['schema'])[:20]}", hint="upgrade kd to read it")
    if os.path.basename(path) != "summary.json":
        return {"kind": "summary"}
    require_summary(values, path)
    file = values.get("checkpoint")
    if isinstance(file, str) and values.get("command") != "linear-probe":
        beside = os.path.join(os.path.dirname(path), os.path.basename(file))
        if not os.path.lexists(beside):
            raise InputError(f"{path} speaks of {os.path.basename(file)}, which is gone", hint=_ANEW)
        try:
            theirs = checkpoint.read_metadata(beside).get("spec_digest")
        except KdError:  # told where that file is checked itself
            theirs = None
        if theirs is not None and theirs != values.get("spec_digest"):
            raise InputError(f"{path} is of another run than {os.path.basename(file)} beside it", hint=_ANEW)
    return {"kind": "summary"}


def _log(path: str) -> Facts:
    """A line of JSON an epoch. Where the run is unfinished, a crash may have torn the last one; a resume cuts it off."""
    *lines, last = _text(path).split("\n")
    if last and os.path.lexists(os.path.join(os.path.dirname(path), "summary.json")):
        lines.append(last)
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as problem:
            raise InputError(f"{path}, line {number} is not valid JSON: {_reason(problem)}") from None
        if not isinstance(values, dict):
            raise InputError(f"{path}, line {number} is not a JSON object")
    return {"kind": "log", "lines": len(lines)}


def _text(path: str) -> str:
    """The content of a regular file of at most `durable.JSON_LIMIT` bytes, which must be UTF-8."""
    with open(durable.open_regular(path), "rb") as file:
        try:
            content = file.read(durable.JSON_LIMIT + 1)
        except OSError as problem:
            raise InputError(f"cannot read {path}: {problem.strerror}", hint="check the disk") from None
    if len(content) > durable.JSON_LIMIT:
        raise InputError(f"{path} is too large for a file of kd", hint="check the path")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text in UTF-8", hint="restore it") from None


def _as_input(path: str, kind: str, validated: Callable[[], object]) -> None:
    """Here a spec is an input and no command line: what is wrong with it is the file's fault."""
    try:
        validated()
    except KdError as problem:
        where = f"{problem.field}: " if problem.field else ""
        raise InputError(f"{path} is no valid {kind}: {where}{problem.message}", hint=problem.hint) from None
    except RecursionError:
        raise InputError(f"{path} is no valid {kind}: nested too deeply") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _reason(problem: Exception) -> str:
    return "nested too deeply" if isinstance(problem, RecursionError) else str(problem)[:200]
