"""How a command ends: its answer on stdout, and its exit code."""

from __future__ import annotations

import os
from typing import Any

import typer

from kdcli import output
from kdcli.errors import KdError


def conclude(document: dict[str, Any], text: str, as_json: bool) -> None:
    """Print the answer, as one JSON document or as text; of several ranks only the first does."""
    if int(os.environ.get("RANK", "0")) == 0:
        output.answer(output.document(document) if as_json else output.printable(text))


def leave(error: KdError | None) -> None:
    """Leave with an error's line and code after the answer is printed; go on without one."""
    if error is not None:
        typer.echo(f"error: {error.line()}", err=True)
        raise typer.Exit(error.code)
