"""A teacher's feature map as a region: a Gaussian around it, from which the student chooses its target.

Tensor code on lists of maps [B,C,H,W] and nothing else: stages of a classifier or levels of a feature pyramid alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from kdcli.gather import BatchNorm2d, moments
from kdcli.methods.feature import at_smaller_size
from kdcli.specs import Section

Scope = Literal["map", "location", "group", "element"]
Match = Literal["mean", "sample", "softmin", "min", "nll", "hinge"]
Rest = Callable[[Tensor], Tensor]
"""What a decoded map [B,C,H,W], in the teacher's own units, is worth to the layers behind it: [] a loss."""

LOG_VARIANCE = (-6.0, 2.0)
"""Bounds of the posterior's log-variance: standard deviations from e^-3 to e."""
START = -2.0
"""Where the log-variance starts: a standard deviation of 0.37."""
POINT_LIKE = 1.1 * math.exp(LOG_VARIANCE[0] / 2)
"""Mean standard deviation below which a region is as good as a point: a tenth above the lower bound."""
COPIED = (0.9, 0.3)
"""Mean standard deviation (of the prior's) above which, and root mean square of mean minus student below which, the
posterior has become its prior. The closed form of `Region` reaches the first only for a beta above 4."""


class RegionSpec(Section):
    """What a region is and how the student is matched with it."""

    target: Literal["region", "point"] = "region"
    """The student's target: a Gaussian, or (point) its mean alone: no variance, one sample, no prior, any `match` the
    squared distance."""
    prior: Literal["none", "standard", "student"] = "student"
    """What the posterior is drawn towards: nothing, N(0, v), or the student's map as the mean of N(h, v)."""
    prior_gradient: Literal["posterior", "both"] = "posterior"
    """Whom the divergence from the student's prior moves: the posterior alone, or the student too (mutual learning)."""
    prior_variance: float = Field(default=1.0, gt=0)
    """Variance v of the prior; maps are normalised, so 1 is theirs."""
    samples: int = Field(default=8, ge=1)
    """Samples M that are drawn of each map; match=sample and target=point take one."""
    match: Match = "softmin"
    """How the student meets the region: nearest samples weighted softly (softmin) or the nearest alone (min); one sample
    (sample); the mean (mean); its density (nll); or the mean, but only from kappa deviations on (hinge)."""
    scope: Scope = "group"
    """For what a sample is chosen: the whole map, each location, each group of channels of a location, each element. With
    many values at stake a nearer sample is hardly ever found, and the region is only noise."""
    group: int = Field(default=8, ge=1)
    """Channels of a group; where it does not divide them, the largest number below that does."""
    tau_sel: float = Field(default=0.1, gt=0)
    """Temperature of the soft choice: weights are softmax(-d / tau_sel) over the samples' mean squared distances d."""
    kappa: float = Field(default=1.0, ge=0)
    """Deviations from the mean that cost nothing with match=hinge."""
    width: int | None = Field(default=None, ge=1)
    """Channels D of the latent map; default: the teacher's."""

    @property
    def drawn(self) -> int:
        """How many samples of each map the student chooses from; none where it is matched with the posterior itself."""
        if self.target == "point" or self.match in ("mean", "nll", "hinge"):
            return 0
        return 1 if self.match == "sample" else self.samples

    @property
    def regularised(self) -> bool:
        """Whether there is a divergence from a prior."""
        return self.target == "region" and self.prior != "none"


@dataclass(frozen=True)
class Posterior:
    """q(z | F) = N(mean, exp(log_variance)), element by element.

    Attributes:
        centre: [B,D,H,W], the normalised map of the teacher (projected, where D is another width): where the mean starts.
        mean: [B,D,H,W].
        log_variance: [B,D,H,W]; None for a point.
    """

    centre: Tensor
    mean: Tensor
    log_variance: Tensor | None

    def draw(self, count: int) -> Tensor:
        """M samples [M,B,D,H,W], through which gradients flow."""
        if self.log_variance is None:
            return self.mean.expand(count, *self.mean.shape)
        noise = torch.randn(count, *self.mean.shape, dtype=self.mean.dtype, device=self.mean.device)
        return torch.addcmul(self.mean, (self.log_variance / 2).exp(), noise)


