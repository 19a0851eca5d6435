"""VSD: its losses against HSAKD's and SLA's published code, and every setting against what its docstring says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from kdcli.data.loader import Batch
from kdcli.errors import IncompatibleError, UsageError
from kdcli.methods.base import Progress, Setting
from kdcli.methods.vsd import VSD, VSDSpec
from kdcli.models import build
from kdcli.models.features import Features
from kdcli.models.heads import Headed
from kdcli.transforms import expand, joint_labels, views

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
CASES = {case["id"]: case for case in json.loads((GOLDEN / "losses.json").read_text())["cases"]}
HSAKD = load_file(GOLDEN / "hsakd.safetensors")
SLA = load_file(GOLDEN / "sla.safetensors")
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
EVEN = Progress(torch.tensor(1.0), torch.tensor(0.0), odd_step=False)
ODD = Progress(torch.tensor(1.0), torch.tensor(0.0), odd_step=True)
K = 10


class Made:
    """VSD with its two networks, built as the commands build them."""

    def __init__(
        self, student: str = "resnet8", teacher: str = "resnet8", *, smoothing: float = 0.0, **settings: Any
    ) -> None:
        torch.manual_seed(0)
        self.spec = VSDSpec(**settings)
        VSD.check(self.spec)
        fixed = VSD.fixed_stride
        self.student = build(student, VSD.student_outputs(self.spec, K), fixed_stride=fixed)
        backbone = build(teacher, VSD.teacher_outputs(self.spec, K), fixed_stride=fixed)
        heads = VSD.teacher_heads(self.spec, backbone, K)
        self.teacher = (backbone if heads is None else Headed(backbone, heads)).eval().requires_grad_(False)
        self.method = VSD(self.spec, Setting(K, 32, smoothing), self.student, self.teacher)

    def features(self, data: Batch, progress: Progress = EVEN) -> tuple[Features, Features]:
        with torch.no_grad():
            taught = self.method.teacher_features(self.teacher, self.method.teacher_views(data, progress))
        return self.method.student_features(self.student, self.method.student_views(data, progress)), taught

    def terms(self, data: Batch, progress: Progress = EVEN) -> dict[str, Tensor]:
        return self.method.loss(data, *self.features(data, progress), progress)


def batch(size: int = 2) -> Batch:
    images = torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return Batch(images, torch.arange(size) * 3 % K, torch.arange(size), 1.0)


def outputs(logits: Tensor, heads: tuple[Tensor, ...] = (), maps: tuple[Tensor, ...] = ()) -> Features:
    return Features(logits, torch.empty(len(logits), 0), maps, heads)


def random(*shape: int, seed: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near(found: Tensor, expected: Tensor | float, tolerance: float) -> bool:
    """max|found - expected| / max|expected|, the measure of the golden numbers."""
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    assert found.shape == wanted.shape
    return bool((found.detach().double() - wanted).abs().max() <= tolerance * wanted.abs().max())


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over rows of KL(teacher ‖ student) of probabilities, written out."""
    return (teacher * (teacher.log() - student.log())).sum(1).mean()


@contextmanager
def counted(modules: nn.Module) -> Iterator[list[torch.Size]]:
    """The shapes of the inputs with which any of `modules` (a ModuleList) is called."""
    seen: list[torch.Size] = []
    hooks = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape)) for m in modules.children()]
    yield seen
    for hook in hooks:
        hook.remove()


# ---------------------------------------------------------------------------------------------------- golden numbers


@PRECISIONS
def test_with_a_class_head_the_student_loss_is_that_of_hsakd(dtype: torch.dtype, tolerance: float) -> None:
    """main_head=class: CE on view 0, KL on the main logits and on three joint heads; values and all gradients."""
    case, prefix = CASES["hsakd_student"], "hsakd_student"
    names = ["logits", *(f"aux_logits_{j}" for j in range(3))]
    student = {n: HSAKD[f"{prefix}/in/{n}"].to(dtype, copy=True).requires_grad_() for n in names}
    teacher = {n: HSAKD[f"{prefix}/in/teacher_{n}"].to(dtype) for n in names}
    data = Batch(HSAKD[f"{prefix}/in/image"], HSAKD[f"{prefix}/in/target"], torch.arange(8), 1.0)
    made = Made(main_head="class")
    assert torch.equal(made.method.student_views(data, EVEN), HSAKD[f"{prefix}/out/rotated_images"])
    learned, taught = (outputs(f["logits"], tuple(f[n] for n in names[1:])) for f in (student, teacher))
    terms = made.method.loss(data, learned, taught, EVEN)
    assert set(terms) == {"kd1", "kd2", "agg1"}
    parts = case["components"]
    assert near(terms["agg1"], parts["loss_ce_rotation0"], tolerance)
    assert near(terms["kd2"], parts["kl_main"], tolerance)
    assert near(terms["kd1"], sum(parts[f"kl_aux_{j}"] for j in range(3)), tolerance)
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    assert near(total, case["loss"], tolerance)
    for name in names:
        grad = student[name].grad
        assert grad is not None
        assert near(grad, HSAKD[f"{prefix}/grad/{name}"], tolerance), name


