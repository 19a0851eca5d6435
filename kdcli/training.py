"""The two training jobs: a teacher's and a student's. Each takes a resolved spec and returns its summary."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kdcli import checkpoint, durable, methods, modelcard, teachers
from kdcli.building import (
    evaluated_part,
    evaluation_loaders,
    in_steps,
    load_data,
    make_loader,
    make_method,
    make_network,
    make_teacher,
    recipe_of,
)
from kdcli.commandline import command_line
from kdcli.data.dataset import DataSet
from kdcli.engine import distributed
from kdcli.engine.device import Device, guarded, open_device
from kdcli.engine.evaluate import evaluate
from kdcli.engine.fit import Fitted, Job, check_batches, fit
from kdcli.engine.signals import StopFlag
from kdcli.engine.step import Step, StudentStep, TeacherStep, deploy
from kdcli.errors import InputError
from kdcli.inference import Use
from kdcli.models.heads import Headed
from kdcli.models.network import Network, macs, parameters_of
from kdcli.models.panel import Panel
from kdcli.networks import Loaded, compare_classes, describe, fingerprint, load_network, tensors_of
from kdcli.output import Story, envelope
from kdcli.runs.directory import CARD, Run, open_run
from kdcli.runs.environment import environment
from kdcli.specs import RunSpec


def open_recorded_device(spec: RunSpec, run: Run) -> Device:
    """The device, with the threads an unfinished run began with, since its last bits depend on them."""
    recorded = None
    if run.status == "unfinished" and (run.directory / "env.json").exists():
        recorded = _recorded_threads(run.directory / "env.json")
    device = open_device(spec.system, recorded)
    if recorded is None and distributed.rank() == 0:
        durable.write_json(run.directory / "env.json", {**environment(spec), "threads": device.threads})
    return device


def _recorded_threads(path: Path) -> int | None:
    """What an environment file says about threads. Raises InputError if it says nonsense."""
    values = durable.read_json(path)
    threads = values.get("threads") if isinstance(values, dict) else 0
    if threads is not None and (type(threads) is not int or not 1 <= threads <= 1024):
        raise InputError(f"{path} does not say how many threads the run began with", hint="restore it or remove it")
    return threads


def _fit(
    run: Run,
    step: Step,
    use: Use,
    dataset: DataSet,
    device: Device,
    story: Story,
    stop: StopFlag,
    facts: dict[str, Any],
) -> tuple[Fitted, Job]:
    spec = run.spec
    recipe = recipe_of(spec)
    train = make_loader(spec, dataset, dataset.train, device, train=True)
    role = "teacher" if spec.command == "pretrain-teacher" else "student"
    name = spec.teacher if role == "teacher" else spec.student
    title = f"{spec.method['name']} {role} {name}"
    job = Job(
        run, step, use, device, train, evaluation_loaders(spec, dataset, device), recipe, story, stop, title, facts
    )
    with contextlib.closing(train):
        check_batches(train, step, recipe)
        fitted = fit(job)
    return fitted, job


def _summary(run: Run, fitted: Fitted, device: Device, network: nn.Module, use: Use, file: str) -> dict[str, Any]:
    """The run's answer: what `--json` prints and summary.json keeps."""
    spec = run.spec
    metrics: dict[str, Any] = {}
    for split, modes in fitted.metrics.items():
        metrics[split] = {**modes["single"], "epoch": "last"}
        extra = {mode: values for mode, values in modes.items() if mode != "single"}
        if extra:
            metrics[split] |= extra
    backbone = deploy(network)
    assert isinstance(backbone, Network)
    size = backbone.image_size
    beside = {"companions": fitted.companions} if fitted.companions else {}
    return envelope(
        spec.command,
        method=spec.method["name"],
        role="teacher" if spec.command == "pretrain-teacher" else "student",
        network=backbone.arch,
        run=str(run.directory),
        checkpoint=str(run.directory / file),
        spec_digest=run.digest,
        metrics=metrics,
        **beside,
        best_on_test={**(fitted.best or {}), "note": "chosen on the test set: papers print it, do not select by it"},
        cost={
            "params": parameters_of(backbone),
            "macs": macs(backbone, size * use.scale),
            "seconds": round(fitted.seconds, 2),
            "images_per_second": round(fitted.images_per_second, 2),
            "peak_mib": device.peak_mib(),
        },
        steps=fitted.steps,
        seed=spec.seed,
    )