@dataclass(frozen=True)
class Comparison:
    """What one stage gives.

    Attributes:
        feature: [], what the student minimises, mean over B, D, H, W.
        likelihood: [], what keeps the latent map true to the teacher: half the expected squared error of a decoded sample,
            mean over B, C, H, W, or what the `Rest` made of one.
        divergence: [], KL(posterior ‖ prior), mean over B, D, H, W; None without a prior.
        followed: [] each: mean `sigma`; `shift` of the mean from the teacher and its `distance` from the student, both the
            mean over B of the root mean square over D, H, W; `effective_samples`, 1 / Σ w² of the soft choice.
    """

    feature: Tensor
    likelihood: Tensor
    divergence: Tensor | None
    followed: dict[str, Tensor]


class Standard(BatchNorm2d):
    """Maps [B,C,H,W] with mean 0 and variance 1 in every channel, over the batch of all ranks; nothing is learned."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False)

    def undo(self, x: Tensor, original: Tensor) -> Tensor:
        """`x` [B,C,H,W] in the units of `original` [B,C,H,W], the map that was normalised."""
        assert self.running_mean is not None
        assert self.running_var is not None
        mean, variance = self.running_mean, self.running_var
        if self.uses_batch(original):
            mean, variance, _ = moments(original)
        return x * (variance + self.eps).sqrt()[:, None, None] + mean[:, None, None]


class Encoder(nn.Module):
    """The posterior of a normalised map. Before the first step its mean is the map and its deviation 0.37 everywhere.

    Args:
        channels: C of the map.
        width: D of the posterior.
        point: leave the variance out.
    """

    def __init__(self, channels: int, width: int, *, point: bool = False) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), BatchNorm2d(width), nn.ReLU())
        self.skip = nn.Identity() if width == channels else nn.Conv2d(channels, width, 1, bias=False)
        self.mean = _constant(width, 0.0)
        self.log_variance = None if point else _constant(width, START)
        if isinstance(self.skip, nn.Conv2d):
            nn.init.orthogonal_(self.skip.weight)

    def forward(self, x: Tensor) -> Posterior:
        """[B,C,H,W] → the posterior of [B,D,H,W]."""
        hidden, centre = self.hidden(x), self.skip(x)
        spread = None if self.log_variance is None else self.log_variance(hidden).clamp(*LOG_VARIANCE)
        return Posterior(centre, centre + self.mean(hidden), spread)


class Region(nn.Module):
    """One stage: the teacher's map becomes a Gaussian, the student's map is matched with samples of it.

    The three losses keep apart: `feature` moves student and connector, `likelihood` encoder and decoder, `divergence` the
    encoder (with prior_gradient=both student and connector too). Were the posterior free, with a perfect decoder, the sum
    likelihood + beta · divergence would be least at the mean (F + beta·h)/(1 + beta) and the variance beta/(1 + beta).

    Args:
        spec: the settings.
        c_s, c_t: channels of the student's and the teacher's map.
    """

    def __init__(self, spec: RegionSpec, c_s: int, c_t: int) -> None:
        super().__init__()
        self.spec = spec
        width = spec.width or c_t
        self.group = max(size for size in range(1, min(spec.group, width) + 1) if width % size == 0)
        """Channels that choose together with scope=group."""
        self.standard = Standard(c_t)
        self.encoder = Encoder(c_t, width, point=spec.target == "point")
        self.decoder = nn.Conv2d(width, c_t, 1)
        self.connector = nn.Sequential(nn.Conv2d(c_s, width, 1, bias=False), BatchNorm2d(width))
        skip = self.encoder.skip
        with torch.no_grad():  # what the skip keeps of a map is decoded as it was
            start = skip.weight[:, :, 0, 0].T if isinstance(skip, nn.Conv2d) else torch.eye(width)
            self.decoder.weight.copy_(start[:, :, None, None])
        nn.init.zeros_(self.decoder.bias)  # type: ignore[arg-type]

    def forward(self, student: Tensor, teacher: Tensor, rest: Rest | None = None) -> Comparison:
        """[B,c_s,h,w], [B,c_t,H,W] → the stage's losses; the larger map is averaged down to the smaller grid.

        Args:
            rest: judges the decoded map of one sample, in place of its expected squared error.
        """
        s, t = at_smaller_size(student, teacher)
        normalised, h = self.standard(t), self.connector(s)
        posterior = self.encoder(normalised)
        with torch.no_grad():  # targets are constants
            samples = posterior.draw(self.spec.drawn)
        if rest is None:
            likelihood = expected_error(self.decoder, posterior, normalised)
        else:
            likelihood = rest(self.standard.undo(self.decoder(posterior.draw(1)[0]), t))
        feature, followed = self.match(h, posterior, samples)
        divergence = self.divergence(posterior, h) if self.spec.regularised else None
        return Comparison(feature, likelihood, divergence, self.measured(h, posterior) | followed)

    def match(self, h: Tensor, posterior: Posterior, samples: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Student [B,D,H,W], posterior, samples [M,B,D,H,W] → [] the student's loss, and {"effective_samples"} of a choice.

        The targets are constants.
        """
        spec, mean = self.spec, posterior.mean.detach()
        if posterior.log_variance is None or spec.match == "mean":
            return (h - mean).square().mean(), {}
        spread = posterior.log_variance.detach()
        if spec.match == "nll":
            return ((h - mean).square() * (-spread).exp() + spread).mean() / 2, {}
        if spec.match == "hinge":
            return ((h - mean).abs() * (-spread / 2).exp() - spec.kappa).clamp(min=0).square().mean(), {}
        with torch.no_grad():
            found = distances(h, samples, spec.scope, self.group)
            weights = soft_choice(found, spec.tau_sel) if spec.match == "softmin" else nearest(found)
            target = blended(samples, weights, spec.scope, self.group)
            value = (weights * found).sum(0).mean()
            effective = (1 / weights.square().sum(0)).mean()
        # Weights are constants and add up to 1, so that this has the value and the gradient of mean Σ_m w·d, without a
        # graph over all samples.
        loss = (h - target).square().mean()
        loss = loss + (value - loss).detach()
        return loss, {"effective_samples": effective} if spec.match == "softmin" else {}

    def divergence(self, posterior: Posterior, h: Tensor) -> Tensor:
        """[], KL(posterior ‖ prior) with the student's map h [B,D,H,W], mean over B, D, H, W."""
        assert posterior.log_variance is not None
        prior = torch.zeros_like(h) if self.spec.prior == "standard" else h
        prior = prior if self.spec.prior_gradient == "both" else prior.detach()
        return gaussian_divergence(posterior.mean, posterior.log_variance, prior, self.spec.prior_variance)

    @torch.no_grad()
    def measured(self, h: Tensor, posterior: Posterior) -> dict[str, Tensor]:
        """{"shift", "distance"} and {"sigma"} where there is one, see `Comparison.followed`."""
        found = {"shift": size(posterior.mean - posterior.centre), "distance": size(posterior.mean - h)}
        if posterior.log_variance is not None:
            found["sigma"] = (posterior.log_variance / 2).exp().mean()
        return found

    def undecayed(self) -> tuple[nn.Parameter, ...]:
        """Parameters that weight decay would draw away from where it is neutral, which for the others is zero.

        A decoder shrunk from the identity, or a log-variance drawn to 0, is a prior that nobody asked for.
        """
        kept = [*self.decoder.parameters(), *self.encoder.skip.parameters()]
        if self.encoder.log_variance is not None:
            kept += [p for name, p in self.encoder.log_variance.named_parameters() if name == "bias"]
        return tuple(kept)


