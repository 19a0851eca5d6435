"""MLP networks of timm at sizes their names do not offer: timm's builders refuse another patch size."""

from __future__ import annotations

import re
from functools import partial

from timm.layers import GatedMlp, GluMlp
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock, SpatialGatingBlock
from torch import nn


def small_mixer(name: str, image_size: int, patch_size: int, outputs: int) -> MlpMixer | None:
    """The network `name` with `patch_size` for square images, fresh weights; None if its plan is not known here."""

    def make(blocks: int, width: int) -> partial[MlpMixer]:
        return partial(
            MlpMixer,
            num_classes=outputs,
            img_size=image_size,
            patch_size=patch_size,
            num_blocks=blocks,
            embed_dim=width,
        )

    if match := re.match(r"mixer_([sbl])\d+_", name):
        return make(*{"s": (8, 512), "b": (12, 768), "l": (24, 1024)}[match[1]])()
    if match := re.match(r"gmixer_(12|24)_", name):
        return make(int(match[1]), 384)(mlp_ratio=(1.0, 4.0), mlp_layer=GluMlp, act_layer=nn.SiLU)
    if match := re.match(r"gmlp_(ti|s|b)16_", name):
        width = {"ti": 128, "s": 256, "b": 512}[match[1]]
        return make(30, width)(mlp_ratio=6, block_layer=SpatialGatingBlock, mlp_layer=GatedMlp)
    if match := re.match(r"resmlp_(big_)?(12|24|36)_", name):
        blocks, width = int(match[2]), 768 if match[1] else 384
        scale = 1e-6 if match[1] else {12: 1e-4, 24: 1e-5, 36: 1e-6}[blocks]
        block = partial(ResBlock, init_values=scale)
        return make(blocks, width)(mlp_ratio=4, block_layer=block, norm_layer=Affine)
    return None
