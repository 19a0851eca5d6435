"""From plain values to a spec, or to one line that says what is wrong with them."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import BaseModel, ValidationError

from kdcli.errors import UsageError, nearest
from kdcli.specs.fields import field_paths


def validate(model: type[BaseModel], values: dict[str, Any], prefix: str = "") -> Any:
    """Build `model` from `values`, turning pydantic's first complaint into one `UsageError` that names field and fix."""
    try:
        return model.model_validate(values)
    except ValidationError as problem:
        raise explain(model, problem, prefix) from None


def explain(model: type[BaseModel], problem: ValidationError, prefix: str = "") -> UsageError:
    """The first error of a `ValidationError` as a `UsageError`: dotted field, what is wrong, the nearest known name."""
    first = problem.errors()[0]
    location = [str(part) for part in first["loc"]]
    path = ".".join([prefix, *location] if prefix else location)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UsageError):
        return cause
    if first["type"] == "extra_forbidden":
        holder = model
        for part in location[:-1]:
            annotation = holder.model_fields[part].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                holder = annotation
        known = set(holder.model_fields)
        hint = nearest(location[-1], known)
        elsewhere = field_paths().get(location[-1])
        if elsewhere and elsewhere != path and not prefix:
            hint = f"it is {elsewhere}"
        return UsageError("no such setting", field=path, hint=hint)
    message = re.sub(r"^Value error, ", "", first["msg"])
    flagged = re.match(r"--([a-z-]+): (.*)", message)
    if flagged and not location:
        return UsageError(flagged[2], field=f"--{flagged[1]}")
    text = message[0].lower() + message[1:]
    if first["type"] not in ("missing", "value_error"):
        text += f", got {json.dumps(first['input'], default=str)[:80]}"
    return UsageError(text, field=path or None)
