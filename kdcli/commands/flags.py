"""Typer options made from the fields of the run spec, so that each setting is declared once.

`command(function, fields)` returns a function whose signature Typer reads: the spec's fields as options, followed by the
common ones (`--preset`, `--set`, `--dry-run`, `--json`, `--quiet`) and those of the command itself.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from kdcli.commands import completion
from kdcli.request import Request, parse_tuple
from kdcli.specs import bare, field_at, field_paths


def _option_type(annotation: Any) -> Any:
    """The type Typer should parse: Optional stripped, tuples as comma-separated strings, the method as its name."""
    annotation = bare(annotation)
    if typing.get_origin(annotation) is tuple:
        return list[str]
    return str if typing.get_origin(annotation) is dict else annotation


def _default_text(field: FieldInfo) -> str | bool:
    value = field.default
    if value is None or isinstance(value, dict):
        return False
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _parameter(leaf: str, path: str) -> inspect.Parameter:
    field = field_at(path)
    kind = _option_type(field.annotation)
    name = leaf.replace("_", "-")
    flag = f"--{name}/--no-{name}" if kind is bool else f"--{name}"
    help_text = " ".join((field.description or "").split())
    shown = _default_text(field)
    if shown:
        help_text += f" [{shown}]"
    option = typer.Option(flag, help=help_text, show_default=False, autocompletion=completion.OF_SETTING.get(leaf))
    return inspect.Parameter(
        leaf, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _teacher_scale() -> inspect.Parameter:
    option = typer.Option(
        "--teacher-scale",
        help="Show the teacher its images this many times larger per side: 1, 2 or 4 (any method; vsd: 2).",
        show_default=False,
    )
    return inspect.Parameter(
        "teacher_scale", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[int | None, option]
    )


def _common() -> list[inspect.Parameter]:
    def parameter(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
        )

    return [
        parameter(
            "preset",
            list[str] | None,
            None,
            typer.Option(
                "--preset",
                help="A preset's name or path (TOML, or a run's spec.json); - is stdin; repeatable.",
                autocompletion=completion.presets,
            ),
        ),
        parameter(
            "set_",
            list[str] | None,
            None,
            typer.Option(
                "--set",
                help="Any setting by its dotted name, such as method.lambda4=1; repeatable.",
                autocompletion=completion.settings,
            ),
        ),
        parameter(
            "dry_run",
            bool,
            False,
            typer.Option("--dry-run", help="Print the resolved spec, the taps and the cost; train nothing."),
        ),
        parameter("json_", bool, False, typer.Option("--json", help="Print one JSON document on stdout.")),
        parameter("quiet", bool, False, typer.Option("--quiet", help="No progress on stderr, only errors.")),
    ]


def command(function: Callable[..., None], leave_out: Iterable[str] = ()) -> Callable[..., None]:
    """Wrap `function(request, **its own options)` as a Typer command with a flag for every field of the run spec.

    Args:
        function: takes a `Request` first; its further keyword-only parameters are Typer options of its own.
        leave_out: leaf names of fields that make no sense for this command.
    """
    paths = {leaf: path for leaf, path in field_paths().items() if leaf not in set(leave_out)}
    signature = inspect.signature(function, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]

    def run(**values: Any) -> None:
        flags: dict[str, Any] = {}
        for leaf, path in paths.items():
            if (value := values.pop(leaf)) not in (None, [], ()):
                if typing.get_origin(bare(field_at(path).annotation)) is tuple:
                    value = parse_tuple(",".join(value))
                flags[path] = value
        if values.get("teacher_scale") is not None:
            flags["method.teacher_scale"] = values["teacher_scale"]
        values.pop("teacher_scale", None)
        request = Request(
            flags,
            values.pop("preset") or [],
            values.pop("set_") or [],
            values.pop("dry_run"),
            values.pop("json_"),
            values.pop("quiet"),
        )
        function(request, **values)

    scale = [_teacher_scale()] if "method" in paths else []
    parameters = [_parameter(leaf, path) for leaf, path in paths.items()] + scale + own + _common()
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__doc__ = function.__doc__
    run.__name__ = function.__name__
    return run
