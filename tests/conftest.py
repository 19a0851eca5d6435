"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from harness import die_at, kd, teachers

__all__ = ["die_at", "kd", "one_thread", "teachers"]


def pytest_configure() -> None:
    """One thread, before any fixture of a wider scope computes something: the last bits depend on it."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread: on a busy machine, threads that wait for each other cost ten times what they save.

    A command pins the number of threads for its whole process, so it is set back after every test.
    """
    yield
    torch.set_num_threads(1)
