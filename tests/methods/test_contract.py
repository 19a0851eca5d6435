"""What every shipped method promises, whatever the pair: one training step of its student and of its teacher."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdcli import methods, teachers
from kdcli.building import make_method, make_network, make_teacher
from kdcli.data.dataset import DataSet, Split
from kdcli.data.loader import Batch
from kdcli.engine import optim
from kdcli.engine.device import Device
from kdcli.engine.state import pack, unpack
from kdcli.engine.step import Step, StepOutput, StudentStep, TeacherStep, deploy
from kdcli.errors import IncompatibleError
from kdcli.inference import Use
from kdcli.methods.base import Progress
from kdcli.models import build
from kdcli.models.heads import Headed
from kdcli.networks import tensors_of
from kdcli.specs import RunSpec

CPU = Device(torch.device("cpu"), "fp32", 1)
PROGRESS = Progress(torch.tensor(1.0), torch.tensor(0.0), odd_step=False)
K = 10
# The ten pairs of VSD's Tables 2 and 3, and one with tokens. The first runs in the normal tests, the others are slow.
PAIRS = [
    ("wrn40_2", "wrn16_2"),
    ("wrn40_2", "wrn40_1"),
    ("resnet56", "resnet20"),
    ("resnet32x4", "resnet8x4"),
    ("vgg13", "vgg8"),
    ("vgg13", "mobilenetv2"),
    ("resnet50", "mobilenetv2"),
    ("resnet32x4", "shufflenetv1"),
    ("resnet32x4", "shufflenetv2"),
    ("wrn40_2", "shufflenetv1"),
    ("timm:vit_tiny_patch16_224", "resnet20"),
]
# What a method truly cannot do: it must say so (exit code 4) before anything is trained.
REFUSED: dict[tuple[str, str], str] = {
    ("ofd", "timm:vit_tiny_patch16_224"): "no BatchNorm",
    ("catkd", "timm:vit_tiny_patch16_224"): "not the mean of a map",
}


def cases(role: str) -> list[Any]:
    """Every shipped method with every pair (role student), or with every teacher it trains itself (role teacher)."""
    found, seen = [], set()
    for name in methods.SHIPPED:
        method = methods.method_class(name)
        if role == "teacher" and method.teacher_settings(method.Spec())["name"] != name:
            continue
        for number, (teacher, student) in enumerate(PAIRS):
            taught = method.needs_teacher or role == "teacher"
            pair = (teacher if taught else None, student if role == "student" else None)
            if (name, *pair) in seen or (name, teacher) in REFUSED:
                continue
            seen.add((name, *pair))
            label = "-".join([name, *(part.removeprefix("timm:") for part in pair if part)])
            marks = [pytest.mark.slow] if number else []
            found.append(pytest.param((name, *pair), id=label, marks=marks))
    return found


def dataset() -> DataSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2 * K, 3, 32, 32), generator=generator, dtype=torch.uint8)
    split = Split.of(torch.arange(2 * K) % K, images=images)
    names = tuple(f"c{i}" for i in range(K))
    return DataSet("synthetic", names, 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), split, split)


def batch(spec: RunSpec, size: int = 2) -> Batch:
    """Random images, with the extra views that the spec's method asks for."""
    method, values = methods.settings(spec)
    generator = torch.Generator().manual_seed(5)
    views = [
        torch.randn(size, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
        for _ in range(1 + len(method.augmentations(values)))
    ]
    return Batch(views[0], torch.arange(size) * 7 % K, torch.arange(size), 1.0, tuple(views[1:]))


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@dataclass
class Stepped:
    """Two steps that were taken: what they were made of, what the first gave, and what was there before and after."""

    spec: RunSpec
    step: Step
    teacher: nn.Module | None
    teacher_before: dict[str, Tensor]
    before: dict[str, Tensor]
    output: StepOutput
    gradients: dict[str, Tensor | None]
    after: dict[str, Tensor]
    packed: dict[str, Tensor]
    """The resume state after the first step."""
    last: dict[str, Tensor]
    """The step's state after the second step."""


def resolved(
    name: str, teacher: str | None, student: str | None, command: str, settings: dict[str, Any] | None = None
) -> RunSpec:
    values = {
        "command": command,
        "method": {"name": name, **(settings or {})},
        "teacher": teacher,
        "student": student,
        "data": {"dataset": "synthetic"},
    }
    return methods.resolve(RunSpec.model_validate(values))


def make(
    name: str,
    teacher: str | None,
    student: str | None,
    device: Device = CPU,
    settings: dict[str, Any] | None = None,
) -> tuple[RunSpec, Step, nn.Module | None]:
    """The step as `kd distill` (with a student) or `kd pretrain-teacher` (without) builds it."""
    data = dataset()
    if student is None:
        spec = resolved(name, teacher, None, "pretrain-teacher", settings)
        method, values = methods.settings(spec)
        network = device.place(make_teacher(spec, method, values, data))
        objective = device.place(make_method(spec, data, None, network))
        use = Use(**method.inference(values, "teacher"))
        return spec, TeacherStep(objective, network, use, device).train(), None
    spec = resolved(name, teacher, student, "distill", settings)
    method, values = methods.settings(spec)
    taught = None
    if teacher is not None:
        wanted = teachers.spec_for(spec)
        taught = make_teacher(wanted, *methods.settings(wanted), data)
        taught = device.place(taught.eval().requires_grad_(False))
    network = device.place(make_network(spec, "student", method, values, data))
    objective = device.place(make_method(spec, data, network, taught))
    use = Use(**method.inference(values, "student"))
    return spec, StudentStep(objective, network, taught, use, device).train(), taught


def one_step(spec: RunSpec, step: Step, optimizer: torch.optim.Optimizer, at: int) -> StepOutput:
    """Forward, backward, update, as the engine does them."""
    torch.manual_seed(1 + at)
    optimizer.zero_grad(set_to_none=True)
    output = step(batch(spec), replace(PROGRESS, odd_step=bool(at % 2), seed=at))
    output.total.backward()
    optimizer.step()
    return output


def optimizer_of(spec: RunSpec, step: Step) -> torch.optim.Optimizer:
    return optim.optimizer(spec.train, step, cuda=False, undecayed=step.undecayed())


def take(name: str, teacher: str | None, student: str | None) -> Stepped:
    """Two steps on two images, with the resume state between them."""
    spec, step, taught = make(name, teacher, student)
    before, teacher_before = state(step), {} if taught is None else state(taught)
    optimizer = optimizer_of(spec, step)
    output = one_step(spec, step, optimizer, 0)
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in step.named_parameters() if p.requires_grad}
    after = state(step)
    packed = {key: value.clone() for key, value in pack(step, optimizer, None, {}).items()}
    one_step(spec, step, optimizer, 1)
    return Stepped(spec, step, taught, teacher_before, before, output, gradients, after, packed, last=state(step))


