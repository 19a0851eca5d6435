"""Options and arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from kdcli.commands import completion

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr, only errors.")]
Device = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda or cuda:N. [auto]", autocompletion=completion.devices)
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default: all cores.")]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Data workers for sets that stream. [2]")]
DataDir = Annotated[str | None, typer.Option("--data-dir", help="Where the data sets lie.")]
Checkpoint = Annotated[str, typer.Argument(metavar="CHECKPOINT|RUN", help="A network, or the run that made it.")]
Seeds = Annotated[str | None, typer.Option("--seeds", help="Several seeds, 0..4 or 0,1,2: one run each.")]
AutoTeacher = Annotated[
    bool, typer.Option("--auto-teacher/--no-auto-teacher", help="Train a missing teacher first. [on]")
]
