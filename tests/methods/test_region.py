"""Regions: closed forms, which loss moves what, what choosing among samples buys, and what every setting changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from kdcli.methods.region import (
    COPIED,
    POINT_LIKE,
    Comparison,
    Posterior,
    Region,
    Regions,
    RegionSpec,
    Standard,
    complaint,
    distances,
    expected_error,
    gaussian_divergence,
    nearest,
    soft_choice,
)

F64 = torch.float64
C_S, C_T = 6, 16
GRID = (3, 16, 5, 5)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def region(c_s: int = C_S, c_t: int = C_T, *, stirred: bool = True, **settings: Any) -> Region:
    """A region in float64; stirred: every parameter moved from where it starts."""
    torch.manual_seed(0)
    made = Region(RegionSpec(**settings), c_s, c_t).double()
    if stirred:
        with torch.no_grad():
            for number, parameter in enumerate(made.parameters()):
                parameter.add_(0.2 * normal(*parameter.shape, seed=number))
    return made


def maps(side: int = 5, teacher_side: int = 5, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    return (
        normal(3, C_S, side, side, seed=1, dtype=dtype),
        3 + 2 * normal(3, C_T, teacher_side, teacher_side, seed=2, dtype=dtype),
    )


def run(made: Region, *given: Any, seed: int = 4) -> Comparison:
    torch.manual_seed(seed)
    return made(*given)


def standardised(x: Tensor) -> Tensor:
    """Mean 0 and variance 1 in every channel, as BatchNorm computes it."""
    return (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()


def one_by_one(x: Tensor, layer: nn.Module) -> Tensor:
    """A 1x1 convolution as a matrix product."""
    assert isinstance(layer, nn.Conv2d)
    y = torch.einsum("bchw,dc->bdhw", x, layer.weight[:, :, 0, 0])
    return y if layer.bias is None else y + layer.bias[:, None, None]


def batchnorm(x: Tensor, layer: nn.Module) -> Tensor:
    assert isinstance(layer, nn.BatchNorm2d)
    return standardised(x) * layer.weight[:, None, None] + layer.bias[:, None, None]


def student_of(made: Region, s: Tensor) -> Tensor:
    """h, independently of the module's forward."""
    return batchnorm(one_by_one(s, made.connector[0]), made.connector[1])


