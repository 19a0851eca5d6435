"""The distillation methods by name: shipped ones (a file each), a user's own file, or a package's entry point."""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli.errors import USERS, InputError, KdError, UsageError, nearest
from kdcli.specs import RunSpec, TrainSpec, validate

if TYPE_CHECKING:
    from kdcli.methods.base import Method, MethodSpec

# Name → one line for `kd list methods`; a name is also the module's, so that listing imports nothing.
SHIPPED = {
    "none": "the student alone, trained on the labels",
    "kd": "softened logits (Hinton et al. 2015)",
    "dml": "untrained peers that learn from each other, without a teacher (Zhang et al. 2018)",
    "takd": "a chain of assistants, each the teacher of the next (Mirzadeh et al. 2020)",
    "dgkd": "teacher and assistants teaching together (Son et al. 2021)",
    "fitnet": "a map of the teacher regressed from the student's (Romero et al. 2015)",
    "at": "attention transfer: where each stage's maps are large (Zagoruyko & Komodakis 2017)",
    "sp": "similarities between the images of a batch (Tung & Mori 2019)",
    "rkd": "distances and angles between the images of a batch (Park et al. 2019)",
    "vid": "variational information distillation of the maps (Ahn et al. 2019)",
    "pkt": "probabilistic knowledge transfer between the images of a batch (Passalis & Tefas 2018)",
    "nst": "neuron selectivity transfer: the channels' distribution (Huang & Wang 2017)",
    "crd": "contrast of embeddings against memory banks (Tian et al. 2020)",
    "ofd": "maps before their ReLU, their negative part down to a margin (Heo et al. 2019)",
    "reviewkd": "maps fused from deep to shallow, compared at several scales (Chen et al. 2021)",
    "dkd": "target and non-target classes decoupled (Zhao et al. 2022)",
    "nkd": "normalised non-target distribution and soft target (Yang et al. 2023)",
    "dist": "correlations between and within classes (Huang et al. 2022)",
    "mlkd": "logits aligned by instance, batch and class on two views (Jin et al. 2023)",
    "lskd": "any logit method on standardised logits (Sun et al. 2024)",
    "catkd": "class activation maps (Guo et al. 2023)",
    "ofa": "logits of the student's stages in the teacher's logit space, for any two families (Hao et al. 2023)",
    "tas": "a hybrid assistant, spliced from both networks' stages, between any two families (TAS, later FBT)",
    "sskd": "similarities of rotated to upright images, beside the logits (Xu et al. 2020)",
    "hsakd": "auxiliary heads over classes and rotations on every stage (Yang et al. 2021)",
    "slkd": "self-learning teachers, fresh copies of the teacher that learn beside the student (Liu et al. 2023)",
    "rekd": "regions in place of points: Gaussians around the teacher's maps, to choose from (our reading)",
    "vsd": "variable scale distillation: rotated images at twice the size, joint labels, hierarchical heads",
}


def known() -> dict[str, str]:
    """Every method by name with a one-line description: the shipped ones and those of the group `kdcli.methods`."""
    plugged = {point.name: f"from {point.value}" for point in entry_points(group="kdcli.methods")}
    return {**plugged, **SHIPPED}


