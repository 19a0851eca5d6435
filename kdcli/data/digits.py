"""scikit-learn's handwritten digits (UCI, Alpaydin and Kaynak 1998): real, small, and always there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kdcli.data.dataset import DataSet, Split
from kdcli.data.normalisation import constants
from kdcli.data.request import Request
from kdcli.data.resize import resident


def read(request: Request) -> DataSet:
    """1,797 grey images of 8x8, levels 0..16 scaled to 0..255 and copied to three channels; a fixed 80/20 split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch: Any = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    images = torch.from_numpy(grey)[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    at = np.arange(len(labels))
    train, test = train_test_split(at, test_size=0.2, stratify=bunch.target, random_state=0)
    sized = resident(images, request.size, request.limit)
    first, second = (Split.of(labels[kept], images=sized[kept]) for kept in (np.sort(train), np.sort(test)))
    mean, std = constants(request.name)
    return DataSet(request.name, tuple("0123456789"), request.size, mean, std, first, second)