def posterior_of(made: Region, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised map, mean and log-variance, independently of the module's forward."""
    normalised = standardised(t)
    r = batchnorm(one_by_one(normalised, made.encoder.hidden[0]), made.encoder.hidden[1]).relu()
    assert made.encoder.log_variance is not None
    mean = normalised + one_by_one(r, made.encoder.mean)
    return normalised, mean, one_by_one(r, made.encoder.log_variance).clamp(-6, 2)


# ------------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 1.0])
def test_the_free_optimum_of_likelihood_and_prior(beta: float) -> None:
    """With an identity decoder: mean (F + beta·h)/(1 + beta) and variance beta/(1 + beta), to 1e-6."""
    target, h = normal(2, 3, 4, 4, seed=0), normal(2, 3, 4, 4, seed=1)
    mean, spread = (torch.zeros_like(target, requires_grad=True) for _ in range(2))
    judge, decoder = region(3, 3), nn.Conv2d(3, 3, 1).double()
    nn.init.dirac_(decoder.weight)
    nn.init.zeros_(decoder.bias)  # type: ignore[arg-type]

    def loss() -> Tensor:
        posterior = Posterior(target, mean, spread)
        return expected_error(decoder, posterior, target) + beta * judge.divergence(posterior, h)

    optimizer = torch.optim.LBFGS(
        [mean, spread], max_iter=500, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss() * target.numel()
        value.backward()
        return value

    optimizer.step(closure)
    assert (mean - (target + beta * h) / (1 + beta)).abs().max() < 1e-6
    assert (spread.exp() - beta / (1 + beta)).abs().max() < 1e-6


@pytest.mark.parametrize("variance", [1.0, 0.3])
def test_the_divergence_is_that_of_two_gaussians(variance: float) -> None:
    """Against torch.distributions; not negative, and zero where the posterior is the prior."""
    mean, spread, prior = (normal(2, 3, 4, 4, seed=seed) for seed in range(3))
    found = gaussian_divergence(mean, spread, prior, variance)
    wanted = kl_divergence(Normal(mean, (spread / 2).exp()), Normal(prior, math.sqrt(variance))).mean()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert found > 0
    same = gaussian_divergence(prior, torch.full_like(prior, math.log(variance)), prior, variance)
    assert same.item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("scope", ["map", "location", "group", "element"])
def test_one_sample_without_variance_is_the_point(scope: str) -> None:
    """L_feat with M = 1 and sigma = 0 is mean (h - mean)², to the last bits, whatever the scope."""
    made = region(scope=scope, samples=1)
    h, mean = normal(*GRID, seed=1), normal(*GRID, seed=2)
    loss, followed = made.match(h, Posterior(mean, mean, torch.zeros_like(mean)), mean[None])
    assert loss.item() == pytest.approx((h - mean).square().mean().item(), rel=1e-14)
    assert followed["effective_samples"].item() == 1


def test_a_point_starts_as_standardised_fitnet() -> None:
    """At the first step its target is the normalised map of the teacher, and the decoder gives it back."""
    s, t = maps()
    made = region(stirred=False, target="point")
    found = run(made, s, t)
    wanted = (student_of(made, s) - standardised(t)).square().mean()
    assert found.feature.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert found.likelihood.item() == pytest.approx(0, abs=1e-20)
    assert found.divergence is None
    assert "sigma" not in found.followed
    assert made.encoder.log_variance is None


def test_a_region_starts_around_the_same_point() -> None:
    """Deviation e^-1 everywhere, around the normalised map."""
    s, t = maps()
    found = run(region(stirred=False), s, t)
    assert found.followed["sigma"].item() == pytest.approx(math.exp(-1), rel=1e-12)
    assert found.followed["shift"].item() == 0
    assert found.likelihood.item() == pytest.approx(math.exp(-2) / 2, rel=1e-12)  # E (z - F)² = sigma²


def test_all_losses_against_the_formulas() -> None:
    """Every loss and every followed value of a stirred region, from the formulas and the same noise."""
    s, t = maps()
    made = region(tau_sel=0.3, group=4)
    found = run(made, s, t)
    h, (normalised, mean, spread) = student_of(made, s), posterior_of(made, t)
    torch.manual_seed(4)
    z = mean + (spread / 2).exp() * torch.randn(8, *mean.shape, dtype=F64)
    many = mean + (spread / 2).exp() * normal(4000, *mean.shape, seed=9)
    errors = torch.stack([(one_by_one(sample, made.decoder) - normalised).square().mean() for sample in many])
    d = (h - z).square().view(8, 3, 4, 4, 5, 5).mean(3)
    w = (d / -0.3).exp() / (d / -0.3).exp().sum(0)
    wanted = {
        "feature": (w * d).sum(0).mean(),
        "divergence": 0.5 * (spread.exp() + (mean - h).square() - 1 - spread).mean(),
    }
    for name, value in wanted.items():
        assert getattr(found, name).item() == pytest.approx(value.item(), rel=1e-10), name
    deviation = (errors / 2).std().item() / math.sqrt(len(errors))
    assert found.likelihood.item() == pytest.approx((errors / 2).mean().item(), abs=4 * deviation)
    assert deviation < 1e-3 * found.likelihood.item()

    def per_image(x: Tensor) -> Tensor:
        return torch.stack([image.square().mean().sqrt() for image in x]).mean()

    followed = {
        "sigma": (spread / 2).exp().mean(),
        "shift": per_image(mean - normalised),
        "distance": per_image(mean - h),
        "effective_samples": (1 / w.square().sum(0)).mean(),
    }
    assert found.followed.keys() == followed.keys()
    for name, value in followed.items():
        assert found.followed[name].item() == pytest.approx(value.item(), rel=1e-10), name
        assert not found.followed[name].requires_grad


# ------------------------------------------------------------------------------------------------- which moves what

MOVES = {
    "feature": {"student", "connector"},
    "likelihood": {"encoder", "decoder"},
    "divergence": {"encoder"},
}


@pytest.mark.parametrize("loss", list(MOVES))
@pytest.mark.parametrize("gradient", ["posterior", "both"])
@pytest.mark.parametrize("match", ["mean", "sample", "softmin", "min", "nll", "hinge"])
def test_each_loss_moves_only_its_own(loss: str, gradient: str, match: str) -> None:
    """The table of gradients; a mutual prior also moves student and connector. The teacher is a constant."""
    s, t = (x.requires_grad_() for x in maps())
    made = region(prior_gradient=gradient, match=match, kappa=0.1)
    getattr(run(made, s, t), loss).backward()
    moved = {name.partition(".")[0] for name, p in made.named_parameters() if p.grad is not None and p.grad.any()}
    if s.grad is not None and s.grad.any():
        moved.add("student")
    both = {"student", "connector"} if loss == "divergence" and gradient == "both" else set()
    assert moved == MOVES[loss] | both
    assert t.grad is None


@pytest.mark.parametrize("prior", ["none", "standard", "student"])
@pytest.mark.parametrize("target", ["region", "point"])
def test_every_parameter_has_a_gradient_even_with_no_weight(prior: str, target: str) -> None:
    """Warm-ups multiply losses by zero; ranks must agree on which parameters take part all the same."""
    s, t = maps()
    made = region(prior=prior, target=target)
    found = run(made, s, t)
    total = 0 * found.feature + found.likelihood
    if found.divergence is not None:
        total = total + 0 * found.divergence
    total.backward()
    assert all(p.grad is not None for p in made.parameters())


# ------------------------------------------------------------------------------------------------ choosing a sample

TABLE = {
    (0.3, 4): {"map": 1.08, "location": 1.01, "group": 0.88, "element": 0.63},
    (0.3, 16): {"map": 1.07, "location": 0.96, "group": 0.75, "element": 0.41},
    (0.7, 4): {"map": 1.46, "location": 1.29, "group": 0.97, "element": 0.42},
    (0.7, 16): {"map": 1.45, "location": 1.17, "group": 0.68, "element": 0.13},
}


@pytest.mark.parametrize(("sigma", "count"), list(TABLE))
def test_only_where_few_values_are_at_stake_is_a_nearer_sample_found(sigma: float, count: int) -> None:
    """Distance to the nearest sample of 64 channels on 8x8, the student one deviation from the mean (a point: 1.00)."""
    h, noise = normal(16, 64, 8, 8, seed=0), normal(count, 16, 64, 8, 8, seed=1)
    flat = torch.zeros_like(h)
    for scope, wanted in TABLE[sigma, count].items():
        made = region(4, 64, match="min", scope=scope)
        loss, _ = made.match(h, Posterior(flat, flat, flat), sigma * noise)
        assert loss.item() == pytest.approx(wanted, abs=0.03), scope


@pytest.mark.parametrize("scope", ["map", "location", "group", "element"])
def test_the_soft_choice_lies_between_the_nearest_and_all(scope: str) -> None:
    """min <= softmin <= mean over the samples; a low temperature is the nearest, a high one their mean."""
    h, z = normal(*GRID, seed=1), normal(8, *GRID, seed=2)
    found = distances(h, z, scope, 8)  # type: ignore[arg-type]

    def mean_distance(weights: Tensor) -> float:
        assert torch.allclose(weights.sum(0), torch.ones_like(weights[0]))
        return (weights * found).sum(0).mean().item()

    assert mean_distance(nearest(found)) == pytest.approx(found.amin(0).mean().item(), rel=1e-12)
    assert found.amin(0).mean() < mean_distance(soft_choice(found, 0.1)) < found.mean()
    assert torch.allclose(soft_choice(found, 1e-9), nearest(found))
    assert torch.allclose(soft_choice(found, 1e9), torch.full_like(found, 1 / 8))


def test_a_group_is_of_channels_that_lie_together() -> None:
    """Distances of all four scopes, summed by hand."""
    h, z = normal(2, 6, 1, 2, seed=1), normal(3, 2, 6, 1, 2, seed=2)
    squared = (h - z).square()
    assert torch.equal(distances(h, z, "element", 3), squared)
    assert torch.allclose(distances(h, z, "map", 3), squared.flatten(2).sum(2) / 12)
    assert torch.allclose(distances(h, z, "location", 3), squared.sum(2) / 6)
    grouped = distances(h, z, "group", 3)
    assert torch.allclose(grouped[:, :, 1], squared[:, :, 3:6].sum(2) / 3)


@pytest.mark.parametrize(
    ("width", "asked", "wanted"), [(64, 8, 8), (12, 8, 6), (116, 8, 4), (7, 8, 7), (13, 8, 1), (64, 100, 64), (9, 2, 1)]
)
def test_the_size_of_a_group_divides_the_channels(width: int, asked: int, wanted: int) -> None:
    """The largest divisor that is not above what was asked for."""
    assert region(4, width, stirred=False, group=asked).group == wanted


@pytest.mark.parametrize("scope", ["map", "location", "group", "element"])
@pytest.mark.parametrize("match", ["softmin", "min"])
def test_the_weights_of_the_choice_are_constants(scope: str, match: str) -> None:
    """Value and gradient are those of mean Σ_m w·d with fixed weights: towards the chosen samples."""
    made = region(match=match, scope=scope, tau_sel=0.5)
    h, z = normal(*GRID, seed=1).requires_grad_(), normal(8, *GRID, seed=2)
    loss, _ = made.match(h, Posterior(z[0], z[0], torch.zeros_like(z[0])), z)
    loss.backward()
    again = h.detach().clone().requires_grad_()
    found = distances(again, z, scope, made.group)  # type: ignore[arg-type]
    w = soft_choice(found.detach(), 0.5) if match == "softmin" else nearest(found.detach())
    wanted = (w * found).sum(0).mean()
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert h.grad is not None
    assert again.grad is not None
    assert torch.allclose(h.grad, again.grad, rtol=1e-10, atol=1e-15)


# ------------------------------------------------------------------------------------------------------- the settings


def expected(match: str, h: Tensor, mean: Tensor, spread: Tensor, z: Tensor) -> Tensor:
    """Each kind of match, element by element."""
    sigma = spread.exp().sqrt()
    if match == "mean":
        return ((h - mean) ** 2).mean()
    if match == "nll":
        return (-Normal(mean, sigma).log_prob(h) - 0.5 * math.log(2 * math.pi)).mean()
    if match == "hinge":
        return F.relu((h - mean).abs() / sigma - 0.5).pow(2).mean()
    d = ((h - z) ** 2).unflatten(2, (2, 8)).mean(3)
    return d.min(0).values.mean() if match == "min" else d[0].mean()


@pytest.mark.parametrize("match", ["mean", "sample", "min", "nll", "hinge"])
def test_every_kind_of_match(match: str) -> None:
    """Against formulas, on the module's own noise; `sample` draws one, the others eight."""
    s, t = maps()
    made = region(match=match, kappa=0.5)
    found = run(made, s, t)
    torch.manual_seed(4)
    _, mean, spread = posterior_of(made, t)
    noise = torch.randn(1 if match == "sample" else 8, *mean.shape, dtype=F64)
    wanted = expected(match, student_of(made, s), mean, spread, mean + (spread / 2).exp() * noise)
    assert found.feature.item() == pytest.approx(wanted.item(), rel=1e-10)
    assert "effective_samples" not in found.followed


def test_within_kappa_deviations_the_hinge_costs_nothing() -> None:
    """A student at the edge of the region is as good as one at its mean."""
    mean, spread = normal(*GRID, seed=1), normal(*GRID, seed=2)
    made, posterior = region(match="hinge", kappa=1.5), Posterior(mean, mean, spread)
    inside, _ = made.match(mean + 1.499 * (spread / 2).exp(), posterior, mean[None])
    outside, _ = made.match(mean + 2.5 * (spread / 2).exp(), posterior, mean[None])
    assert inside.item() == 0
    assert outside.item() == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize(("prior", "variance"), [("standard", 1.0), ("student", 1.0), ("student", 0.5)])
def test_what_the_prior_is(prior: str, variance: float) -> None:
    """N(0, v), or N(h, v) around the student's map."""
    s, t = maps()
    made = region(prior=prior, prior_variance=variance)
    found = run(made, s, t)
    _, mean, spread = posterior_of(made, t)
    centre = student_of(made, s) if prior == "student" else torch.zeros_like(mean)
    wanted = kl_divergence(Normal(mean, (spread / 2).exp()), Normal(centre, math.sqrt(variance))).mean()
    assert found.divergence is not None
    assert found.divergence.item() == pytest.approx(wanted.item(), rel=1e-10)


def test_without_a_prior_there_is_no_divergence() -> None:
    s, t = maps()
    assert run(region(prior="none"), s, t).divergence is None


@pytest.mark.parametrize("samples", [1, 3])
def test_the_number_of_samples(samples: int) -> None:
    """More samples, more to choose from; one leaves no choice."""
    s, t = maps()
    made = region(samples=samples, tau_sel=1e-6)
    assert run(made, s, t).followed["effective_samples"].item() == pytest.approx(1, abs=0.01)
    assert made.spec.drawn == samples
    one = run(region(samples=1), s, t).feature
    assert (run(region(samples=8, match="min"), s, t).feature < one).item()


@pytest.mark.parametrize("width", [4, C_T, 24])
def test_the_latent_width(width: int) -> None:
    """At first the mean is decoded to what its channels can hold of the map: all of it if they are not fewer."""
    s, t = maps()
    made = region(stirred=False, width=width)
    posterior = made.encoder(standardised(t))
    assert posterior.mean.shape == (3, width, 5, 5)
    back, normalised = made.decoder(posterior.mean), standardised(t)
    if width >= C_T:
        assert torch.allclose(back, normalised, atol=1e-6)
    else:
        assert torch.allclose(made.decoder(made.encoder.skip(back)), back, atol=1e-6)  # a projection
        assert not torch.allclose(back, normalised, atol=0.1)
    found = run(made, s, t)
    assert torch.isfinite(found.feature + found.likelihood)


def test_the_log_variance_stays_within_its_bounds() -> None:
    """Standard deviations from e^-3 to e."""
    made = region()
    assert made.encoder.log_variance is not None
    assert made.encoder.log_variance.bias is not None
    for value, wanted in [(-50.0, math.exp(-3)), (50.0, math.e)]:
        nn.init.constant_(made.encoder.log_variance.bias, value)
        assert run(made, *maps()).followed["sigma"].item() == pytest.approx(wanted, rel=1e-12)


# --------------------------------------------------------------------------------------------------- shapes and kinds


@pytest.mark.parametrize(("c", "size"), [(32, 5_344), (64, 20_928), (128, 82_816)])
def test_the_parameters_of_a_stage(c: int, size: int) -> None:
    assert sum(p.numel() for p in region(c, c, stirred=False).parameters()) == size


@pytest.mark.parametrize(("side", "teacher_side"), [(5, 10), (10, 5), (6, 4)])
def test_the_larger_map_is_averaged_down(side: int, teacher_side: int) -> None:
    """A region of maps on two grids is that of the maps on the smaller."""
    s, t = maps(side, teacher_side)
    smaller = min(side, teacher_side)
    small = (F.adaptive_avg_pool2d(x, smaller) for x in (s, t))
    found, wanted = run(region(), s, t), run(region(), *small)
    assert found.feature.item() == pytest.approx(wanted.feature.item(), rel=1e-12)
    assert found.likelihood.item() == pytest.approx(wanted.likelihood.item(), rel=1e-12)


def test_the_levels_of_a_feature_pyramid() -> None:
    """P2..P6 of 256 channels, the teacher's image larger: each level by itself, and a gradient everywhere."""
    sides = (16, 8, 4, 2, 1)
    student = [normal(2, 256, n, n, seed=n, dtype=torch.float32).requires_grad_() for n in sides]
    teacher = [normal(2, 256, 2 * n, n, seed=9 + n, dtype=torch.float32) for n in sides]
    torch.manual_seed(0)
    levels = Regions(RegionSpec(samples=2), [(256, 256)] * 5)
    torch.manual_seed(1)
    found = levels(student, teacher)
    assert len(found) == 5
    torch.stack([one.feature + one.likelihood + (one.divergence or 0) for one in found]).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in levels.parameters())
    assert all(s.grad is not None and s.grad.any() for s in student)
    torch.manual_seed(1)
    alone = [level(s, t) for level, s, t in zip(levels, student, teacher, strict=True)]
    assert [one.feature.item() for one in alone] == [one.feature.item() for one in found]
    with pytest.raises(ValueError, match="zip"):
        levels(student[:4], teacher[:4])


@pytest.mark.parametrize("settings", [{}, {"match": "nll"}, {"match": "hinge"}, {"target": "point"}, {"width": 4}])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_precision_is_kept(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """float64 stays float64; half precision from autocast is computed in fp32."""
    made = region(**settings).to(dtype)
    found = run(made, *maps(dtype=dtype))
    values = [found.feature, found.likelihood, *found.followed.values()]
    assert {value.dtype for value in values} == {dtype}
    if dtype == torch.float32:
        s, t = (x.bfloat16() for x in maps(dtype=dtype))
        assert run(made, s, t).feature.dtype == torch.float32


def test_the_same_seed_gives_the_same_samples() -> None:
    s, t = maps()
    first, again, other = (run(region(), s, t, seed=seed).feature.item() for seed in (4, 4, 5))
    assert first == again
    assert first != other


def judge_of(seen: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def rest(decoded: Tensor) -> Tensor:
        seen.append(decoded)
        return decoded.square().mean()

    return rest


def test_layers_behind_the_map_see_it_in_its_own_units() -> None:
    """They judge one decoded sample; at first that is the teacher's map with noise of its own scale."""
    s, t = maps()
    seen: list[Tensor] = []
    made = region(stirred=False, target="point")
    found = run(made, s, t, judge_of(seen))
    assert torch.allclose(seen[0], t, atol=1e-10)
    assert found.likelihood.item() == pytest.approx(t.square().mean().item(), rel=1e-10)
    run(region(stirred=False), s, t, judge_of(seen))
    deviation = (seen[1] - t).std((0, 2, 3)) / t.std((0, 2, 3))
    assert deviation.mean().item() == pytest.approx(math.exp(-1), rel=0.05)


def test_normalisation_can_be_undone() -> None:
    """In training by the batch's statistics, in evaluation by the running ones, of one value by those too."""
    layer = Standard(C_T).double()
    assert not list(layer.parameters())
    _, t = maps()
    once = layer(t)
    assert torch.allclose(once, standardised(t))
    assert torch.allclose(layer.undo(once, t), t)
    single = t[:1, :, :1, :1]
    assert torch.allclose(layer.undo(layer(single), single), single)
    layer.eval()
    assert not torch.allclose(layer(t), once)
    assert torch.allclose(layer.undo(layer(t), t), t)


def test_weight_decay_leaves_decoder_and_variance_alone() -> None:
    """What would be drawn away from where it is neutral; nothing of the student's side."""
    made = region(width=4)
    names = {id(p): name for name, p in made.named_parameters()}
    kept = {"decoder.weight", "decoder.bias", "encoder.skip.weight", "encoder.log_variance.bias"}
    assert {names[id(p)] for p in made.undecayed()} == kept
    assert len(Regions(RegionSpec(target="point"), [(3, 3), (4, 4)]).undecayed()) == 4


# --------------------------------------------------------------------------------------------------------- complaints


def test_complaints() -> None:
    """A point, or a copy of the student; neither with what training usually gives."""
    spec = RegionSpec()
    assert complaint(spec, 0.3, 1.0) is None
    assert complaint(spec, POINT_LIKE * 1.01, 1.0) is None
    assert "shrunk to a point" in (complaint(spec, POINT_LIKE * 0.99, 1.0) or "")
    assert "copies the student" in (complaint(spec, 0.95, 0.2) or "")
    assert complaint(spec, 0.95, COPIED[1] * 1.01) is None
    assert complaint(spec, 0.85, 0.2) is None
    assert complaint(RegionSpec(prior="none"), 0.95, 0.2) is None
    assert "copies the student" in (complaint(RegionSpec(prior_variance=0.25), 0.48, 0.2) or "")


@pytest.mark.parametrize(("settings", "beta", "words"), [({}, 100.0, "copies"), ({"prior": "none"}, 0.0, "shrunk")])
def test_what_the_complaints_are_about_happens(settings: dict[str, Any], beta: float, words: str) -> None:
    """Trained to its optimum, a posterior with a heavy prior copies a student it can predict; without a prior it is a point.

    The student's map is a linear function of the teacher's, so that the encoder can.
    """
    _, t = maps()
    s = torch.einsum("bchw,dc->bdhw", standardised(t), normal(C_S, C_T, seed=3) / 4)
    made = region(stirred=False, **settings)
    for parameter in made.connector.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=0.03)
    for step in range(400):
        optimizer.zero_grad()
        found = run(made, s, t, seed=step)
        total = found.likelihood if found.divergence is None else found.likelihood + beta * found.divergence
        total.backward()
        optimizer.step()
    found = run(made, s, t)
    problem = complaint(made.spec, found.followed["sigma"].item(), found.followed["distance"].item())
    assert problem is not None
    assert words in problem
