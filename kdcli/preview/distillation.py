"""`--dry-run`: what a spec will do and cost, without training anything."""

from __future__ import annotations

import copy
import math
from typing import Any

from torch import nn

from kdcli import methods, output, teachers
from kdcli.building import (
    evaluation_loaders,
    in_steps,
    load_data,
    make_loader,
    make_method,
    make_network,
    make_teacher,
    recipe_of,
)
from kdcli.data.dataset import DataSet
from kdcli.data.loader import Batch, Loader
from kdcli.engine.device import Device, guarded, open_device
from kdcli.engine.step import Step, StudentStep, TeacherStep, deploy
from kdcli.inference import Use
from kdcli.models.heads import Headed
from kdcli.models.network import Network, macs, macs_with_heads, parameters_of, stage_shapes
from kdcli.models.panel import Panel
from kdcli.networks import compare_classes, load_network
from kdcli.preview import memory
from kdcli.preview.memory import Training
from kdcli.preview.pace import FEW, noise, seconds_per_step, start
from kdcli.specs import RunSpec


def preview(spec: RunSpec) -> tuple[dict[str, Any], str]:
    """The resolved spec, the networks with their taps, the views, the steps, and an estimate of time and memory.

    Everything is set up as the run does it. Time is measured on steps of 4 and 16 images and carried over to the batch,
    memory is counted for the whole batch (`memory.estimate`).

    Raises:
        KdError: whatever would stop the run before its first step.
    """
    with guarded():
        return _preview(spec)


def _preview(spec: RunSpec) -> tuple[dict[str, Any], str]:
    device = open_device(spec.system)
    dataset = load_data(spec)
    method, values = methods.settings(spec)
    networks: dict[str, Any] = {}
    teacher: Network | Headed | Panel | None = None
    trainings: list[Training] = []
    loaders: list[Loader] = []
    if spec.command == "pretrain-teacher":
        assert spec.teacher is not None
        file = teachers.named_file(spec.teacher)
        backbone = None if file is None else load_network(file).backbone
        teacher = make_teacher(spec, method, values, dataset, backbone)
        use = Use(**method.inference(values, "teacher"))
        networks["teacher"] = _network(teacher, dataset.image_size * use.scale)
        step: Any = TeacherStep(make_method(spec, dataset, None, teacher), teacher, use, device)
    else:
        if method.needs_teacher:
            teacher, wanted = _teacher(spec, dataset)
            scale = Use(**method.inference(values, "teacher")).scale
            networks["teacher"] = _network(teacher, dataset.image_size * scale)
            if wanted is not None:
                trainings.append(_before(wanted, teacher, loaders, device))
            teacher.requires_grad_(False).eval()
            device.place(teacher)
        student = make_network(spec, "student", method, values, dataset)
        networks["student"] = _network(student, dataset.image_size)
        use = Use(**method.inference(values, "student"))
        objective = make_method(spec, dataset, student, teacher)
        teacher = in_steps(objective, teacher)
        step = StudentStep(objective, student, teacher, use, device)
    trainings.append(_training(spec, step, use, dataset, loaders, device))
    cost = {"memory_mib": round(memory.estimate(trainings))}
    cost |= _cost(spec, step, teacher, dataset, device)
    steps = math.ceil(len(dataset.train) / spec.train.batch_size)
    recipe = recipe_of(spec)
    total = min(steps * recipe.epochs, recipe.max_steps or steps * recipe.epochs)
    seconds = total * cost["seconds_per_step"]
    document = output.envelope(
        spec.command,
        dry_run=True,
        spec=spec.model_dump(mode="json"),
        networks=networks,
        views={role: cost.pop(f"{role}_views") for role in ("student", "teacher") if f"{role}_views" in cost},
        data={"train": len(dataset.train), "test": len(dataset.test), "classes": len(dataset.classes)},
        steps={"per_epoch": steps, "total": total},
        estimate={**cost, "hours": round(seconds / 3600, 3)},
    )
    return document, _text(document)


def _training(spec: RunSpec, step: Step, use: Use, dataset: DataSet, loaders: list[Loader], device: Device) -> Training:
    """The training of `step`, with all that stands ready before it begins; its loaders are added to `loaders`."""
    tests = list(evaluation_loaders(spec, dataset, device).values())
    loaders += [make_loader(spec, dataset, dataset.train, device, train=True), *tests]
    ranks = memory.ranks_of(spec.system.nproc)
    return Training(
        device.place(step),
        use,
        device,
        recipe_of(spec),
        lambda count: _batch(spec, count, dataset, device),
        images=min(math.ceil(spec.train.batch_size / ranks), len(dataset.train)),
        evaluated=max(min(loader.batch_size, len(loader.split)) for loader in tests),
        ranks=ranks,
    )


def _before(wanted: RunSpec, teacher: Network | Headed | Panel, loaders: list[Loader], device: Device) -> Training:
    """The training of a teacher that there is none of yet: it takes place in the same process, before the student's."""
    method, values = methods.settings(wanted)
    dataset = load_data(wanted)
    network = copy.deepcopy(teacher.teacher if isinstance(teacher, Panel) else teacher)
    use = Use(**method.inference(values, "teacher"))
    step = TeacherStep(make_method(wanted, dataset, None, network), network, use, device)
    return _training(wanted, step, use, dataset, loaders, device)


