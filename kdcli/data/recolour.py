"""What an image goes through behind its crop and flip: timm's RandAugment, or random colours."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdcli.data.transforms import Transform


class RandAugment:
    """timm's RandAugment on uint8 [3,S,S].

    It works on PIL images and draws from the global generators of Python and numpy. Both are seeded from torch's, which
    `seeded` has set, and left as they were.

    Args:
        policy: timm's string, for example `rand-m9-mstd0.5-inc1`.
        size: S.
        mean: per channel, on the 0..1 scale: what fills the places that a shift or rotation uncovers.
    """

    def __init__(self, policy: str, size: int, mean: tuple[float, float, float]) -> None:
        from timm.data.auto_augment import rand_augment_transform

        fill = tuple(min(255, round(255 * m)) for m in mean)
        self.function = rand_augment_transform(policy, {"translate_const": int(size * 0.45), "img_mean": fill})
        for op in self.function.ops:
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize

    def __call__(self, image: Tensor) -> Tensor:
        with _global_generators(int(torch.randint(2**32, ()))):
            changed = self.function(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))
        return torch.from_numpy(np.array(changed)).permute(2, 0, 1).contiguous()


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keep the highest bits of each colour. At full magnitude timm keeps none, which newer versions of Pillow refuse."""
    mask = 0xFF << (8 - bits) & 0xFF
    return image.point([level & mask for level in range(256)] * len(image.getbands()))


@contextmanager
def _global_generators(seed: int) -> Iterator[None]:
    """Python's and numpy's global generators seeded, and put back afterwards."""
    before, numpys = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpys)


def further(policy: str | None, jitter: float, size: int, mean: tuple[float, float, float]) -> Transform | None:
    """What follows the crop and flip, uint8 [3,S,S] → uint8 [3,S,S]; None for nothing.

    As timm does, colours are jittered only where there is no RandAugment, or one of the set 3a, which has few of them.

    Args:
        policy: of RandAugment, or None.
        jitter: j; brightness, contrast and saturation change by factors uniform in [max(0, 1-j), 1+j], in random order.
    """
    jitters = jitter > 0 and (policy is None or "3a" in policy)
    if policy is None and not jitters:
        return None
    from torchvision.transforms import v2  # slow to import

    steps: list[Transform] = []
    if policy is not None:
        steps.append(RandAugment(policy, size, mean))
    if jitters:
        steps.append(v2.ColorJitter(jitter, jitter, jitter))
    return steps[0] if len(steps) == 1 else v2.Compose(steps)