class Regions(nn.ModuleList):
    """A `Region` for each pair of maps: stages of a classifier, or the levels of a feature pyramid.

    Args:
        spec: the settings of all.
        channels: (c_s, c_t) of each pair.
    """

    def __init__(self, spec: RegionSpec, channels: Sequence[tuple[int, int]]) -> None:
        super().__init__(Region(spec, c_s, c_t) for c_s, c_t in channels)

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], rests: Sequence[Rest | None] | None = None
    ) -> list[Comparison]:
        """Maps [B,c_s,h,w] and [B,c_t,H,W], in order → what each pair gives."""
        rests = [None] * len(self) if rests is None else rests
        return [region(*given) for region, *given in zip(self, student, teacher, rests, strict=True)]

    def undecayed(self) -> tuple[nn.Parameter, ...]:
        """Parameters that are to have no weight decay."""
        return tuple(p for region in self if isinstance(region, Region) for p in region.undecayed())


def expected_error(decoder: nn.Conv2d, posterior: Posterior, target: Tensor) -> Tensor:
    """[], half the squared error of a decoded sample against the normalised map [B,C,H,W], in expectation over the samples.

    The decoder is linear, so that no sample is needed: the error of the decoded mean, and the decoded variance. Mean over
    B, C, H, W.
    """
    error = (decoder(posterior.mean) - target.detach()).square().mean()
    if posterior.log_variance is not None:
        error = error + F.conv2d(posterior.log_variance.exp(), decoder.weight.square()).mean()
    return error / 2


