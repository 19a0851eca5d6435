"""LSKD: any logit method on standardised logits, so that the student need not match the teacher's logits in size.

`--set method.inner.name=NAME` chooses the method (kd by default) and `--set method.inner.KEY=VALUE` its settings.

Equation: L = a · CE(s, y) + b · D_T(z(s), z(t)), z(x) = (x - mean(x)) / (std(x) + 1e-7) over the K classes of each image, D_T
    the terms of the inner method at temperature T and a its weight of the cross-entropy.
Reductions: those of the inner method; the standard deviation is the unbiased one (K-1).
Source: Sun et al. 2024, arXiv 2403.01427; losses equal to those of the released code around kd, dkd and mlkd:
    T = 2, b = 9, others for some pairs (its training logs); a is the inner method's (0.1 for kd and mlkd, 1 for dkd).
Tensors: those of the inner method; gradients pass through the mean and standard deviation of the student's logits.
Cost: that of the inner method.
Our reading: around mlkd only the instance level is standardised, while b weighs all three levels, as in the released code;
    around dist and nkd, which nobody published, all probabilities are those of standardised logits. Around dkd b multiplies
    α and β, as in the latest released code (an earlier one squared it and left T at 4).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor

from kdcli import methods
from kdcli.data.loader import Batch
from kdcli.errors import IncompatibleError, UsageError
from kdcli.losses import exact
from kdcli.methods.base import Method, MethodSpec, Progress, Setting
from kdcli.methods.logits import LogitMethod, LogitSpec
from kdcli.models.features import Features
from kdcli.models.heads import Headed
from kdcli.models.network import Network
from kdcli.models.panel import Panel
from kdcli.specs import TrainSpec, validate

# Settings of the inner method that LSKD's own take the place of.
GOVERNED = {
    "kd_weight": "weight",
    "temperature": "temperature",
    "teacher_scale": "teacher_scale",
    "scale_mode": "scale_mode",
}
# (T, weight) by inner method and pair, where the training logs deviate from (2, 9).
PAIRS: dict[str, dict[tuple[str, str], tuple[float, float]]] = {
    "kd": {
        ("vgg13", "vgg8"): (3, 9),
        ("vgg13", "mobilenetv2"): (3, 9),
        ("resnet32x4", "wrn16_2"): (3, 9),
        ("resnet32x4", "wrn40_2"): (3, 9),
        ("wrn40_2", "mobilenetv2"): (3, 9),
        ("resnet50", "mobilenetv2"): (3, 1),
        ("resnet110", "resnet20"): (4, 12),
    },
    "dkd": {
        ("vgg13", "vgg8"): (2, 15),
        ("vgg13", "mobilenetv2"): (3, 9),
        ("wrn40_2", "wrn16_2"): (2, 12),
        ("wrn40_2", "wrn40_1"): (2, 12),
        ("wrn40_2", "resnet8x4"): (2, 18),
        ("wrn40_2", "mobilenetv2"): (2, 15),
        ("resnet50", "mobilenetv2"): (2, 15),
        ("resnet56", "resnet20"): (3, 18),
        ("resnet110", "resnet20"): (2, 15),
        ("resnet110", "resnet32"): (2, 15),
    },
    "mlkd": {
        ("vgg13", "vgg8"): (2, 6),
        ("vgg13", "mobilenetv2"): (2, 6),
        ("resnet32x4", "shufflenetv2"): (2, 6),
    },
}
# Settings of the inner method in the same logs: all dkd runs with a (T, weight) of their own have β = 2, and one more.
INNER: dict[str, dict[tuple[str, str], dict[str, Any]]] = {
    "dkd": {pair: {"beta": 2.0} for pair in [*PAIRS["dkd"], ("resnet32x4", "wrn16_2")]},
}
# On ImageNet the released configuration of kd weighs the cross-entropy by 1.
IMAGENET: dict[str, dict[str, Any]] = {"kd": {"ce_weight": 1.0}}


class LSKDSpec(MethodSpec):
    """Settings of LSKD."""

    name: str = "lskd"
    """The method's name."""
    inner: dict[str, Any] = Field(default={"name": "kd"})
    """Name and settings of the logit method that compares the standardised logits, its `ce_weight` included."""
    temperature: float = Field(default=2.0, gt=0, le=1000)
    """T of the inner method."""
    weight: float = Field(default=9.0, ge=0)
    """Weight b of the inner method's terms (the place of its `kd_weight`)."""

    @field_validator("inner")
    @classmethod
    def _complete(cls, given: dict[str, Any]) -> dict[str, Any]:
        """With every default of the inner method visible."""
        return validated(given)[1].model_dump(mode="json", exclude=set(GOVERNED))


