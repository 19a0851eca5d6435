"""R12: one flipped bit, or one cut, anywhere in a checkpoint is detected; a run goes back to the state before."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from fuzzing import METHODS, SEED, Trial, complaints, fresh, stock, told, trial
from harness import outcome
from mutators import one_fault
from test_fuzz_checkpoints import files


def faulty(number: int, folder: Path) -> Trial:
    """`kd verify` on a file with the one fault that `number` stands for: students, teachers and states in turn."""
    draw = random.Random(f"{SEED} flip {number}")
    sources = files()
    content = one_fault(sources[number % len(sources)].read_bytes(), draw)
    (fresh(folder / "trial") / "x.safetensors").write_bytes(content)
    return trial(["verify", "x.safetensors"], folder / "trial")


def overlooked(count: int, folder: Path) -> list[str]:
    """The faults of `count` that were not found, or not told as they should be."""
    stock()
    found = [faulty(number, folder) for number in range(count)]
    return [told(one, wrong) for one in found if (wrong := complaints(one, [3]))]


def test_a_sample_of_flips_and_cuts_is_detected(tmp_path):
    """R12, a sample of the 2,000."""
    missed = overlooked(28, tmp_path)
    assert not missed, "\n".join(missed[:5])


@pytest.mark.slow
def test_every_flip_and_cut_is_detected(tmp_path):
    """R12: 2,000 of 2,000."""
    missed = overlooked(2000, tmp_path)
    assert not missed, f"{len(missed)}\n" + "\n".join(missed[:5])
    print(f"R12: seed '{SEED} flip': 2000 of 2000 flips and cuts detected")


def fallen_back(method: str, number: int, folder: Path) -> tuple[Trial, list[str]]:
    """An unfinished run whose newest state has one fault, started again; what is wrong with its end."""
    made = stock()
    run = shutil.copytree(made.runs[method], fresh(folder / "trial") / "run")
    newest = max((run / "state").iterdir())
    newest.write_bytes(one_fault(newest.read_bytes(), random.Random(f"{SEED} resume {method} {number}")))
    found = trial([*made.words(method), "--out", "run"], folder / "trial", writable=["run"])
    wrong = complaints(found, [0])
    if not ("going back to the state before it" in found.err and "going on at step 9" in found.err):
        wrong.append("no notice of going back")
    if found.code == 0 and outcome(run) != outcome(made.whole[method]):
        wrong.append("other bits than the uninterrupted run")
    return found, wrong


@pytest.mark.parametrize("method", ["kd", "vsd", *(pytest.param(m, marks=pytest.mark.slow) for m in ("crd", "slkd"))])
def test_a_run_goes_back_to_the_state_before(method, tmp_path):
    """The newest state damaged: a notice, the state before it, and the bits of the uninterrupted run."""
    found, wrong = fallen_back(method, 0, tmp_path)
    assert not wrong, told(found, wrong)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_many_runs_go_back_to_the_state_before(method, tmp_path):
    """25 faults a method."""
    for number in range(1, 26):
        found, wrong = fallen_back(method, number, tmp_path)
        assert not wrong, told(found, wrong)
    print(f"R12: {method}: 25 damaged states, 25 times back to the state before, with the same bits")


def without_digest() -> None:
    """`kd` that believes what a file says, as a plain safetensors reader does."""
    from kdcli.checkpoint import layout

    layout.require_digest = layout.require_seal = lambda *_: None


def test_these_checks_have_teeth(tmp_path):
    """Without digest and seal most flips go unnoticed, and a run goes on from a damaged state to other bits."""
    draw = random.Random(SEED)
    missed = 0
    for _ in range(10):
        content = bytearray(stock().student.read_bytes())
        content[draw.randrange(len(content) // 2, len(content))] ^= 4
        (fresh(tmp_path / "trial") / "x.safetensors").write_bytes(content)
        found = trial(["digest", "x.safetensors"], tmp_path / "trial", before=without_digest)
        missed += bool(complaints(found, [3]))
    assert missed == 10
