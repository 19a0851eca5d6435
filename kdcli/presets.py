"""Presets: TOML files that fill a spec, and the order in which the sources of a setting win.

defaults < the data set's recipe < presets, in the order given < flags < `--set`.

A preset is a partial spec. Its `[about]` table (title, source, published numbers) is for people and is not part of the
spec. The `command` it was written for is kept only if the command line runs the same one.
"""

from __future__ import annotations

import json
import os
import sys
import tomllib
import typing
from importlib import resources
from pathlib import Path
from typing import Any, TextIO

from kdcli.errors import InputError, UsageError, nearest
from kdcli.request import Request, parse_tuple
from kdcli.specs import RunSpec, bare, field_at, field_paths, validate

_DEPTH = 32
"""Tables and lists within one another; a shipped preset has four."""

STDIN_FILE = "KD_STDIN_FILE"
"""Environment variable of a rank: the file with what its launcher read from stdin, which can be read only once."""

_SWEEPS = ("tables/", "studies/")
"""Folders of shipped sweeps: the papers' tables, and studies of our own."""

_kept: tuple[TextIO, str] | None = None  # the stream that was read as stdin, and its text

_RECIPES = {
    "cifar100": "cifar",
    "cifar10": "cifar",
    "stl10": "cifar",
    "tinyimagenet": "tinyimagenet",
    "imagenet": "imagenet",
    "digits": "digits",
    "synthetic": "digits",
}


def folder() -> Path:
    """Where the shipped presets lie: beside the package in a checkout, inside it when installed."""
    installed = Path(str(resources.files("kdcli"))) / "presets"
    return installed if installed.is_dir() else Path(__file__).resolve().parent.parent / "presets"


def names() -> dict[str, Path]:
    """Preset name → file, for every shipped preset of one run (`recipes/cifar`, `quickstart`, `vsd/fig4a-rot-2x` …)."""
    return {name: path for name, path in _shipped().items() if not name.startswith(_SWEEPS)}


def sweeps() -> dict[str, Path]:
    """Name → file of the shipped sweeps, each of which stands for many runs (`tables/vsd-2`, `studies/cpu` …)."""
    return {name: path for name, path in _shipped().items() if name.startswith(_SWEEPS)}


def _shipped() -> dict[str, Path]:
    root = folder()
    return {p.relative_to(root).with_suffix("").as_posix(): p for p in sorted(root.rglob("*.toml"))}


def read(name: str) -> dict[str, Any]:
    """A preset by name or path as a plain dictionary, without what is for people.

    Raises:
        UsageError: no such preset, it is not valid TOML or JSON, or it is a sweep.
        InputError: the file cannot be read.
    """
    values = _read(name, names() | sweeps())
    if "sweep" in values:
        raise UsageError(
            f"{name} stands for many runs, not for the settings of one",
            field="--preset",
            hint=f"kd sweep {name} --plan",
        )
    values.pop("about", None)
    return values


def read_sweep(name: str) -> dict[str, Any]:
    """A sweep by name or path as a plain dictionary, with what is for people.

    Raises:
        UsageError: no such file, or it is not valid TOML or JSON.
        InputError: the file cannot be read.
    """
    try:
        return _read(name, names() | sweeps())
    except UsageError as problem:  # it was no --preset
        raise UsageError(problem.message, hint=problem.hint) from None


def _read(name: str, shipped: dict[str, Path]) -> dict[str, Any]:
    if name == "-":
        return _parse(_stdin(), "stdin", json_first=True)
    if name in shipped:
        return _parse(shipped[name].read_text("utf-8"), name)
    path = Path(name)
    looks_like_path = path.suffix in (".toml", ".json") or "/" in name
    if path.is_file():
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise InputError(f"cannot read the preset {name}: {problem}") from None
        return _parse(text, name, json_first=path.suffix == ".json")
    if looks_like_path and path.suffix:
        raise UsageError(f"no such file: {name}", field="--preset", hint=nearest(path.stem, shipped))
    raise UsageError(f"no preset named {name!r}", field="--preset", hint=nearest(name, shipped))


def _stdin() -> str:
    """All of stdin, which is read once: a command looks at its presets as often as it needs them.

    Raises:
        UsageError: it is closed, or shared by ranks that somebody else launched.
        InputError: it is not text.
    """
    global _kept
    try:
        if path := os.environ.get(STDIN_FILE):
            return Path(path).read_text("utf-8", errors="surrogateescape")
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UsageError("ranks cannot share stdin", field="--preset", hint="name a file, or start them by --nproc")
        if sys.stdin is None:
            raise UsageError("stdin is closed", field="--preset", hint="name a file")
        if _kept is None or _kept[0] is not sys.stdin:
            _kept = sys.stdin, sys.stdin.read()
        return _kept[1]
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"cannot read the preset on stdin: {problem}") from None