class LSKD(Method):
    """The inner method's loss, its instance-level logits standardised, its terms weighed by `weight`."""

    Spec: ClassVar[type[MethodSpec]] = LSKDSpec

    def __init__(
        self, spec: LSKDSpec, setting: Setting, student: Network | None, teacher: Network | Headed | Panel | None
    ) -> None:
        super().__init__(spec, setting, student, teacher)
        if setting.classes < 3:
            raise IncompatibleError(
                "lskd needs three classes: standardised, two logits keep nothing but their order",
                field="method",
                hint="kd does the same with raw logits",
            )
        method, values = inner(spec)
        self.inner = method(values, setting, student, teacher)
        self.inner.prepare = standardise

    @classmethod
    def check(cls, spec: Any) -> None:
        """What the inner method checks."""
        method, values = inner(spec)
        method.check(values)

    @classmethod
    def for_pair(cls, given: dict[str, Any], teacher: str, student: str, dataset: str) -> dict[str, Any]:
        """T and weight of the pair with the inner method that the user chose, and that method's settings."""
        chosen = given.get("inner", {})
        method, name = logit_method(chosen), chosen.get("name", "kd")
        found = method.for_pair(chosen, teacher, student, dataset)
        settings = {key: value for key, value in found.items() if key not in GOVERNED}
        if dataset == "imagenet":
            return {"inner": settings | IMAGENET.get(name, {})}
        settings |= INNER.get(name, {}).get((teacher, student), {})
        temperature, weight = PAIRS.get(name, {}).get((teacher, student), (2, 9))
        return {"temperature": float(temperature), "weight": float(weight), "inner": settings}

    @classmethod
    def augmentations(cls, spec: Any) -> tuple[Literal["crop", "strong"], ...]:
        """Those of the inner method."""
        method, values = inner(spec)
        return method.augmentations(values)

    @classmethod
    def student_outputs(cls, spec: Any, classes: int) -> int:
        """That of the inner method."""
        method, values = inner(spec)
        return method.student_outputs(values, classes)

    @classmethod
    def teacher_outputs(cls, spec: Any, classes: int) -> int:
        """That of the inner method."""
        method, values = inner(spec)
        return method.teacher_outputs(values, classes)

    @classmethod
    def teacher_settings(cls, spec: Any) -> dict[str, Any]:
        """The inner method's: the same teacher serves with and without standardisation."""
        method, values = inner(spec)
        return method.teacher_settings(values)

    @classmethod
    def teacher_recipe(cls, spec: Any, recipe: TrainSpec) -> TrainSpec:
        """The inner method's."""
        method, values = inner(spec)
        return method.teacher_recipe(values, recipe)

    def student_views(self, batch: Batch, progress: Progress) -> Tensor:
        """Those of the inner method."""
        return self.inner.student_views(batch, progress)

    def teacher_views(self, batch: Batch, progress: Progress) -> Tensor:
        """Those of the inner method."""
        return self.inner.teacher_views(batch, progress)

    def loss(self, batch: Batch, student: Features, teacher: Features | None, progress: Progress) -> dict[str, Tensor]:
        """The terms of the inner method."""
        return self.inner.loss(batch, student, teacher, progress)

    def teacher_loss(self, batch: Batch, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """That of the inner method."""
        return self.inner.teacher_loss(batch, teacher, progress)


def standardise(logits: Tensor) -> Tensor:
    """[B,K] → each row with mean 0 and (unbiased) standard deviation 1; the gradient passes through both statistics."""
    z = exact(logits)
    return (z - z.mean(1, keepdim=True)) / (1e-7 + z.std(1, keepdim=True))


def inner(spec: LSKDSpec) -> tuple[type[LogitMethod], LogitSpec]:
    """The inner method and its settings, those that LSKD governs included."""
    method, values = validated(spec.inner)
    return method, values.model_copy(update={theirs: getattr(spec, ours) for theirs, ours in GOVERNED.items()})


def validated(given: dict[str, Any]) -> tuple[type[LogitMethod], LogitSpec]:
    """The inner method and its settings as given.

    Raises:
        UsageError: no logit method, an unknown or invalid setting, or one that LSKD's own takes the place of.
    """
    method = logit_method(given)
    for theirs, ours in GOVERNED.items():
        if theirs in given:
            raise UsageError("is set by lskd", field=f"method.inner.{theirs}", hint=f"set method.{ours}")
    return method, validate(method.Spec, {"name": "kd", **given}, prefix="method.inner")


def logit_method(given: Any) -> type[LogitMethod]:
    """The class of the inner method that `given` names; kd where it names none.

    Raises:
        UsageError: it names no logit method, or one that wants assistants.
    """
    if not isinstance(given, dict):
        raise UsageError(f"is a table of settings, not {given!r}", field="method.inner", hint="method.inner.name=kd")
    name = given.get("name", "kd")
    try:
        method = methods.method_class(str(name))
    except UsageError:
        method = Method
    if not _fits(method):
        known = [other for other in methods.SHIPPED if _fits(methods.method_class(other))]
        raise UsageError(f"{name!r} is no logit method", field="method.inner.name", hint=f"one of {', '.join(known)}")
    return method  # type: ignore[return-value]


def _fits(method: type[Method]) -> bool:
    return issubclass(method, LogitMethod) and method.assistants == "none"
