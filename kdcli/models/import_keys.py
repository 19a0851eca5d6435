"""State-dict keys of the public code bases, translated to the keys used here. Imports no torch.

HSAKD stores all heads of a network in one module: `auxiliary_classifier.block_extractor{h}.{position}...`, h from 1,
and per-head layers such as `bn{h}`, `conv2_{h}`, `fc{h}`. Here head j = h - 1 is a truncated network, `heads.{j}.`,
whose layers have the names they have in the backbone.
"""

from __future__ import annotations

import re

from kdcli.models.names import canonical

_VGG_BLOCKS: dict[int, dict[int, int]] = {
    1: {1: 1, 4: 2, 7: 3, 9: 4},
    2: {1: 2, 4: 3, 6: 4},
    3: {1: 3, 3: 4},
    4: {0: 3, 2: 4},
}
"""Head, then position in its sequence (the other positions are pooling and ReLU), to the number of the block."""


def map_keys(arch: str, keys: list[str]) -> dict[str, str]:
    """Foreign key to our key, for every one of `keys`; nothing is dropped.

    Strips `module.` and `backbone.`, renames HSAKD's heads to `heads.{j}.*` and MobileNetV2's `classifier.*` of SSKD
    and HSAKD to `classifier.0.*`. `arch` may be any accepted spelling.
    """
    arch = canonical(arch)
    return {key: _map_key(arch, key) for key in keys}


def _map_key(arch: str, key: str) -> str:
    key = key.removeprefix("module.").removeprefix("backbone.")
    if key.startswith("auxiliary_classifier."):
        return hsakd_head_key(arch, key)
    if arch.startswith("mobilenetv2") and re.fullmatch(r"classifier\.(weight|bias)", key):
        return key.replace("classifier.", "classifier.0.")
    return key


def hsakd_head_key(arch: str, key: str) -> str:
    """The key here of one `auxiliary_classifier.*` key of HSAKD; an unfamiliar one is returned unchanged."""
    name = key.removeprefix("auxiliary_classifier.")
    stage = re.fullmatch(r"block_extractor(\d+)\.(\d+)\.(.+)", name)
    if stage:
        h, position, rest = int(stage[1]), int(stage[2]), stage[3]
        return f"heads.{h - 1}.{_stage_name(arch, h, position)}.{rest}"
    single = re.fullmatch(r"(fc|bn|conv2_)(\d+)\.(.+)", name)
    if single:
        kind, h, rest = single[1], int(single[2]), single[3]
        layer = {"fc": _classifier(arch), "bn": "bn1", "conv2_": "conv2"}[kind]
        return f"heads.{h - 1}.{layer}.{rest}"
    return key


def _classifier(arch: str) -> str:
    if arch.startswith("mobilenetv2"):
        return "classifier.0"
    if arch.startswith("vgg"):
        return "classifier"
    return "linear" if arch.startswith("shufflenet") or arch in ("resnet18", "resnet34", "resnet50") else "fc"


def _stage_name(arch: str, h: int, position: int) -> str:
    """Where the `position`-th entry of head h's sequence lives in a truncated network."""
    if arch.startswith("vgg"):
        return f"block{_VGG_BLOCKS[h][position]}" if position in _VGG_BLOCKS.get(h, {}) else f"unknown{position}"
    if arch.startswith("mobilenetv2"):
        # Heads 1..4 begin with group 2, 3, 5 and (the last stage again) 5.
        return f"blocks.{ {1: 2, 2: 3, 3: 5, 4: 5}.get(h, 0) + position }"
    four = arch in ("resnet18", "resnet34", "resnet50")
    last = 4 if four else 3
    stage = min(h + 1, last) + position
    if arch == "shufflenetv2" and stage > last:
        return "conv2" if stage == last + 1 else "bn2"
    return f"block{stage}" if arch.startswith("wrn") else f"layer{stage}"