@PRECISIONS
def test_with_a_class_head_the_teacher_loss_is_that_of_hsakd(dtype: torch.dtype, tolerance: float) -> None:
    """CE of the main head on view 0 plus CE of every head on the joint labels; values and all gradients."""
    case, prefix = CASES["hsakd_teacher"], "hsakd_teacher"
    names = ["logits", *(f"aux_logits_{j}" for j in range(3))]
    found = {n: HSAKD[f"{prefix}/in/{n}"].to(dtype, copy=True).requires_grad_() for n in names}
    data = Batch(torch.zeros(8, 3, 6, 6), HSAKD[f"{prefix}/in/target"], torch.arange(8), 1.0)
    method = VSD(VSDSpec(main_head="class"), Setting(K, 32, 0.0), None, None)
    terms = method.teacher_loss(data, outputs(found["logits"], tuple(found[n] for n in names[1:])), EVEN)
    assert near(terms["ce"], case["components"]["ce_main_rotation0"], tolerance)
    assert near(terms["heads"], sum(case["components"][f"ce_aux_{j}"] for j in range(3)), tolerance)
    total = terms["ce"] + terms["heads"]
    total.backward()
    assert near(total, case["loss"], tolerance)
    for name in names:
        grad = found[name].grad
        assert grad is not None
        assert near(grad, HSAKD[f"{prefix}/grad/{name}"], tolerance), name


@PRECISIONS
def test_the_joint_cross_entropy_is_that_of_sla(dtype: torch.dtype, tolerance: float) -> None:
    """agg1 of a joint head (mean over the M*B rows and K*M outputs) is SLA's loss, for student and teacher."""
    case, prefix = CASES["sla_rotation"], "sla_rotation"
    logits = SLA[f"{prefix}/in/joint_logits"].to(dtype, copy=True).requires_grad_()
    data = Batch(torch.zeros(8, 3, 4, 4), SLA[f"{prefix}/in/target"], torch.arange(8), 1.0)
    method = VSD(VSDSpec(lambda1=0, lambda2=0), Setting(K, 32, 0.0), None, None)
    terms = method.loss(data, outputs(logits), outputs(logits), EVEN)
    assert set(terms) == {"agg1"}
    terms["agg1"].backward()
    assert near(terms["agg1"], case["loss"], tolerance)
    assert logits.grad is not None
    assert near(logits.grad, SLA[f"{prefix}/grad/joint_logits"], tolerance)
    assert near(method.teacher_loss(data, outputs(logits), EVEN)["ce"], case["loss"], tolerance)


# ------------------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize(
    ("weight", "term"), [("lambda1", "kd1"), ("lambda2", "kd2"), ("lambda3", "agg1"), ("lambda4", "agg2")]
)
def test_each_weight_scales_its_own_term_and_zero_removes_it(weight: str, term: str) -> None:
    """λ of 0 leaves the term out, λ of 2.5 is 2.5 times λ of 1, and no other term moves."""
    one = Made(lambda4=1).terms(batch())
    assert set(one) == {"kd1", "kd2", "agg1", "agg2"}
    more = Made(**{"lambda4": 1, weight: 2.5}).terms(batch())
    none = Made(**{"lambda4": 1, weight: 0}).terms(batch())
    assert more[term].item() == pytest.approx(2.5 * one[term].item(), rel=1e-5)
    assert set(none) == set(one) - {term}
    for other in set(one) - {term}:
        assert more[other].item() == pytest.approx(one[other].item(), rel=1e-5)
        assert none[other].item() == pytest.approx(one[other].item(), rel=1e-5)