def check_step(stepped: Stepped) -> None:
    """What holds for students and teachers alike."""
    terms = torch.stack(list(stepped.output.terms.values()))
    assert torch.isfinite(stepped.output.total)
    assert stepped.output.total.item() == pytest.approx(terms.sum().item(), rel=1e-6)
    assert 0 <= stepped.output.correct.item() <= 2
    # A parameter without a gradient would stop a run on several ranks, and would be a term nobody notices missing.
    assert not [name for name, grad in stepped.gradients.items() if grad is None]
    assert all(torch.isfinite(grad).all() for grad in stepped.gradients.values() if grad is not None)
    after = stepped.after
    for name, value in after.items():
        if name.endswith("num_batches_tracked") and not is_frozen(stepped.step, name):
            assert value.item() == stepped.before[name].item() + 1, name
    # Weight decay moves even those whose gradient rounds to zero; a bias behind which a layer starts at zero moves next.
    still = [name for name in stepped.gradients if torch.equal(stepped.last[name], stepped.before[name])]
    assert not still


def is_frozen(step: Step, name: str) -> bool:
    """Whether a buffer belongs to a teacher's backbone that is kept as it is."""
    module = step.get_submodule(name.partition(".")[0])
    return isinstance(module, Headed) and module.frozen and name.partition(".")[2].startswith("network.")


@pytest.fixture(scope="module", params=cases("student"))
def student(request: pytest.FixtureRequest) -> Stepped:
    return take(*request.param)


@pytest.fixture(scope="module", params=cases("teacher"))
def teacher(request: pytest.FixtureRequest) -> Stepped:
    return take(*request.param)


def test_a_step_trains_student_and_method(student: Stepped) -> None:
    """Finite loss, terms that sum to it, a gradient and an update everywhere, BatchNorm statistics updated once."""
    check_step(student)


def test_the_frozen_teacher_stays_as_it_was(student: Stepped) -> None:
    """No gradient, no update, no BatchNorm statistic; nothing of it is in the step's parameters or state."""
    if student.teacher is None:
        assert not methods.method_class(student.spec.method["name"]).needs_teacher
        return
    assert same(student.teacher_before, state(student.teacher))
    assert all(p.grad is None for p in student.teacher.parameters())
    theirs = {id(p) for p in student.teacher.parameters()} | {id(b) for b in student.teacher.buffers()}
    assert not theirs & {id(t) for t in [*student.step.parameters(), *student.step.buffers()]}


