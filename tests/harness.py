"""What the tests of the command line share: tiny jobs, run in this process, in another one, or stopped in the middle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kdcli import checkpoint
from kdcli.__main__ import run

ROOT = Path(__file__).resolve().parent.parent

# A run of 30 steps in 3 epochs (the last batch of each is smaller), a hundredth of a second each.
JOB = [
    *("--dataset", "digits", "--image-size", "8", "--train-fraction", "0.1", "--batch-size", "15", "--epochs", "3"),
    *("--device", "cpu"),
]
TINY = [*JOB, "--threads", "1"]
PER_EPOCH, STEPS = 10, 30


@dataclass
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout as exactly one JSON document; anything else on it is a failure."""
        return json.loads(self.out)

    @property
    def errors(self) -> list[str]:
        """The lines of stderr that begin with `error:`."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]

    @property
    def error(self) -> str:
        """The one error line; there must be exactly one, it must be the last, and no traceback."""
        assert len(self.errors) == 1, self.err
        assert self.err.splitlines()[-1] == self.errors[0]
        assert "Traceback" not in self.err
        return self.errors[0]


Kd = Callable[..., Result]


@pytest.fixture
def kd(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kd:
    """Run a command in this process, in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Result:
        capfd.readouterr()
        code = run([str(word) for word in words])
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return call


def environment() -> dict[str, str]:
    """This process's environment, with the package importable from anywhere."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(*words: object) -> list[str]:
    """The argument vector of a real `kd` process."""
    return [sys.executable, "-m", "kdcli", *map(str, words)]


def spawn(*words: object, cwd: Path, **more: Any) -> subprocess.Popen[str]:
    """Start a real `kd` process with both outputs captured."""
    return subprocess.Popen(
        command(*words),
        cwd=cwd,
        env=environment(),
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more},
    )


def finish(process: subprocess.Popen[str], timeout: float = 180) -> Result:
    """Wait for a process, and kill it if it does not end."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return Result(process.returncode, out or "", err or "")


def steps_saved(directory: Path) -> int:
    """The step of the newest resume state; -1 if there is none."""
    return max((int(p.stem.partition("-")[2]) for p in (directory / "state").glob("step-*.safetensors")), default=-1)


def wait_for_step(process: subprocess.Popen[str], directory: Path, step: int, timeout: float = 120) -> None:
    """Wait until the run has saved at `step` or later; fail if it ends before."""
    until = time.monotonic() + timeout
    while steps_saved(directory) < step:
        assert process.poll() is None, f"it ended before step {step}: {process.communicate()}"
        assert time.monotonic() < until, f"it did not reach step {step}"
        time.sleep(0.003)


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by relative path."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def outcome(directory: Path) -> tuple[str, bytes]:
    """What two runs must share to the bit: the digest of the network, and the log of the epochs."""
    return checkpoint.digest(directory), (directory / "metrics.jsonl").read_bytes()


class Died(BaseException):
    """Stands for a process that ends without a chance to clean up."""


@pytest.fixture
def die_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`die_at(n)`: the process "dies" when it is about to train its step n (counted from 0); -1: never again."""
    from kdcli.engine import fit

    original = fit.Training.step
    at = -1

    def step(self: Any, epoch: int, batch: Any) -> None:
        if self.at == at:
            raise Died
        original(self, epoch, batch)

    monkeypatch.setattr(fit.Training, "step", step)

    def choose(number: int) -> None:
        nonlocal at
        at = number

    return choose


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with the finished TINY teachers of the methods kd and vsd, to be copied or read."""
    folder = tmp_path_factory.mktemp("teachers")
    for method in ("kd", "vsd"):
        words = ["pretrain-teacher", "--method", method, "--teacher", "resnet14", *TINY, "--max-steps", "6"]
        assert run([*words, "--quiet", "--out", str(folder / method)]) == 0
    return folder
