"""The command line: thin commands that parse, and hand a validated spec to the module that does the work.

Nothing here imports torch; the work's modules are imported when work starts.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kdcli import __version__, completion, flags, output, presets
from kdcli.errors import KdError, ThresholdError
from kdcli.request import Request, parse_seeds, with_flags
from kdcli.specs import RunSpec, field_paths

app = typer.Typer(
    name="kd",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help=(
        "Distil small image classifiers from large ones, and compare distillation methods honestly.\n\n"
        "Settings: defaults < the data set's recipe < --preset < flags < --set KEY=VALUE. The answer goes to stdout "
        "(--json: one JSON document), progress to stderr. --verbose, anywhere, shows the traceback of a bug."
    ),
)

_PROBE = [leaf for leaf, path in field_paths().items() if path.startswith("probe.")]
_STUDENT_ONLY = ["student", "student_taps", "teacher_lr", "teacher_pretrained", "ratio", "baseline"]
_NETWORKS = [
    *("method", "teacher", "student", "teacher_taps", "student_taps", "pretrained", "teacher_pretrained", "teacher_lr"),
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr, only errors.")]
Device = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda or cuda:N. [auto]", autocompletion=completion.devices)
]


def _version(value: bool) -> None:
    if value:
        output.answer(f"kd {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = None,
) -> None: ...


def _spec(command: str, request: Request) -> RunSpec:
    """The resolved spec of a training command: checked, every default filled in."""
    spec = presets.resolve(command, request)
    from kdcli import methods

    return methods.resolve(spec)


def _launched(spec: RunSpec) -> bool:
    """Whether `--nproc` handed the work to ranks of its own (and this process only waited for them)."""
    if spec.system.nproc == 1 or "RANK" in os.environ:
        return False
    from kdcli.engine.launch import launch

    launch(spec.system.nproc)
    return True


def _story(request: Request) -> output.Story:
    rank = int(os.environ.get("RANK", "0"))
    return output.Story(quiet=request.quiet or rank > 0)


def _answer(document: dict[str, Any], text: str, as_json: bool) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        output.answer(output.document(document) if as_json else output.printable(text))


def _preview(spec: RunSpec, request: Request) -> None:
    from kdcli.preview import preview

    document, text = preview(spec)
    _answer(document, text, request.json)


def _seeds(text: str | None, spec: RunSpec) -> list[int]:
    """`0..4` or `0,1,2` → the seeds; without it the spec's own."""
    return [spec.seed] if text is None else parse_seeds(text, "--seeds")


def _pretrain_teacher(
    request: Request,
) -> None:
    """Train the teacher that a method needs.

    kd pretrain-teacher --teacher wrn40_2 --method vsd --data-dir data
    """
    spec = _spec("pretrain-teacher", request)
    if request.dry_run:
        return _preview(spec, request)
    if _launched(spec):
        return None
    from kdcli import jobs, report

    summary = jobs.teacher(spec, _story(request))
    return _answer(summary, report.runs_table([summary]), request.json)


def _distill(
    request: Request,
    *,
    seeds: Annotated[str | None, typer.Option("--seeds", help="Several seeds, 0..4 or 0,1,2: one run each.")] = None,
    auto_teacher: Annotated[
        bool, typer.Option("--auto-teacher/--no-auto-teacher", help="Train a missing teacher first. [on]")
    ] = True,
) -> None:
    """Distil a student from a teacher: the main job.

    kd distill --method vsd --teacher wrn40_2 --student wrn16_2 --data-dir data

    The teacher may be an architecture: then the one trained for this data set, recipe and method is looked for under
    the runs folder, and trained first if there is none.
    """
    spec = _spec("distill", request)
    if request.dry_run:
        return _preview(spec, request)
    if _launched(spec):
        return None
    from kdcli import jobs, report

    document = jobs.students(spec, _seeds(seeds, spec), _story(request), auto_teacher=auto_teacher)
    return _answer(document, report.distill_table(document), request.json)


