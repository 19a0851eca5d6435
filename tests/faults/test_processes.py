"""R7, R8, R9: true processes that work together, ranks and data workers: equal results, and nobody waits for the dead."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from harness import ROOT, TINY, Result, command, environment, finish, wait_for_step
from test_kills import Fresh

from kdcli import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

HERE = Path(__file__).resolve().parent
TIMEOUT = 4.0  # seconds; what the jobs below are given as --rank-timeout and --data-timeout
CPU = ("--device", "cpu", "--threads", "1")
# 40 steps; the last batch of each epoch is smaller, and odd for two ranks.
WITHOUT_BATCHNORM = [
    *("distill", "--method", "none", "--student", "timm:vit_tiny_patch16_224", "--dataset", "digits"),
    *("--image-size", "32", "--train-fraction", "0.1", "--batch-size", "15", "--epochs", "4", *CPU),
]
WITH_BATCHNORM = ["distill", "--method", "none", "--student", "resnet8", *TINY, "--epochs", "4"]
LONG = [*TINY, "--epochs", "400", "--checkpoint-every", "5"]
RANKS = [*LONG, "--nproc", "2", "--rank-timeout", f"{TIMEOUT:g}", "--out", "run"]
STREAMED = ["distill", "--method", "none", "--student", "resnet8", *LONG, "--color-jitter", "0.1"]
STREAMED += ["--workers", "2", "--data-timeout", f"{TIMEOUT:g}", "--out", "run"]


@dataclass
class Started:
    """A true `kd` process and those that it has started, by their process numbers."""

    process: subprocess.Popen[str]
    others: list[int] = field(default_factory=list)

    def learn(self) -> None:
        """Take down who its children are now, but for Python's own helper that tidies up after shared memory."""
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        found = [int(word) for word in text.split()]
        self.others = [pid for pid in found if "resource_tracker" not in _of(pid, "cmdline")]

    def rank(self, number: int) -> int:
        """The process of a rank."""
        return next(pid for pid in self.others if f"\0RANK={number}\0" in "\0" + _of(pid, "environ"))

    def alive(self) -> list[int]:
        """Those of the others that have not ended."""
        return [pid for pid in self.others if _state(pid) not in ("", "Z")]


def _of(pid: int, what: str) -> str:
    try:
        return Path(f"/proc/{pid}/{what}").read_text()
    except OSError:
        return ""


def _state(pid: int) -> str:
    """Its state in the system's one letter (R, S, T, Z …); nothing if it is gone."""
    return _of(pid, "stat").rpartition(")")[2].strip()[:1]


Start = Callable[..., Started]


@pytest.fixture
def start(fresh: Fresh) -> Iterator[Start]:
    """Starts a `kd` process in a directory, with a variant of `variants.py` in it and in all that it starts."""
    running: list[Started] = []

    def begin(words: list[str], folder: Path, variant: str = "") -> Started:
        env = environment()
        if variant:
            site = fresh()
            paths = [str(HERE), str(HERE.parent)]
            (site / "sitecustomize.py").write_text(
                f"import sys\nsys.path[:0] = {paths!r}\nimport variants\nvariants.{variant}()\n"
            )
            env["PYTHONPATH"] = f"{site}{os.pathsep}{ROOT}"
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command(*words), cwd=folder, env=env, text=True, start_new_session=True, stdout=pipe, stderr=pipe
        )
        running.append(Started(process))
        return running[-1]

    yield begin
    for one in running:
        for pid in (*one.others, one.process.pid):
            if pid != one.process.pid or one.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        one.process.communicate()


def struck(one: Started, pid: int, how: signal.Signals, within: float) -> tuple[list[str], float]:
    """Strike a process; what is wrong with how all of them ended, and the seconds until the one that began had."""
    begun = time.monotonic()
    os.kill(pid, how)
    try:
        one.process.wait(within + 2)
    except subprocess.TimeoutExpired:
        return [f"still running after {within + 2:.0f} s"], within + 2
    seconds = time.monotonic() - begun
    wrong = [f"it took {seconds:.1f} s"] if seconds > within else []
    time.sleep(1)
    if one.alive():  # they would also keep the pipes open
        return [*wrong, f"{len(one.alive())} processes are left"], seconds
    result = finish(one.process)
    if result.code != 8:
        wrong.append(f"exit code {result.code}: {result.err[-300:]}")
    elif len(result.errors) != 1 or "Traceback" in result.err:
        wrong.append(f"not one line: {result.err[-300:]}")
    else:
        wrong += unnamed(one, pid, result)
    return wrong, seconds


def unnamed(one: Started, pid: int, result: Result) -> list[str]:
    """Whether the message names nobody."""
    word = "data worker" if "--data-timeout" in one.process.args else f"rank {one.others.index(pid)}"  # type: ignore[operator]
    return [] if word in result.error else [f"{word} is not named: {result.error}"]


# ------------------------------------------------------------------------------------------------------------------- R7


