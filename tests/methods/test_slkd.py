"""SLKD against its released code, Table 7's lessons, training in parallel and in sequence, and what is followed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from golden import PRECISIONS, PROGRESS, Case, batch, features, near, setting
from harness import TINY, Kd
from safetensors.torch import load_file
from torch import Tensor, nn

from kdcli import checkpoint
from kdcli.engine.device import Device
from kdcli.engine.step import StudentStep
from kdcli.errors import IncompatibleError, UsageError
from kdcli.inference import Use
from kdcli.methods import resolve
from kdcli.methods.kd import KD, KDSpec
from kdcli.methods.slkd import SLKD, SLKDSpec
from kdcli.models import build
from kdcli.models.features import Features
from kdcli.models.network import Network
from kdcli.models.panel import Panel
from kdcli.specs import RunSpec, validate
from kdcli.transforms import rescale

T = 4.0


def networks(student: str = "resnet8", teacher: str = "resnet14") -> tuple[Network, Network]:
    """A student in training and a frozen teacher for five classes."""
    torch.manual_seed(0)
    return build(student, 5).train(), build(teacher, 5).eval().requires_grad_(False)


def taught(s: Tensor, own: Sequence[Tensor] = ()) -> Features:
    """Features of a network beside which others made `own`."""
    return replace(features(s), assistants=tuple(features(z) for z in own))


def toy(n: int) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Student, teacher and n self-learning teachers: logits [6,9]; and labels."""
    generator = torch.Generator().manual_seed(3)
    s, t, *own = (2 * torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2 + n))
    return s.requires_grad_(), t, [z.requires_grad_() for z in own], torch.arange(6)


def kl(p: Tensor, q: Tensor, temperature: float = T) -> float:
    """T² · KL(softmax(p/T) ‖ softmax(q/T)), from its definition."""
    one, other = (z.detach().div(temperature).softmax(1) for z in (p, q))
    return float((one * (one / other).log()).sum() / len(p) * temperature**2)


def ce(z: Tensor, y: Tensor) -> float:
    return float(-z.detach().softmax(1)[torch.arange(len(y)), y].log().mean())


# ------------------------------------------------------------------------------------------------- the reference numbers


@PRECISIONS
@pytest.mark.parametrize("detach", [False, True])
def test_the_released_loss_and_its_gradients(dtype: torch.dtype, tolerance: float, detach: bool) -> None:
    """Every part, the sum, and the gradients of the student and of both self-learning teachers, with and without detach."""
    case = Case("slkd")
    hyper = case.hyper
    spec = SLKDSpec(
        detach=detach,
        fusion=hyper["fusion"],
        ce_share=hyper["ce_weight"],
        temperature=hyper["T"],
        process_weight=hyper["process_weight"],
        process_ce=hyper["ce_weight_cs"],
        process_kd=hyper["kd_weight_cs"],
    )
    s, *own = (case.input(f"{name}_logits", dtype, learns=True) for name in ("student", "slt1", "slt2"))
    t = features(case.input("teacher_logits", dtype))
    terms = SLKD(spec, setting(20), None, None).loss(batch(case.input("target")), taught(s, own), t, PROGRESS)
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    assert near(total, case.loss or 0.0, tolerance)
    parts = case.components
    assert near(terms["ce"], parts["loss_ce"], tolerance)
    assert near(terms["kd"], parts["loss_kd"], tolerance)
    assert near(terms["self_ce"] + terms["self_kd"], parts["loss_kd_tc"], tolerance)
    assert near(terms["process_ce"] + terms["process_kd"], parts["loss_kd_cs"], tolerance)
    assert s.grad is not None
    assert near(s.grad, case.gradient("student_logits"), tolerance)
    for i, z in enumerate(own, 1):
        wanted = case.output(f"grad_detached_slt{i}_logits") if detach else case.gradient(f"slt{i}_logits")
        assert z.grad is not None
        assert near(z.grad, wanted, tolerance)


