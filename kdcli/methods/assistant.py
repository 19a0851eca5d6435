"""TAS's hybrid assistant: the front stages of one network, a local-to-global bridge, the last stage of the other.

    assistant(x) = tail_K(S_K^last(bridge(S_F^{n-1}(… S_F^1(x)))))

The stages are shared with student and teacher, not copied; only the bridge is new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from kdcli.models.batch_statistics import batch_statistics
from kdcli.models.blocks import pool
from kdcli.models.features import Features
from kdcli.models.network import Network, stage_shapes
from kdcli.transforms import rescale

Kind = Literal["conv", "conv+attention", "attention", "full"]
"""Which of its two parts it has: attention in the bridge (conv+attention, full), the last stage (attention, full)."""


class Bridge(nn.Module):
    """[B,C,H,H] → [B,D,S,S]: patches embedded and normalised, then one block of window attention and MLP (L2G of FBT).

    Args:
        channels, side: C and H.
        width, out: D and S. A smaller map is enlarged (bilinear) before the embedding; patches of a larger one are
            H/S pixels wide, after enlarging to a multiple of S where it is none.
        attention: with the attention block: pre-norm, windows of 7 or else 4 where they divide S, else of S; D/32 heads.
    """

    def __init__(self, channels: int, side: int, width: int, out: int, *, attention: bool) -> None:
        super().__init__()
        patch = -(-side // out)
        self.side = patch * out
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.norm = nn.LayerNorm(width)
        self.block = _attention(width, out) if attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,H] → [B,D,S,S]."""
        if x.shape[-1] != self.side:
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=False)
        x = self.norm(self.embed(x).permute(0, 2, 3, 1))
        return self.block(x).permute(0, 3, 1, 2)