def hand_on_stdin(folder: Path) -> dict[str, str]:
    """What a process needs in its environment to see the same stdin as this one; its text is put into `folder`.

    Empty where this process has not read its own.
    """
    if _kept is None:
        return {}
    file = folder / "stdin"
    file.write_text(_kept[1], "utf-8", errors="surrogateescape")
    return {STDIN_FILE: str(file)}


def about(name: str) -> dict[str, Any]:
    """The `[about]` table of a shipped preset."""
    return _load_toml(_shipped()[name].read_text("utf-8"), name).get("about", {})


def _load_toml(text: str, name: str) -> dict[str, Any]:
    try:
        return _shallow(tomllib.loads(text))
    except (ValueError, RecursionError) as problem:  # ValueError: also an integer of thousands of digits
        raise UsageError(f"{name} is not valid TOML: {str(problem)[:200]}", field="--preset") from None


def _parse(text: str, name: str, json_first: bool = False) -> dict[str, Any]:
    if json_first and text.lstrip().startswith("{"):
        try:
            values = _shallow(json.loads(text))
        except (ValueError, RecursionError) as problem:
            raise UsageError(f"{name} is not valid JSON: {str(problem)[:200]}", field="--preset") from None
    else:
        values = _load_toml(text, name)
    return values


def _shallow(values: Any) -> Any:
    """The values, unless they are nested as no preset is. Raises RecursionError."""
    level = [values]
    for _ in range(_DEPTH):
        inner = [value.values() if isinstance(value, dict) else value for value in level]
        level = [one for held in inner for one in held if isinstance(one, dict | list)]
        if not level:
            return values
    raise RecursionError("nested too deeply")


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, table by table. A method given by another name replaces the whole method table.

    Settings of a method that nobody has named yet are kept for the one that is named later.
    """
    result = dict(base)
    for key, value in over.items():
        if key == "method" and isinstance(value, str):
            value = {"name": value}
        old = result.get(key)
        if old is not None and isinstance(old, dict) != isinstance(value, dict):
            raise UsageError(f"is a table of settings, not {value!r}"[:120], field=key, hint=f"for example {key}.KEY")
        if isinstance(value, dict) and isinstance(old, dict):
            if key == "method" and "name" in old and value.get("name", old["name"]) != old["name"]:
                result[key] = dict(value)
            else:
                result[key] = merge(old, value)
        else:
            result[key] = value
    return result


def put(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`values` with the dotted `path` set to `value`."""
    nested: Any = value
    for part in reversed(path.split(".")):
        nested = {part: nested}
    return merge(values, nested)


def parse_set(text: str) -> tuple[str, Any]:
    """`train.epochs=3` → ("train.epochs", 3): the value as JSON where it is JSON, else as a string.

    Raises:
        UsageError: there is no `=`, or no key.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"{text!r} is not KEY=VALUE", field="--set", hint="for example --set method.lambda4=1")
    key = key.strip()
    try:
        return key, _shallow([json.loads(value)])[0]
    except RecursionError:
        raise UsageError("nested too deeply", field=key[:200]) from None
    except ValueError:  # no JSON; or an integer of thousands of digits, which is no setting either
        pass
    listed = key in field_paths().values() and typing.get_origin(bare(field_at(key).annotation)) is tuple
    return key, parse_tuple(value) if listed else value


def resolve(command: str, request: Request) -> RunSpec:
    """The spec that a command line asks for, before the method's own settings are checked.

    Raises:
        UsageError: an unknown or invalid setting, named, with a fix.
    """
    asked: dict[str, Any] = {}
    for name in request.presets:
        preset = read(name)
        # `kd evaluate`-like commands aside, a preset may serve several commands: what it was written for does not bind.
        preset.pop("command", None)
        asked = merge(asked, preset)
    for path, value in request.flags.items():
        asked = put(asked, path, value)
    for text in request.sets:
        path, value = parse_set(text)
        asked = put(asked, path, value)
    data = asked.get("data", {})
    dataset = str(data.get("dataset", "cifar100")) if isinstance(data, dict) else "cifar100"
    recipe = read("recipes/probe" if command == "linear-probe" else f"recipes/{recipe_for(dataset)}")
    return validate(RunSpec, {**merge(recipe, asked), "command": command})


def recipe_for(dataset: str) -> str:
    """The name of a data set's standard recipe under `presets/recipes`."""
    from kdcli.data.names import canonical

    return _RECIPES.get(canonical(dataset).partition(":")[0], "folder")
