"""Image files into memory: N paths to one uint8 tensor."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from kdcli.data.images import read_image, refuse, threads
from kdcli.data.resize import square
from kdcli.errors import InputError


def read_tensor(path: str | os.PathLike[str]) -> Tensor:
    """One file as uint8 [3,H,W] RGB. Raises InputError."""
    return torch.from_numpy(np.array(read_image(path))).permute(2, 0, 1).contiguous()


def decode(paths: list[str], size: int) -> Tensor:
    """All files as uint8 [N,3,size,size] (shorter side resized, centre cropped), decoded in threads.

    Raises:
        InputError: naming every file that cannot be used (the first 20 by name).
    """
    out = torch.empty((len(paths), 3, size, size), dtype=torch.uint8)

    def fill(start: int) -> list[str]:
        bad = []
        for at in range(start, min(start + 64, len(paths))):
            try:
                out[at] = square(read_tensor(paths[at]), size)
            except InputError as error:
                bad.append(error.message)
        return bad

    with ThreadPoolExecutor(threads()) as pool:
        refuse([message for bad in pool.map(fill, range(0, len(paths), 64)) for message in bad], len(paths))
    return out