def gaussian_divergence(mean: Tensor, log_variance: Tensor, prior: Tensor, variance: float = 1.0) -> Tensor:
    """[], KL(N(mean, exp(log_variance)) ‖ N(prior, variance)), mean over the elements of the four [B,D,H,W]."""
    ratio = (log_variance.exp() + (mean - prior).square()) / variance
    return (math.log(variance) - log_variance + ratio - 1).mean() / 2


def distances(student: Tensor, samples: Tensor, scope: Scope, group: int) -> Tensor:
    """[B,D,H,W], [M,B,D,H,W] → mean squared distances [M,…] of all that chooses a sample of its own.

    `map`: [M,B]; `location`: [M,B,H,W]; `group`: [M,B,D/group,H,W], of channels that lie together; `element`:
    [M,B,D,H,W].
    """
    squared = (student - samples).square()
    if scope == "map":
        return squared.mean((2, 3, 4))
    if scope == "location":
        return squared.mean(2)
    return squared if scope == "element" else squared.unflatten(2, (-1, group)).mean(3)


def soft_choice(found: Tensor, temperature: float) -> Tensor:
    """Distances d [M,…] → weights [M,…], softmax over the samples of -d / temperature."""
    return (-found / temperature).softmax(0)


def nearest(found: Tensor) -> Tensor:
    """Distances [M,…] → weights [M,…]: 1 for the nearest sample, 0 for the others."""
    return torch.zeros_like(found).scatter_(0, found.argmin(0, keepdim=True), 1.0)


def blended(samples: Tensor, weights: Tensor, scope: Scope, group: int) -> Tensor:
    """Samples [M,B,D,H,W] and the weights [M,…] of `distances`' shapes → their weighted sum [B,D,H,W]."""
    if scope == "map":
        return torch.einsum("mbdhw,mb->bdhw", samples, weights)
    if scope == "location":
        return (samples * weights[:, :, None]).sum(0)
    if scope == "element":
        return (samples * weights).sum(0)
    return (samples.unflatten(2, (-1, group)) * weights[:, :, :, None]).sum(0).flatten(1, 2)


def size(x: Tensor) -> Tensor:
    """[B,…] → []: the root mean square of each row's values, mean over B."""
    return x.flatten(1).square().mean(1).sqrt().mean()


def complaint(spec: RegionSpec, sigma: float, distance: float) -> str | None:
    """What is wrong with a region, given its mean standard deviation and the distance of its mean from the student."""
    if sigma < POINT_LIKE:
        return f"has shrunk to a point (sigma {sigma:.3f}): raise method.beta, or use method.prior=student"
    if spec.regularised and sigma > COPIED[0] * math.sqrt(spec.prior_variance) and distance < COPIED[1]:
        return f"copies the student (sigma {sigma:.2f}, {distance:.2f} from it): lower method.beta"
    return None


def _constant(width: int, value: float) -> nn.Conv2d:
    """A 1x1 convolution that starts as a constant."""
    convolution = nn.Conv2d(width, width, 1)
    nn.init.zeros_(convolution.weight)
    nn.init.constant_(convolution.bias, value)  # type: ignore[arg-type]
    return convolution