def distance(one: Path, other: Path) -> float:
    """The largest difference of a weight in two finished runs."""
    first, second = (checkpoint.load(run / "student.safetensors")[0] for run in (one, other))
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def trained(start: Start, words: list[str], folder: Path, *more: str, variant: str = "") -> Path:
    """A finished run of `words` in a directory of its own."""
    result = finish(start([*words, "--out", "run", *more], folder, variant).process, 300)
    assert result.code == 0, result.err
    return folder / "run"


def test_two_ranks_do_what_one_does(start: Start, fresh: Fresh) -> None:
    """R7: without BatchNorm weights within 1e-5 of one rank's after 40 steps; with it another network, twice the same."""
    two = ("--nproc", "2")
    one, both = trained(start, WITHOUT_BATCHNORM, fresh()), trained(start, WITHOUT_BATCHNORM, fresh(), *two)
    apart = distance(one, both)
    assert apart <= 1e-5
    assert distance(one, trained(start, WITHOUT_BATCHNORM, fresh(), *two, variant="gradients_not_shared")) > 1e-5
    first, second = (trained(start, WITH_BATCHNORM, fresh(), *two) for _ in range(2))
    assert (first / "student.safetensors").read_bytes() == (second / "student.safetensors").read_bytes()
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    local = distance(first, trained(start, WITH_BATCHNORM, fresh()))
    print(f"R7: two ranks and one differ by {apart:.1e} without BatchNorm and by {local:.1e} with it, after 40 steps")


# ------------------------------------------------------------------------------------------------------------------- R8


def rank_struck(
    start: Start, folder: Path, method: str, number: int, how: signal.Signals, variant: str = ""
) -> tuple[list[str], float]:
    """Strike a rank in its training; `TIMEOUT` and ten seconds later all must be gone."""
    teacher = ["pretrain-teacher", "--method", method, "--teacher", "resnet8", *TINY, "--max-steps", "2"]
    assert finish(start([*teacher, "--out", "teacher"], folder).process).code == 0
    words = ["distill", "--method", method, "--teacher", "teacher", "--student", "resnet8", *RANKS]
    one = start(words, folder, variant)
    wait_for_step(one.process, folder / "run", 10)
    one.learn()
    one.others.sort(key=lambda pid: int(_of(pid, "environ").split("\0RANK=")[1].split("\0")[0]))
    return struck(one, one.rank(number), how, TIMEOUT + 10)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize(("method", "number"), [("kd", 0), ("kd", 1), ("crd", 1), ("slkd", 0), ("vsd", 1)])
def test_a_rank_that_dies_or_stops_answering(
    how: signal.Signals, method: str, number: int, start: Start, fresh: Fresh
) -> None:
    """R8: exit 8 naming it, and nobody is left."""
    wrong, seconds = rank_struck(start, fresh(), method, number, how)
    assert wrong == []
    print(f"R8: {method}, rank {number}, {how.name}: all gone after {seconds:.1f} s, --rank-timeout {TIMEOUT:g}")


def test_a_rank_that_is_waited_for_is_found(start: Start, fresh: Fresh) -> None:
    """R8 has teeth: with torch's own timeout, minutes, a rank that is stopped holds up the others."""
    wrong, _ = rank_struck(start, fresh(), "kd", 1, signal.SIGSTOP, "ranks_waited_for")
    assert any("still running" in one for one in wrong)


# ------------------------------------------------------------------------------------------------------------------- R9


def worker_struck(start: Start, folder: Path, how: signal.Signals, variant: str = "") -> tuple[list[str], float]:
    """Strike one of two data workers; `TIMEOUT` and five seconds later all must be gone."""
    one = start(STREAMED, folder, variant)
    wait_for_step(one.process, folder / "run", 10)
    one.learn()
    assert len(one.others) == 2
    return struck(one, one.others[0], how, TIMEOUT + 5)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_stops_answering(how: signal.Signals, start: Start, fresh: Fresh) -> None:
    """R9: exit 8 in time, and no worker is left."""
    wrong, seconds = worker_struck(start, fresh(), how)
    assert wrong == []
    print(f"R9: a worker, {how.name}: all gone after {seconds:.1f} s, --data-timeout {TIMEOUT:g}")


def test_workers_go_with_their_run(start: Start, fresh: Fresh) -> None:
    """R9: the run is killed outright; its workers are gone ten seconds later."""
    folder = fresh()
    one = start(STREAMED, folder)
    wait_for_step(one.process, folder / "run", 10)
    one.learn()
    assert len(one.others) == 2
    one.process.kill()
    begun = time.monotonic()
    while one.alive() and time.monotonic() < begun + 10:
        time.sleep(0.05)
    assert one.alive() == []
    print(f"R9: the run, SIGKILL: its workers are gone after {time.monotonic() - begun:.1f} s")


def test_a_worker_that_is_waited_for_is_found(start: Start, fresh: Fresh) -> None:
    """R9 has teeth: without a timeout a stopped worker is waited for without end."""
    wrong, _ = worker_struck(start, fresh(), signal.SIGSTOP, "workers_waited_for")
    assert any("still running" in one for one in wrong)
