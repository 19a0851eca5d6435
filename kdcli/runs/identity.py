"""What makes two runs the same run, and the directory it has by its name."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from kdcli.specs import RunSpec


def identity(spec: RunSpec, contents: dict[str, str] | None = None) -> dict[str, Any]:
    """The spec's identity; what is given as a file counts by its content and not by its path.

    Args:
        contents: content digests by the paths that name them in the spec (teacher, assistants, encoder, a method's file).
    """
    return _by_content(spec.identity(), contents or {})


def _by_content(values: dict[str, Any], contents: dict[str, str]) -> dict[str, Any]:
    def named(path: Any) -> Any:
        return f"content:{contents[path]}" if path in contents else path

    def of_method(settings: dict[str, Any]) -> dict[str, Any]:  # lskd names a method inside its own settings
        nested = {key: of_method(value) for key, value in settings.items() if isinstance(value, dict)}
        return {**settings, **nested, **({"name": named(settings["name"])} if "name" in settings else {})}

    return {
        **values,
        "teacher": named(values["teacher"]),
        "encoder": named(values["encoder"]),
        "assistant": [named(path) for path in values["assistant"]],
        "method": of_method(values["method"]),
    }


def digest_of(values: dict[str, Any]) -> str:
    """SHA-256 (hex) of a plain JSON value in canonical form."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def directory_for(spec: RunSpec, digest: str) -> Path:
    """`--out`, or `RUNS/<dataset>/<method>-<teacher>-<student>-s<seed>-<digest>` (teachers: `teacher-…`)."""
    if spec.system.out is not None:
        return Path(spec.system.out)
    parts = [spec.method["name"], spec.teacher, spec.student]
    if spec.command == "pretrain-teacher":
        parts = ["teacher", *parts]
    labels = [_label(str(part)) for part in parts if part is not None]
    name = "-".join([*labels, f"s{spec.seed}", digest[:8]])
    return Path(spec.system.runs_dir) / _label(spec.data.dataset) / name


def _label(text: str) -> str:
    """A part of a directory name: the last part of a path, without anything a shell or a file system minds."""
    last = Path(text).stem if text.endswith((".safetensors", ".py")) else Path(text.rstrip("/")).name
    return re.sub(r"[^A-Za-z0-9_.]+", "_", last).strip("._")[:48] or "x"


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted path."""
    paths: dict[str, Any] = {}
    for key, value in values.items():
        paths |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return paths
