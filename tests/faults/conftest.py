"""The warmed process, the teachers, and what uninterrupted runs give; made once, when first asked for."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faultjobs import JOB, distil
from outcomes import Reference, reference
from warmed import Warm


@pytest.fixture(scope="session")
def place() -> Iterator[Path]:
    """A directory for all trials: in memory where the system has such a place, since a kill does not ask for a disk."""
    memory = Path("/dev/shm")
    parent = str(memory) if memory.is_dir() and os.access(memory, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="kd-faults-", dir=parent)).resolve()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """The warmed process."""
    server = Warm()
    yield server
    server.close()


def fresh_below(place: Path) -> Path:
    """A new directory that lasts as long as `place`."""
    return Path(tempfile.mkdtemp(dir=place))


@pytest.fixture
def fresh(place: Path) -> Iterator[Callable[[], Path]]:
    """Makes an empty directory at each call; all are gone after the test."""
    made: list[Path] = []

    def make() -> Path:
        made.append(fresh_below(place))
        return made[-1]

    yield make
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def whole(warm: Warm, place: Path) -> Callable[[str], Reference]:
    """Trains the teacher of a method, and gives the words of its distillation and what they give uninterrupted."""
    known: dict[str, Reference] = {}

    def make(method: str) -> Reference:
        if method not in known:
            words = ["pretrain-teacher", "--method", method, "--teacher", "resnet8", *JOB, "--max-steps", "4"]
            warm.learn([*words, "--out", f"teachers/{method}"], place)
            warm.learn([*distil(method, place), "--out", "run"], fresh_below(place))
            known[method] = reference(warm, distil(method, place), fresh_below(place))
        return known[method]

    return make
