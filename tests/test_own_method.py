"""A user's own method, as docs/own-method.md describes it: the example there is what is run here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from harness import TINY, Kd, outcome

from kdcli import checkpoint
from kdcli.data.loader import Batch
from kdcli.methods import method_class
from kdcli.methods.base import Progress, Setting
from kdcli.models import build

PAGE = Path(__file__).resolve().parent.parent / "docs" / "own-method.md"
RUN = ["distill", "--method", "./mine.py", "--teacher", "resnet14", "--student", "resnet8", *TINY, "--epochs", "1"]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """The page's example as a file."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)
    file = tmp_path / "mine.py"
    file.write_text(code, "utf-8")
    return file


def test_it_trains_and_leaves_a_plain_student(kd: Kd, mine: Path, tmp_path: Path):
    """Both terms in the log, the setting in the spec, nothing of the method in the student."""
    result = kd(*RUN, "--set", "method.weight=0.5", "--json")
    assert result.code == 0, result.err
    run = tmp_path / result.json["run"]
    assert set(json.loads((run / "metrics.jsonl").read_text())["terms"]) == {"ce", "mine"}
    assert json.loads((run / "spec.json").read_text())["method"]["weight"] == 0.5
    tensors, _ = checkpoint.load(run / "student.safetensors")
    assert not [name for name in tensors if "embed" in name]
    assert kd("evaluate", run, "--json").json["metrics"]["test"]["top1"] == result.json["metrics"]["test"]["top1"]


def test_its_settings_are_checked(kd: Kd, mine: Path):
    """As a shipped method's: the field is named."""
    refused = kd(*RUN, "--set", "method.weight=-1")
    assert refused.code == 2
    assert "method.weight" in refused.error
    unknown = kd(*RUN, "--set", "method.wieght=1")
    assert unknown.code == 2
    assert "weight" in unknown.error
    assert "weight" in json.dumps(kd("schema", "--method", "./mine.py").json)


def test_its_labels_are_those_of_mixed_images(mine: Path):
    """Under mixup the targets are shares of classes; `batch.labels` would be the larger share alone."""
    x, soft = torch.randn(4, 3, 8, 8), torch.rand(4, 10).softmax(1)
    student, teacher = build("resnet8", 10), build("resnet14", 10)
    own = method_class(str(mine))
    method = own(own.Spec(name=str(mine)), Setting(10, 8, 0.0), student, teacher)  # type: ignore[call-arg]
    batch = Batch(x, soft.argmax(1), torch.arange(4), 1.0, soft=soft)
    seen = student.features(x)
    terms = method.loss(batch, seen, teacher.features(x), Progress(torch.tensor(1.0), torch.tensor(0.0), False))
    assert terms["ce"].item() == pytest.approx(-(soft * seen.logits.log_softmax(1)).sum(1).mean().item(), rel=1e-5)


def test_it_resumes_bit_for_bit(kd: Kd, mine: Path, tmp_path: Path):
    """Its own layer and that layer's momentum are in the resume state."""
    assert kd(*RUN, "--out", "whole").code == 0
    assert kd(*RUN, "--out", "broken", "--max-minutes", "0.0001").code == 75
    assert kd(*RUN, "--out", "broken").code == 0
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "broken")


def test_it_counts_by_its_content(kd: Kd, mine: Path, tmp_path: Path):
    """Moved, it is the same run; changed, it is another one, and an unfinished run does not go on with other code."""
    first = kd(*RUN, "--json").json["run"]
    (tmp_path / "elsewhere").mkdir()
    moved = mine.rename(tmp_path / "elsewhere" / "mine.py")
    elsewhere = [*RUN]
    elsewhere[elsewhere.index("./mine.py")] = str(moved)
    again = kd(*elsewhere, "--json")
    assert again.json["run"] == first
    assert "finished already" in again.err
    assert kd(*elsewhere, "--out", "half", "--max-minutes", "0.0001").code == 75
    moved.write_text(moved.read_text().replace("gap.square().mean()", "gap.abs().mean()"))
    assert kd(*elsewhere, "--json").json["run"] != first
    drifted = kd(*elsewhere, "--out", "half")
    assert drifted.code == 4
    assert "method's file" in drifted.error


@pytest.mark.parametrize(
    ("text", "code"),
    [("import nothing_of_that_name\n", 3), ("x = 1\n", 2), ("def broken(:\n", 3)],
    ids=["import", "no method", "syntax"],
)
def test_a_file_that_is_no_method_is_one_line(kd: Kd, mine: Path, text: str, code: int):
    mine.write_text(text)
    result = kd(*RUN)
    assert result.code == code
    assert "mine.py" in result.error
