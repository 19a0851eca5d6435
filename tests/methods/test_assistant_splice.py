"""TAS's hybrid assistant: where it is cut, what its bridge is, and that it is student and teacher but for the bridge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdcli.methods.assistant import Assistant, Bridge, Kind, Whole
from kdcli.models import build
from kdcli.models.features import Features
from kdcli.models.network import Network, parameters_of, stage_shapes

K = 10
VIT, SWIN = "timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224"
MIXER, RESMLP = "timm:mixer_s32_224", "timm:resmlp_12_224"
CONVNEXT = "timm:convnext_atto"


def images(n: int = 2, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(9))


def frozen(name: str, size: int = 32) -> Network:
    torch.manual_seed(1)
    return build(name, K, size).eval().requires_grad_(False)


def spliced(student: Network, teacher: Network, kind: Kind = "full", size: int = 32, scale: int = 1) -> Assistant:
    torch.manual_seed(2)
    return Assistant(student, teacher, size, scale * size, kind=kind)


def native(network: Network, x: Tensor) -> Tensor:
    """What the last stage reads."""
    x = network.stem(x)
    for i in range(1, network.n_stages):
        x = network.stage(i, x)
    return x


# ------------------------------------------------------------------------------------------------------- where it is cut


@pytest.mark.parametrize(
    "name",
    [
        *("resnet8", "wrn16_2", "vgg8", "mobilenetv1", "mobilenetv2", "shufflenetv1", "shufflenetv2", "resnet50"),
        *(VIT, SWIN, MIXER, RESMLP, CONVNEXT, "timm:resnet18", "timm:mobilenetv2_100", "timm:mobilenetv3_small_050"),
        *("torchvision:resnet18", "timm:deit_tiny_distilled_patch16_224"),
    ],
)
def test_a_network_spliced_with_itself_is_itself(name: str) -> None:
    """Front stages, last stage and tail are cut where they join: without a bridge the logits are the network's own."""
    network = frozen(name)
    one = images(1)
    made = network.features(one)
    assistant = spliced(network, network)
    assistant.bridge = nn.Identity()
    before_last = native(network, one)
    if assistant.prefix is not None:  # where its own class token has got to
        assistant.prefix.data.copy_(before_last[0, : len(assistant.prefix)])
    found = assistant(made.maps[-2], network)
    torch.testing.assert_close(found.logits, made.logits)
    torch.testing.assert_close(found.pooled, made.pooled)
    torch.testing.assert_close(found.maps[-1], made.maps[-1])


@pytest.mark.parametrize(
    ("teacher", "student", "teacher_first"),
    [
        ("wrn40_2", "wrn16_2", False),
        (VIT, "resnet8", False),
        (MIXER, "mobilenetv2", False),
        (SWIN, "resnet18", False),
        ("resnet8", VIT, True),
        (CONVNEXT, MIXER, True),
        (VIT, RESMLP, False),
        (RESMLP, SWIN, False),
        ("vgg13", "shufflenetv2", False),
        ("resnet50", "wrn16_2", False),
    ],
)
def test_the_convolutional_network_is_the_front(teacher: str, student: str, teacher_first: bool) -> None:
    """If exactly one is convolutional it comes first, else the student does; logits [B,K], the back network's features."""
    s, t = build(student, K), frozen(teacher)
    assistant = spliced(s, t)
    assert assistant.teacher_first is teacher_first
    front, back = (t, s) if teacher_first else (s, t)
    found = assistant(front.features(images()).maps[-2], back)
    assert found.logits.shape == (2, K)
    assert found.pooled.shape == (2, back.pooled_dim)
    assert found.maps[-1].shape[1:] == stage_shapes(back, 32)[-1]
    assert torch.isfinite(found.logits).all()


