"""ReKD, our reading: its terms and weights, warm-ups, stages, likelihoods, alarms, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import batch, setting
from torch import Tensor, nn

from kdcli.data.loader import Batch
from kdcli.errors import IncompatibleError, UsageError
from kdcli.losses import divergence
from kdcli.methods.base import Outcome, Progress
from kdcli.methods.region import Comparison, Region
from kdcli.methods.rekd import ReKD, ReKDSpec, remaining
from kdcli.models import build
from kdcli.models.features import Features
from kdcli.models.heads import Headed, build_heads
from kdcli.models.network import Network
from kdcli.transforms import rescale

K = 10
LABELS = torch.tensor([3, 7])


def images(n: int = 2, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(9))


def at(epoch: float) -> Progress:
    return Progress(torch.tensor(epoch), torch.tensor(0.5), odd_step=False)


LATE = at(1000.0)


def frozen(name: str, size: int = 32) -> Network:
    """A teacher whose BatchNorms have statistics of their own, so that nothing is the identity by chance."""
    network = build(name, K, size)
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.running_mean, module.bias):
                assert value is not None
                value.data.copy_(torch.randn(value.shape, generator=generator) / 3)
            for value in (module.running_var, module.weight):
                assert value is not None
                value.data.copy_(0.5 + torch.rand(value.shape, generator=generator))
    return network.eval().requires_grad_(False)


class Made:
    """A method with its networks, and what both made of two images."""

    def __init__(
        self, teacher: str = "wrn16_2", student: str = "resnet8", scale: int = 1, size: int = 32, **settings: Any
    ) -> None:
        torch.manual_seed(0)
        self.teacher, self.student = frozen(teacher, size), build(student, K, size)
        spec = ReKDSpec(**settings, teacher_scale=scale)  # type: ignore[arg-type]
        ReKD.check(spec)
        made = replace(setting(K), image_size=size, scale=scale)
        self.method = ReKD(spec, made, self.student, self.teacher).train()
        self.batch = replace(batch(LABELS), images=images(size=size))
        with torch.no_grad():
            self.taught = self.method.teacher_features(self.teacher, self.method.teacher_views(self.batch, LATE))
        self.learned = self.method.student_features(self.student, self.batch.images)

    def outcome(self, progress: Progress = LATE, given: Batch | None = None, seed: int = 5) -> Outcome:
        torch.manual_seed(seed)
        return self.method.outcome(given or self.batch, self.learned, self.taught, progress)

    def compared(self, seed: int = 5) -> list[Comparison]:
        """What the regions make of the same maps and noise, stage by stage."""
        torch.manual_seed(seed)
        count = len(self.method.regions)
        return self.method.regions(self.learned.stages[-count:], self.taught.stages[-count:])


def mean(values: list[Any]) -> float:
    return torch.stack(values).detach().mean().item()


# -------------------------------------------------------------------------------------------------- terms and weights


def test_the_terms_are_weighted_means_over_the_stages() -> None:
    """λ_f, λ_e and λ_e · β, each of a mean; the cross-entropy beside them; nothing else."""
    made = Made(weight=3.0, encoder_weight=0.5, beta=0.2, ce_weight=0.7)
    found = made.outcome()
    compared = made.compared()
    assert len(compared) == 3
    wanted = {
        "ce": 0.7 * F.cross_entropy(made.learned.logits, LABELS).item(),
        "feature": 3.0 * mean([one.feature for one in compared]),
        "likelihood": 0.5 * mean([one.likelihood for one in compared]),
        "kl": 0.5 * 0.2 * mean([one.divergence for one in compared]),
    }
    assert {name: term.item() for name, term in found.terms.items()} == pytest.approx(wanted, rel=1e-5)


def test_the_defaults_are_those_of_the_design() -> None:
    spec = ReKDSpec()
    assert (spec.weight, spec.encoder_weight, spec.beta, spec.kd_weight) == (5, 1, 0.1, 0)
    assert (spec.samples, spec.tau_sel, spec.group, spec.warmup, spec.warm_start) == (8, 0.1, 8, 20, 0)
    assert (spec.match, spec.scope, spec.prior, spec.prior_gradient) == ("softmin", "group", "student", "posterior")
    assert (spec.target, spec.likelihood, spec.stages) == ("region", "recon", "all")


def test_hintons_divergence_can_be_added() -> None:
    """A "+KD" run."""
    made = Made(kd_weight=0.8, temperature=3.0)
    wanted = 0.8 * divergence(made.learned.logits, made.taught.logits, 3.0)
    assert made.outcome().terms["kd"].item() == pytest.approx(wanted.item(), rel=1e-6)


def test_loss_gives_the_terms_of_the_outcome() -> None:
    made = Made()
    terms = made.outcome().terms
    torch.manual_seed(5)
    again = made.method.loss(made.batch, made.learned, made.taught, LATE)
    assert again.keys() == terms.keys() == {"ce", "feature", "likelihood", "kl"}
    for name in ("ce", "feature", "likelihood", "kl"):
        assert torch.equal(again[name], terms[name])


def test_mixed_images_have_shared_targets() -> None:
    """Both cross-entropies, to the labels and behind the decoder, take the classes' shares."""
    made = Made(likelihood="task", target="point")
    shares = torch.zeros(2, K).scatter(1, LABELS[:, None], 0.6)
    shares[:, 0] += 0.4
    terms = made.outcome(given=replace(made.batch, soft=shares)).terms
    for name, logits in (("ce", made.learned.logits), ("likelihood", made.taught.logits)):
        wanted = -(shares * logits.log_softmax(1)).sum(1).mean()
        assert terms[name].item() == pytest.approx(wanted.item(), rel=1e-4)


