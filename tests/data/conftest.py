"""What the tests of the data package share."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kdcli.data import cifar


@pytest.fixture
def small_cifar(monkeypatch):
    """CIFAR layouts of 4 records a class, so that a test need not write 150 MB."""
    small = {
        "cifar100": replace(cifar.LAYOUTS["cifar100"], train_records=400, test_records=100),
        "cifar10": replace(cifar.LAYOUTS["cifar10"], train_records=20, test_records=20),
    }
    monkeypatch.setattr(cifar, "LAYOUTS", small)
    return small