@contextlib.contextmanager
def _opened(spec: RunSpec, contents: dict[str, str]) -> Iterator[Run]:
    """`open_run` on every rank: the first makes or clears the directory before the others look, and writes all."""
    first = distributed.rank() == 0
    if not first:
        distributed.barrier()
    with open_run(spec, contents, readonly=not first) as run:
        if first:
            distributed.barrier()
        yield run
        distributed.barrier()  # what the first has written is there when the others go on


def pretrain_teacher(spec: RunSpec, story: Story, stop: StopFlag) -> dict[str, Any]:
    """Train the teacher that `spec` (a resolved `pretrain-teacher` spec) describes; its summary.

    A finished run is not repeated, an unfinished one goes on.
    """
    first = distributed.rank() == 0
    contents = teachers.contents(spec)
    with guarded(), _opened(spec, contents) as run:
        if run.status == "finished":
            story.note(f"{run.directory} is finished already")
            return run.summary()
        device = open_recorded_device(spec, run)
        dataset = load_data(spec, story)
        method, values = methods.settings(spec)
        backbone = _backbone(spec, story, stop, dataset)
        teacher = make_teacher(spec, method, values, dataset, None if backbone is None else backbone.backbone)
        use = Use(**method.inference(values, "teacher"))
        step = TeacherStep(make_method(spec, dataset, None, teacher), teacher, use, device)
        told: dict[str, Any] = {}
        if backbone is not None:
            told = {"backbone": {"digest": backbone.digest, "checkpoint": str(backbone.path)}}
        facts = _facts(spec, dataset, contents)
        if backbone is not None:
            facts["backbone"] = backbone.digest
        fitted, _ = _fit(run, step, use, dataset, device, story, stop, facts)
        summary = _summary(run, fitted, device, teacher, use, "teacher.safetensors") | told
        if first:
            _export(run, "teacher", fitted.network, dataset, use, summary, told)
        return summary


def _facts(spec: RunSpec, dataset: DataSet, contents: dict[str, str]) -> dict[str, Any]:
    """What a resumed run must find as it was, besides its spec."""
    facts: dict[str, Any] = {"classes": list(dataset.classes)}
    code = [digest for path, digest in contents.items() if path.endswith(".py")]
    if code:
        facts["method's file"] = code
    return facts


def _backbone(spec: RunSpec, story: Story, stop: StopFlag, dataset: DataSet) -> Loaded | None:
    """The trained network to which the spec's teacher adds heads, trained first if there is none; None if it does not."""
    wanted = teachers.backbone_for(spec)
    if wanted is None:
        return None
    assert spec.teacher is not None
    file = teachers.named_file(spec.teacher) or teachers.finished(wanted)
    if file is None:
        story.note(f"backbone: no trained {spec.teacher} for this recipe found, training it first")
        file = Path(pretrain_teacher(wanted, story, stop)["checkpoint"])
    loaded = load_network(file)
    compare_classes(loaded.metadata, dataset, loaded.path)
    teachers.check(loaded, wanted, len(dataset.classes))
    return loaded


def _export(
    run: Run, role: str, network: nn.Module, dataset: DataSet, use: Use, summary: dict[str, Any], extra: dict[str, Any]
) -> None:
    """Write the network, then the summary, which marks the run as finished, then a student's card, made from all of them."""
    assert isinstance(network, Network | Headed)
    metadata = {
        "role": role,
        **describe(network, dataset, use),
        "method": run.spec.method,
        "spec_digest": run.digest,
        "seed": run.spec.seed,
        "metrics": summary["metrics"],
        **extra,
    }
    checkpoint.save(run.directory / f"{role}.safetensors", tensors_of(network), metadata)
    run.finish(summary)
    if role == "student":
        modelcard.write(run.directory)


