"""Commands that train and take the fields of the run spec as flags."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import typer

from kdcli import output, presets
from kdcli.commands import completion, flags
from kdcli.commands.ending import conclude
from kdcli.commands.options import AutoTeacher, Seeds
from kdcli.request import Request, parse_seeds, with_flags
from kdcli.specs import RunSpec, field_paths

_PROBE = [leaf for leaf, path in field_paths().items() if path.startswith("probe.")]
_STUDENT_ONLY = ["student", "assistant", "student_taps", "teacher_lr", "teacher_pretrained", "ratio", "baseline"]
_NETWORKS = [
    *("method", "teacher", "assistant", "student", "teacher_taps", "student_taps"),
    *("pretrained", "teacher_pretrained", "teacher_lr"),
]


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


def _preview(spec: RunSpec, request: Request) -> None:
    from kdcli.preview.distillation import preview

    document, text = preview(spec)
    conclude(document, text, request.json)


def _seeds(text: str | None, spec: RunSpec) -> list[int]:
    """`0..4` or `0,1,2` → the seeds; without it the spec's own."""
    return [spec.seed] if text is None else parse_seeds(text, "--seeds")


def pretrain_teacher(request: Request) -> None:
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
    return conclude(summary, report.runs_table([summary]), request.json)


def distill(
    request: Request,
    *,
    seeds: Seeds = None,
    auto_teacher: AutoTeacher = True,
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
    return conclude(document, report.distill_table(document), request.json)


def fewshot(
    request: Request,
    *,
    ratio: Annotated[
        list[float] | None,
        typer.Option("--ratio", help="Share of the training images the student sees; repeatable. [0.25 0.5 0.75]"),
    ] = None,
    seeds: Seeds = None,
    auto_teacher: AutoTeacher = True,
) -> None:
    """Distil on stratified fractions of the training images, from a teacher that saw all of them; one table.

    kd fewshot --method vsd --teacher resnet56 --student resnet20 --ratio 0.25 --ratio 0.5 --data-dir data
    """
    spec = _spec("distill", request)
    from kdcli import jobs, report

    ratios = ratio or [0.25, 0.5, 0.75]
    if request.dry_run:
        return _preview(jobs.at_ratio(spec, ratios[0]), request)
    if _launched(spec):
        return None
    document = jobs.fewshot(spec, ratios, _seeds(seeds, spec), _story(request), auto_teacher=auto_teacher)
    return conclude(document, report.fewshot_table(document), request.json)


def linear_probe(
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
        from kdcli.probe import preview

        return conclude(*preview(specs), request.json)
    from kdcli import jobs, report

    document = jobs.probes(specs, _story(request))
    return conclude(document, report.probe_table(document), request.json)


def bench(
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
    return conclude(document, bench_table(document), request.json)


COMMANDS = {
    "pretrain-teacher": flags.command(pretrain_teacher, leave_out=[*_STUDENT_ONLY, *_PROBE, "encoder"]),
    "distill": flags.command(distill, leave_out=[*_PROBE, "encoder"]),
    "fewshot": flags.command(fewshot, leave_out=[*_PROBE, "encoder", "ratio", "baseline"]),
    "linear-probe": flags.command(
        linear_probe,
        leave_out=[*_NETWORKS, "baseline", "encoder", "dataset", "ratio", "base_lr", "light_lr", "compile", "nproc"],
    ),
    "bench": flags.command(
        bench,
        leave_out=[
            *_PROBE,
            *("encoder", "baseline", "pretrained", "teacher_pretrained", "teacher_lr", "max_steps", "eval_every"),
            *("val_fraction", "nproc", "rank_timeout", "out", "runs_dir", "overwrite"),
            *("checkpoint_every", "max_minutes", "requeue", "tensorboard", "wandb"),
        ],
    ),
}