# ----------------------------------------------------------------------------------------------------------- warm-ups


@pytest.mark.parametrize(
    ("settings", "epoch", "feature", "kl"),
    [
        ({}, 1, 1 / 20, 1),
        ({}, 10, 10 / 20, 1),
        ({}, 20, 1, 1),
        ({}, 240, 1, 1),
        ({"warmup": 0}, 1, 1, 1),
        ({"warmup": 2}, 1, 0.5, 1),
        ({"warm_start": 5}, 5, 0, 0),
        ({"warm_start": 5}, 6, 1 / 20, 1),
        ({"warm_start": 5, "warmup": 0}, 5, 0, 0),
        ({"warm_start": 5, "warmup": 0}, 6, 1, 1),
    ],
)
def test_warm_ups(settings: dict[str, Any], epoch: int, feature: float, kl: float) -> None:
    """λ_f grows over 20 epochs; before the encoder has had its head start neither it nor the prior counts."""
    made = Made(stages="last", **settings)
    full, now = made.outcome().terms, made.outcome(at(epoch)).terms
    assert now["feature"].item() == pytest.approx(feature * full["feature"].item(), rel=1e-6)
    assert now["kl"].item() == pytest.approx(kl * full["kl"].item(), rel=1e-6)
    assert now["likelihood"].item() == full["likelihood"].item()
    assert now["ce"].item() == full["ce"].item()


def test_every_parameter_has_a_gradient_while_weights_are_zero() -> None:
    """Ranks must agree on which parameters take part, in every epoch."""
    made = Made(warm_start=3)
    torch.stack(list(made.outcome(at(1)).terms.values())).sum().backward()
    assert all(p.grad is not None for p in [*made.method.parameters(), *made.student.parameters()])


# ------------------------------------------------------------------------------------------------- stages and networks


@pytest.mark.parametrize(
    ("stages", "sizes"), [("all", [5_344, 20_928, 82_816]), ("last", [82_816])], ids=["all", "last"]
)
def test_the_parameters_of_a_pair(stages: str, sizes: list[int]) -> None:
    """wrn40_2 → wrn16_2."""
    found = Made("wrn40_2", "wrn16_2", stages=stages).method.regions
    assert [sum(p.numel() for p in region.parameters()) for region in found] == sizes