@pytest.mark.parametrize(("teacher", "student"), [("wrn40_2", "wrn16_2"), (VIT, "resnet8"), ("resnet8", VIT)])
def test_grids_of_any_ratio_meet(teacher: str, student: str) -> None:
    """A teacher that sees images twice as large, before or behind the bridge."""
    s, t = build(student, K), build(teacher, K, 64).eval().requires_grad_(False)
    assistant = spliced(s, t, scale=2)
    front, back, size = (t, s, 64) if assistant.teacher_first else (s, t, 32)
    found = assistant(front.features(images(size=size)).maps[-2], back)
    assert found.maps[-1].shape[1:] == stage_shapes(back, 32 if assistant.teacher_first else 64)[-1]


# ------------------------------------------------------------------------------------------------------------ the bridge


@pytest.mark.parametrize(
    ("teacher", "student", "size", "before", "behind", "window", "heads", "millions"),
    [
        ("wrn40_2", "wrn16_2", 32, (64, 16), (64, 16), 4, 2, 0.054),
        ("timm:vit_small_patch16_224", "timm:resnet18", 224, (256, 14), (384, 14), 7, 12, 1.87),
        ("timm:vit_small_patch16_224", "resnet18", 32, (256, 8), (384, 8), 4, 12, 1.87),
        ("timm:convnext_tiny", "timm:deit_tiny_patch16_224", 224, (384, 14), (192, 14), 7, 6, None),
        ("timm:swin_tiny_patch4_window7_224", "timm:resnet18", 224, (256, 14), (384, 14), 7, 12, 1.87),
    ],
)
def test_bridges_have_the_sizes_of_their_pairs(
    teacher: str,
    student: str,
    size: int,
    before: tuple[int, int],
    behind: tuple[int, int],
    window: int,
    heads: int,
    millions: float | None,
) -> None:
    """Channels and grid on both sides, window, heads and parameters of the pairs of our notes; grids of the same size."""
    s, t = (build(name, 100, size) for name in (student, teacher))
    assistant = spliced(s, t, size=size)
    bridge = assistant.bridge
    front = t if assistant.teacher_first else s
    assert stage_shapes(front, size)[-2] == (before[0], before[1], before[1])
    assert (bridge.embed.in_channels, bridge.side) == before
    assert bridge.embed.kernel_size == (1, 1)
    assert (bridge.embed.out_channels, bridge.block.input_resolution) == (behind[0], (behind[1], behind[1]))
    assert bridge.block.window_size == (window, window)
    assert bridge.block.shift_size == (0, 0)
    assert bridge.block.attn.num_heads == heads
    if millions is not None:
        assert parameters_of(bridge) / 1e6 == pytest.approx(millions, rel=0.01)
    if assistant.prefix is not None:
        assert assistant.prefix.shape == (1, behind[0])


@pytest.mark.parametrize(
    ("side", "out", "patch", "between"), [(16, 8, 2, 16), (8, 8, 1, 8), (4, 8, 1, 8), (16, 4, 4, 16), (8, 7, 2, 14)]
)
def test_patches_are_as_large_as_the_grids_ask(side: int, out: int, patch: int, between: int) -> None:
    """Stride where the front's grid is larger, bilinear enlarging where it is smaller or does not divide."""
    bridge = Bridge(3, side, 8, out, attention=False)
    assert bridge.embed.stride == bridge.embed.kernel_size == (patch, patch)
    assert bridge.side == between
    assert bridge(torch.randn(2, 3, side, side)).shape == (2, 8, out, out)


@pytest.mark.parametrize(
    ("grid", "window"), [(14, 7), (7, 7), (8, 4), (28, 7), (16, 4), (4, 4), (5, 5), (2, 2), (1, 1)]
)
def test_windows_divide_the_grid(grid: int, window: int) -> None:
    """7, else 4, else the whole grid; a position sees nothing outside its window before the next stage."""
    torch.manual_seed(0)
    bridge = Bridge(4, grid, 8, grid, attention=True)
    x = torch.randn(1, 4, grid, grid, requires_grad=True)
    bridge(x)[0, :, 0, 0].square().sum().backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(0) > 0
    assert seen[:window, :window].all()
    assert int(seen.sum()) == window**2