def test_lambda4_is_the_joint_cross_entropy_of_the_students_heads() -> None:
    """Eq. 3 read with the student's heads: a sum over the heads of means over the rows."""
    heads = tuple(random(8, 40, seed=j) for j in range(3))
    data = batch(2)
    made = Made(lambda4=1)
    terms = made.method.loss(data, outputs(heads[0], heads), outputs(heads[0], heads), EVEN)
    expected = sum(F.cross_entropy(z, joint_labels(data.labels, 4)).item() for z in heads)
    assert terms["agg2"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "student_heads", "student_runs", "teacher_runs"),
    [
        ({}, 3, 3, 3),
        ({"lambda1": 0}, 0, 0, 0),
        ({"lambda1": 0, "lambda4": 1}, 3, 3, 0),
        ({"kd1_target": "spatial"}, 0, 0, 0),
        ({"kd1_target": "spatial", "lambda4": 1}, 3, 3, 0),
        ({"stages": 2}, 2, 2, 2),
    ],
)
def test_heads_are_built_and_run_only_where_a_term_reads_them(
    settings: dict[str, Any], student_heads: int, student_runs: int, teacher_runs: int
) -> None:
    """A head costs as much as a backbone, so none runs for a term that is switched off."""
    made = Made(**settings)
    built = getattr(made.method, "student_heads", nn.ModuleList())
    assert len(built) == student_heads
    if not student_heads:
        assert not list(made.method.parameters())
    assert isinstance(made.teacher, Headed)
    with counted(built) as mine, counted(made.teacher.heads) as theirs:
        made.terms(batch())
    assert len(mine) == student_runs
    assert len(theirs) == teacher_runs


def test_every_module_of_the_method_is_in_the_graph_whatever_the_weights() -> None:
    """Maps of unequal width need connectors for KD1 only: with λ1 = 0 none is built, or DDP would wait for it."""
    with_kd1 = Made("resnet8", "resnet8x4", kd1_target="channel", lambda4=1)
    assert any(p.requires_grad for p in with_kd1.method.connectors.parameters())
    without = Made("resnet8", "resnet8x4", kd1_target="channel", lambda1=0, lambda4=1)
    for made in (with_kd1, without):
        torch.stack(list(made.terms(batch()).values())).sum().backward()
        unused = [name for name, p in made.method.named_parameters() if p.grad is None]
        assert not unused


# ------------------------------------------------------------------------------------------------------ Rescale Block

SHAPES = {1: (16, 32), 2: (32, 16), 3: (64, 8)}
"""Channels and side of resnet8's maps at 32 pixels."""


def enlarged(x: Tensor, kind: str, f: int) -> Tensor:
    if kind == "nearest":
        return x.repeat_interleave(f, 2).repeat_interleave(f, 3)
    if kind == "bilinear":
        return F.interpolate(x, scale_factor=f, mode="bilinear", align_corners=False)
    return torch.cat([torch.cat([x] * f, 2)] * f, 3) if kind == "tile" else x


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("kind", ["nearest", "bilinear", "tile", "transposed", "pool_teacher", "none"])
def test_the_rescale_block_brings_the_students_maps_to_the_teachers_scale(kind: str, factor: int) -> None:
    """The values of each parameter-free kind, the sizes of all, and what the student's heads are fed."""
    made = Made(rescale=kind, teacher_scale=factor)
    grown = 1 if kind in ("none", "pool_teacher") else factor
    assert bool(list(made.method.blocks.parameters())) == (kind == "transposed")
    for (channels, side), block in zip(SHAPES.values(), made.method.blocks, strict=True):
        x = torch.randn(2, channels, side, side)
        y = block(x)
        assert y.shape == (2, channels, side * grown, side * grown)
        if kind != "transposed":
            assert torch.allclose(y, enlarged(x, kind, factor))
    with counted(made.method.student_heads) as seen:
        made.method.student_features(made.student, batch().images)
    assert [s[1:] for s in seen] == [(c, side * grown, side * grown) for c, side in SHAPES.values()]


