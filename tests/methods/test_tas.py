"""TAS: who learns from what, the switches of its ablation, and the assistant's place between any two families."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import PROGRESS, batch, setting
from harness import Kd
from torch import Tensor, nn

from kdcli.data.dataset import Split
from kdcli.data.loader import Batch, Loader
from kdcli.engine.device import Device
from kdcli.engine.evaluate import evaluate
from kdcli.engine.step import StudentStep
from kdcli.errors import IncompatibleError, UsageError
from kdcli.inference import Use
from kdcli.methods.assistant import Bridge
from kdcli.methods.contrast import Contrast
from kdcli.methods.tas import TAS, TASSpec
from kdcli.models import build
from kdcli.models.network import Network, stage_shapes
from kdcli.specs import validate

K = 10
CPU = Device(torch.device("cpu"), "fp32", 1)
VIT, MLP = "timm:test_vit", "timm:gmixer_12_224"
SWIN = "timm:swin_pico_patch4_window7_224"


def images(count: int = 4, size: int = 32) -> Batch:
    labels = torch.arange(count) % K
    made = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))
    return Batch(made, labels, torch.arange(count), 1.0)


def make(
    teacher: str, student: str, *, size: int = 32, outputs: int = K, **settings: Any
) -> tuple[TAS, Network, Network, StudentStep]:
    """Method, student, frozen teacher, and the step that the engine would train."""
    torch.manual_seed(0)
    t = build(teacher, outputs, size).eval().requires_grad_(False)
    s = build(student, outputs, size).train()
    spec = validate(TASSpec, {"name": "tas", **settings})
    TAS.check(spec)
    method = TAS(spec, setting(outputs, image_size=size), s, t)
    return method, s, t, StudentStep(method, s, t, Use(), CPU).train()


def gradients(module: nn.Module) -> set[str]:
    """The names of the parameters that a loss has reached."""
    return {n for n, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def by_part(student: Network, reached: set[str]) -> dict[str, bool]:
    """Which of stem and first stages, last stage, and classifier of a wide residual network were reached."""
    parts = {"front": ("conv1", "block1", "block2"), "last": ("block3", "bn1"), "head": ("fc",)}
    return {part: any(name.startswith(begin) for name in reached) for part, begin in parts.items()}


# ---------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    ("pair", "bridge", "student"),
    [
        ("tf", True, {"front": True, "last": False, "head": False}),
        ("fs", False, {"front": True, "last": True, "head": True}),
        ("ts", False, {"front": True, "last": True, "head": True}),
    ],
)
def test_each_pair_moves_what_it_should(pair: str, bridge: bool, student: dict[str, bool]):
    """(t,f) the bridge and the front stages, not the last stage and head; (f,s) and (t,s) the student alone."""
    method, s, t, _step = make("wrn16_2", "wrn10_2", pairs=(pair, *{"ts", "tf", "fs"} - {pair}))
    learned = s.features((data := images()).images)
    with torch.no_grad():
        taught = t.features(data.images)
    terms = method.outcome(data, method.joint_features(learned, taught), taught, PROGRESS).terms
    (terms[f"feature_{pair}"] + terms[f"logit_{pair}"]).backward()
    assert method.assistant is not None
    assert by_part(s, gradients(s)) == student
    assert bool(gradients(method.assistant)) is bridge
    assert not gradients(t)
    assert all(p.grad is None for p in t.parameters())


def test_a_bridge_that_nothing_teaches_is_not_trained():
    """Without (t,f) it stays as it was; with detach_fused off the student's own lesson moves it."""
    method, *_ = make("wrn10_2", "wrn10_2", pairs=("ts", "fs"))
    assert method.assistant is not None
    assert not any(p.requires_grad for p in method.assistant.parameters())
    method, _s, _, step = make("wrn10_2", "wrn10_2", pairs=("ts", "fs"), detach_fused=False)
    step(images(), PROGRESS).total.backward()
    assert method.assistant is not None
    assert {"bridge.embed.weight", "bridge.block.attn.qkv.weight"} <= gradients(method.assistant)


