"""The two training jobs: a teacher's and a student's. Each takes a resolved spec and returns its summary."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcli import checkpoint, data, durable, methods, teachers
from kdcli.data.dataset import DataSet, Split
from kdcli.data.loader import Loader
from kdcli.data.randomness import generator, mix
from kdcli.engine import distributed
from kdcli.engine.device import Device, guarded, open_device
from kdcli.engine.evaluate import evaluate
from kdcli.engine.fit import Fitted, Job, check_batches, fit
from kdcli.engine.signals import StopFlag
from kdcli.engine.step import Step, StudentStep, TeacherStep, deploy
from kdcli.errors import InputError
from kdcli.inference import Use
from kdcli.methods.base import Method, Setting
from kdcli.models import build
from kdcli.models.heads import Headed
from kdcli.models.network import Network, macs, parameters_of, stage_shapes
from kdcli.networks import Loaded, compare_classes, describe, fingerprint, load_network, tensors_of
from kdcli.output import Story, envelope
from kdcli.runs import Run, environment, open_run
from kdcli.specs import RunSpec

_EVAL_BATCH = 250


def load_data(spec: RunSpec, story: Story | None = None) -> DataSet:
    """The spec's data set: the training share, then the validation split taken from it."""
    wanted = spec.data
    dataset = data.load(
        wanted.dataset,
        wanted.data_dir,
        image_size=wanted.image_size,
        download=wanted.download,
        resident_mib=wanted.resident_mib,
    )
    for note in dataset.notes:
        if story is not None:
            story.note(note)
    dataset = dataset.with_fraction(wanted.train_fraction, wanted.split_seed)
    dataset = dataset.with_validation(wanted.val_fraction, wanted.split_seed)
    return dataset.with_fraction(wanted.ratio, wanted.split_seed)


def make_network(spec: RunSpec, role: str, method: type[Method], values: Any, dataset: DataSet) -> Network:
    """A fresh student or teacher; its initial weights depend on the seed and nothing else."""
    classes = len(dataset.classes)
    if role == "teacher":
        name, taps, outputs = spec.teacher, spec.teacher_taps, method.teacher_outputs(values, classes)
    else:
        name, taps, outputs = spec.student, spec.student_taps, method.student_outputs(values, classes)
    assert name is not None
    torch.manual_seed(mix(spec.seed, "weights"))
    return build(
        name,
        outputs,
        dataset.image_size,
        pretrained=spec.pretrained,
        taps=taps,
        fixed_stride=method.fixed_stride,
    )


def make_teacher(spec: RunSpec, method: type[Method], values: Any, dataset: DataSet) -> Network | Headed:
    """A fresh teacher with the heads that the method asks for."""
    network = make_network(spec, "teacher", method, values, dataset)
    # Not every network takes every size: find out before anything is trained.
    stage_shapes(network, dataset.image_size * method.inference(values, "teacher")["scale"])
    torch.manual_seed(mix(spec.seed, "heads"))
    heads = method.teacher_heads(values, network, len(dataset.classes))
    return network if heads is None else Headed(network, heads)


def make_method(spec: RunSpec, dataset: DataSet, student: Network | None, teacher: Network | Headed | None) -> Method:
    """The method's side of the training, its own modules initialised from the seed."""
    method, values = methods.settings(spec)
    setting = Setting(len(dataset.classes), dataset.image_size, spec.train.label_smoothing)
    torch.manual_seed(mix(spec.seed, "method"))
    return method(values, setting, student, teacher)  # type: ignore[call-arg]


def _augment(spec: RunSpec, dataset: DataSet) -> str:
    if spec.data.augment != "auto":
        return spec.data.augment
    return "crop" if dataset.image_size <= 96 else "resized-crop"


def make_loader(spec: RunSpec, dataset: DataSet, split: Split, device: Device, *, train: bool) -> Loader:
    """The loader of a split; this rank's share of it."""
    return Loader(
        split,
        mean=dataset.mean,
        std=dataset.std,
        image_size=dataset.image_size,
        batch_size=spec.train.batch_size if train else _EVAL_BATCH,
        seed=spec.seed,
        augment=_augment(spec, dataset) if train else "none",
        device=device.torch,
        train=train,
        workers=spec.system.workers,
        timeout=spec.system.data_timeout,
        rank=distributed.rank(),
        world=distributed.world(),
    )


