"""docs/cli.md, made from what the commands say about themselves: `python -m kdcli.pages.cli > docs/cli.md`."""

from __future__ import annotations

import inspect
import types
import typing
from pathlib import Path
from typing import Any

from typer.models import ArgumentInfo, OptionInfo

from kdcli.cli import app

_HEAD = """# Commands

Made by `python -m kdcli.pages.cli` from the commands themselves; do not edit.

What holds for all of them (JSON, exit codes, the order of settings, sweeps, benchmarks, several processes) is in
[guide.md](guide.md), every setting of every method in [methods.md](methods.md). `kd COMMAND --help` prints what
stands here, and `kd --install-completion` teaches your shell the commands and options.
"""


def text() -> str:
    """The whole page, as Markdown."""
    commands = {str(info.name): info.callback for info in app.registered_commands if not info.hidden}
    contents = [f"- [`kd {name}`](#kd-{name}): {_paragraphs(function)[0]}" for name, function in commands.items()]
    sections = [_section(name, function) for name, function in commands.items()]
    return "\n\n".join([_HEAD.strip(), "\n".join(contents), *sections]) + "\n"


def _paragraphs(function: Any) -> list[str]:
    """A docstring's paragraphs, each on one line; examples keep their lines, as code."""
    found = []
    for paragraph in inspect.cleandoc(function.__doc__ or "").replace("\\", "").split("\n\n"):
        lines = [line.strip() for line in paragraph.splitlines() if line.strip("\b ")]
        code = bool(lines) and (lines[0].startswith("kd ") or " | kd " in lines[0])
        found.append("\n".join(["```sh", *lines, "```"]) if code else " ".join(lines))
    return found


def _section(name: str, function: Any) -> str:
    arguments, options = [], []
    hints = typing.get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        kind, *notes = typing.get_args(hints.get(parameter.name, parameter.annotation))
        info = next(note for note in notes if isinstance(note, ArgumentInfo | OptionInfo))
        if isinstance(info, ArgumentInfo):
            arguments.append((f"`{info.metavar or parameter.name.upper()}`", _cell(info.help)))
        elif not info.hidden:
            options.append((_flag(info, kind, parameter.name), _cell(info.help)))
    usage = " ".join([f"kd {name}", *(left.strip("`") for left, _ in arguments), "[OPTIONS]"])
    parts = [f"## kd {name}", f"`{usage}`", *_paragraphs(function)]
    parts += [_table(rows) for rows in (arguments, options) if rows]
    return "\n\n".join(parts)


def _flag(info: OptionInfo, kind: Any, name: str) -> str:
    """A flag and what may stand behind it."""
    # In an annotation the first declaration stands where a default would.
    declared = [d for d in (info.default, *(info.param_decls or ())) if isinstance(d, str)] or [f"--{name}"]
    flags = ", ".join(f"`{flag}`" for declaration in declared for flag in declaration.split("/"))
    kinds = [one for one in _alternatives(kind) if one is not type(None)]
    if typing.get_origin(kinds[0]) is typing.Literal:
        return f"{flags} {', '.join(f'`{value}`' for value in typing.get_args(kinds[0]))}"
    shown = {int: "a whole number", float: "a number", str: "text", Path: "a path"}
    if typing.get_origin(kinds[0]) is list:
        return f"{flags} {shown.get(typing.get_args(kinds[0])[0], 'text')}, repeatable or with commas"
    return flags if kinds[0] is bool else f"{flags} {shown.get(kinds[0], 'text')}"


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def _cell(help_: str | None) -> str:
    return " ".join((help_ or "").split()).replace("|", "\\|")


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {left} | {right} |" for left, right in rows)])


if __name__ == "__main__":
    print(text(), end="")