def test_the_front_can_be_kept_from_the_assistants_gradient():
    """share_front=false: (t,f) reaches the bridge alone."""
    method, s, t, _ = make("wrn10_2", "wrn10_2", share_front=False)
    learned, taught = s.features(images().images), t.features(images().images)
    terms = method.outcome(images(), method.joint_features(learned, taught), taught, PROGRESS).terms
    (terms["feature_tf"] + terms["logit_tf"]).backward()
    assert not gradients(s)
    assert method.assistant is not None
    assert gradients(method.assistant)


@pytest.mark.parametrize("ghost", [False, True])
def test_the_teacher_stays_as_it_is_and_the_student_is_a_plain_one(ghost: bool):
    """No buffer of the teacher changes, ghost statistics or not; the student's state has the keys of one without TAS."""
    _method, s, t, step = make("wrn10_2", "wrn10_2", ghost_bn=ghost)
    before = {k: v.clone() for k, v in t.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in step.parameters() if p.requires_grad), lr=0.1)
    for _ in range(2):
        step(images(), PROGRESS).total.backward()
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in t.state_dict().items())
    assert s.state_dict().keys() == build("wrn10_2", K, 32).state_dict().keys()
    assert not any(name.startswith("teacher") for name in step.state_dict())
    assert all(not p.requires_grad for p in t.parameters())


def test_the_students_batchnorm_follows_one_pass_a_step():
    """The front's activations are those of the student's own pass: its statistics are updated once."""
    _, s, _, step = make("wrn10_2", "wrn10_2")
    step(images(), PROGRESS)
    counts = {v.item() for k, v in s.state_dict().items() if k.endswith("num_batches_tracked")}
    assert counts == {1}


# ------------------------------------------------------------------------------------------------------------- numbers


