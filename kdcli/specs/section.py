"""What every part of a spec has in common."""

from __future__ import annotations

import json
import os
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator


def aside(default: Any, **constraints: Any) -> Any:
    """A field that is no part of a run's identity (left out of the spec digest)."""
    return Field(default, json_schema_extra={"identity": False}, **constraints)


class Section(BaseModel):
    """Base of every part of a spec: unknown keys are refused, values do not change, docstrings are help texts."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _can_be_a_path(cls, value: Any) -> Any:
        """No name, path or pattern has a NUL or half a character in it: the system's calls would choke on either."""
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, str) and "\0" in one:
                raise ValueError("a NUL character is in it")
            try:
                os.fsencode(one if isinstance(one, str) else "")
            except UnicodeEncodeError:
                raise ValueError("it is not text") from None
        return value


def strip_asides(section: BaseModel) -> dict[str, Any]:
    """The section as plain JSON values, without its fields marked as no part of the identity."""
    kept: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("identity") is False:
            continue
        value = getattr(section, name)
        kept[name] = strip_asides(value) if isinstance(value, BaseModel) else json.loads(json.dumps(value))
    return kept
