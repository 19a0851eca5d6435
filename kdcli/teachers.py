"""The teacher of a distillation: a file the user names, one found under the runs folder, or one trained on the way."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli import checkpoint, methods
from kdcli.commandline import command_line
from kdcli.errors import IncompatibleError, InputError, UsageError
from kdcli.models.names import canonical
from kdcli.runs.identity import digest_of, directory_for, identity
from kdcli.specs import RunSpec, TrainSpec

if TYPE_CHECKING:
    from kdcli.networks import Loaded


def named_file(name: str, field: str = "--teacher") -> Path | None:
    """The checkpoint that a teacher or assistant names, or None if it names an architecture.

    Raises:
        UsageError: it is neither a path that exists nor an architecture, or a pickle, which training does not read.
        InputError: it is a run directory without a finished network.
    """
    path = Path(name)
    if path.suffix in (".pth", ".pt", ".bin", ".tar"):
        raise UsageError(
            f"{name} is not a kd checkpoint",
            field=field,
            hint=f"first: kd import {name} --arch ARCH --out teacher.safetensors",
        )
    if path.is_file() or path.is_dir():
        return checkpoint.locate(path)
    if path.suffix == ".safetensors" or ("/" in name and ":" not in name.partition("/")[0]):
        raise InputError(f"no such checkpoint or run directory: {name}", field=field)
    canonical(name, field=field)
    return None


def spec_for(spec: RunSpec) -> RunSpec:
    """The spec of the teacher that a resolved distillation spec asks for: same data and recipe, seed 0, all images.

    Equal to what `kd pretrain-teacher` resolves to with the same settings, so that a teacher is found again.
    """
    train = spec.train.model_copy(update={"lr": spec.train.teacher_lr, "teacher_lr": None})
    return methods.resolve(_shared(spec, train).model_copy(update={"command": "pretrain-teacher", "assistant": ()}))


def _shared(spec: RunSpec, train: TrainSpec) -> RunSpec:
    """The raw spec of a network that many runs may share: seed 0, all images, a directory of its own.

    What the recipe left open is left open again, to be filled in for that network; what the user set stays.
    """
    method, _ = methods.settings(spec)
    nesterov = None if train.nesterov == method.nesterov_on(spec.data.dataset) else train.nesterov
    return spec.model_copy(
        update={
            "seed": 0,
            "baseline": False,
            "data": spec.data.model_copy(update={"ratio": 1.0}),
            "system": spec.system.model_copy(update={"out": None, "overwrite": False}),
            "train": train.model_copy(update={"nesterov": nesterov}),
        }
    )


def backbone_for(spec: RunSpec) -> RunSpec | None:
    """The spec of the backbone to which a resolved `pretrain-teacher` spec adds heads; None if it trains everything."""
    method, values = methods.settings(spec)
    settings = method.teacher_backbone(values)
    if settings is None:
        return None
    wanted = _shared(spec, spec.train).model_copy(update={"method": settings})
    if spec.teacher is not None and named_file(spec.teacher) is not None:
        return wanted  # it is there, so nothing of its recipe is to be filled in
    return methods.resolve(wanted)


def assistant_for(spec: RunSpec, position: int) -> RunSpec:
    """The distillation that makes an assistant of a resolved spec: from the teacher and the assistants before it."""
    update = {
        "student": spec.assistant[position],
        "student_taps": None,
        "assistant": spec.assistant[:position],
    }
    return methods.resolve(_shared(spec, _open_rate(spec)).model_copy(update=update))


def prepared_for(spec: RunSpec, arch: str) -> list[RunSpec]:
    """The distillations of networks like the teacher (`arch`) that a resolved spec's method wants made beforehand."""
    method, values = methods.settings(spec)
    wanted = []
    for number, settings in enumerate(method.prepared(values)):
        update = {"method": settings, "student": arch, "student_taps": spec.teacher_taps}
        wanted.append(methods.resolve(_shared(spec, _open_rate(spec)).model_copy(update={**update, "seed": number})))
    return wanted


def _open_rate(spec: RunSpec) -> TrainSpec:
    """The recipe with its learning rate left open again where it is the standard one of the student."""
    assert spec.student is not None
    standard = spec.train.lr == methods.standard_rate(spec.train, spec.student)
    return spec.train.model_copy(update={"lr": None if standard else spec.train.lr})


def find(spec: RunSpec) -> tuple[RunSpec, Path | None]:
    """The spec of the teacher that fits, and its finished checkpoint under the runs folder, if it is there."""
    wanted = spec_for(spec)
    return wanted, finished(wanted)


def contents(spec: RunSpec) -> dict[str, str]:
    """Content digests of everything a spec names by path, by that path.

    Raises:
        UsageError: a network is named by a file that kd does not read.
        InputError: a file is missing or damaged.
    """
    found: dict[str, str] = {}
    named = [(spec.teacher, "--teacher"), *((name, "--assistant") for name in spec.assistant)]
    for name, field in named:
        if name is not None and (file := named_file(name, field)) is not None:
            found[name] = checkpoint.digest(file)
    for method in _methods_named(spec.method):
        if method.endswith(".py"):
            found[method] = hashlib.sha256(Path(method).read_bytes()).hexdigest()
    return found


def _methods_named(settings: dict[str, Any]) -> list[str]:
    """The names of a method and of those inside its settings (lskd's `inner`)."""
    inner = [name for value in settings.values() if isinstance(value, dict) for name in _methods_named(value)]
    return [str(settings["name"]), *inner] if "name" in settings else inner


def finished(wanted: RunSpec) -> Path | None:
    """The network of the run that a spec describes, if that run is finished under the runs folder."""
    directory = directory_for(wanted, digest_of(identity(wanted, contents(wanted))))
    role = "teacher" if wanted.command == "pretrain-teacher" else "student"
    file = directory / f"{role}.safetensors"
    return file if (directory / "summary.json").is_file() and file.is_file() else None


def check(loaded: Loaded, spec: RunSpec, classes: int) -> None:
    """Refuse a teacher whose main head or input scale is not what the method needs.

    Raises:
        IncompatibleError: with the command that makes a fitting teacher.
    """
    method, values = methods.settings(spec)
    outputs = method.teacher_outputs(values, classes)
    wanted = spec_for(spec.model_copy(update={"teacher": loaded.backbone.arch}))
    command = command_line(wanted.command, wanted)
    if loaded.backbone.outputs != outputs:
        raise IncompatibleError(
            f"{loaded.path} has {loaded.backbone.outputs} outputs and the method {spec.method['name']} needs {outputs}",
            field="--teacher",
            hint=f"make one that fits: {command}",
        )
    use: dict[str, Any] = method.inference(values, "teacher")
    if replace(loaded.use, scale_mode="") != replace(type(loaded.use)(**use), scale_mode=""):
        raise IncompatibleError(
            f"{loaded.path} was trained for transform {loaded.use.transform} at scale {loaded.use.scale}, the method is "
            f"set to {use['transform']} at scale {use['scale']}",
            field="--teacher",
            hint=f"make one that fits: {command}",
        )