def _teacher(spec: RunSpec, story: Story, stop: StopFlag, dataset: DataSet, *, auto: bool) -> Loaded:
    """The teacher of a distillation, trained first where the spec names an architecture without a trained one."""
    assert spec.teacher is not None
    file = teachers.named_file(spec.teacher)
    if file is None:
        method, values = methods.settings(spec)
        wanted, file = teachers.find(spec)
        if file is not None:
            story.note(f"teacher: {file}")
        else:
            if not auto:
                raise InputError(
                    f"no trained {spec.teacher} for {spec.method['name']} on {spec.data.dataset} under "
                    f"{spec.system.runs_dir}",
                    field="--teacher",
                    hint=f"make it: {command_line(wanted.command, wanted)}",
                )
            # Whatever makes the pair impossible shall show itself before the teacher is trained, and not after.
            made = make_teacher(wanted, method, values, dataset)
            if not spec.assistant:
                make_method(spec, dataset, make_network(spec, "student", method, values, dataset), made)
            del made
            story.note(f"teacher: no trained {spec.teacher} for this method and recipe found, training it first")
            file = Path(pretrain_teacher(wanted, story, stop)["checkpoint"])
    return _read(file, spec, dataset, story)


def _assistant(spec: RunSpec, position: int, story: Story, stop: StopFlag, dataset: DataSet, *, auto: bool) -> Loaded:
    """An assistant of a distillation, itself distilled first where the spec names an architecture."""
    name = spec.assistant[position]
    file = teachers.named_file(name, "--assistant")
    if file is None:
        file = _distilled(teachers.assistant_for(spec, position), f"assistant {name}", story, stop, auto=auto)
    return _read(file, spec, dataset, story)


def _prepared(
    spec: RunSpec, teacher: Loaded, story: Story, stop: StopFlag, dataset: DataSet, *, auto: bool
) -> list[Loaded]:
    """Networks like the teacher that the method wants distilled from it beforehand; made first where there are none."""
    wanted = teachers.prepared_for(spec, teacher.backbone.arch)
    files = [_distilled(one, f"network {i} taught beforehand", story, stop, auto=auto) for i, one in enumerate(wanted)]
    return [_read(file, spec, dataset, story) for file in files]


def _distilled(wanted: RunSpec, what: str, story: Story, stop: StopFlag, *, auto: bool) -> Path:
    """The network of a distillation that another one needs: found, or made now.

    Raises:
        InputError: there is none, and it is not to be made on the way.
    """
    file = teachers.finished(wanted)
    if file is not None:
        story.note(f"{what}: {file}")
        return file
    if not auto:
        raise InputError(
            f"there is no {what} for this teacher and recipe under {wanted.system.runs_dir}",
            hint=f"make it: {command_line(wanted.command, wanted)}",
        )
    story.note(f"{what}: none found for this teacher and recipe, distilling it first")
    return Path(distill(wanted, story, stop)["checkpoint"])


def _read(file: Path, spec: RunSpec, dataset: DataSet, story: Story) -> Loaded:
    """A network that is to teach, checked against data set and method.

    It is said where it will see images normalised otherwise than those it was trained on.

    Raises:
        IncompatibleError: its classes, outputs or input scale are not those that are needed.
    """
    loaded = load_network(file)
    compare_classes(loaded.metadata, dataset, loaded.path)
    teachers.check(loaded, spec, len(dataset.classes))
    theirs, ours = loaded.metadata["normalization"], {"mean": list(dataset.mean), "std": list(dataset.std)}
    if theirs is None or any(abs(a - b) > 0.01 for key in ours for a, b in zip(theirs[key], ours[key], strict=True)):
        said = "an unknown normalisation" if theirs is None else f"mean {theirs['mean']} and std {theirs['std']}"
        story.note(
            f"{loaded.path} was trained with {said}; it will see images normalised with mean {ours['mean']} and std "
            f"{ours['std']}"
        )
    return loaded


