"""The teacher of a distillation: a file the user names, one found under the runs folder, or one trained on the way."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli import checkpoint, methods, presets
from kdcli.errors import IncompatibleError, InputError, UsageError
from kdcli.flags import Request
from kdcli.models.names import canonical
from kdcli.runs import digest_of, directory_for, flat, identity
from kdcli.specs import RunSpec, field_paths

if TYPE_CHECKING:
    from kdcli.networks import Loaded


def named_file(spec: RunSpec) -> Path | None:
    """The checkpoint a spec's teacher names, or None if it names an architecture.

    Raises:
        UsageError: it is neither a path that exists nor an architecture.
        InputError: it is a run directory without a finished network.
    """
    assert spec.teacher is not None
    path = Path(spec.teacher)
    if path.is_file() or path.is_dir():
        return checkpoint.locate(path)
    if path.suffix in (".safetensors", ".pth", ".pt") or (
        "/" in spec.teacher and ":" not in spec.teacher.partition("/")[0]
    ):
        raise InputError(f"no such checkpoint or run directory: {spec.teacher}", field="--teacher")
    canonical(spec.teacher, field="--teacher")
    return None


def spec_for(spec: RunSpec) -> RunSpec:
    """The spec of the teacher that a resolved distillation spec asks for: same data and recipe, seed 0, all images.

    Equal to what `kd pretrain-teacher` resolves to with the same settings, so that a teacher is found again.
    """
    method, values = methods.settings(spec)
    train = spec.train
    # What the recipe left open is left open again, to be filled in for the teacher; what the user set stays.
    nesterov = None if train.nesterov == method.nesterov else train.nesterov
    data = spec.data.model_copy(update={"ratio": 1.0})
    system = spec.system.model_copy(update={"out": None, "overwrite": False})
    train = train.model_copy(update={"lr": train.teacher_lr, "teacher_lr": None, "nesterov": nesterov})
    raw = spec.model_copy(
        update={
            "command": "pretrain-teacher",
            "method": values.model_dump(mode="json"),
            "seed": 0,
            "data": data,
            "system": system,
            "train": train,
        }
    )
    return methods.resolve(raw)


def find(spec: RunSpec) -> tuple[RunSpec, Path | None]:
    """The spec of the teacher that fits, and its finished checkpoint under the runs folder, if it is there."""
    wanted = spec_for(spec)
    directory = directory_for(wanted, digest_of(identity(wanted)))
    file = directory / "teacher.safetensors"
    finished = (directory / "summary.json").is_file() and file.is_file()
    return wanted, file if finished else None


def command_for(wanted: RunSpec) -> str:
    """The shell command that trains this teacher, with every setting in which it differs from the standard recipe."""
    words = {"method": wanted.method["name"], "teacher": wanted.teacher, "data.dataset": wanted.data.dataset}
    bare = methods.resolve(presets.resolve("pretrain-teacher", Request(words, [], [], False, False, False)))
    standard, mine = flat(bare.identity()), flat(wanted.identity())
    mine |= {"data.data_dir": wanted.data.data_dir, "system.runs_dir": wanted.system.runs_dir}
    standard |= {"data.data_dir": None, "system.runs_dir": "runs"}
    parts = ["kd pretrain-teacher"]
    parts += ["--method", shlex.quote(words["method"]), "--teacher", wanted.teacher or ""]
    parts += ["--dataset", shlex.quote(words["data.dataset"])]
    flags = {path: f"--{leaf.replace('_', '-')}" for leaf, path in field_paths().items()}
    for path, value in mine.items():
        if value == standard.get(path):
            continue
        if path in flags and isinstance(value, int | float | str) and not isinstance(value, bool):
            parts += [flags[path], shlex.quote(str(value))]
        else:
            parts += ["--set", shlex.quote(f"{path}={json.dumps(value)}")]
    return " ".join(parts)


def check(loaded: Loaded, spec: RunSpec, classes: int) -> None:
    """Refuse a teacher whose main head or input scale is not what the method needs.

    Raises:
        IncompatibleError: with the command that makes a fitting teacher.
    """
    method, values = methods.settings(spec)
    outputs = method.teacher_outputs(values, classes)
    command = command_for(spec_for(spec.model_copy(update={"teacher": loaded.backbone.arch})))
    if loaded.backbone.outputs != outputs:
        raise IncompatibleError(
            f"{loaded.path} has {loaded.backbone.outputs} outputs and the method {spec.method['name']} needs {outputs}",
            field="--teacher",
            hint=f"make one that fits: {command}",
        )
    wanted: dict[str, Any] = method.inference(values, "teacher")
    if replace(loaded.use, scale_mode="") != replace(type(loaded.use)(**wanted), scale_mode=""):
        raise IncompatibleError(
            f"{loaded.path} was trained for transform {loaded.use.transform} at scale {loaded.use.scale}, the method is "
            f"set to {wanted['transform']} at scale {wanted['scale']}",
            field="--teacher",
            hint=f"make one that fits: {command}",
        )


def refuse_pth(spec: RunSpec) -> None:
    """Training commands read no pickles.

    Raises:
        UsageError: the teacher is a `.pth` or `.pt` file.
    """
    if spec.teacher is not None and spec.teacher.endswith((".pth", ".pt", ".bin", ".tar")):
        raise UsageError(
            f"{spec.teacher} is not a kd checkpoint",
            field="--teacher",
            hint=f"first: kd import {spec.teacher} --arch ARCH --out teacher.safetensors",
        )
