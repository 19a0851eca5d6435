"""`--dry-run`: what a spec will do and cost, without training anything."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import nn

from kdcli import methods, output, teachers
from kdcli.building import load_data, make_method, make_network, make_teacher, recipe_of
from kdcli.data.dataset import DataSet
from kdcli.data.loader import Batch
from kdcli.engine.device import Device, guarded, open_device
from kdcli.engine.step import StudentStep, TeacherStep, deploy
from kdcli.inference import Use
from kdcli.methods.base import Progress
from kdcli.models.heads import Headed
from kdcli.models.network import Network, macs, macs_with_heads, parameters_of, stage_shapes
from kdcli.models.panel import Panel
from kdcli.networks import compare_classes, load_network
from kdcli.specs import RunSpec

_FEW = 4  # images in the smallest step that is timed


def preview(spec: RunSpec) -> tuple[dict[str, Any], str]:
    """The resolved spec, the networks with their taps, the views, the steps, and an estimate of time and memory.

    Time and memory are measured on steps of 4 and 16 images and carried over to the batch.

    Raises:
        KdError: whatever would stop the run before its first step.
    """
    with guarded():
        return _preview(spec)


def _preview(spec: RunSpec) -> tuple[dict[str, Any], str]:
    dataset = load_data(spec)
    method, values = methods.settings(spec)
    device = open_device(spec.system)
    networks: dict[str, Any] = {}
    teacher: Network | Headed | Panel | None = None
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
            teacher = _teacher(spec, dataset)
            scale = Use(**method.inference(values, "teacher")).scale
            networks["teacher"] = _network(teacher, dataset.image_size * scale)
            teacher.requires_grad_(False)
        student = make_network(spec, "student", method, values, dataset)
        networks["student"] = _network(student, dataset.image_size)
        use = Use(**method.inference(values, "student"))
        step = StudentStep(make_method(spec, dataset, student, teacher), student, teacher, use, device)
    cost = _cost(spec, step, teacher, dataset, device)
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


def _teacher(spec: RunSpec, dataset: DataSet) -> Network | Headed | Panel:
    """Who teaches: files where there are any, else fresh networks, since only shapes and speed matter here."""
    method, _ = methods.settings(spec)
    if spec.assistant and method.assistants == "last":
        return _assistant(spec, len(spec.assistant) - 1, dataset)
    teacher = _main_teacher(spec, dataset)
    main = deploy(teacher)
    assert isinstance(main, Network)
    others = [_assistant(spec, i, dataset) for i in range(len(spec.assistant))]
    for wanted in teachers.prepared_for(spec, main.arch):
        others.append(make_network(wanted, "student", *methods.settings(wanted), dataset))
    return Panel(main, others) if others else teacher


def _assistant(spec: RunSpec, position: int, dataset: DataSet) -> Network:
    file = teachers.named_file(spec.assistant[position])
    if file is not None:
        return load_network(file).backbone
    wanted = teachers.assistant_for(spec, position)
    return make_network(wanted, "student", *methods.settings(wanted), dataset)


def _main_teacher(spec: RunSpec, dataset: DataSet) -> Network | Headed:
    assert spec.teacher is not None
    file = teachers.named_file(spec.teacher)
    if file is None:
        wanted, file = teachers.find(spec)
        if file is None:
            method, values = methods.settings(spec)
            return make_teacher(wanted, method, values, dataset)
    loaded = load_network(file)
    compare_classes(loaded.metadata, dataset, loaded.path)
    teachers.check(loaded, spec, len(dataset.classes))
    return loaded.network


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


class _SavedBytes:
    """Counts the bytes that autograd keeps for the backward pass, each storage once."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def total(self) -> int:
        return sum(self.storages.values())


def _batch(spec: RunSpec, count: int, dataset: DataSet, device: Device) -> Batch:
    method, values = methods.settings(spec)
    size = dataset.image_size
    index = torch.arange(count, device=device.torch) % len(dataset.train)
    images = torch.randn(count, 3, size, size, device=device.torch).to(memory_format=torch.channels_last)
    extra = tuple(images.flip(3) for _ in method.augmentations(values))
    return Batch(images, index % len(dataset.classes), index, 1.0, extra)


def _cost(spec: RunSpec, step: Any, teacher: nn.Module | None, dataset: DataSet, device: Device) -> dict[str, Any]:
    """Views, seconds a step and MiB, measured on steps of a few images and carried over to the batch."""
    size = spec.train.batch_size
    progress = Progress(torch.ones((), device=device.torch), torch.zeros((), device=device.torch), False)
    device.place(step).train()
    cost: dict[str, Any] = {}
    few = _batch(spec, min(_FEW, size), dataset, device)
    if teacher is not None:
        device.place(teacher)
        cost["teacher_views"] = len(step.method.teacher_views(few, progress)) // len(few.labels)
        if isinstance(step, StudentStep):
            teacher.eval()
    if isinstance(step, StudentStep):
        cost["student_views"] = len(step.method.student_views(few, progress)) // len(few.labels)

    def seconds(batch: Batch) -> float:
        best = float("inf")
        for _ in range(3):  # the first pays for allocation and the choice of kernels
            started = time.monotonic()
            step(batch, progress).total.backward()
            device.synchronize()
            best = min(best, time.monotonic() - started)
        return best

    at_few = seconds(few)
    more = min(4 * _FEW, size)
    if at_few < 1 and more > len(few.labels):  # a step has fixed costs: two sizes tell them from those of an image
        at_more = seconds(_batch(spec, more, dataset, device))
        per_image = max(0.0, at_more - at_few) / (more - len(few.labels))
        estimate = at_more + per_image * (size - more)
    else:
        estimate = at_few * size / len(few.labels)
    saved = _SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        step(few, progress)
    learned = sum(p.numel() * p.element_size() for p in step.parameters() if p.requires_grad)
    frozen = 0 if teacher is None else sum(p.numel() * p.element_size() for p in teacher.parameters())
    resident = [split.images for split in (dataset.train, dataset.test) if split.images is not None]
    images = sum(held.nbytes for held in resident)
    activations = max(0, saved.total - learned) * size / len(few.labels) / spec.train.accumulate
    cost["seconds_per_step"] = round(estimate, 4)
    cost["memory_mib"] = round((3 * learned + frozen + activations + images) / 2**20)
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