def _fewshot(
    request: Request,
    *,
    ratio: Annotated[
        list[float] | None,
        typer.Option("--ratio", help="Share of the training images the student sees; repeatable. [0.25 0.5 0.75]"),
    ] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="Several seeds, 0..4 or 0,1,2: one run each.")] = None,
    auto_teacher: Annotated[
        bool, typer.Option("--auto-teacher/--no-auto-teacher", help="Train a missing teacher first. [on]")
    ] = True,
) -> None:
    """Distil on stratified fractions of the training images, from a teacher that saw all of them; one table.

    kd fewshot --method vsd --teacher resnet56 --student resnet20 --ratio 0.25 --ratio 0.5 --data-dir data
    """
    spec = _spec("distill", request)
    if request.dry_run:
        return _preview(spec, request)
    if _launched(spec):
        return None
    from kdcli import jobs, report

    ratios = ratio or [0.25, 0.5, 0.75]
    document = jobs.fewshot(spec, ratios, _seeds(seeds, spec), _story(request), auto_teacher=auto_teacher)
    return _answer(document, report.fewshot_table(document), request.json)


def _linear_probe(
    request: Request,
    *,
    network: Annotated[str, typer.Argument(metavar="CHECKPOINT|RUN", help="The network to freeze.")],
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            "--dataset",
            help="Data sets to transfer to; repeatable. [stl10 tinyimagenet]",
            autocompletion=completion.datasets,
        ),
    ] = None,
) -> None:
    """Train one linear layer on the frozen features of a network; top-1 on each data set.

    kd linear-probe runs/cifar100/vsd-wrn40_2-wrn16_2-s0-1a2b3c4d --dataset stl10 --dataset tinyimagenet
    """
    specs = []
    for name in dataset or ["stl10", "tinyimagenet"]:
        asked = {**request.flags, "encoder": network, "data.dataset": name}
        specs.append(presets.resolve("linear-probe", with_flags(request, asked)))
    if request.dry_run:
        documents = [spec.model_dump(mode="json") for spec in specs]
        return _answer(
            output.envelope("linear-probe", specs=documents), output.document({"specs": documents}), request.json
        )
    from kdcli import jobs, report

    document = jobs.probes(specs, _story(request))
    return _answer(document, report.probe_table(document), request.json)