def _teacher(spec: RunSpec, dataset: DataSet) -> tuple[Network | Headed | Panel, RunSpec | None]:
    """Who teaches, and the spec of the teacher if it is to be trained first.

    Files where there are any, else fresh networks, since only shapes and speed matter here.
    """
    method, _ = methods.settings(spec)
    if spec.assistant and method.assistants == "last":
        return _assistant(spec, len(spec.assistant) - 1, dataset), None
    teacher, wanted = _main_teacher(spec, dataset)
    main = deploy(teacher)
    assert isinstance(main, Network)
    others = [_assistant(spec, i, dataset) for i in range(len(spec.assistant))]
    for other in teachers.prepared_for(spec, main.arch):
        others.append(make_network(other, "student", *methods.settings(other), dataset))
    return (Panel(main, others) if others else teacher), wanted


def _assistant(spec: RunSpec, position: int, dataset: DataSet) -> Network:
    file = teachers.named_file(spec.assistant[position])
    if file is not None:
        return load_network(file).backbone
    wanted = teachers.assistant_for(spec, position)
    return make_network(wanted, "student", *methods.settings(wanted), dataset)


def _main_teacher(spec: RunSpec, dataset: DataSet) -> tuple[Network | Headed, RunSpec | None]:
    assert spec.teacher is not None
    file = teachers.named_file(spec.teacher)
    if file is None:
        wanted, file = teachers.find(spec)
        if file is None:
            method, values = methods.settings(spec)
            return make_teacher(wanted, method, values, dataset), wanted
    loaded = load_network(file)
    compare_classes(loaded.metadata, dataset, loaded.path)
    teachers.check(loaded, spec, len(dataset.classes))
    return loaded.network, None


def _network(network: Network | Headed | Panel, size: int) -> dict[str, Any]:
    if isinstance(network, Panel):
        others = list(network.networks)[1:]
        assert all(isinstance(other, Network) for other in others)
        return {**_network(network.teacher, size), "assistants": [other.arch for other in others]}
    backbone = deploy(network)
    assert isinstance(backbone, Network)
    shapes = stage_shapes(backbone, size)
    described = {
        "arch": backbone.arch,
        "input_size": size,
        "outputs": backbone.outputs,
        "taps": {f"F{i}": list(shape) for i, shape in enumerate(shapes)},
        "params": parameters_of(backbone),
        "macs": macs(backbone, size),
    }
    if isinstance(network, Headed):
        described["heads"] = {
            "count": len(network.heads),
            "params": parameters_of(network) - parameters_of(backbone),
            "macs": macs_with_heads(network, size) - macs(backbone, size),
        }
    return described


def _batch(spec: RunSpec, count: int, dataset: DataSet, device: Device) -> Batch:
    method, values = methods.settings(spec)
    return noise(count, dataset, device, extra=len(method.augmentations(values)))


def _cost(spec: RunSpec, step: Any, teacher: nn.Module | None, dataset: DataSet, device: Device) -> dict[str, Any]:
    """Views and seconds a step."""
    size = spec.train.batch_size
    device.place(step).train()
    cost: dict[str, Any] = {}
    few, progress = _batch(spec, min(FEW, size), dataset, device), start(device)
    if teacher is not None:
        device.place(teacher)
        cost["teacher_views"] = len(step.method.teacher_views(few, progress)) // len(few.labels)
        if isinstance(step, StudentStep):
            teacher.eval()
    if isinstance(step, StudentStep):
        cost["student_views"] = len(step.method.student_views(few, progress)) // len(few.labels)
    seconds = seconds_per_step(step, size, lambda count: _batch(spec, count, dataset, device), device)
    cost["seconds_per_step"] = round(seconds, 4)
    return cost


def _text(document: dict[str, Any]) -> str:
    lines = [output.document(document["spec"]), ""]
    for role, network in document["networks"].items():
        taps = "  ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in network["taps"].items())
        lines.append(
            f"{role} {network['arch']}: {network['params']:,} parameters, {network['macs']:,} multiply-accumulates at "
            f"{network['input_size']} pixels, {network['outputs']} outputs; {taps}"
        )
        if "heads" in network:
            heads = network["heads"]
            lines.append(f"  {heads['count']} heads: {heads['params']:,} parameters, {heads['macs']:,} MACs")
    estimate, steps = document["estimate"], document["steps"]
    lines.append("views per image: " + ", ".join(f"{role} {count}" for role, count in document["views"].items()))
    lines.append(f"steps: {steps['total']:,} ({steps['per_epoch']:,} an epoch, {document['data']['train']:,} images)")
    lines.append(
        f"estimate: {estimate['seconds_per_step']:.3f} s a step, {estimate['hours']:.2f} h in all without evaluation, "
        f"{estimate['memory_mib']:,} MiB"
    )
    return "\n".join(lines)
