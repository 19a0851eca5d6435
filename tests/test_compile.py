"""Compiled steps: they learn what plain ones learn, and a compiled run that was killed ends in the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from harness import TINY, Died, Kd, outcome

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None and shutil.which("c++") is None, reason="needs a C++ compiler"),
]


def losses(directory: Path) -> list[float]:
    """Of every epoch."""
    return [json.loads(line)["train"]["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["kd", "vsd"])
def test_a_compiled_run_is_the_plain_one_and_resumes(method: str, kd: Kd, die_at, teachers, tmp_path: Path) -> None:
    """Losses to rounding; killed within an epoch and started again, the same bits as uninterrupted."""
    words = ["distill", "--method", method, "--teacher", str(teachers / method), "--student", "resnet8", *TINY]
    compiled = [*words, "--compile"]
    assert kd(*words, "--out", "plain").code == 0
    assert kd(*compiled, "--out", "whole").code == 0
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "plain"), rel=2e-3)
    again = [*compiled, "--out", "broken", "--checkpoint-every", "3"]
    die_at(8)
    with pytest.raises(Died):
        kd(*again)
    die_at(-1)
    assert "going on at step 6" in (result := kd(*again)).err
    assert result.code == 0
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