def test_one_stage_is_the_last() -> None:
    """Its terms are those of the last region; its followed values bear its number."""
    made = Made(stages="last")
    assert made.outcome().terms["feature"].item() == pytest.approx(5 * made.compared()[0].feature.item(), rel=1e-6)
    assert "sigma_stage3" in made.outcome().followed
    assert "sigma_stage2" not in made.outcome().followed


def test_unequal_numbers_of_stages_meet_at_the_last() -> None:
    """resnet50's first of four stages has no partner in wrn16_2; a student with more stages keeps its last ones."""
    made = Made("resnet50", "wrn16_2")
    assert [region.decoder.out_channels for region in made.method.regions] == [512, 1024, 2048]  # type: ignore[union-attr]
    assert torch.isfinite(made.outcome().terms["feature"])
    more = Made("wrn16_2", "mobilenetv2")
    assert sorted(n for n in more.outcome().followed if n.startswith("sigma_")) == [
        f"sigma_stage{i}" for i in range(more.student.n_stages - 2, more.student.n_stages + 1)
    ]


def test_stages_are_read_before_their_closing_relu() -> None:
    made = Made("resnet14", "resnet8")
    for features in (made.learned, made.taught):
        assert all(stage.min() < 0 for stage in features.stages)
        for i, stage in enumerate(features.stages, start=1):
            assert torch.equal(stage, features.preact(i))


@pytest.mark.parametrize(
    ("teacher", "student"), [("timm:vit_tiny_patch16_224", "resnet8"), ("resnet8", "shufflenetv2")]
)
def test_other_families(teacher: str, student: str) -> None:
    """Tokens teach by their patches; channels that 8 does not divide form smaller groups."""
    made = Made(teacher, student)
    torch.stack(list(made.outcome().terms.values())).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in made.method.parameters() if p.grad is not None)
    assert any(p.grad is not None and p.grad.any() for p in made.student.parameters())


@pytest.mark.parametrize("likelihood", ["recon", "task"])
def test_an_enlarged_teacher(likelihood: str) -> None:
    """Twice the image size: the same modules, the teacher's maps averaged down (and enlarged for its own layers)."""
    made, plain = Made(scale=2, likelihood=likelihood), Made(likelihood=likelihood)
    assert {n: v.shape for n, v in made.method.state_dict().items()} == {
        n: v.shape for n, v in plain.method.state_dict().items()
    }
    assert made.taught.stages[0].shape[2] == 2 * made.learned.stages[0].shape[2]
    outcome = made.outcome()
    assert all(torch.isfinite(term) for term in outcome.terms.values())
    wanted = rescale(images(), 2, "bilinear")
    assert torch.equal(made.taught.logits, made.teacher(wanted))


def test_the_same_seed_gives_the_same_run() -> None:
    """Modules and noise come from the default generator alone."""
    one, two = Made().outcome().terms, Made().outcome().terms
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["feature"], Made().outcome(seed=6).terms["feature"])


def test_a_teacher_with_heads_is_read_without_them() -> None:
    """As any other method does."""
    network = frozen("resnet14")
    student = build("resnet8", K)
    method = ReKD(ReKDSpec(), setting(K), student, Headed(network, build_heads(network, K)))
    found = method.teacher_features(Headed(network, build_heads(network, K)), images())
    assert found.heads == ()
    assert len(method.regions) == 3


# --------------------------------------------------------------------------------------------- the task as likelihood


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet8", 32),
        ("wrn16_2", 32),
        ("vgg8", 32),
        ("mobilenetv2", 32),
        ("shufflenetv1", 32),
        ("shufflenetv2", 32),
        ("timm:resnet18", 32),
        ("torchvision:resnet18", 64),
        ("timm:swin_pico_patch4_window7_224", 32),
        ("timm:convnext_atto", 32),
    ],
)
def test_the_remaining_layers_go_on_where_the_stage_ended(name: str, size: int) -> None:
    """From a pre-activation map to the logits that the whole network gives."""
    network = frozen(name, size)
    with torch.no_grad():
        features = network.features(images(size=size))
        for j in range(1, network.n_stages + 1):
            logits = remaining(network, j, features.preact(j))
            assert torch.allclose(logits, features.logits, rtol=1e-4, atol=1e-5), j