def test_the_defaults_are_those_of_the_reference() -> None:
    """Two fused in equal parts, not detached, and the weights of CIFAR."""
    hyper, spec = Case("slkd").hyper, SLKDSpec()
    assert (spec.ce_share, spec.temperature, spec.process_weight) == (hyper["ce_weight"], hyper["T"], 1.0)
    assert (spec.process_ce, spec.process_kd) == (hyper["ce_weight_cs"], hyper["kd_weight_cs"])
    assert (spec.self_teachers, spec.detach) == (2, False)
    assert SLKD(spec, setting(20), None, None).fusion == tuple(hyper["fusion"])


# ------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize(
    ("count", "fusion", "shares"),
    [(1, (), (1,)), (2, (), (0.5, 0.5)), (3, (), (1 / 3,) * 3), (3, (1, 2, 5), (0.125, 0.25, 0.625))],
)
def test_every_term_by_its_formula(count: int, fusion: tuple[float, ...], shares: tuple[float, ...]) -> None:
    """N networks, weights of the fusion relative to their sum, and every weight of the settings."""
    s, t, own, y = toy(count)
    spec = SLKDSpec(
        self_teachers=count, fusion=fusion, ce_share=0.3, temperature=2, process_weight=5, process_ce=3, process_kd=7
    )
    terms = SLKD(spec, setting(9), None, None).loss(batch(y), taught(s, own), features(t), PROGRESS)
    fused = torch.stack([w * z for w, z in zip(shares, own, strict=True)]).sum(0)
    wanted = {
        "ce": 0.3 * ce(s, y),
        "kd": 0.7 * kl(t, s, 2),
        "process_ce": 5 * 3 * ce(s, y),
        "process_kd": 5 * 7 * kl(fused, s, 2),
        "self_ce": 0.3 * sum(ce(z, y) for z in own),
        "self_kd": 0.7 * sum(kl(t, z, 2) for z in own),
    }
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("detach", [False, True])
def test_detach_keeps_the_students_term_from_the_self_learning_teachers(detach: bool) -> None:
    """The value is the same; only released, the gradient reaches them, through the fusion's weights."""
    s, t, own, y = toy(2)
    method = SLKD(SLKDSpec(detach=detach, fusion=(1, 3)), setting(9), None, None)
    term = method.loss(batch(y), taught(s, own), features(t), PROGRESS)["process_kd"]
    one, other = torch.autograd.grad(term, own, allow_unused=True)
    assert term.item() == pytest.approx(kl(0.25 * own[0] + 0.75 * own[1], s))
    if detach:
        assert one is other is None
    else:
        assert one is not None
        assert one.abs().max() > 1e-3
        assert torch.allclose(3 * one, other)


def test_mixed_images_and_smoothed_labels_reach_every_cross_entropy() -> None:
    """The targets are each image's shares of the classes, for the student and for the self-learning teachers."""
    s, t, own, y = toy(2)
    soft = torch.full((6, 9), 0.02, dtype=torch.float64).scatter(1, y[:, None], 0.84)
    mixed = replace(batch(y), soft=soft)
    method = SLKD(SLKDSpec(), setting(9, label_smoothing=0.1), None, None)
    terms = method.loss(mixed, taught(s, own), features(t), PROGRESS)
    target = 0.9 * soft + 0.1 / 9

    def against(z: Tensor) -> float:
        return float(-(target * z.detach().log_softmax(1)).sum(1).mean())

    assert terms["process_ce"].item() == pytest.approx(against(s), rel=1e-10)
    assert terms["self_ce"].item() == pytest.approx(0.1 * sum(map(against, own)), rel=1e-10)


# ------------------------------------------------------------------------------------------------------ whose lessons


class Counted(nn.Module):
    """Counts the passes of a network."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network, self.passes = network, 0

    def features(self, x: Tensor) -> Features:
        self.passes += 1
        return self.network.features(x)


def test_the_teacher_alone_is_plain_kd() -> None:
    """No self-learning teacher is built or run, whatever the training; terms and numbers are KD's with the same weights."""
    student, teacher = networks()
    for training in ("parallel", "sequential"):
        spec = SLKDSpec(taught_by="teacher", training=training)
        method = SLKD(spec, setting(5), student, teacher)
        assert not list(method.parameters())
        assert not list(method.buffers())
        assert SLKD.prepared(spec) == ()
        s, t, _, y = toy(0)
        outcome = method.outcome(batch(y), taught(s), features(t), PROGRESS)
        plain = KD(KDSpec(), setting(9), None, None).loss(batch(y), features(s), features(t), PROGRESS)
        assert {k: v.item() for k, v in outcome.terms.items()} == pytest.approx({k: v.item() for k, v in plain.items()})
        assert set(outcome.followed) == {"kl_teacher_student"}
        assert method.student_features(student, torch.randn(2, 3, 32, 32)).assistants == ()