@pytest.mark.parametrize(("width", "heads"), [(16, 1), (32, 1), (64, 2), (116, 2), (384, 12), (100, 2)])
def test_heads_divide_the_width(width: int, heads: int) -> None:
    """A head for 32 channels, as many as divide them, at least one."""
    bridge = Bridge(4, 4, width, 4, attention=True)
    assert bridge.block.attn.num_heads == heads


# --------------------------------------------------------------------------------------------------------- the variants


@pytest.mark.parametrize("pair", [("wrn40_2", "wrn16_2"), (VIT, "resnet8"), ("resnet8", VIT), (SWIN, "mobilenetv2")])
def test_the_ablation_takes_parts_away(pair: tuple[str, str]) -> None:
    """conv: the embedding alone, its mean classified; + attention; the last stage without attention; both."""
    t, s = frozen(pair[0]), build(pair[1], K)
    kinds: tuple[tuple[Kind, bool, bool], ...] = (
        ("conv", False, False),
        ("conv+attention", True, False),
        ("attention", False, True),
        ("full", True, True),
    )
    for kind, attends, last in kinds:
        assistant = spliced(s, t, kind)
        front, back = (t, s) if assistant.teacher_first else (s, t)
        maps = front.features(images()).maps
        found = assistant(maps[-2], back)
        assert isinstance(assistant.bridge.block, nn.Identity) is not attends
        if not last:
            x = assistant.bridge(maps[-2])
            assert assistant.prefix is None
            torch.testing.assert_close(found.pooled, x.mean((2, 3)))
            torch.testing.assert_close(found.logits, back.classify(x.mean((2, 3))))
        assert found.logits.shape == (2, K)


def test_the_class_token_is_copied_with_its_position() -> None:
    """A parameter of the assistant's own, equal at first to class token plus position; the network's stays."""
    t = frozen(VIT)
    assistant = spliced(build("resnet8", K), t)
    net = t.net
    assert assistant.prefix is not None
    torch.testing.assert_close(assistant.prefix.data, net.cls_token[0] + net.pos_embed[0, :1])
    assistant.prefix.data.add_(1)
    assert not torch.equal(t.prefix_tokens, assistant.prefix)


def test_positions_are_added_on_request() -> None:
    """`add_pos`: the back network's, to the patches; a network that has none gets none."""
    t, s = frozen(VIT), build("resnet8", K).eval()
    assistant = spliced(s, t)
    x = s.features(images()).maps[-2]
    plain = assistant(x, t).logits
    assistant.add_pos = True
    moved = assistant(x, t).logits
    assert not torch.allclose(plain, moved)
    t.net.pos_embed.data[:, 1:] = 0
    torch.testing.assert_close(assistant(x, t).logits, plain)
    other = frozen("resnet14")
    assistant = spliced(s, other)
    plain = assistant(x, other).logits
    assistant.add_pos = True
    torch.testing.assert_close(assistant(x, other).logits, plain)


# ------------------------------------------------------------------------------------------------- statistics and states