def test_a_channel_that_is_switched_off_is_passed_over() -> None:
    """A wide residual network whose BatchNorm multiplies a channel by zero: its map says nothing, and nothing breaks."""
    network = frozen("wrn16_2")
    norm = network.preact_norm(2)
    assert norm is not None
    norm.weight.data[:3] = torch.tensor([0.0, 1e-30, -0.4])
    with torch.no_grad():
        features = network.features(images())
        assert torch.allclose(remaining(network, 2, features.preact(2)), features.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("student", ["resnet8", "mobilenetv2", "vgg8"])
def test_at_first_the_task_is_what_the_teacher_makes_of_it(student: str) -> None:
    """A point is decoded as it is: the likelihood is the teacher's own cross-entropy, on any of its stages."""
    made = Made("wrn16_2", student, likelihood="task", target="point")
    grids = [(s.shape[2], t.shape[2]) for s, t in zip(made.learned.stages[-3:], made.taught.stages, strict=False)]
    found, wanted = made.outcome().terms["likelihood"].item(), F.cross_entropy(made.taught.logits, LABELS).item()
    same = all(t <= s for s, t in grids)
    assert (found == pytest.approx(wanted, rel=1e-4)) == same


def test_the_task_moves_encoder_and_decoder_alone() -> None:
    """The teacher stays frozen, though gradients pass through its layers; the student gets none of it."""
    made = Made(likelihood="task")
    before = {name: value.clone() for name, value in made.teacher.state_dict().items()}
    made.outcome().terms["likelihood"].backward()
    moved = {name.split(".")[2] for name, p in made.method.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"encoder", "decoder"}
    assert all(p.grad is None for p in [*made.student.parameters(), *made.teacher.parameters()])
    assert all(torch.equal(value, before[name]) for name, value in made.teacher.state_dict().items())


def test_the_task_changes_the_likelihood_alone() -> None:
    """With the same noise the other terms are the same."""
    recon, task = (Made(likelihood=likelihood, stages="last").outcome().terms for likelihood in ("recon", "task"))
    assert {name for name in recon if not torch.equal(recon[name], task[name])} == {"likelihood"}


@pytest.mark.parametrize("teacher", ["timm:vit_tiny_patch16_224", "timm:regnetx_002"])
def test_a_teacher_that_cannot_go_on_from_a_map_is_refused(teacher: str) -> None:
    """A class token is not in the map; a network tapped by hooks has no layers to call. Reconstruction suits both."""
    with pytest.raises(IncompatibleError, match="cannot be fed with its map alone") as problem:
        Made(teacher, "resnet8", likelihood="task")
    assert problem.value.code == 4
    assert problem.value.field == "method.likelihood"
    assert torch.isfinite(Made(teacher, "resnet8").outcome().terms["likelihood"])


# ----------------------------------------------------------------------------------------------- followed and alarms


def test_what_is_followed() -> None:
    """Unweighted losses and the regions' values, means over the stages; deviation and distance of each stage too."""
    made = Made(weight=7.0, beta=0.3, encoder_weight=2.0)
    found, compared = made.outcome(at(1)).followed, made.compared()
    assert not any(value.requires_grad or value.dim() for value in found.values())
    wanted: dict[str, float] = {
        "feature": mean([one.feature for one in compared]),
        "likelihood": mean([one.likelihood for one in compared]),
        "kl": mean([one.divergence for one in compared]),
    }
    for name in ("sigma", "shift", "distance", "effective_samples"):
        wanted[name] = mean([one.followed[name] for one in compared])
    for stage, one in enumerate(compared, start=1):
        wanted |= {f"{name}_stage{stage}": one.followed[name].item() for name in ("sigma", "distance")}
    assert {name: value.item() for name, value in found.items()} == pytest.approx(wanted, rel=1e-5)


def test_a_point_has_no_deviation_to_follow() -> None:
    """Nor a divergence, a choice, or an alarm."""
    made = Made(target="point")
    outcome = made.outcome()
    names = {"feature", "likelihood", "shift", "distance", *(f"distance_stage{i}" for i in (1, 2, 3))}
    assert set(outcome.followed) == names
    assert set(outcome.terms) == {"ce", "feature", "likelihood"}
    assert made.method.alarms(dict.fromkeys(names, 0.0)) == []


def test_alarms_name_the_stage() -> None:
    """One sentence for each stage whose region is none any more; silence otherwise, in the first step too."""
    method = ReKD(ReKDSpec(), setting(K), None, None)
    fine = {f"{name}_stage{i}": value for i in (1, 2, 3) for name, value in (("sigma", 0.3), ("distance", 1.0))}
    fine |= {"sigma": 0.3, "distance": 1.0}
    assert method.alarms(fine) == []
    (alarm,) = method.alarms(fine | {"sigma_stage2": 0.05})
    assert alarm.startswith("the region of the student's stage 2 has shrunk to a point")
    (alarm,) = method.alarms(fine | {"sigma_stage3": 0.97, "distance_stage3": 0.1})
    assert alarm.startswith("the region of the student's stage 3 copies the student")
    assert len(method.alarms(fine | {"sigma_stage1": 0.05, "sigma_stage2": 0.05})) == 2
    made = Made()
    assert made.method.alarms({name: value.item() for name, value in made.outcome().followed.items()}) == []


def test_the_decoder_has_no_weight_decay() -> None:
    """Nor what the deviations start from: three tensors of each of three stages."""
    made = Made()
    regions = [region for region in made.method.regions if isinstance(region, Region)]
    kept = made.method.undecayed()
    assert len(kept) == 9
    assert {id(p) for region in regions for p in region.decoder.parameters()} < {id(p) for p in kept}


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("match", ["nll", "hinge"])
def test_a_point_has_no_density(match: str) -> None:
    with pytest.raises(UsageError, match="no deviation"):
        ReKD.check(ReKDSpec(target="point", match=match))  # type: ignore[arg-type]


@pytest.mark.parametrize("prior", ["none", "standard"])
def test_mutual_gradients_need_the_students_prior(prior: str) -> None:
    with pytest.raises(UsageError, match="no part in the prior"):
        ReKD.check(ReKDSpec(prior=prior, prior_gradient="both"))  # type: ignore[arg-type]


def test_a_mutual_prior_moves_the_student() -> None:
    """The divergence reaches the student's weights with prior_gradient=both, and does not without."""
    for gradient, reached in (("both", True), ("posterior", False)):
        made = Made(prior_gradient=gradient)
        made.outcome().terms["kl"].backward()
        assert any(p.grad is not None and p.grad.any() for p in made.student.parameters()) == reached


def test_networks_of_different_classes_are_refused() -> None:
    with pytest.raises(IncompatibleError, match="outputs"):
        ReKD(ReKDSpec(), setting(K), build("resnet8", K), build("resnet8", 3))


def test_networks_without_stages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that gives no maps (some tapped by hooks) has nothing to make a region of."""
    student = build("resnet8", K)
    monkeypatch.setattr(student, "n_stages", 0)
    with pytest.raises(IncompatibleError, match="share no stages"):
        ReKD(ReKDSpec(), setting(K), student, build("resnet8", K))


def test_nothing_is_built_without_networks() -> None:
    """Where only a teacher is to be trained."""
    method = ReKD(ReKDSpec(), setting(K), None, None)
    assert not list(method.parameters())
    features = Features(torch.zeros(2, K), torch.zeros(2, 4), ())
    assert set(method.teacher_loss(batch(LABELS), features, LATE)) == {"ce"}