@pytest.mark.parametrize(("kind", "divisor"), [("pool_teacher", 2), ("nearest", 1)])
def test_pool_teacher_averages_the_teachers_maps(kind: str, divisor: int) -> None:
    """The teacher's heads are fed 2x2 averages of its maps, so that both networks' maps have the student's size."""
    made = Made(rescale=kind)
    assert isinstance(made.teacher, Headed)
    with counted(made.teacher.heads) as seen:
        _, taught = made.features(batch())
    assert [s[1:] for s in seen] == [(c, 2 * side // divisor, 2 * side // divisor) for c, side in SHAPES.values()]
    fed = [F.avg_pool2d(m, 2) if divisor == 2 else m for m in taught.stages]
    for head, found, x in zip(made.teacher.heads, taught.heads, fed, strict=True):
        assert torch.allclose(found, head(x), atol=1e-5)


def test_the_students_heads_read_its_rescaled_maps() -> None:
    """head_j of the block of F_j, in order, with K*M outputs."""
    made = Made()
    made.student.eval()
    made.method.eval()
    found = made.method.student_features(made.student, batch().images)
    expected = made.student.features(batch().images)
    assert torch.allclose(found.logits, expected.logits)
    for j, head in enumerate(made.method.student_heads):
        by_hand = head(enlarged(expected.maps[j + 1], "nearest", 2))
        assert found.heads[j].shape == (2, 4 * K)
        assert torch.allclose(found.heads[j], by_hand, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize(("scale", "side"), [(1, 32), (2, 64), (4, 128)])
def test_the_teacher_sees_the_students_views_enlarged(scale: int, side: int) -> None:
    """Each rotated view, interpolated: the same rows in the same order."""
    method = VSD(VSDSpec(teacher_scale=scale), Setting(K, 32, 0.0), None, None)
    data = batch()
    small, large = method.student_views(data, EVEN), method.teacher_views(data, EVEN)
    assert torch.equal(small, expand(data.images, "rot4"))
    assert large.shape == (8, 3, side, side)
    expected = small if scale == 1 else F.interpolate(small, (side, side), mode="bilinear", align_corners=False)
    assert torch.allclose(large, expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_scale_mode_is_the_interpolation(mode: str) -> None:
    """bilinear, nearest and bicubic as torch interpolates."""
    method = VSD(VSDSpec(scale_mode=mode), Setting(K, 32, 0.0), None, None)
    corners = None if mode == "nearest" else False
    expected = F.interpolate(batch().images, (64, 64), mode=mode, align_corners=corners)
    assert torch.allclose(method.teacher_views(batch(), EVEN)[::4], expected, atol=1e-6)


def test_mixed_scales_alternate_by_step() -> None:
    """mixed: even steps at teacher_scale, odd ones at scale 1; fixed: always at teacher_scale; losses exist for both."""
    made = Made(scale_policy="mixed", kd1_target="spatial", lambda4=1)
    assert made.method.teacher_views(batch(), EVEN).shape[-1] == 64
    assert torch.equal(made.method.teacher_views(batch(), ODD), made.method.student_views(batch(), ODD))
    fixed = VSD(VSDSpec(), Setting(K, 32, 0.0), None, None)
    assert fixed.teacher_views(batch(), ODD).shape[-1] == 64
    for progress in (EVEN, ODD):
        assert all(torch.isfinite(term) for term in made.terms(batch(), progress).values())


@pytest.mark.parametrize("transform", ["none", "rot2", "perm3", "rot2xperm3"])
def test_transform_spans_the_joint_space(transform: str) -> None:
    """M views a row, K*M outputs of main head and auxiliary heads on both networks."""
    m = views(transform)
    made = Made(transform=transform)
    learned, taught = made.features(batch())
    assert torch.equal(made.method.student_views(batch(), EVEN), expand(batch().images, transform))
    for found in (learned, taught):
        assert found.logits.shape == (2 * m, K * m)
        assert [z.shape for z in found.heads] == [(2 * m, K * m)] * 3
    assert all(torch.isfinite(term) for term in made.method.loss(batch(), learned, taught, EVEN).values())


def marginals(logits: Tensor, tau: float) -> Tensor:
    """p(y) of joint logits at a temperature, summed view by view."""
    p = torch.softmax(logits / tau, 1)
    m = logits.shape[1] // K
    return torch.stack([sum(p[:, y * m + i] for i in range(m)) for y in range(K)], 1)


def test_a_teacher_with_other_transformations_is_compared_on_class_marginals() -> None:
    """perm6 teacher, rot4 student: p(y) of each student row against the mean over the teacher's six views."""
    made = Made(teacher_transform="perm6")
    learned, taught = made.features(batch())
    assert torch.equal(made.method.student_views(batch(), EVEN), expand(batch().images, "rot4"))
    assert made.method.teacher_views(batch(), EVEN).shape == (12, 3, 64, 64)
    assert learned.logits.shape == (8, 4 * K)
    assert taught.logits.shape == (12, 6 * K)
    terms = made.method.loss(batch(), learned, taught, EVEN)

    def compared(student: Tensor, teacher: Tensor) -> float:
        t = marginals(teacher.double(), 3.0).unflatten(0, (2, 6)).mean(1)
        s = marginals(student.double(), 3.0).unflatten(0, (2, 4))
        return 9 * torch.stack([kl(s[:, r], t) for r in range(4)]).mean().item()

    assert terms["kd2"].item() == pytest.approx(compared(learned.logits, taught.logits), rel=1e-4)
    pairs = zip(learned.heads, taught.heads, strict=True)
    assert terms["kd1"].item() == pytest.approx(sum(compared(s, t) for s, t in pairs), rel=1e-4)


def test_a_low_temperature_leaves_other_transformations_finite() -> None:
    """At 0.05 most of the teacher's probabilities are zero in fp32, their logarithms are not."""
    made = Made(teacher_transform="perm6", tau_kd=0.05)
    learned, taught = made.features(batch())
    sharp = replace(taught, logits=40 * taught.logits)
    assert all(torch.isfinite(term) for term in made.method.loss(batch(), learned, sharp, EVEN).values())


def test_a_teacher_transform_equal_to_the_students_is_no_other() -> None:
    """Naming rot4 twice is the joint comparison of the default."""
    named, default = Made(teacher_transform="rot4").terms(batch()), Made().terms(batch())
    assert {k: v.item() for k, v in named.items()} == {k: v.item() for k, v in default.items()}


# ------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("settings", [{"kd2_space": "class"}, {"kd2_space": "class", "tau2": False, "tau_kd": 2.0}])
def test_kd2_on_class_marginals(settings: dict[str, Any]) -> None:
    """kd2_space=class: KL between Σ_r p(y,r) of the two networks; KD1 stays in the joint space."""
    made = Made(**settings)
    tau = made.spec.tau_kd
    s, t = random(8, 40, seed=1), random(8, 40, seed=2)
    terms = made.method.loss(batch(), outputs(s, (s,)), outputs(t, (t,)), EVEN)
    factor = tau**2 if made.spec.tau2 else 1.0
    assert terms["kd2"].item() == pytest.approx(factor * kl(marginals(s, tau), marginals(t, tau)).item(), rel=1e-9)
    joint = kl(torch.softmax(s / tau, 1), torch.softmax(t / tau, 1)).item()
    assert terms["kd1"].item() == pytest.approx(factor * joint, rel=1e-9)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_temperature_and_its_square(tau: float) -> None:
    """tau_kd softens both distillation terms, tau2 multiplies them by its square; agg1 knows neither."""
    s, t = random(8, 40, seed=1), random(8, 40, seed=2)

    def terms(**settings: Any) -> dict[str, Tensor]:
        return Made(tau_kd=tau, **settings).method.loss(batch(), outputs(s, (s,)), outputs(t, (t,)), EVEN)

    expected = kl(torch.softmax(s / tau, 1), torch.softmax(t / tau, 1)).item()
    plain, scaled = terms(tau2=False), terms()
    for term in ("kd1", "kd2"):
        assert plain[term].item() == pytest.approx(expected, rel=1e-9)
        assert scaled[term].item() == pytest.approx(expected * tau**2, rel=1e-9)
    assert plain["agg1"].item() == scaled["agg1"].item()


def test_temperature_and_smoothing_of_the_cross_entropies() -> None:
    """tau_ce divides the logits of every cross-entropy, label smoothing spreads over the joint space; KD is untouched."""
    s, t, data = random(8, 40, seed=1), random(8, 40, seed=2), batch()
    made, default = Made(tau_ce=2.0, lambda4=1, smoothing=0.1), Made(lambda4=1)
    terms, plain = (m.method.loss(data, outputs(s, (s, s)), outputs(t, (t, t)), EVEN) for m in (made, default))
    expected = F.cross_entropy(s / 2, joint_labels(data.labels, 4), label_smoothing=0.1).item()
    assert terms["agg1"].item() == pytest.approx(expected, rel=1e-12)
    assert terms["agg2"].item() == pytest.approx(2 * expected, rel=1e-12)
    assert (terms["kd1"], terms["kd2"]) == (plain["kd1"], plain["kd2"])
    taught = made.method.teacher_loss(data, outputs(s, (s, s)), EVEN)
    assert taught["ce"].item() == pytest.approx(expected, rel=1e-12)
    assert taught["heads"].item() == pytest.approx(2 * expected, rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "k"), [({}, 3), ({"stages": 2}, 2), ({"lambda1": 0}, 3), ({"lambda1": 0, "lambda4": 1}, 3)]
)
def test_kd2_times_k_counts_kd2_once_per_stage(settings: dict[str, Any], k: int) -> None:
    """K is the number of distilled stages, whether or not KD1 is on."""
    once, times = Made(**settings).terms(batch()), Made(kd2_times_k=True, **settings).terms(batch())
    assert times["kd2"].item() == pytest.approx(k * once["kd2"].item(), rel=1e-6)
    assert times["agg1"].item() == once["agg1"].item()


def softened(x: Tensor, target: str, tau: float) -> Tensor:
    """Rows of probabilities of a map [B,C,H,W], one softmax at a time."""
    if target == "spatial":
        rows = [x[b, c].flatten() for b in range(x.shape[0]) for c in range(x.shape[1])]
    elif target == "channel":
        b, _, h, w = x.shape
        rows = [x[i, :, u, v] for i in range(b) for u in range(h) for v in range(w)]
    else:
        rows = [x[b].flatten() for b in range(x.shape[0])]
    return torch.stack([torch.softmax(row / tau, 0) for row in rows])


@pytest.mark.parametrize("target", ["spatial", "channel", "flat"])
@pytest.mark.parametrize("rescale", ["nearest", "pool_teacher"])
def test_kd1_on_maps(target: str, rescale: str) -> None:
    """spatial: positions per channel; channel: channels per position; flat: all at once; maps at the same size."""
    made = Made(kd1_target=target, rescale=rescale)
    maps = {tap: random(2, c, 4, 4, seed=tap) for tap, (c, _) in SHAPES.items()}
    theirs = {tap: random(2, c, 8, 8, seed=9 + tap) for tap, (c, _) in SHAPES.items()}
    s, t = random(2, 40, seed=1), random(2, 40, seed=2)
    student = outputs(s, maps=(s, *maps.values()))
    teacher = outputs(t, maps=(t, *theirs.values()))
    made.method.spec = made.spec.model_copy(update={"lambda2": 0, "lambda3": 0})
    found = made.method.loss(batch(), student, teacher, EVEN)["kd1"].item()
    expected = 0.0
    for tap in SHAPES:
        mine, other = enlarged(maps[tap], rescale, 2), theirs[tap]
        if rescale == "pool_teacher":
            other = F.avg_pool2d(other, 2)
        expected += 9 * kl(softened(mine, target, 3.0), softened(other, target, 3.0)).item()
    assert found == pytest.approx(expected, rel=1e-9)


def test_kd1_on_maps_needs_no_heads_and_bridges_unequal_maps() -> None:
    """A teacher without heads, of another width, depth and stride: connectors to its width, sizes matched."""
    made = Made("resnet8", "vgg8", kd1_target="channel", teacher_heads=False)
    assert not isinstance(made.teacher, Headed)
    terms = made.terms(batch())
    assert set(terms) == {"kd1", "kd2", "agg1"}
    assert all(torch.isfinite(term) for term in terms.values())
    widths = [made.teacher.features(batch().images).maps[tap].shape[1] for tap in made.method.teacher_taps]
    assert [c[0].out_channels for c in made.method.connectors] == widths


@pytest.mark.parametrize(("main_head", "student", "teacher"), [("joint", 40, 60), ("class", 10, 10)])
def test_main_head_is_the_width_of_both_networks(main_head: str, student: int, teacher: int) -> None:
    """joint: K*M of each network's own transformations; class: K. How each is used later follows from it."""
    spec = VSDSpec(main_head=main_head, teacher_transform="perm6")
    assert VSD.student_outputs(spec, K) == student
    assert VSD.teacher_outputs(spec, K) == teacher
    joint = main_head == "joint"
    assert VSD.inference(spec, "student")["transform"] == ("rot4" if joint else "none")
    assert VSD.inference(spec, "teacher")["transform"] == ("perm6" if joint else "none")
    assert VSD.inference(spec, "student")["scale"] == 1
    assert VSD.inference(spec, "teacher")["scale"] == 2


# -------------------------------------------------------------------------------------------------------------- stages


def test_fewer_stages_drop_the_shallowest() -> None:
    """stages=2 keeps the last two of three on both networks, the teacher's heads included."""
    made = Made(stages=2)
    assert made.method.taps == made.method.teacher_taps == (2, 3)
    assert isinstance(made.teacher, Headed)
    learned, taught = made.features(batch())
    assert len(learned.heads) == len(taught.heads) == 2
    everything = made.teacher.features(made.method.teacher_views(batch(), EVEN)).heads
    for found, expected in zip(taught.heads, everything[1:], strict=True):
        assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher", "taps", "teacher_taps"),
    [("resnet20", "vgg13", (1, 2, 3), (1, 2, 4)), ("vgg8", "resnet8", (1, 2, 4), (1, 2, 3))],
)
def test_unequal_stage_counts_drop_the_shallowest(
    student: str, teacher: str, taps: tuple[int, ...], teacher_taps: tuple[int, ...]
) -> None:
    """vgg has four maps with heads and resnet three: the vgg's first is left out, whichever network it is."""
    made = Made(student, teacher)
    assert (made.method.taps, made.method.teacher_taps) == (taps, teacher_taps)
    assert len(made.method.student_heads) == 3


def test_more_stages_than_there_are_is_refused() -> None:
    """Asking for five stages of three does not quietly give three."""
    with pytest.raises(IncompatibleError, match="3 stages, not 5") as problem:
        Made(stages=5)
    assert problem.value.field == "method.stages"


# --------------------------------------------------------------------------------------------------- what cannot be


def test_a_teacher_without_heads_is_refused_with_the_command_that_makes_one() -> None:
    """Exit code 4, naming the fix."""
    student, teacher = build("resnet8", 40), build("resnet14", 40)
    with pytest.raises(IncompatibleError, match="no auxiliary heads") as problem:
        VSD(VSDSpec(), Setting(K, 32, 0.0), student, teacher)
    assert problem.value.code == 4
    assert "kd pretrain-teacher --method vsd --teacher resnet14" in (problem.value.hint or "")


@pytest.mark.parametrize("settings", [{"lambda1": 0}, {"kd1_target": "flat"}, {"lambda1": 0, "lambda4": 1}])
def test_a_teacher_without_heads_will_do_where_kd1_does_not_read_them(settings: dict[str, Any]) -> None:
    """The other terms work with any joint teacher."""
    VSD(VSDSpec(**settings), Setting(K, 32, 0.0), build("resnet8", 40), build("resnet14", 40))


def test_heads_of_another_joint_space_are_refused_before_training() -> None:
    """A class-head teacher trained with rot2 looks right from outside; its heads tell."""
    other = VSDSpec(main_head="class", transform="rot2")
    backbone = build("resnet8", K)
    heads = VSD.teacher_heads(other, backbone, K)
    assert heads is not None
    with pytest.raises(IncompatibleError, match=r"20 outputs.*needs 40"):
        VSD(VSDSpec(main_head="class"), Setting(K, 32, 0.0), build("resnet8", K), Headed(backbone, heads))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"teacher_scale": 1, "scale_policy": "mixed"}, "method.scale_policy"),
        ({"teacher_heads": False}, "method.teacher_heads"),
        ({"kd1_target": "spatial", "teacher_transform": "perm6"}, "method.kd1_target"),
        ({"lambda2": 0, "lambda3": 0}, "method.lambda3"),
        ({"lambda1": 0, "lambda2": 0, "lambda3": 0}, "method.lambda3"),
    ],
)
def test_contradicting_settings_are_refused(settings: dict[str, Any], field: str) -> None:
    """A usage error that names the setting, before anything is built."""
    with pytest.raises(UsageError) as problem:
        VSD.check(VSDSpec(**settings))
    assert problem.value.field == field
    assert problem.value.hint