def evaluated_part(spec: RunSpec, split: Split) -> Split:
    """The images a run is evaluated on: all of them, or under `--max-steps` no more than it trains on (at least 250).

    A smoke run would otherwise spend its time on evaluation; the metrics say how many images they were measured on.
    """
    if spec.train.max_steps is None:
        return split
    limit = max(_EVAL_BATCH, spec.train.max_steps * spec.train.batch_size)
    if limit >= len(split):
        return split
    chosen = torch.randperm(len(split), generator=generator(spec.data.split_seed, "evaluated"))[:limit]
    return split.subset(chosen.sort().values)


def _tests(spec: RunSpec, dataset: DataSet, device: Device) -> dict[str, Loader]:
    splits = {"val": dataset.val, "test": dataset.test}
    return {
        name: make_loader(spec, dataset, evaluated_part(spec, split), device, train=False)
        for name, split in splits.items()
        if split is not None
    }


def open_recorded_device(spec: RunSpec, run: Run) -> Device:
    """The device, with the threads an unfinished run began with, since its last bits depend on them."""
    recorded = None
    if run.status == "unfinished" and (run.directory / "env.json").exists():
        recorded = durable.read_json(run.directory / "env.json").get("threads")
    device = open_device(spec.system, recorded)
    if recorded is None and distributed.rank() == 0:
        durable.write_json(run.directory / "env.json", {**environment(spec), "threads": device.threads})
    return device


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
    train = make_loader(spec, dataset, dataset.train, device, train=True)
    normalised = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in step.modules())
    check_batches(train, normalised, spec.train.batch_size)
    role = "teacher" if spec.command == "pretrain-teacher" else "student"
    name = spec.teacher if role == "teacher" else spec.student
    title = f"{spec.method['name']} {role} {name}"
    job = Job(run, step, use, device, train, _tests(spec, dataset, device), story, stop, title, facts)
    fitted = fit(job)
    train.close()
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
    return envelope(
        spec.command,
        method=spec.method["name"],
        role="teacher" if spec.command == "pretrain-teacher" else "student",
        network=backbone.arch,
        run=str(run.directory),
        checkpoint=str(run.directory / file),
        spec_digest=run.digest,
        metrics=metrics,
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
def _opened(spec: RunSpec, digest: str | None = None) -> Iterator[Run]:
    """`open_run` on every rank: the first makes or clears the directory before the others look, and writes all."""
    first = distributed.rank() == 0
    if not first:
        distributed.barrier()
    with open_run(spec, digest, readonly=not first) as run:
        if first:
            distributed.barrier()
        yield run
        distributed.barrier()  # what the first has written is there when the others go on


def pretrain_teacher(spec: RunSpec, story: Story, stop: StopFlag) -> dict[str, Any]:
    """Train the teacher that `spec` (a resolved `pretrain-teacher` spec) describes; its summary.

    A finished run is not repeated, an unfinished one goes on.
    """
    first = distributed.rank() == 0
    with guarded(), _opened(spec) as run:
        if run.status == "finished":
            story.note(f"{run.directory} is finished already")
            return run.summary()
        device = open_recorded_device(spec, run)
        dataset = load_data(spec, story)
        method, values = methods.settings(spec)
        teacher = make_teacher(spec, method, values, dataset)
        use = Use(**method.inference(values, "teacher"))
        step = TeacherStep(make_method(spec, dataset, None, teacher), teacher, use, device)
        fitted, _ = _fit(run, step, use, dataset, device, story, stop, {"classes": list(dataset.classes)})
        summary = _summary(run, fitted, device, teacher, use, "teacher.safetensors")
        if first:
            _export(run, "teacher", fitted.network, dataset, use, summary, {})
        return summary


def _export(
    run: Run, role: str, network: nn.Module, dataset: DataSet, use: Use, summary: dict[str, Any], extra: dict[str, Any]
) -> None:
    """Write the network and the summary; the summary comes last, since it marks the run as finished."""
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


def _teacher(
    spec: RunSpec, story: Story, stop: StopFlag, dataset: DataSet, *, auto: bool
) -> tuple[Loaded, dict[str, Any]]:
    """The teacher of a distillation, trained first where the spec names an architecture without a trained one."""
    file = teachers.named_file(spec)
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
                    hint=f"make it: {teachers.command_for(wanted)}",
                )
            # Whatever makes the pair impossible shall show itself before the teacher is trained, and not after.
            made = make_teacher(wanted, method, values, dataset)
            make_method(spec, dataset, make_network(spec, "student", method, values, dataset), made)
            del made
            story.note(f"teacher: no trained {spec.teacher} for this method and recipe found, training it first")
            file = Path(pretrain_teacher(wanted, story, stop)["checkpoint"])
    loaded = load_network(file)
    compare_classes(loaded.metadata, dataset, loaded.path)
    teachers.check(loaded, spec, len(dataset.classes))
    theirs = loaded.metadata["normalization"]
    if theirs is None or max(abs(a - b) for a, b in zip(theirs["mean"], dataset.mean, strict=True)) > 0.01:
        story.note(
            f"{loaded.path} was trained with mean {theirs and theirs['mean']}; it will see images normalised with "
            f"{list(dataset.mean)}"
        )
    return loaded, loaded.metadata.get("metrics", {}).get("test", {})