def test_the_self_learning_teachers_alone() -> None:
    """The teacher's whole lesson is left out for the student, and the self-learning teachers still learn from the teacher."""
    s, t, own, y = toy(1)
    terms = {}
    for taught_by in ("both", "self-learning"):
        method = SLKD(SLKDSpec(self_teachers=1, taught_by=taught_by), setting(9), None, None)
        terms[taught_by] = method.loss(batch(y), taught(s, own), features(t), PROGRESS)
    alone = terms["self-learning"]
    assert set(terms["both"]) - set(alone) == {"ce", "kd"}
    assert all(torch.equal(alone[name], terms["both"][name]) for name in alone)
    assert alone["process_ce"].item() == pytest.approx(ce(s, y))
    assert alone["self_kd"].item() == pytest.approx(0.9 * kl(t, own[0]))


@pytest.mark.parametrize("count", [1, 3])
def test_self_learning_teachers_are_fresh_and_differ(count: int) -> None:
    """The teacher's architecture, other weights, each its own; one pass each in training mode; gradients in one backward."""
    student, teacher = networks()
    method = SLKD(SLKDSpec(self_teachers=count), setting(5), student, teacher).train()
    assert [network.arch for network in method.self_teachers] == ["resnet14"] * count
    weights = [network.state_dict()["conv1.weight"] for network in (teacher, *method.self_teachers)]
    assert not any(torch.equal(weights[i], weights[j]) for i in range(count + 1) for j in range(i))
    counted = [Counted(network) for network in method.self_teachers]
    method.self_teachers = nn.ModuleList(counted)
    step = StudentStep(method, student, teacher, Use(), Device(torch.device("cpu"), "fp32", 1)).train()
    here = replace(batch(torch.tensor([0, 4])), images=torch.randn(2, 3, 32, 32))
    step(here, PROGRESS).total.backward()
    assert [network.passes for network in counted] == [1] * count
    assert all(p.grad is not None for p in step.parameters())
    for network in counted:
        assert {int(v) for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")} == {1}
    assert all(p.grad is None for p in teacher.parameters())


def test_self_learning_teachers_see_images_of_the_teachers_size() -> None:
    """With teacher_scale 2 they run on what the teacher sees, and down-sample as it does (vgg)."""
    torch.manual_seed(0)
    student = build("resnet8", 5)
    teacher = build("vgg8", 5, fixed_stride=True)
    method = SLKD(SLKDSpec(teacher_scale=2), setting(5, scale=2), student, teacher).eval()
    here = replace(batch(torch.tensor([1, 2])), images=torch.randn(2, 3, 32, 32))
    with torch.no_grad():
        found = method.student_features(student, method.student_views(here, PROGRESS))
        larger = method.teacher_views(here, PROGRESS)
        reference = teacher.features(larger)
        for network, seen in zip(method.self_teachers, found.assistants, strict=True):
            assert torch.equal(seen.logits, network(larger))
            assert [m.shape for m in seen.maps] == [m.shape for m in reference.maps]
    assert found.maps[0].shape[-1] == 32


def test_a_step_on_real_networks_is_its_formula() -> None:
    """The engine's step: the sum of the terms from the logits of networks of different families."""
    student, teacher = networks("shufflenetv2", "resnet8x4")
    method = SLKD(SLKDSpec(), setting(5), student, teacher).train()
    step = StudentStep(method, student, teacher, Use(), Device(torch.device("cpu"), "fp32", 1)).train()
    y = torch.tensor([0, 3, 1, 4])
    here = replace(batch(y), images=torch.randn(4, 3, 32, 32))
    with torch.no_grad():  # batch statistics: a second pass in training mode gives the same logits
        s, t = student(here.images), teacher(here.images)
        own = [network(here.images) for network in method.self_teachers]
    output = step(here, PROGRESS)
    wanted = 1.1 * ce(s, y) + 0.9 * kl(t, s) + kl((own[0] + own[1]) / 2, s)
    wanted += sum(0.1 * ce(z, y) + 0.9 * kl(t, z) for z in own)
    assert output.total.item() == pytest.approx(wanted, rel=1e-4)
    assert output.followed["kl_teacher_student"].item() == pytest.approx(kl(t, s), rel=1e-4)
    assert not any(value.requires_grad for value in output.followed.values())


# ---------------------------------------------------------------------------------------------------------- in sequence


def test_in_sequence_each_is_a_run_of_kd_beforehand() -> None:
    """With the same a and T; nothing is built beside the student."""
    spec = SLKDSpec(training="sequential", self_teachers=3, ce_share=0.7, temperature=2)
    assert SLKD.prepared(spec) == ({"name": "kd", "ce_weight": 0.7, "kd_weight": 0.3, "temperature": 2.0},) * 3
    assert SLKD.prepared(SLKDSpec()) == ()
    student, teacher = networks()
    method = SLKD(spec, setting(5), student, Panel(teacher, [teacher] * 3))
    assert not list(method.parameters())


@pytest.mark.parametrize("taught_by", ["both", "self-learning"])
def test_in_sequence_only_the_student_learns(taught_by: Any) -> None:
    """The same student's part as in parallel, and no term of the frozen networks, which are the teacher's assistants."""
    s, t, own, y = toy(2)
    parallel = SLKD(SLKDSpec(taught_by=taught_by, fusion=(3, 1)), setting(9), None, None)
    frozen = SLKD(SLKDSpec(taught_by=taught_by, fusion=(3, 1), training="sequential"), setting(9), None, None)
    together = parallel.outcome(batch(y), taught(s, own), features(t), PROGRESS)
    after = frozen.outcome(batch(y), features(s), taught(t, own), PROGRESS)
    assert set(together.terms) - set(after.terms) == {"self_ce", "self_kd"}
    assert all(torch.equal(after.terms[name], together.terms[name]) for name in after.terms)
    assert after.followed.keys() == together.followed.keys()
    assert all(torch.equal(after.followed[name], together.followed[name]) for name in after.followed)


def test_in_sequence_from_the_command_line(kd: Kd, tmp_path) -> None:
    """The self-learning teachers are runs of the teacher's architecture, named in the summary, followed, not exported."""
    words = ["--teacher", "resnet14", "--student", "resnet8", *TINY, "--epochs", "1", "--json"]
    result = kd("distill", "--method", "slkd", *words, "--set", "method.training=sequential", "--out", "run")
    assert result.code == 0, result.err
    told = result.json["teacher"]["assistants"]
    assert [one["arch"] for one in told] == ["resnet14", "resnet14"]
    for seed, one in enumerate(told):
        metadata = checkpoint.read_metadata(tmp_path / one["checkpoint"])
        assert (metadata["seed"], metadata["method"]["name"], metadata["method"]["kd_weight"]) == (seed, "kd", 0.9)
        assert metadata["teacher"]["digest"] == result.json["teacher"]["digest"]
    (line,) = (json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert set(line["terms"]) == {"ce", "kd", "process_ce", "process_kd"}
    assert 0 <= line["followed"]["top1_self2"] <= 100


# ------------------------------------------------------------------------------------------------------------- followed


def test_what_is_followed_by_its_formula() -> None:
    """Divergences with T², as in the loss, and shares of right answers in percent; constants."""
    s, t, own, y = toy(2)
    method = SLKD(SLKDSpec(fusion=(1, 3), temperature=2), setting(9), None, None)
    followed = method.outcome(batch(y), taught(s, own), features(t), PROGRESS).followed
    fused = 0.25 * own[0] + 0.75 * own[1]

    def top1(z: Tensor) -> float:
        return 100 * sum(int(row.argmax()) == int(label) for row, label in zip(z, y, strict=True)) / len(y)

    wanted = {
        "kl_teacher_student": kl(t, s, 2),
        "kl_fused_student": kl(fused, s, 2),
        "kl_teacher_self1": kl(t, own[0], 2),
        "kl_teacher_self2": kl(t, own[1], 2),
        "kl_teacher_fused": kl(t, fused, 2),
        "top1_self1": top1(own[0]),
        "top1_self2": top1(own[1]),
        "top1_fused": top1(fused),
    }
    assert {name: value.item() for name, value in followed.items()} == pytest.approx(wanted, rel=1e-6)
    assert not any(value.requires_grad for value in followed.values())


def test_self_learning_teachers_are_measured_on_request() -> None:
    """Off by default; on, each is shown the images enlarged as in training; nothing in sequence."""
    student, teacher = networks()
    assert SLKD(SLKDSpec(), setting(5), student, teacher).companions(student, teacher) == {}
    spec = SLKDSpec(evaluate_self_teachers=True, teacher_scale=2, scale_mode="nearest")
    method = SLKD(spec, setting(5, scale=2), student, teacher).eval()
    found = method.companions(student, teacher)
    x = torch.randn(2, 3, 32, 32)
    assert list(found) == ["self1", "self2"]
    for module, network in zip(found.values(), method.self_teachers, strict=True):
        assert torch.equal(module(x), network(rescale(x, 2, "nearest")))
    frozen = SLKDSpec(evaluate_self_teachers=True, training="sequential")
    assert SLKD(frozen, setting(5), student, teacher).companions(student, teacher) == {}


def test_a_run_records_the_trajectory_and_exports_the_student_alone(kd: Kd, tmp_path) -> None:
    """Followed values and, on request, the accuracies of the self-learning teachers, each epoch."""
    words = ["--teacher", "resnet14", "--student", "resnet8", *TINY, "--set", "method.evaluate_self_teachers=true"]
    result = kd("distill", "--method", "slkd", *words, "--out", "run", "--json")
    assert result.code == 0, result.err
    lines = [json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["train"]["loss"] == pytest.approx(sum(line["terms"].values()), abs=1e-6)
        assert line["terms"]["process_kd"] == pytest.approx(line["followed"]["kl_fused_student"], rel=1e-5)
        assert set(line["companions"]) == {"self1", "self2"}
    exported = load_file(tmp_path / "run/student.safetensors")
    assert set(exported) == set(build("resnet8", 10).state_dict())


# ------------------------------------------------------------------------------------------------- settings and refusals


def test_the_settings_of_a_data_set() -> None:
    """ImageNet's a and T, which the user's own win over; nothing for others."""
    assert SLKD.for_pair({}, "wrn40_2", "wrn16_2", "cifar100") == {}
    values = {
        "command": "distill",
        "teacher": "torchvision:resnet34",
        "student": "torchvision:resnet18",
        "data": {"dataset": "imagenet"},
    }
    for own, wanted in (({}, (0.5, 1.0)), ({"temperature": 3.0}, (0.5, 3.0))):
        spec = RunSpec.model_validate({**values, "method": {"name": "slkd", **own}})
        method = resolve(spec).method
        assert (method["ce_share"], method["temperature"]) == wanted
        made = SLKD.prepared(SLKDSpec.model_validate({**method, "training": "sequential"}))
        assert {(one["ce_weight"], one["kd_weight"], one["temperature"]) for one in made} == {(0.5, 0.5, wanted[1])}


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"self_teachers": 0}, "method.self_teachers"),
        ({"fusion": [0.5, -0.5]}, "method.fusion.1"),
        ({"fusion": [1.0, 0.0]}, "method.fusion.1"),
        ({"fusion": [0.2, 0.3, 0.5]}, "method.fusion"),
        ({"ce_share": 1.5}, "method.ce_share"),
        ({"temperature": 0}, "method.temperature"),
        ({"training": "sequential", "teacher_scale": 2}, "method.training"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any], field: str) -> None:
    """Exit code 2, named, before anything is loaded."""
    with pytest.raises(UsageError) as problem:
        SLKD.check(validate(SLKDSpec, given, prefix="method"))
    assert problem.value.field == field


def test_a_teacher_of_other_classes_is_refused() -> None:
    """Exit code 4."""
    with pytest.raises(IncompatibleError, match="outputs") as problem:
        SLKD(SLKDSpec(), setting(5), build("resnet8", 5), build("resnet14", 3))
    assert problem.value.code == 4
