"""--teacher-scale: any method's teacher may see larger images, is trained on them, and is kept apart from the plain one."""

from __future__ import annotations

import json

import pytest
from harness import TINY, Kd

from kdcli import checkpoint

PAIR = ["--teacher", "resnet14", "--student", "resnet8", *TINY, "--epochs", "1"]


def test_kd_with_a_teacher_at_twice_the_size(kd: Kd, tmp_path):
    """The teacher is trained and used at 16 pixels, the student stays at 8; both run and checkpoint say so."""
    result = kd("distill", "--method", "kd", *PAIR, "--teacher-scale", "2", "--json")
    assert result.code == 0, result.err
    (teacher,) = (tmp_path / "runs/digits").glob("teacher-none-resnet14-*")
    trained = checkpoint.read_metadata(teacher / "teacher.safetensors")
    assert trained["inference"]["scale"] == 2
    assert trained["method"] == {"name": "none", "teacher_scale": 2, "scale_mode": "bilinear"}
    student = checkpoint.read_metadata(tmp_path / result.json["run"] / "student.safetensors")
    assert student["inference"]["scale"] == 1
    told = json.loads((teacher / "summary.json").read_text())
    measured = kd("evaluate", teacher, "--json").json["metrics"]["test"]  # evaluated on enlarged images too
    assert measured["top1"] == told["metrics"]["test"]["top1"]


def test_methods_share_the_enlarged_teacher_and_not_the_plain_one(kd: Kd, tmp_path):
    """kd and takd at scale 2 find the same teacher; at scale 1 they need another."""
    assert kd("distill", "--method", "kd", *PAIR, "--teacher-scale", "2").code == 0
    second = kd("distill", "--method", "takd", *PAIR, "--teacher-scale", "2")
    assert "teacher: runs" in second.err
    third = kd("distill", "--method", "takd", *PAIR)
    assert "training it first" in third.err
    assert len(list((tmp_path / "runs/digits").glob("teacher-*"))) == 2


def test_a_plain_teacher_is_refused_where_an_enlarged_one_is_asked_for(kd: Kd, tmp_path):
    """Exit 4 with the command that makes one that fits."""
    made = kd("pretrain-teacher", "--teacher", "resnet14", *TINY, "--epochs", "1", "--json").json["run"]
    words = [*PAIR]
    words[1] = made
    refused = kd("distill", "--method", "kd", *words, "--teacher-scale", "2")
    assert refused.code == 4
    assert "kd pretrain-teacher" in refused.error
    assert "teacher_scale" in refused.error


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["distill", "--method", "none", "--student", "resnet8", *TINY, "--teacher-scale", "2"], "no teacher"),
        (["distill", "--method", "kd", *PAIR, "--teacher-scale", "3"], "method.teacher_scale"),
    ],
)
def test_what_makes_no_sense_is_refused(words, part, kd: Kd):
    result = kd(*words)
    assert result.code == 2
    assert part in result.error