def test_the_exported_student_is_a_plain_network(student: Stepped) -> None:
    """Exactly the tensors of the architecture: whatever the method learned besides stays behind."""
    network = student.step.trained
    method, values = methods.settings(student.spec)
    name = student.spec.student
    assert name is not None
    with torch.device("meta"):
        plain = build(name, method.student_outputs(values, K), 32, fixed_stride=method.fixed_stride)
    exported = tensors_of(network)
    assert {k: v.shape for k, v in exported.items()} == {k: v.shape for k, v in plain.state_dict().items()}


def test_a_resumed_student_equals_an_uninterrupted_one(student: Stepped, request: pytest.FixtureRequest) -> None:
    """The same seeds build the same networks and modules; from the saved state the second step gives the same bits."""
    spec, step, taught = make(*request.node.callspec.params["student"])
    assert same(state(step), student.before)
    assert taught is None or same(state(taught), student.teacher_before)
    optimizer = optimizer_of(spec, step)
    unpack(student.packed, 1, step, optimizer, None, torch.device("cpu"))
    one_step(spec, step, optimizer, 1)
    assert same(state(step), student.last)


def test_a_step_trains_the_teacher_and_its_heads(teacher: Stepped) -> None:
    """As for the student: every parameter of backbone and heads learns."""
    check_step(teacher)


def test_the_teachers_network_is_evaluated_without_heads(teacher: Stepped) -> None:
    """What is evaluated is a plain network, and its tensors keep the architecture's names in the checkpoint."""
    bare = deploy(teacher.step.trained)
    exported = tensors_of(teacher.step.trained)
    assert set(bare.state_dict()) <= set(exported)
    assert all(name.startswith("heads.") for name in set(exported) - set(bare.state_dict()))


def test_a_teacher_that_cannot_read_its_images_is_refused_when_it_is_made() -> None:
    """A Mixer mixes a fixed number of patches: VSD cannot show it images of twice the size."""
    spec = resolved("vsd", "timm:mixer_s32_224", None, "pretrain-teacher")
    with pytest.raises(IncompatibleError, match="cannot read 64 x 64"):
        make_teacher(spec, *methods.settings(spec), dataset())


@pytest.mark.parametrize(("name", "teacher_name"), list(REFUSED))
def test_a_pair_that_cannot_work_is_refused_before_training(name: str, teacher_name: str) -> None:
    """Exit code 4 with the reason."""
    with pytest.raises(IncompatibleError, match=REFUSED[name, teacher_name]):
        make(name, teacher_name, "resnet20")


def test_the_seed_changes_the_students_weights() -> None:
    """Not the least promise of a seed."""
    spec = resolved("none", None, "resnet8", "distill")
    method, values = methods.settings(spec)
    one, two = (
        make_network(spec.model_copy(update={"seed": seed}), "student", method, values, dataset()) for seed in (0, 1)
    )
    assert not torch.equal(one.state_dict()["conv1.weight"], two.state_dict()["conv1.weight"])


@pytest.mark.parametrize("name", [n for n in methods.SHIPPED if methods.method_class(n).needs_teacher])
def test_a_teacher_with_other_outputs_is_refused_with_a_reason(name: str) -> None:
    """Networks whose logits cannot be compared end in an `IncompatibleError` (exit code 4), never in a number."""
    data = dataset()
    spec = resolved(name, "resnet14", "resnet8", "distill")
    method, values = methods.settings(spec)
    student_net = make_network(spec, "student", method, values, data)
    other = build("resnet14", 3).eval().requires_grad_(False)

    def step() -> None:
        objective = make_method(spec, data, student_net, other)
        StudentStep(objective, student_net, other, Use(), CPU)(batch(spec), PROGRESS)

    with pytest.raises(IncompatibleError) as problem:
        step()
    assert problem.value.code == 4
    assert problem.value.message


@pytest.mark.parametrize("name", list(methods.SHIPPED))
def test_bf16_networks_give_fp32_losses(name: str) -> None:
    """Under autocast the loss and its terms are fp32, close to the fp32 run's, and every parameter gets a gradient."""
    teacher_name = "resnet8x4" if methods.method_class(name).needs_teacher else None
    losses = []
    for precision in ("fp32", "bf16"):
        spec, step, _ = make(name, teacher_name, "resnet8", Device(torch.device("cpu"), precision, 1))
        output = step(batch(spec), PROGRESS)
        output.total.backward()
        assert {term.dtype for term in [output.total, *output.terms.values()]} == {torch.float32}
        assert not [n for n, p in step.named_parameters() if p.requires_grad and p.grad is None]
        losses.append(output.total.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]