def test_the_teacher_depends_only_on_what_trains_it() -> None:
    """Students that differ in their own settings share a teacher; another scale or transformation needs another."""
    base = VSD.teacher_settings(VSDSpec())
    for own in (
        {"lambda1": 0.5},
        {"lambda4": 1},
        {"tau_kd": 4},
        {"rescale": "tile"},
        {"stages": 1},
        {"kd2_space": "class"},
        {"kd1_target": "flat"},
        {"kd2_times_k": True},
        {"tau2": False},
    ):
        assert VSD.teacher_settings(VSDSpec(**own)) == base, own
    for theirs in (
        {"teacher_scale": 4},
        {"scale_mode": "nearest"},
        {"scale_policy": "mixed"},
        {"transform": "rot2"},
        {"teacher_transform": "perm6"},
        {"main_head": "class"},
        {"tau_ce": 2},
        {"lambda1": 0, "teacher_heads": False},
    ):
        assert VSD.teacher_settings(VSDSpec(**theirs)) != base, theirs
    same = VSD.teacher_settings(VSDSpec(transform="rot4", teacher_transform="perm6"))
    assert same == VSD.teacher_settings(VSDSpec(transform="perm6"))
    assert VSD.teacher_settings(VSDSpec(**same)) == same


def test_a_teacher_without_heads_is_trained_on_its_main_head_alone() -> None:
    """teacher_heads=False: no heads are made and Eq. 1 is the whole loss."""
    spec = VSDSpec(teacher_heads=False, lambda1=0)
    assert VSD.teacher_heads(spec, build("resnet8", 40), K) is None
    method = VSD(spec, Setting(K, 32, 0.0), None, None)
    assert set(method.teacher_loss(batch(), outputs(random(8, 40, seed=1)), EVEN)) == {"ce"}