@dataclass
class _Taught:
    """Who teaches a student.

    Attributes:
        network: as the method sees it: the teacher, the last assistant in its place, or a `Panel` of all.
        main: the teacher or the assistant in its place.
        told: what the summary says about it.
    """

    network: Network | Headed | Panel
    main: Loaded
    digests: list[str]
    told: dict[str, Any]


def _taught(
    spec: RunSpec, story: Story, stop: StopFlag, dataset: DataSet, device: Device, *, auto: bool
) -> _Taught | None:
    """Everyone who teaches the spec's student, frozen and on the device; None for a method without a teacher."""
    method, _ = methods.settings(spec)
    if not method.needs_teacher:
        return None
    if method.assistants == "last" and spec.assistant:
        everyone = [_assistant(spec, len(spec.assistant) - 1, story, stop, dataset, auto=auto)]
    else:
        everyone = [_teacher(spec, story, stop, dataset, auto=auto)]
        everyone += [_assistant(spec, i, story, stop, dataset, auto=auto) for i in range(len(spec.assistant))]
        everyone += _prepared(spec, everyone[0], story, stop, dataset, auto=auto)
    told = []
    for loaded in everyone:
        device.place(loaded.network.requires_grad_(False))
        known = loaded.metadata.get("metrics", {}).get("test", {})
        if "top1" not in known:
            known = _measure(spec, loaded, dataset, device)
        facts = {"arch": loaded.backbone.arch, "digest": loaded.digest, "checkpoint": str(loaded.path)}
        told.append(facts | {key: known[key] for key in ("top1", "marginal", "aggregate", "n") if key in known})
        story.note(f"teacher {loaded.backbone.arch}: {known['top1']:.2f} % on {known['n']} test images")
    main, *others = everyone
    network = main.network if not others else Panel(main.backbone, [loaded.backbone for loaded in others])
    summary = {**told[0], "assistants": told[1:]} if others else told[0]
    return _Taught(network.eval(), main, [loaded.digest for loaded in everyone], summary)


def distill(spec: RunSpec, story: Story, stop: StopFlag, *, auto_teacher: bool = True) -> dict[str, Any]:
    """Train the student that `spec` (a resolved `distill` or `fewshot` spec) describes; its summary.

    Args:
        auto_teacher: train the teacher (and assistants) first if the spec names an architecture and none is found.
    """
    method, values = methods.settings(spec)
    contents = teachers.contents(spec)
    first = distributed.rank() == 0
    with guarded(), _opened(spec, contents) as run:
        if run.status == "finished":
            story.note(f"{run.directory} is finished already")
            if first and run.writable and not (run.directory / CARD).exists():  # killed before it was written
                modelcard.write(run.directory)
            return run.summary()
        device = open_recorded_device(spec, run)
        dataset = load_data(spec, story)
        taught = _taught(spec, story, stop, dataset, device, auto=auto_teacher)
        student = make_network(spec, "student", method, values, dataset)
        network = None if taught is None else taught.network
        objective = make_method(spec, dataset, student, network)
        teacher = in_steps(objective, network)
        facts = _facts(spec, dataset, contents)
        if taught is not None:
            facts["teacher"] = taught.digests
        use = Use(**method.inference(values, "student"))
        step = StudentStep(objective, student, teacher, use, device)
        before = None if teacher is None else fingerprint(teacher)
        fitted, _ = _fit(run, step, use, dataset, device, story, stop, facts)
        if teacher is not None and fingerprint(teacher) != before:
            raise RuntimeError("the frozen teacher changed during the training")
        summary = _summary(run, fitted, device, student, use, "student.safetensors")
        told = {} if taught is None else {"teacher": taught.told}
        summary |= told
        if first:
            _export(run, "student", fitted.network, dataset, use, summary, told)
        return summary


def _measure(spec: RunSpec, loaded: Loaded, dataset: DataSet, device: Device) -> dict[str, Any]:
    """The accuracy of a teacher that came without one (imported)."""
    loader = make_loader(spec, dataset, evaluated_part(spec, dataset.test), device, train=False)
    return evaluate(loaded.backbone, loaded.use, loader, device).modes["single"]
