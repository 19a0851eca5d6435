"""The shell command that carries out a resolved spec."""

from __future__ import annotations

import json
import shlex
from typing import Any

from kdcli import methods, presets
from kdcli.request import Request
from kdcli.specs import RunSpec, field_paths


def command_line(command: str, spec: RunSpec) -> str:
    """The shell command that carries out a resolved spec: the networks, then whatever differs from the standard recipe."""
    if spec.command == "linear-probe":
        words = {"encoder": spec.encoder, "data.dataset": spec.data.dataset}
        bare = presets.resolve(spec.command, _bare(words))
        parts = ["kd", command, str(spec.encoder)]
    else:
        words = {"method": spec.method["name"], "data.dataset": spec.data.dataset}
        words |= {key: getattr(spec, key) for key in ("teacher", "student") if getattr(spec, key) is not None}
        bare = methods.resolve(presets.resolve(spec.command, _bare(words)))
        parts = ["kd", command, "--method", spec.method["name"]]
        parts += [word for key in ("teacher", "student") if key in words for word in (f"--{key}", words[key])]
    parts += ["--dataset", spec.data.dataset]
    said = {*words}
    if command == "fewshot":
        parts += ["--ratio", str(spec.data.ratio)]
        said |= {"data.ratio"}
    standard, mine = _flat(bare), _flat(spec)
    for path, value in mine.items():
        if path not in said and value != standard.get(path):
            parts += _words(path, value, flag=_has_flag(command, path))
    return shlex.join(parts)


def _has_flag(command: str, path: str) -> bool:
    """Whether a command has flags for what is plain: a linear probe leaves out many, and `--baseline` is distill's."""
    if command == "linear-probe":
        return path == "seed"
    return path != "baseline" or command == "distill"


def _bare(words: dict[str, Any]) -> Request:
    return Request(words, [], [], False, False, True)


def _flat(spec: RunSpec) -> dict[str, Any]:
    """Every setting by dotted path; the method's one by one, their tables whole."""
    values = spec.model_dump(mode="json")
    method = {f"method.{key}": value for key, value in values.pop("method").items() if key != "name"}
    return {path: _at(values, path) for path in field_paths().values() if path != "method"} | method


def _at(values: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        values = values[key]
    return values


def _words(path: str, value: Any, *, flag: bool) -> list[str]:
    """A setting as words of the command line: its flag where it is a plain value of the recipe or the machine.

    Args:
        flag: whether the command has one.
    """
    section, _, leaf = path.rpartition(".")
    name = leaf.replace("_", "-")
    if not flag or section not in ("", "data", "train", "system") or value in (None, []) or isinstance(value, dict):
        return ["--set", _assignment(path, value)]
    if isinstance(value, list):
        words = [str(item) for item in value]
        return ["--set", _assignment(path, value)] if "," in "".join(words) else [f"--{name}", ",".join(words)]
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


def _assignment(path: str, value: Any) -> str:
    plain = f"{path}={value}"
    if isinstance(value, str) and presets.parse_set(plain) == (path, value):
        return plain
    return f"{path}={json.dumps(value)}"