@pytest.mark.parametrize("rescale", ["nearest", "transposed", "pool_teacher"])
@pytest.mark.parametrize("target", ["head_logits", "spatial", "channel", "flat"])
def test_every_kind_of_kd1_works_under_bf16(target: str, rescale: str) -> None:
    """Maps come out of autocast in bf16; connectors and softening compute in fp32, with gradients everywhere."""
    made = Made("resnet8", "resnet8x4", kd1_target=target, rescale=rescale)
    with torch.autocast("cpu", torch.bfloat16):
        learned, taught = made.features(batch())
    assert learned.logits.dtype == torch.bfloat16
    terms = made.method.loss(batch(), learned, taught, EVEN)
    assert {term.dtype for term in terms.values()} == {torch.float32}
    torch.stack(list(terms.values())).sum().backward()
    assert not [n for n, p in made.method.named_parameters() if p.grad is None]


def test_networks_of_one_image_size_are_refused_before_training() -> None:
    """A Mixer's heads cannot read a student's maps at twice the size; the hint names a way."""
    with pytest.raises(IncompatibleError, match="one size only") as problem:
        Made("timm:mixer_s32_224", "resnet8")
    assert "method.rescale=pool_teacher" in (problem.value.hint or "")
    Made("timm:mixer_s32_224", "resnet8", rescale="pool_teacher")
    Made("resnet8", "timm:mixer_s32_224", teacher_scale=1)


