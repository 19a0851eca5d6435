"""Subsets: what scikit-learn draws, with stable ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.model_selection import StratifiedShuffleSplit

from kdcli.data.dataset import DataSet, Split
from kdcli.errors import InputError, UsageError


def small(count: int = 200, classes: int = 5) -> DataSet:
    labels = torch.arange(count) * 7 % classes
    split = Split.of(
        labels, images=(torch.arange(count) % 256).to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    )
    names = tuple(f"c{i}" for i in range(classes))
    return DataSet("made", names, 4, (0.5,) * 3, (0.5,) * 3, split, split)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("seed", [0, 3])
def test_fraction_is_scikit_learns(fraction, seed):
    dataset = small()
    y = dataset.train.labels.numpy()
    split = StratifiedShuffleSplit(n_splits=1, test_size=1 - fraction, random_state=seed)
    expected, _ = next(split.split(np.zeros(len(y)), y))
    part = dataset.with_fraction(fraction, seed)
    assert part.train.ids.tolist() == sorted(expected.tolist())
    assert torch.equal(part.train.labels, dataset.train.labels[part.train.ids])
    assert torch.equal(part.train.images, dataset.train.images[part.train.ids])
    assert part.test is dataset.test


def test_whole_fraction_and_no_validation_change_nothing():
    dataset = small()
    assert dataset.with_fraction(1, 0) is dataset
    assert dataset.with_validation(0, 0) is dataset


def test_validation_is_disjoint_stratified_and_keeps_ids():
    dataset = small().with_fraction(0.5, 0).with_validation(0.2, 1)
    train, val = set(dataset.train.ids.tolist()), set(dataset.val.ids.tolist())
    assert not train & val
    assert (len(train), len(val)) == (80, 20)
    assert torch.bincount(dataset.val.labels).tolist() == [4] * 5


@pytest.mark.parametrize("fraction", [0, -1, 1.5, 0.001])
def test_impossible_fractions_are_usage_errors(fraction):
    with pytest.raises(UsageError):
        small().with_fraction(fraction, 0)


def test_a_split_of_paths_subsets_too():
    split = Split.of([0, 1, 0], paths=["a", "b", "c"]).subset([2, 0])
    assert split.paths == ["c", "a"]
    assert split.ids.tolist() == [2, 0]
    assert split.subset([0]).ids.tolist() == [2]


def test_empty_splits_are_refused():
    dataset = small()
    with pytest.raises(InputError, match="test split is empty"):
        DataSet("made", dataset.classes, 4, dataset.mean, dataset.std, dataset.train, dataset.test.subset([]))
    with pytest.raises(InputError, match="2 images but 1 labels"):
        Split.of([0], paths=["a", "b"])
