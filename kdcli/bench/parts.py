"""The networks and the method of a benchmark: fresh ones, since only shapes and speed matter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from kdcli import methods, teachers
from kdcli.building import in_steps, make_method, make_network, make_teacher
from kdcli.data.dataset import DataSet
from kdcli.data.randomness import generator
from kdcli.engine.device import Device
from kdcli.engine.step import StudentStep, deploy
from kdcli.errors import InputError
from kdcli.inference import Use
from kdcli.models.heads import Headed
from kdcli.models.names import canonical
from kdcli.models.network import Network
from kdcli.models.panel import Panel
from kdcli.specs import RunSpec

Teacher = Network | Headed | Panel


@dataclass(frozen=True)
class Parts:
    """A step and those who take part in it. Built twice from the same spec, all weights are the same."""

    step: StudentStep
    student: Network
    teacher: Teacher | None
    use: Use


def architectures(spec: RunSpec) -> RunSpec:
    """The spec with every network by its architecture, and none started from a library's weights.

    Raises:
        UsageError: a name is that of no architecture.
        InputError: a named file is missing or damaged.
    """

    def bare(name: str, field: str) -> str:
        if teachers.named_file(name, field) is None:
            return canonical(name, field=field)
        arch = methods.architecture(name)
        if not arch:
            raise InputError(f"{name} does not say which architecture it holds", field=field)
        return arch

    return spec.model_copy(
        update={
            "teacher": None if spec.teacher is None else bare(spec.teacher, "--teacher"),
            "assistant": tuple(bare(name, "--assistant") for name in spec.assistant),
            "pretrained": False,
            "teacher_pretrained": False,
        }
    )


def build(spec: RunSpec, dataset: DataSet, device: Device, *, fold: bool) -> Parts:
    """Student, frozen teacher and method of a spec that names architectures; not on the device yet.

    Args:
        fold: fold the teacher's BatchNorm where the method allows it, as training does.
    """
    method, values = methods.settings(spec)
    teacher = _teacher(spec, dataset) if method.needs_teacher else None
    if teacher is not None:
        _settle(teacher.requires_grad_(False).eval(), dataset.image_size * values.teacher_scale)
    student = make_network(spec, "student", method, values, dataset)
    use = Use(**method.inference(values, "student"))
    objective = make_method(spec, dataset, student, teacher)
    teacher = in_steps(objective, teacher, fold=fold)
    return Parts(StudentStep(objective, student, teacher, use, device), student, teacher, use)


def _settle(teacher: Teacher, size: int) -> None:
    """Give a fresh teacher's BatchNorm the statistics of a few images of noise.

    Without any, the maps of a deep network grow from block to block, and losses that compare maps overflow.
    """
    norms = [module for module in teacher.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True  # None: the plain mean over all batches, here one
    with torch.no_grad():
        teacher.features(torch.randn(8, 3, size, size, generator=generator("bench", "settle")))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum, norm.training = momentum, False


def _teacher(spec: RunSpec, dataset: DataSet) -> Teacher:
    """Everyone who teaches, as the method sees them."""
    method, values = methods.settings(spec)
    if spec.assistant and method.assistants == "last":
        return _assistant(spec, len(spec.assistant) - 1, dataset)
    teacher = make_teacher(spec, method, values, dataset)
    main = deploy(teacher)
    assert isinstance(main, Network)
    others = [_assistant(spec, position, dataset) for position in range(len(spec.assistant))]
    for wanted in teachers.prepared_for(spec, main.arch):
        others.append(make_network(wanted, "student", *methods.settings(wanted), dataset))
    return Panel(main, others) if others else teacher


def _assistant(spec: RunSpec, position: int, dataset: DataSet) -> Network:
    wanted = teachers.assistant_for(spec, position)
    return make_network(wanted, "student", *methods.settings(wanted), dataset)