@pytest.mark.parametrize("settings", [{}, {"rescale": "bilinear"}, {"kd1_target": "spatial", "lambda4": 1}])
def test_a_transformer_can_be_the_student(settings: dict[str, Any]) -> None:
    """Token networks give maps and take maps of other sizes in their heads; all of the method learns."""
    made = Made("timm:vit_tiny_patch16_224", "resnet14", **settings)
    torch.stack(list(made.terms(batch()).values())).sum().backward()
    unused = [n for net in (made.method, made.student) for n, p in net.named_parameters() if p.grad is None]
    assert not unused


# ----------------------------------------------------------------------------------------------------- labels alone


def test_a_teacher_that_no_loss_reads_costs_nothing(kd, monkeypatch, tmp_path) -> None:
    """With lambda1=lambda2=0 its pass is left out, and the student is the same to the bit as with it."""
    from harness import TINY, outcome

    from kdcli.engine.step import StudentStep
    from kdcli.methods.base import Method

    words = ["distill", "--method", "vsd", "--teacher", "resnet14", "--student", "resnet8", *TINY, "--max-steps", "3"]
    words += ["--set", "method.lambda1=0", "--set", "method.lambda2=0"]
    taught: list[bool] = []
    forward = StudentStep.forward

    def watched(self, *args):
        taught.append(self._teacher[0] is not None)
        return forward(self, *args)

    monkeypatch.setattr(StudentStep, "forward", watched)
    without = kd(*words, "--out", "without", "--json")
    assert without.code == 0, without.err
    assert without.json["teacher"]["arch"] == "resnet14"
    with monkeypatch.context() as patch:
        patch.setattr(VSD, "reads_teacher", Method.reads_teacher)
        assert kd(*words, "--out", "with").code == 0
    assert taught == [False] * 3 + [True] * 3
    assert outcome(tmp_path / "without") == outcome(tmp_path / "with")
    preview = kd(*words, "--dry-run", "--json").json
    assert preview["views"] == {"student": 4}
