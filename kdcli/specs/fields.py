"""The settings of a run by their names, for flags, help texts and commands."""

from __future__ import annotations

import types
import typing
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kdcli.specs.run import RunSpec
from kdcli.specs.section import Section


def field_paths(model: type[BaseModel] = RunSpec, prefix: str = "") -> dict[str, str]:
    """Leaf name → dotted path of every setting that has a flag (`epochs` → `train.epochs`)."""
    paths: dict[str, str] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            paths |= field_paths(field.annotation, f"{prefix}{name}.")
        elif f"{prefix}{name}" != "command":
            paths[name] = f"{prefix}{name}"
    return paths


def bare(annotation: Any) -> Any:
    """An annotation without its `| None`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation


def field_at(path: str) -> FieldInfo:
    """The pydantic field at a dotted path of the run spec."""
    model: Any = RunSpec
    *sections, leaf = path.split(".")
    for section in sections:
        model = model.model_fields[section].annotation
    return model.model_fields[leaf]