def _bench(
    request: Request,
    *,
    against: Annotated[
        Literal["naive"] | None,
        typer.Option(
            "--against", help="Also time the way of the usual code bases, in turns: eager, NCHW, PIL workers."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Steps a round; default: about two seconds' worth, at least 3.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds, of which the median counts. [5]")] = 5,
) -> None:
    """Time a distillation, see where a step's time goes and how near it is to what the device can do; nothing is written.

    kd bench --method kd --teacher wrn40_2 --student wrn16_2 --against naive

    It needs no data: noise of the data set's shape stands in where there is none. All networks are fresh.
    """
    spec = _spec("distill", request)
    if request.dry_run:
        return _preview(spec, request)
    from kdcli.bench import bench, bench_table

    document = bench(spec, _story(request), against=against, steps=steps, rounds=rounds)
    return _answer(document, bench_table(document), request.json)


app.command("pretrain-teacher")(flags.command(_pretrain_teacher, leave_out=[*_STUDENT_ONLY, *_PROBE, "encoder"]))
app.command("distill")(flags.command(_distill, leave_out=[*_PROBE, "encoder"]))
app.command("fewshot")(flags.command(_fewshot, leave_out=[*_PROBE, "encoder", "ratio", "baseline"]))
app.command("linear-probe")(
    flags.command(
        _linear_probe,
        leave_out=[*_NETWORKS, "baseline", "encoder", "dataset", "ratio", "base_lr", "light_lr", "compile", "nproc"],
    )
)
app.command("bench")(
    flags.command(
        _bench,
        leave_out=[
            *_PROBE,
            *("encoder", "baseline", "pretrained", "teacher_pretrained", "teacher_lr", "max_steps", "eval_every"),
            *("val_fraction", "nproc", "rank_timeout", "out", "runs_dir", "overwrite"),
            *("checkpoint_every", "max_minutes", "requeue", "tensorboard", "wandb"),
        ],
    )
)


@app.command("evaluate")
def _evaluate(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT|RUN", help="A network, or the run that made it.")],
    inference: Annotated[
        str | None,
        typer.Option(
            "--inference",
            help="Only this way: single, marginal or aggregate; default: all it has.",
            autocompletion=completion.inferences,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", help="Default: the one it was trained on.", autocompletion=completion.datasets),
    ] = None,
    data_dir: Annotated[str | None, typer.Option("--data-dir", help="Where the data sets lie.")] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="A checkpoint or run to count agreement with.")
    ] = None,
    min_top1: Annotated[
        float | None, typer.Option("--min-top1", help="Leave with exit code 10 if top-1 (percent) is below this.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only this many test images.")] = None,
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default: all cores.")] = None,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Data workers for sets that stream. [2]")] = 2,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a network on its test images: top-1, top-5, NLL, ECE, agreement with a teacher, throughput.

    kd evaluate runs/cifar100/vsd-wrn40_2-wrn16_2-s0-1a2b3c4d --data-dir data --min-top1 70
    """
    from kdcli import report
    from kdcli.evaluation import evaluate_checkpoint

    document = evaluate_checkpoint(
        checkpoint,
        inference=inference,
        dataset=dataset,
        data_dir=data_dir,
        teacher=teacher,
        limit=limit,
        device=device,
        threads=threads,
        workers=workers,
        story=output.Story(quiet=quiet),
    )
    error = None
    if min_top1 is not None and (top1 := document["metrics"]["test"]["top1"]) < min_top1:
        error = ThresholdError(f"top-1 is {top1:.2f} %, below {min_top1:g} %", field="--min-top1")
        document |= output.failure("evaluate", error)
    _answer(document, report.evaluation_table(document), json_)
    _leave(error)


@app.command("export")
def _export(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT|RUN", help="A network, or the run that made it.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write: .safetensors, .onnx or .pt2.")],
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="safetensors, onnx or torch (torch.export); default: by the file's name.",
            autocompletion=completion.words("safetensors", "onnx", "torch"),
        ),
    ] = None,
    inputs: Annotated[
        str,
        typer.Option(
            "--inputs",
            help="Pixels that the graph takes: float (0..1) or uint8 (0..255). [float]",
            autocompletion=completion.words("float", "uint8"),
        ),
    ] = "float",
    outputs: Annotated[
        str,
        typer.Option(
            "--outputs",
            help="logits or probabilities. [logits]",
            autocompletion=completion.words("logits", "probabilities"),
        ),
    ] = "logits",
    inference: Annotated[
        str,
        typer.Option(
            "--inference",
            help="single, or (joint heads) marginal or aggregate. [single]",
            autocompletion=completion.inferences,
        ),
    ] = "single",
    opset: Annotated[int | None, typer.Option("--opset", help="Of ONNX; default: the exporter's newest.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", help="A network to compare the cost with; default: the run's own teacher."),
    ] = None,
    data_dir: Annotated[str | None, typer.Option("--data-dir", help="Where the data sets lie.")] = None,
    images: Annotated[int, typer.Option("--images", min=1, help="How many images to check it on. [256]")] = 256,
    random: Annotated[
        bool, typer.Option("--random-images", help="Check it on random images, not on test images.")
    ] = False,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default: all cores.")] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a network as a file for others, checked against the original: safetensors, ONNX or torch.export.

    kd export runs/cifar100/vsd-wrn40_2-wrn16_2-s0-1a2b3c4d --out student.onnx

    The normalisation is inside the graph, so nobody needs kd to run it. Nothing is written if the two disagree (exit code 4).
    """
    from kdcli.export import Wish, export, export_text

    wish = Wish(
        checkpoint,
        out,
        format_,
        inputs=inputs,
        outputs=outputs,
        inference=inference,
        data_dir=data_dir,
        limit=images,
        random=random,
        teacher=teacher,
        threads=threads,
        opset=opset,
    )
    document = export(wish, output.Story(quiet=quiet))
    _answer(document, export_text(document), json_)