def _attention(width: int, side: int) -> nn.Module:
    from timm.models.swin_transformer import SwinTransformerBlock  # slow to import, and only this method wants it

    window = next((w for w in (7, 4) if side % w == 0), side)
    heads = max(1, width // 32)
    while width % heads:
        heads -= 1
    return SwinTransformerBlock(width, (side, side), num_heads=heads, window_size=window, shift_size=0, mlp_ratio=4.0)


class Ghost(nn.Module):
    """Running statistics for another path through a frozen network's BatchNorm layers, whose own stay as they are.

    In training mode the layers normalise by the batch and these statistics follow it; in evaluation mode they use these.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.names = [
            f"{name}.{buffer}"
            for name, module in network.named_modules()
            if isinstance(module, _BatchNorm)
            for buffer, _ in module.named_buffers()
        ]
        for name in self.names:
            self.register_buffer(_flat(name), network.get_buffer(name).detach().clone())

    def __call__(self, network: nn.Module, run: Callable[[Tensor], Features], x: Tensor) -> Features:
        """`run(x)`, a pass through stages of `network`, with these statistics in place of its own."""
        mine = {f"network.{name}": self.get_buffer(_flat(name)) for name in self.names}
        with _batchnorm_mode(network, self.training):
            found = functional_call(_Run(network, run), mine, (x,))
        assert isinstance(found, Features)
        return found


def _flat(name: str) -> str:
    return name.replace(".", "/")


class _Run(nn.Module):
    def __init__(self, network: nn.Module, run: Callable[[Tensor], Features]) -> None:
        super().__init__()
        self.network, self.run = network, run

    def forward(self, x: Tensor) -> Features:
        return self.run(x)


@contextmanager
def _batchnorm_mode(network: nn.Module, training: bool) -> Iterator[None]:
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    before = [norm.training for norm in norms]
    try:
        for norm in norms:
            norm.training = training
        yield
    finally:
        for norm, mode in zip(norms, before, strict=True):
            norm.training = mode


class Assistant(nn.Module):
    """What is new in the assistant; the stages it shares are handed to it.

    Where exactly one of the two networks is convolutional it is the front; otherwise the student is. A back network with
    prefix tokens (class token) gets a learned copy of them, positions included. Such a token has gathered its image by the
    last stage, which alone cannot do it: so the mean of the bridge's patches is added, through a linear layer that starts
    at zero.

    Args:
        student, teacher: the networks; the assistant keeps neither.
        student_size, teacher_size: sides of their images in pixels.
        kind: see `Kind`. Without the last stage the bridge's mean goes straight into the back network's classifier.
        summary: add that mean to the prefix tokens; off, they are the same for every image.
        add_pos: add the back network's position embeddings to the bridge's patches.
        ghost: statistics of its own for the BatchNorm layers of a frozen back network.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network,
        student_size: int,
        teacher_size: int,
        *,
        kind: Kind = "full",
        summary: bool = True,
        add_pos: bool = False,
        ghost: bool = False,
    ) -> None:
        super().__init__()
        self.teacher_first = teacher.kind == "conv" and student.kind == "token"
        self.last_stage = kind in ("attention", "full")
        front, back, front_size, back_size = student, teacher, student_size, teacher_size
        if self.teacher_first:
            front, back, front_size, back_size = teacher, student, teacher_size, student_size
        channels, side, _ = stage_shapes(front, front_size)[-2]
        shapes = stage_shapes(back, back_size)
        width, out, _ = shapes[-2] if self.last_stage else (back.pooled_dim, *shapes[-1][1:])
        self.bridge = Bridge(channels, side, width, out, attention=kind in ("conv+attention", "full"))
        prefix = back.prefix_tokens if self.last_stage else None
        self.prefix = None if prefix is None else nn.Parameter(prefix.detach().clone())
        self.summary = None if prefix is None or not summary else nn.Linear(width, prefix.numel(), bias=False)
        if self.summary is not None:
            nn.init.zeros_(self.summary.weight)
        self.add_pos = add_pos and self.last_stage
        self.ghost = Ghost(back) if ghost and not self.teacher_first else None
        self._normalised = any(isinstance(module, _BatchNorm) for module in back.modules())

    def forward(self, front: Tensor, back: Network) -> Features:
        """The front network's map before its last stage [B,C,H,H] → features of the assistant; logits [B,K]."""
        x = self.bridge(front)
        if not self.last_stage:
            pooled = pool(x)
            return Features(back.classify(pooled), pooled, (x,), final=x, network=back)
        if self.ghost is not None:
            return self.ghost(back, lambda y: self._behind(y, back), x)
        # The statistics of a student's BatchNorm follow its own pass alone.
        with batch_statistics(back) if self._normalised and back.training else nullcontext():
            return self._behind(x, back)

    def _behind(self, x: Tensor, back: Network) -> Features:
        """The back network's last stage and tail on the bridge's map [B,D,S,S]."""
        if self.add_pos and (positions := back.positions(x.shape[-1])) is not None:
            x = x + positions.detach()
        tokens = back.from_map(x)
        if self.prefix is not None:
            prefix = self.prefix.to(tokens.dtype).expand(x.shape[0], -1, -1)
            if self.summary is not None:
                prefix = prefix + self.summary(tokens.mean(1)).view_as(prefix)
            tokens = torch.cat([prefix, tokens], 1)
        last = back.stage(back.n_stages, tokens)
        final = back.final(last)
        pooled, logits = back.tail(last) if final is None else (pool(final), None)
        logits = back.classify(pooled) if logits is None else logits
        return Features(logits, pooled, (back.to_map(last),), final=final, network=back)


class Whole(nn.Module):
    """The assistant from images to logits, for measuring it: student, teacher and bridge as they are at that moment.

    Args:
        scale, mode: how the teacher's images are enlarged, where its stages come first.
    """

    def __init__(self, assistant: Assistant, student: Network, teacher: Network, scale: int, mode: str) -> None:
        super().__init__()
        self.assistant, self.student, self.teacher = assistant, student, teacher
        self.scale, self.mode = scale, mode

    def forward(self, images: Tensor) -> Tensor:
        """[B,3,H,W] → [B,K]."""
        first = self.assistant.teacher_first
        front, back = (self.teacher, self.student) if first else (self.student, self.teacher)
        x = front.stem(rescale(images, self.scale, self.mode) if first else images)
        for i in range(1, front.n_stages):
            x = front.stage(i, x)
        return self.assistant(front.to_map(x), back).logits