def test_without_assistant_and_features_it_is_two_cross_entropies():
    """assistant=none, a = 0, γ = 1: CE to the labels plus CE to the teacher's probabilities at T = 1."""
    method, s, t, step = make("wrn10_2", "wrn10_2", assistant="none", feature_weight=0)
    assert not list(method.parameters())
    data = images()
    output = step(data, PROGRESS)
    s.train()
    logits, taught = s(data.images), t(data.images)
    expected = F.cross_entropy(logits, data.labels) + F.cross_entropy(logits, taught.softmax(1))
    assert output.total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_infonce_is_the_cross_entropy_of_scaled_cosines():
    """An independent loop over the images; symmetric is the mean of both directions."""
    g = torch.Generator().manual_seed(1)
    z, t = (torch.randn(5, 7, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([0, 1, 0, 2, 3])
    scale = 1 / 0.07

    def expected(a: Tensor, b: Tensor, *, masked: bool = False) -> float:
        total = 0.0
        for i in range(5):
            keep = [j for j in range(5) if j == i or not (masked and labels[i] == labels[j])]
            cosines = {j: F.cosine_similarity(a[i], b[j], dim=0).item() for j in keep}
            total -= scale * cosines[i] - math.log(sum(math.exp(scale * c) for c in cosines.values()))
        return total / 5

    assert Contrast().double()(z, t, batch(labels)).item() == pytest.approx(expected(z, t), rel=1e-6)
    both = Contrast(symmetric=True).double()(z, t, batch(labels)).item()
    assert both == pytest.approx((expected(z, t) + expected(t, z)) / 2, rel=1e-6)
    masked = Contrast(mask_same_class=True).double()(z, t, batch(labels)).item()
    assert masked == pytest.approx(expected(z, t, masked=True), rel=1e-6)
    assert masked < Contrast().double()(z, t, batch(labels)).item()


def test_the_scale_is_learned_and_bounded():
    """It starts at 1/0.07 and never exceeds 100, whatever is learned."""
    contrast = Contrast()
    assert contrast.scale.item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        contrast.log_scale.fill_(9.0)
    assert contrast.scale.item() == pytest.approx(100)


def test_the_scale_comes_back_from_its_bound():
    """Whatever an update made of it, the next step holds it at 100, and there it still learns."""
    contrast = Contrast()
    with torch.no_grad():
        contrast.log_scale.fill_(9.0)
    z = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    contrast(z, -z, batch(torch.arange(4))).backward()  # the worst targets ask for a smaller scale
    assert contrast.log_scale.item() == pytest.approx(math.log(100))
    assert contrast.log_scale.grad is not None
    assert contrast.log_scale.grad.item() > 0


def test_one_image_is_no_contrast():
    """B = 1 (an epoch's last batch): InfoNCE is zero and everything finite."""
    _, _, _, step = make("timm:test_vit", "timm:test_vit")  # no BatchNorm
    output = step(images(1), PROGRESS)
    assert torch.isfinite(output.total)
    assert all(output.terms[f"feature_{pair}"].item() == 0 for pair in ("ts", "tf", "fs"))


def test_at_the_start_features_tell_nothing_and_logits_are_flat():
    """InfoNCE is about ln B or above it (its scale is 14), OFA's loss about ln K."""
    method, *_, step = make("wrn16_2", "wrn16_2")
    assert method.contrast is not None
    with torch.no_grad():
        method.contrast.log_scale.fill_(0.0)
    terms = step(images(32), PROGRESS).terms
    for pair in ("ts", "tf", "fs"):
        assert terms[f"feature_{pair}"].item() == pytest.approx(math.log(32), rel=0.15)
        assert terms[f"logit_{pair}"].item() == pytest.approx(math.log(K), rel=0.35)


def test_mse_of_pooled_vectors_and_of_maps():
    """Smoothed: the mean over B and D; not smoothed: over the positions too, at the target's size."""
    for smoothing, pick in (("gap", lambda f: f.pooled), ("none", lambda f: f.final)):
        method, s, t, _ = make("wrn10_2", "wrn10_2", assistant="none", feature_loss="mse", smoothing=smoothing)
        learned, taught = s.features(images().images), t.features(images().images)
        terms = method.loss(images(), learned, taught, PROGRESS)
        assert terms["feature_ts"].item() == pytest.approx(F.mse_loss(pick(learned), pick(taught)).item(), rel=1e-5)
        assert not list(method.parameters())  # equal widths need no projection


def test_smoothing_to_a_small_grid():
    """k x k means of the last map, compared as one vector."""
    method, s, t, _ = make("wrn10_2", "wrn10_2", assistant="none", feature_loss="mse", smoothing=2)
    learned, taught = s.features(images().images), t.features(images().images)
    assert learned.final is not None
    assert taught.final is not None
    expected = F.mse_loss(F.adaptive_avg_pool2d(learned.final, 2), F.adaptive_avg_pool2d(taught.final, 2))
    found = method.loss(images(), learned, taught, PROGRESS)["feature_ts"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_hintons_divergence_in_place_of_ofas_loss():
    """logit_loss=kd at T; logit_loss=none leaves the logits out."""
    method, s, t, _ = make("wrn10_2", "wrn10_2", assistant="none", logit_loss="kd", temperature=2.0)
    learned, taught = s.features(images().images), t.features(images().images)
    found = method.loss(images(), learned, taught, PROGRESS)["logit_ts"]
    p, q = (F.log_softmax(x / 2, 1) for x in (taught.logits, learned.logits))
    assert found.item() == pytest.approx(4 * F.kl_div(q, p, reduction="batchmean", log_target=True).item(), rel=1e-5)
    method, *_, step = make("wrn10_2", "wrn10_2", logit_loss="none")
    assert set(step(images(), PROGRESS).terms) == {"ce", "feature_ts", "feature_tf", "feature_fs"}


def test_warm_up_raises_features_and_the_assistants_lesson():
    """In epoch 1 of 4: a quarter of every feature term and of what the assistant teaches; the rest as it is."""
    early = replace(PROGRESS, epoch=torch.tensor(1.0))
    full = make("wrn10_2", "wrn10_2")[3](images(), early).terms
    risen = make("wrn10_2", "wrn10_2", warmup=4)[3](images(), early).terms
    ratios = {name: (risen[name] / full[name]).item() for name in full}
    quarter = {"feature_ts": 0.25, "feature_tf": 0.25, "feature_fs": 0.25, "logit_fs": 0.25}
    assert ratios == pytest.approx({"ce": 1, "logit_ts": 1, "logit_tf": 1} | quarter, rel=1e-4)


def test_the_assistant_may_learn_from_the_labels_too():
    """assistant_ce is the weight of its cross-entropy."""
    plain = make("wrn10_2", "wrn10_2")[3](images(), PROGRESS)
    more = make("wrn10_2", "wrn10_2", assistant_ce=0.5)[3](images(), PROGRESS)
    assert set(more.terms) - set(plain.terms) == {"ce_assistant"}
    assert more.total.item() == pytest.approx(plain.total.item() + more.terms["ce_assistant"].item(), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- the splice


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_sizes_of_the_bridge():
    """wrn40_2 → wrn16_2: 64x16x16, window 4, two heads, 0.054 million parameters; ViT-S → ResNet-18 at 224: 1.87."""
    method, *_ = make("wrn40_2", "wrn16_2")
    assert method.assistant is not None
    assert count(method.assistant) == pytest.approx(54_000, rel=0.01)
    block: Any = method.assistant.bridge.block
    assert (block.attn.window_size, block.attn.num_heads) == ((4, 4), 2)
    large = Bridge(256, 14, 384, 14, attention=True)
    assert count(large) == pytest.approx(1_870_000, rel=0.01)
    block = large.block
    assert (block.attn.window_size, block.attn.num_heads) == ((7, 7), 12)


@pytest.mark.parametrize(
    ("side", "out", "patch"), [(16, 16, 1), (16, 8, 2), (7, 14, 1), (14, 4, 4), (8, 3, 3)], ids=lambda x: str(x)
)
def test_a_bridge_between_any_two_grids(side: int, out: int, patch: int):
    """Patches as wide as the ratio; smaller maps, and those that do not divide, are enlarged first."""
    bridge = Bridge(5, side, 8, out, attention=True)
    assert bridge.embed.stride == (patch, patch)
    assert bridge(torch.randn(2, 5, side, side)).shape == (2, 8, out, out)


@pytest.mark.parametrize(
    ("teacher", "student", "first"),
    [
        ("wrn16_2", "resnet8x4", "student"),
        (VIT, "resnet8", "student"),
        (SWIN, "resnet8", "student"),
        ("resnet8", VIT, "teacher"),
        ("resnet8", SWIN, "teacher"),
        ("resnet8", MLP, "teacher"),
        (VIT, MLP, "student"),
        ("timm:convnext_atto", VIT, "teacher"),
        ("vgg8", "mobilenetv2", "student"),
        ("timm:test_vit2", VIT, "student"),
        ("timm:deit_tiny_distilled_patch16_224", "resnet8", "student"),
    ],
)
def test_any_two_families(teacher: str, student: str, first: str):
    """The convolutional network in front, else the student; finite losses and a gradient for every parameter."""
    method, _s, t, step = make(teacher, student)
    assert method.assistant is not None
    assert method.assistant.teacher_first is (first == "teacher")
    output = step(images(), PROGRESS)
    output.total.backward()
    assert torch.isfinite(output.total)
    assert not [n for n, p in step.named_parameters() if p.requires_grad and p.grad is None]
    assert all(p.grad is None for p in t.parameters())
    assert 0 <= output.followed["top1_assistant"].item() <= 100


@pytest.mark.parametrize("kind", ["conv", "conv+attention", "attention", "full"])
@pytest.mark.parametrize(("teacher", "student"), [("wrn10_2", "resnet8"), (VIT, "resnet8"), ("resnet8", VIT)])
def test_the_kinds_of_assistant(kind: str, teacher: str, student: str):
    """Attention and last stage, each with and without the other; without the last stage the bridge is classified."""
    method, s, t, step = make(teacher, student, assistant=kind)
    assistant = method.assistant
    assert assistant is not None
    assert isinstance(assistant.bridge.block, nn.Identity) is (kind in ("conv", "attention"))
    back = s if assistant.teacher_first else t
    shapes = stage_shapes(back, 32)
    stage = -2 if kind in ("attention", "full") else -1
    channels = shapes[-2][0] if stage == -2 else back.pooled_dim
    front = t if assistant.teacher_first else s
    bridged = assistant.bridge(front.features(images().images).maps[-2])
    assert bridged.shape == (4, channels, *shapes[stage][1:])
    output = step(images(), PROGRESS)
    output.total.backward()
    assert not [n for n, p in step.named_parameters() if p.requires_grad and p.grad is None]


def test_a_map_enters_a_vision_transformer_with_its_class_token():
    """The copy starts as class token plus position; behind it the patches are the network's own sequence again."""
    method, _s, t, _ = make(VIT, "resnet8")
    assert method.assistant is not None
    prefix = method.assistant.prefix
    assert prefix is not None
    vit: Any = t
    expected = vit.net.cls_token[0] + vit.net.pos_embed[0, :1]
    assert torch.equal(prefix, expected)
    x = t.stem(images().images)
    for i in range(1, t.n_stages):
        x = t.stage(i, x)
    tokens = torch.cat([x[:, :1], t.from_map(t.to_map(x))], 1)
    assert torch.equal(tokens, x)
    with torch.no_grad():
        prefix.copy_(x[0, :1])
        own = method.assistant._behind(t.to_map(x[:1]), t).logits
    assert torch.allclose(own, t(images().images)[:1], atol=1e-5)


def test_the_class_token_can_know_the_image():
    """pooled: the same at first, then the copy plus what the linear layer makes of the patches' mean; copy: for all alike."""
    method, s, t, step = make(VIT, "resnet8")
    plain, *_ = make(VIT, "resnet8", class_token="copy")
    assert method.assistant is not None
    assert plain.assistant is not None
    assert plain.assistant.summary is None
    summary = method.assistant.summary
    assert summary is not None
    x = s.features(images().images).maps[-2]
    assert torch.equal(method.assistant(x, t).logits, plain.assistant(x, t).logits)
    step(images(), PROGRESS).total.backward()
    assert gradients(summary) == {"weight"}
    with torch.no_grad():
        summary.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        bridged = method.assistant.bridge(x)
        tokens = t.from_map(bridged)
        first = method.assistant.prefix + (tokens.mean(1) @ summary.weight.T)[:, None]  # type: ignore[operator]
        expected = t.tail(t.stage(t.n_stages, torch.cat([first, tokens], 1)))[1]
        assert torch.allclose(method.assistant(x, t).logits, expected, atol=1e-5)


def test_position_embeddings_can_be_added_to_the_patches():
    """add_pos changes what the back network sees, by what it adds to its own patches."""
    method, s, t, _ = make(VIT, "resnet8", add_pos=True)
    plain, *_ = make(VIT, "resnet8")
    assert method.assistant is not None
    assert plain.assistant is not None
    x = s.features(images().images).maps[-2]
    assert not torch.equal(method.assistant(x, t).logits, plain.assistant(x, t).logits)
    vit: Any = t
    positions = t.positions(8)
    assert positions is not None
    assert torch.allclose(positions.flatten(1).T, vit.net.pos_embed[0, 1:])


def test_the_feature_of_a_class_token_network():
    """avg: the mean of the patch tokens behind the final norm; cls: what the classifier reads."""
    vit: Any
    for pool in ("avg", "cls"):
        method, _, vit, _ = make(VIT, "resnet8", vit_pool=pool)
        features = vit.features(images().images)
        tokens = vit.net.forward_features(images().images)
        expected = tokens[:, 1:].mean(1) if pool == "avg" else tokens[:, 0]
        assert torch.allclose(method._grid(features).flatten(1), expected, atol=1e-5)


def test_ghost_statistics_are_the_assistants_own():
    """In training they follow the batch and the logits are those of batch statistics; in evaluation they are used."""
    method, s, t, step = make("wrn10_2", "wrn10_2", ghost_bn=True)
    assert method.assistant is not None
    ghost = method.assistant.ghost
    assert ghost is not None
    before = {name: value.clone() for name, value in ghost.state_dict().items()}
    step(images(), PROGRESS)
    changed = {name for name, value in ghost.state_dict().items() if not torch.equal(value, before[name])}
    assert any("block3" in name and name.endswith("running_mean") for name in changed)
    assert not any("block1" in name for name in changed)
    x = s.features(images().images).maps[-2]
    trained = method.assistant(x, t).logits
    method.eval()
    again = {name: value.clone() for name, value in ghost.state_dict().items()}
    evaluated = method.assistant(x, t).logits
    assert not torch.allclose(trained, evaluated)
    assert all(torch.equal(value, again[name]) for name, value in ghost.state_dict().items())
    assert not any(module.training for module in t.modules())


@pytest.mark.parametrize(("teacher", "student"), [("wrn10_2", "resnet8"), (VIT, "resnet8"), ("resnet8", VIT)])
def test_the_companion_is_the_assistant_of_the_training(teacher: str, student: str):
    """From images it gives the logits of the splice, in the networks' evaluation mode, and leaves them as they were."""
    method, s, t, step = make(teacher, student)
    (whole,) = step.companions().values()
    method.eval()
    s.eval()
    with torch.no_grad():
        taught, learned = t.features(images().images), s.features(images().images)
        (spliced,) = method.joint_features(learned, taught).assistants
        assert torch.allclose(whole(images().images), spliced.logits, atol=1e-5)
    assert make(teacher, student, assistant="none")[3].companions() == {}


def test_enlarged_images_reach_a_teacher_in_front():
    """At teacher scale 2 the companion enlarges them as training does, and grids of any ratio are bridged."""
    torch.manual_seed(0)
    spec = TASSpec(teacher_scale=2)
    t, s = build("resnet8", K, 32).eval().requires_grad_(False), build(VIT, K, 32).train()
    method = TAS(spec, setting(K, scale=2), s, t)
    step = StudentStep(method, s, t, Use(), CPU).train()
    step(images(), PROGRESS).total.backward()
    (whole,) = step.companions().values()
    assert whole(images().images).shape == (4, K)


# ---------------------------------------------------------------------------------------------------------- the settings


def test_parameters_without_weight_decay():
    """Temperature, norms, biases, tokens and tables; never a weight matrix."""
    method, *_ = make(VIT, "resnet8")
    names = {id(p): n for n, p in method.named_parameters()}
    undecayed = {names[id(p)] for p in method.undecayed()}
    assert {"contrast.log_scale", "assistant.prefix", "assistant.bridge.norm.weight"} <= undecayed
    assert "assistant.bridge.block.attn.relative_position_bias_table" in undecayed
    assert "assistant.bridge.embed.weight" not in undecayed
    assert all(p.dim() < 2 for p in method.undecayed() if names[id(p)].endswith("weight"))


def test_one_projection_for_one_width():
    """None where the width is the teacher's; student and assistant share theirs where the student's stage comes last."""
    method, *_ = make("wrn16_2", "wrn10_2")
    assert not method.projections
    method, *_ = make("wrn16_2", "resnet8")
    assert list(method.projections) == ["64"]  # the student's; the assistant ends in the teacher
    method, *_ = make("wrn16_2", VIT)
    assert list(method.projections) == ["64"]  # both end in the student


def test_a_projection_of_targets_alone_is_not_trained():
    """A width that only the assistant has, which only teaches, has no gradient to learn from."""
    settings = {"assistant": "conv", "smoothing": 2}
    method, *_, step = make("timm:mobilenetv2_100", "resnet8", pairs=("ts", "fs"), **settings)
    assert {w: p.weight.requires_grad for w, p in method.projections.items()} == {"64": True, "1280": False}
    step(images(), PROGRESS).total.backward()
    assert not [n for n, p in step.named_parameters() if p.requires_grad and p.grad is None]
    method, *_ = make("timm:mobilenetv2_100", "resnet8", **settings)
    assert all(p.weight.requires_grad for p in method.projections.values())


def test_a_network_without_maps_has_no_grid():
    """A token network tapped by hooks has a pooled vector alone."""
    s = build("resnet8", K, 224)
    t = build("timm:tnt_s_patch16_224", K, 224)
    with pytest.raises(IncompatibleError, match="no maps"):
        TAS(TASSpec(assistant="none", smoothing=2), setting(K, image_size=224), s, t)
    TAS(TASSpec(assistant="none"), setting(K, image_size=224), s, t)


def test_pairs_with_an_assistant_that_is_not_there_are_left_out():
    """assistant=none keeps (t,s) of the three; were none left, the method would be plain training."""
    method, *_ = make("wrn10_2", "wrn10_2", assistant="none")
    assert method.pairs == ("ts",)
    with pytest.raises(UsageError, match="nothing is left"):
        TAS.check(TASSpec(assistant="none", pairs=("tf", "fs")))


def test_what_cannot_be_spliced_is_refused():
    """A network tapped by hooks has no callable stages; without an assistant it will do."""
    torch.manual_seed(0)
    t = build("resnet8", K, 32).eval()
    s = build("torchvision:squeezenet1_1", K, 64)
    with pytest.raises(IncompatibleError, match="no stages to splice"):
        TAS(TASSpec(), setting(K, image_size=64), s, t)
    TAS(TASSpec(assistant="none"), setting(K, image_size=64), s, t)


def test_settings_of_the_command_line(kd: Kd):
    """`assistant` is a list of networks only outside the method; lists of the method may be written with commas."""
    words = ["distill", "--method", "tas", "--teacher", "resnet14", "--student", "resnet8", "--dataset", "digits"]
    shown = kd(*words, "--set", "method.assistant=conv", "--set", "method.pairs=ts,tf", "--dry-run", "--json")
    assert shown.code == 0, shown.err
    assert (shown.json["spec"]["method"]["assistant"], shown.json["spec"]["method"]["pairs"]) == ("conv", ["ts", "tf"])
    assert kd(*words, "--set", "method.pairs=ts,tx").code == 2


def test_a_pair_named_twice_is_refused():
    with pytest.raises(UsageError, match="named twice"):
        TAS.check(TASSpec(pairs=("ts", "ts")))


def test_the_assistant_is_measured_like_the_student():
    """Through the engine's evaluation: a number of correct images, and every module in the mode it had."""
    _method, _s, t, step = make("wrn10_2", "wrn10_2")
    split = Split.of([0, 1, 2, 3], images=torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8))
    loader = Loader(
        split,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        image_size=32,
        batch_size=4,
        seed=0,
        augment="none",
        device="cpu",
        train=False,
    )
    before = {name: module.training for name, module in step.named_modules()}
    found = evaluate(step.companions()["assistant"], Use(), loader, CPU).modes["single"]
    assert found["n"] == 4
    assert {name: module.training for name, module in step.named_modules()} == before
    assert not t.training