@app.command("predict")
def _predict(
    network: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT|RUN|EXPORTED", help="A network, the run that made it, an .onnx or .pt2."),
    ],
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE|DIR…", help="Image files, folders of them; - reads a list of paths.")
    ],
    top: Annotated[int, typer.Option("--top", min=1, help="How many of the likeliest classes to give. [5]")] = 5,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode",
            help="single, or (joint heads) marginal or aggregate. [single]",
            autocompletion=completion.inferences,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images at a time. [64]")] = 64,
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default: all cores.")] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Open a .pt2 file, which may hold code: for your own.")
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Classify image files: a JSON line each (on a terminal: a row each).

    kd predict runs/cifar100/vsd-wrn40_2-wrn16_2-s0-1a2b3c4d photo.jpg holidays/

    find holidays -name '*.jpg' -print0 | kd predict student.onnx - > answers.jsonl

    A file that cannot be read is one line on stderr; the others are done, and the exit code is 3.
    """
    import sys

    from kdcli.predict import Asked, predict, prediction_line

    made: list[dict[str, Any]] = []
    rows = sys.stdout.isatty()

    def emit(prediction: dict[str, Any]) -> bool:
        if json_:
            made.append(prediction)
            return True
        return output.answer(prediction_line(prediction) if rows else output.json_line(prediction))

    asked = Asked(mode, top, batch_size, device, threads, trust)
    document, error = predict(network, images, asked, output.Story(quiet=quiet or rows), emit)
    if json_:
        failed = {} if error is None else output.failure("predict", error)
        _answer({**document, **failed, "predictions": made}, "", json_)
    _leave(error)


@app.command("watch")
def _watch(
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

    from kdcli.watch import Lines, Live, state_line, watch

    if json_:
        return _answer(watch(run, once=once, interval=interval, show=lambda view: True), "", json_)
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


@app.command("sweep")
def _sweep(
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
        return _answer(document, lines, json_) if json_ or lines else None  # an empty line would be a command to xargs
    document, error = carrying_out.carry_out(sweep_, only or [], set_ or [], story, jobs)
    if error is not None:
        document |= output.failure("sweep", error)
    _answer(document, report.sweep_table(document), json_)
    return _leave(error)


@app.command("report")
def _report(
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
    data_dir: Annotated[str | None, typer.Option("--data-dir", help="Where the data sets lie.")] = None,
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default: all cores.")] = None,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Data workers for sets that stream. [2]")] = 2,
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
    _answer(document, text, json_ or format_ == "json")


@app.command("list")
def _list(
    what: Annotated[
        str,
        typer.Argument(
            metavar="methods|models|datasets|presets",
            help="What to list.",
            autocompletion=completion.words("methods", "models", "datasets", "presets"),
        ),
    ],
    json_: Json = False,
) -> None:
    """List the methods, networks, data sets or presets there are.

    kd list methods
    """
    from kdcli import catalogue

    document, text = catalogue.listing(what)
    _answer(document, text, json_)


@app.command("inspect")
def _inspect(
    model: Annotated[
        str,
        typer.Argument(help="A network's name, a checkpoint or a run directory.", autocompletion=completion.models),
    ],
    input_size: Annotated[
        int, typer.Option("--input-size", min=4, max=1024, help="Side of the input, pixels. [32]")
    ] = 32,
    classes: Annotated[int, typer.Option("--classes", min=1, help="Outputs of the classifier. [100]")] = 100,
    taps: Annotated[
        str | None, typer.Option("--taps", help="Modules to tap instead of the automatic choice (timm:, torchvision:).")
    ] = None,
    json_: Json = False,
) -> None:
    """Show a network's stages, their shapes, its parameters and multiply-accumulates.

    kd inspect wrn40_2 --input-size 64
    """
    from kdcli import catalogue

    document, text = catalogue.inspection(model, input_size, classes, taps)
    _answer(document, text, json_)


@app.command("schema")
def _schema(
    method: Annotated[
        str | None,
        typer.Option("--method", help="The schema of this method's settings only.", autocompletion=completion.methods),
    ] = None,
) -> None:
    """Print the JSON Schema of the run spec, or of a method's settings.

    kd schema --method vsd
    """
    model: Any = RunSpec
    if method is not None:
        from kdcli import methods

        model = methods.method_class(method).Spec
    output.answer(output.document(model.model_json_schema()))


@app.command("import")
def _import(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A .pth, .pt or .safetensors of another code base.")],
    arch: Annotated[
        str,
        typer.Option("--arch", help="The architecture it holds, such as wrn40_2.", autocompletion=completion.models),
    ],
    out: Annotated[Path, typer.Option("--out", help="Where to write the kd checkpoint (.safetensors).")],
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            help="The data set it was trained on, for class names and normalisation.",
            autocompletion=completion.datasets,
        ),
    ] = None,
    data_dir: Annotated[str | None, typer.Option("--data-dir", help="Where the data sets lie.")] = None,
    part: Annotated[
        str,
        typer.Option(
            "--part",
            help="student or teacher, of a file that holds both. [student]",
            autocompletion=completion.words("student", "teacher"),
        ),
    ] = "student",
    json_: Json = False,
) -> None:
    """Turn a checkpoint of RepDistiller, mdistiller, SSKD or HSAKD into a kd checkpoint, running none of its pickles.

    kd import wrn_40_2_vanilla/ckpt_epoch_240.pth --arch wrn40_2 --dataset cifar100 --out teacher.safetensors
    """
    from kdcli import catalogue

    document, text = catalogue.imported(source, arch, out, dataset, data_dir, part)
    _answer(document, text, json_)


@app.command("verify")
def _verify(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH…", help="Files, run directories, directories of runs; - reads a list.")
    ],
    json_: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only what is not sound.")] = False,
) -> None:
    """Check every byte of checkpoints and resume states, and specs, presets and logs; exit code 3 if one is damaged.

    kd verify runs student.safetensors

    find /archive -name '*.safetensors' -print0 | kd verify --quiet -
    """
    from kdcli import verify

    findings = []
    for finding in verify.verify(paths):
        findings.append(finding)
        if not json_ and not (quiet and finding.ok):
            output.answer(finding.line)
    document, error = verify.conclusion(findings)
    if json_:
        _answer(document, "", json_)
    _leave(error)


@app.command("digest")
def _digest(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH…", help="Checkpoints or run directories; - reads a list.")
    ],
    whole: Annotated[
        bool, typer.Option("--whole", help="Also print the seal of the header: the two cover every byte of the file.")
    ] = False,
    json_: Json = False,
) -> None:
    """Print a hash of the weights alone, the path after it: equal networks have equal digests.

    kd digest runs/a/student.safetensors runs/b/student.safetensors
    """
    from kdcli import verify

    findings = []
    for finding in verify.digests(paths):
        findings.append(finding)
        if finding.ok and not json_:
            output.answer(verify.digest_line(finding, whole))
    document, error = verify.digest_conclusion(findings, whole)
    if json_:
        _answer(document, "", json_)
    _leave(error)


@app.command("doctor")
def _doctor(
    data_dir: Annotated[
        str | None, typer.Option("--data-dir", help="Where the data sets lie; default $KD_DATA_DIR, else ./data.")
    ] = None,
    runs_dir: Annotated[str, typer.Option("--runs-dir", help="Where runs are to be written. [runs]")] = "runs",
    json_: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only warnings and problems.")] = False,
) -> None:
    """Look over this machine: versions, devices, data sets, disk, limits. Each problem comes with its fix.

    kd doctor --data-dir data --runs-dir runs

    Exit code 0 unless there is a problem: 3 (data), 4 (what is installed does not fit), 5 (cannot write).
    """
    from kdcli import doctor

    document, text, error = doctor.examine(data_dir, runs_dir, quiet=quiet)
    if json_ or text:
        _answer(document, text, json_)
    _leave(error)


def _leave(error: KdError | None) -> None:
    """Leave with an error's line and code after the answer is printed; go on without one."""
    if error is not None:
        typer.echo(f"error: {error.line()}", err=True)
        raise typer.Exit(error.code)