def method_class(name: str) -> type[Method]:
    """The Method class called `name`, a path to a Python file that defines one, or an entry point's name.

    Raises:
        UsageError: there is no such method, or the file defines none or several.
        InputError: the file cannot be imported.
    """
    from kdcli.methods.base import Method

    if name in SHIPPED:
        module = importlib.import_module(f"kdcli.methods.{name}")
    elif name.endswith(".py"):
        module = _import_file(Path(name))
    else:
        for point in entry_points(group="kdcli.methods"):
            if point.name == name:
                return point.load()
        raise UsageError(f"no method named {name!r}", field="method", hint=nearest(name, known()))
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise UsageError(f"{name} defines {len(found)} Method classes", field="method", hint="define exactly one")
    return found[0]


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"no such file: {path}", field="method", hint="give the path of a Python file")
    spec = importlib.util.spec_from_file_location(USERS + path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as problem:
        raise InputError(f"{path} cannot be imported: {type(problem).__name__}: {problem}", field="method") from None
    return module


def settings(spec: RunSpec) -> tuple[type[Method], MethodSpec]:
    """The method's class and its validated settings.

    Raises:
        UsageError: a setting is unknown or out of range, named with its dotted path.
    """
    return _settings(spec.method)


def _settings(given: dict[str, Any], pair: dict[str, Any] | None = None) -> tuple[type[Method], MethodSpec]:
    method = method_class(given["name"])
    values: MethodSpec = validate(method.Spec, _over(pair or {}, given), prefix="method")
    method.check(values)
    return method, values


def _over(base: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` laid over `base`, table by table (lskd has a table of its inner method's settings)."""
    tables = {k: _over(base[k], v) for k, v in given.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | given | tables


def _for_pair(spec: RunSpec) -> dict[str, Any]:
    """What the literature chose for the spec's two networks; nothing where there are not two."""
    if spec.command != "distill" or spec.student is None or spec.teacher is None:
        return {}
    method = method_class(spec.method["name"])
    return method.for_pair(spec.method, architecture(spec.teacher), spec.student, spec.data.dataset)


def architecture(network: str) -> str:
    """The registry name of a network given by name, checkpoint or run directory."""
    if not Path(network).exists():
        return _name_or_none(network)
    from kdcli import checkpoint

    try:
        metadata = checkpoint.read_metadata(checkpoint.locate(network))
    except KdError:  # told, with the way out, when the teacher is loaded
        return ""
    arch = metadata.get("arch")  # of a file that nobody has checked yet
    return str(arch.get("name", "")) if isinstance(arch, dict) else ""


def resolve(spec: RunSpec) -> RunSpec:
    """`spec` with every default visible: the method's settings (those of its pair where the literature has any), and what
    the recipe leaves to pair and method.

    A teacher's spec keeps only what its training depends on, so that equal teachers have equal digests.

    Raises:
        UsageError: a setting is invalid, or the method takes no teacher and one was given (or the reverse).
    """
    from kdcli.models.names import canonical

    method, values = _settings(spec.method, _for_pair(spec))
    train = spec.train

    explicit = train.lr
    changes: dict[str, Any] = {}
    if train.nesterov is None:
        changes["nesterov"] = method.nesterov_on(spec.data.dataset)
    update: dict[str, Any] = {}
    if spec.command == "pretrain-teacher":
        assert spec.teacher is not None
        teacher_method = method.teacher_settings(values)
        teacher_class = method_class(teacher_method["name"])
        _check_mixing(spec, teacher_class, teacher_method["name"])
        if train.nesterov is None:
            changes["nesterov"] = teacher_class.nesterov_on(spec.data.dataset)
        values = validate(teacher_class.Spec, teacher_method, prefix="method")
        grown = teacher_class.teacher_backbone(values) is not None and Path(spec.teacher).exists()
        name = spec.teacher if grown else canonical(spec.teacher, field="teacher")
        changes |= {"lr": explicit or standard_rate(train, architecture(name)), "teacher_lr": None}
        update |= {"teacher": name, "student": None, "student_taps": None, "assistant": ()}
        update |= {"pretrained": spec.pretrained or spec.teacher_pretrained, "teacher_pretrained": False}
        update["data"] = spec.data.model_copy(update={"ratio": 1.0})
    else:
        assert spec.student is not None
        _check_mixing(spec, method, spec.method["name"])
        if spec.teacher is not None and not method.needs_teacher:
            raise UsageError(
                f"the method {spec.method['name']} takes no teacher", field="--teacher", hint="leave it out"
            )
        if spec.teacher is None and method.needs_teacher:
            raise UsageError(
                f"the method {spec.method['name']} needs a teacher",
                field="--teacher",
                hint="name an architecture, a checkpoint or a run directory",
            )
        if spec.assistant and method.assistants == "none":
            raise UsageError(
                f"the method {spec.method['name']} takes no assistants", field="--assistant", hint="takd and dgkd do"
            )
        if spec.assistant and values.teacher_scale != 1:
            raise UsageError(
                "assistants see images as the student does, so they cannot teach at another scale",
                field="method.teacher_scale",
                hint="leave out --teacher-scale or --assistant",
            )
        if not method.needs_teacher and getattr(values, "teacher_scale", 1) != 1:
            raise UsageError(
                f"the method {spec.method['name']} has no teacher whose images could be enlarged",
                field="method.teacher_scale",
                hint="leave it out",
            )
        changes["lr"] = explicit or standard_rate(train, spec.student)
        if method.needs_teacher and spec.teacher is not None:
            name = "" if Path(spec.teacher).exists() else _name_or_none(spec.teacher)
            changes["teacher_lr"] = train.teacher_lr or explicit or standard_rate(train, name)
            update["teacher"] = name or spec.teacher  # one spelling, so that WRN-40-2 and wrn40_2 are the same run
        else:
            changes["teacher_lr"] = None
    update["method"] = values.model_dump(mode="json")
    update["train"] = train.model_copy(update=changes)
    return spec.model_copy(update=update)


def _check_mixing(spec: RunSpec, method: type[Method], name: str) -> None:
    """Refuse mixed images where a loss of the method could not say what they show."""
    if spec.data.mixes and not method.mixes:
        raise UsageError(
            f"the method {name} cannot learn from mixed images",
            field="--mixup" if spec.data.mixup > 0 else "--cutmix",
            hint="--mixup 0 --cutmix 0",
        )


def standard_rate(train: TrainSpec, network: str) -> float:
    """The recipe's learning rate for a network by its registry name."""
    from kdcli.models.names import LIGHT

    return train.light_lr if network in LIGHT else train.base_lr


def _name_or_none(teacher: str) -> str:
    from kdcli.models.names import canonical

    try:
        return canonical(teacher)
    except UsageError:  # a path: the learning rate is not needed
        return ""
