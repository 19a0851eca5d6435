"""Commands on many runs: carry them out, compare them, follow one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kdcli import output
from kdcli.commands import completion
from kdcli.commands.ending import conclude, leave
from kdcli.commands.options import DataDir, Device, Json, Quiet, Threads, Workers


def sweep(
    sweep_: Annotated[
        str,
        typer.Argument(
            metavar="SWEEP",
            help="A sweep's name (tables/…, studies/… of `kd list presets`) or path (TOML).",
            autocompletion=completion.sweeps,
        ),
    ],
    plan: Annotated[
        bool, typer.Option("--plan", help="Print one command a run, teachers first; train nothing.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            help="Only these runs: method=vsd,kd or pair=wrn40_2:wrn16_2; also label, teacher, student, preset, dataset, "
            "ratio, probe, seed, a swept setting, and stage=backbone,teacher,student,probe; repeatable.",
            autocompletion=completion.only,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting of every run by its dotted name, such as train.epochs=60; seed=0,1,2 makes three of each; "
            "repeatable.",
            autocompletion=completion.settings,
        ),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option("--jobs", min=1, help="Do up to this many runs at a time, each in a process of its own. [1]"),
    ] = 1,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Carry out the many runs of one file, such as a paper's table, and print ours beside the published numbers.

    kd sweep tables/vsd-2 --only pair=wrn40_2:wrn16_2 --set data.data_dir=data

    kd sweep tables/vsd-2 --plan
    """
    from kdcli import report
    from kdcli.sweep import carrying_out

    story = output.Story(quiet=quiet)
    if plan:
        document = carrying_out.plan(sweep_, only or [], set_ or [])
        for line in report.missing_lines(document):
            story.note(line)
        lines = report.plan_lines(document)
        return conclude(document, lines, json_) if json_ or lines else None  # an empty line would be a command to xargs
    document, error = carrying_out.carry_out(sweep_, only or [], set_ or [], story, jobs)
    if error is not None:
        document |= output.failure("sweep", error)
    conclude(document, report.sweep_table(document), json_)
    return leave(error)


def report(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN…|SWEEP",
            help="Run directories, folders of runs, or one sweep.",
            autocompletion=completion.sweeps,
        ),
    ],
    format_: Annotated[
        Literal["markdown", "csv", "latex", "json"], typer.Option("--format", help="Of the table on stdout. [markdown]")
    ] = "markdown",
    out: Annotated[
        Path, typer.Option("--out", help="Where report.html, the tables and kept results go. [report]")
    ] = Path("report"),
    page: Annotated[
        bool, typer.Option("--page/--no-page", help="Write the page; without, only the table. [on]")
    ] = True,
    best: Annotated[
        bool, typer.Option("--best", help="Also a column with the best epoch on the test images, named as such.")
    ] = False,
    fast: Annotated[bool, typer.Option("--fast", help="Leave out what needs passes through the networks.")] = False,
    images: Annotated[
        bool, typer.Option("--images/--no-images", help="Show sample images of the test set on the page. [on]")
    ] = True,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            help="Of a sweep: only these runs, as in kd sweep; repeatable.",
            autocompletion=completion.only,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Of a sweep: the settings it was run with; repeatable.",
            autocompletion=completion.settings,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Pass only this many test images.")] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    threads: Threads = None,
    workers: Workers = 2,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare runs: a table (mean ± std, n, last epoch, beside published numbers) and a page with pictures.

    kd report runs --data-dir data --out report

    kd report tables/vsd-2 --only pair=wrn40_2:wrn16_2 --format latex --no-page
    """
    from kdcli.report.command import Wanted, report

    wanted = Wanted(format_, out if page else None, best, fast, images, limit, data_dir, device, threads, workers)
    document, text = report(targets, only or [], set_ or [], wanted, output.Story(quiet=quiet))
    conclude(document, text, json_ or format_ == "json")


def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.")],
    once: Annotated[bool, typer.Option("--once", help="Say how far it is, and leave.")] = False,
    interval: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between two looks. [2]")] = 2.0,
    json_: Json = False,
) -> None:
    """Follow a run from another terminal, by its files: a live view on a terminal, else one line an epoch.

    kd watch runs/cifar100/vsd-wrn40_2-wrn16_2-s0-1a2b3c4d

    Exit code 0 when the run has finished, 75 if it is unfinished and nobody is training it: run its command again.
    """
    import sys

    from kdcli.runs.watch import Lines, Live, state_line, watch

    if json_:
        return conclude(watch(run, once=once, interval=interval, show=lambda view: True), "", json_)
    if once or not sys.stdout.isatty():
        document = watch(run, once=once, interval=interval, show=Lines(output.answer))
        if once and not document["finished"]:
            output.answer(state_line(document))
        return None
    live = Live()
    try:
        watch(run, once=once, interval=interval, show=live)
    finally:
        live.close()
    return None