def statistics(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.named_buffers()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_frozen_stage_keeps_its_statistics() -> None:
    """The teacher's last stage is in evaluation mode on the spliced path, gradients pass, nothing in it changes."""
    t, s = frozen("wrn16_2"), build("resnet8", K).train()
    before = statistics(t)
    assistant = spliced(s, t).train()
    front = s.features(images()).maps[-2]
    assistant(front, t).logits.square().sum().backward()
    assert same(before, statistics(t))
    assert all(p.grad is None for p in t.parameters())
    assert all(p.grad is not None for p in assistant.parameters())
    one = assistant(front[:1], t).logits
    torch.testing.assert_close(one, assistant(front, t).logits[:1])  # no statistic of the batch


def test_ghost_statistics_are_the_paths_own() -> None:
    """`ghost`: the batch normalises in training and is followed; evaluation uses what was followed; the teacher's stay."""
    t, s = frozen("wrn16_2"), build("resnet8", K).train()
    before = statistics(t)
    assistant = Assistant(s, t, 32, 32, ghost=True).train()
    x = s.features(images(8)).maps[-2].detach()
    first = assistant(x, t).logits
    assert not torch.allclose(assistant(x[:4], t).logits, first[:4], atol=1e-4)
    assert same(before, statistics(t))
    assert not t.training
    assert not any(module.training for module in t.modules())
    fresh = Assistant(s, t, 32, 32, ghost=True)
    changed = [n for n, b in assistant.named_buffers() if not torch.equal(b, dict(fresh.named_buffers())[n])]
    assert any("running_mean" in name for name in changed)
    for _ in range(200):
        assistant(x, t)
    # The running variance is the unbiased one, and the mean has arrived.
    torch.testing.assert_close(assistant.eval()(x, t).logits, assistant.train()(x, t).logits, rtol=0.05, atol=0.05)
    assistant.eval()
    state = {k: v.clone() for k, v in assistant.state_dict().items()}
    assistant(x, t)
    assert same(state, assistant.state_dict())


class Tokens(Network):
    """A token network that has BatchNorm, as none of the libraries' cut ones has."""

    kind = "token"

    def __init__(self) -> None:
        super().__init__(outputs=K, n_stages=2, pooled_dim=6, classifier_name="fc")
        self.embed = nn.Conv2d(3, 6, 4, stride=4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)) for _ in range(2))
        self.fc = nn.Linear(6, K)

    def stem(self, x: Tensor) -> Tensor:
        return self.embed(x)

    def raw_stage(self, i: int, x: Tensor) -> Tensor:
        return self.blocks[i - 1](x)

    def final(self, x: Tensor) -> Tensor:
        return x

    def truncated(self, first: int, outputs: int) -> Network:
        raise NotImplementedError


def test_a_students_statistics_follow_its_own_pass_alone() -> None:
    """A student behind the bridge normalises by the batch, and the spliced pass leaves its running statistics alone."""
    t, s = frozen("resnet8"), Tokens().train()
    assistant = spliced(s, t).train()
    assert assistant.teacher_first
    before = statistics(s)
    front = t.features(images(4)).maps[-2]
    found = assistant(front, s).logits
    assert same(before, statistics(s))
    assert all(module.training for module in s.modules())
    assert not torch.allclose(assistant(front[:2], s).logits, found[:2])
    found.square().sum().backward()
    grads = {name: p.grad is not None for name, p in s.named_parameters()}
    assert {name for name, has in grads.items() if has} == {n for n in grads if n.startswith(("blocks.1", "fc"))}


@pytest.mark.parametrize(("teacher", "student"), [("wrn16_2", "resnet8"), (VIT, "resnet8"), ("resnet8", VIT)])
@pytest.mark.parametrize("scale", [1, 2])
def test_the_whole_assistant_is_that_of_the_features(teacher: str, student: str, scale: int) -> None:
    """From images to logits it gives what the training path gives, with the networks' weights of that moment."""
    torch.manual_seed(1)
    t, s = build(teacher, K, 32 * scale).eval().requires_grad_(False), build(student, K).eval()
    assistant = spliced(s, t, scale=scale).eval()
    whole = Whole(assistant, s, t, scale, "bilinear").eval()

    def expected() -> Tensor:
        larger = images() if scale == 1 else nn.functional.interpolate(images(), scale_factor=2.0, mode="bilinear")
        first = assistant.teacher_first
        front: Features = t.features(larger) if first else s.features(images())
        return assistant(front.maps[-2], s if first else t).logits

    torch.testing.assert_close(whole(images()), expected())
    with torch.no_grad():
        for p in s.parameters():
            p.mul_(1.1)
    torch.testing.assert_close(whole(images()), expected())