def distill(spec: RunSpec, story: Story, stop: StopFlag, *, auto_teacher: bool = True) -> dict[str, Any]:
    """Train the student that `spec` (a resolved `distill` or `fewshot` spec) describes; its summary.

    Args:
        auto_teacher: train the teacher first if the spec names an architecture and none is found.
    """
    method, values = methods.settings(spec)
    digest = None
    if method.needs_teacher:
        teachers.refuse_pth(spec)
        if (file := teachers.named_file(spec)) is not None:
            digest = checkpoint.digest(file)
    first = distributed.rank() == 0
    with guarded(), _opened(spec, digest) as run:
        if run.status == "finished":
            story.note(f"{run.directory} is finished already")
            return run.summary()
        device = open_recorded_device(spec, run)
        dataset = load_data(spec, story)
        loaded, known = None, {}
        if method.needs_teacher:
            loaded, known = _teacher(spec, story, stop, dataset, auto=auto_teacher)
        student = make_network(spec, "student", method, values, dataset)
        teacher = None if loaded is None else loaded.network
        objective = make_method(spec, dataset, student, teacher)
        facts: dict[str, Any] = {"classes": list(dataset.classes)}
        told: dict[str, Any] = {}
        if loaded is not None:
            device.place(loaded.network.requires_grad_(False))
            if "top1" not in known:
                known = _measure(spec, loaded, dataset, device)
            told = {"arch": loaded.backbone.arch, "digest": loaded.digest, "checkpoint": str(loaded.path)}
            told |= {key: known[key] for key in ("top1", "marginal", "aggregate", "n") if key in known}
            story.note(f"teacher {loaded.backbone.arch}: {known['top1']:.2f} % on {known['n']} test images")
            facts["teacher"] = loaded.digest
        use = Use(**method.inference(values, "student"))
        step = StudentStep(objective, student, teacher, use, device)
        before = None if teacher is None else fingerprint(teacher)
        fitted, _ = _fit(run, step, use, dataset, device, story, stop, facts)
        if teacher is not None and fingerprint(teacher) != before:
            raise RuntimeError("the frozen teacher changed during the training")
        summary = _summary(run, fitted, device, student, use, "student.safetensors")
        if told:
            summary["teacher"] = told
        if first:
            _export(run, "student", fitted.network, dataset, use, summary, {"teacher": told} if told else {})
        return summary


def _measure(spec: RunSpec, loaded: Loaded, dataset: DataSet, device: Device) -> dict[str, Any]:
    """The accuracy of a teacher that came without one (imported)."""
    loader = make_loader(spec, dataset, evaluated_part(spec, dataset.test), device, train=False)
    return evaluate(loaded.backbone, loaded.use, loader, device).modes["single"]
