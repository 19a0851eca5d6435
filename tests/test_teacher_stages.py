"""Teachers made in two stages (sskd, frozen hsakd): an ordinary network first, then heads on it while it is frozen."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest
import torch
from harness import TINY, Died, Kd, outcome

from kdcli import checkpoint

# The methods whose teachers are made so; one crop for all copies, or three more from the loader.
SHARED = ["--method", "sskd", "--set", "method.crops=shared"]
INDEPENDENT = ["--method", "sskd"]
FROZEN = ["--method", "hsakd", "--set", "method.teacher=frozen"]
METHODS = pytest.mark.parametrize(
    "method",
    [
        pytest.param(SHARED, id="sskd with a shared crop"),
        pytest.param(INDEPENDENT, id="sskd"),
        pytest.param(FROZEN, id="hsakd"),
    ],
)
TEACHER = ["pretrain-teacher", "--teacher", "resnet14", *TINY]
STUDENT = ["distill", "--student", "resnet8", *TINY]


@METHODS
def test_the_teacher_is_a_finished_network_with_new_heads(method, kd: Kd, tmp_path):
    """Backbone trained first (3 epochs), heads after it (1 epoch); the backbone's tensors are the same bits in both."""
    result = kd(*TEACHER, *method, "--json")
    assert result.code == 0, result.err
    assert "training it first" in result.err
    (plain,) = (tmp_path / "runs/digits").glob("teacher-none-resnet14-*")
    made = tmp_path / result.json["run"]
    assert result.json["backbone"]["digest"] == checkpoint.digest(plain)
    assert len((plain / "metrics.jsonl").read_text().splitlines()) == 3
    assert len((made / "metrics.jsonl").read_text().splitlines()) == 1
    before, told = checkpoint.load(plain / "teacher.safetensors")
    after, _ = checkpoint.load(made / "teacher.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name.partition(".")[0] for name in set(after) - set(before)} == {"heads"}
    assert result.json["metrics"]["test"]["top1"] == told["metrics"]["test"]["top1"]
    assert kd("evaluate", made, "--json").json["metrics"]["test"]["top1"] == told["metrics"]["test"]["top1"]


@METHODS
def test_the_student_finds_the_teacher_that_was_made_for_it(method, kd: Kd, tmp_path):
    """Trained on the way the first time, found the second; the exported student is a plain network."""
    words = [*STUDENT, "--teacher", "resnet14", *method, "--epochs", "1", "--json"]
    first = kd(*words)
    assert first.code == 0, first.err
    second = kd(*words, "--seed", "1")
    assert "training it first" not in second.err
    assert second.json["teacher"]["digest"] == first.json["teacher"]["digest"]
    (teacher,) = (tmp_path / "runs/digits").glob("teacher-[sh]*")
    assert first.json["teacher"]["digest"] == checkpoint.digest(teacher)
    plain = kd(*STUDENT, "--method", "none", "--max-steps", "1", "--json").json["run"]
    exported, _ = checkpoint.load(tmp_path / first.json["run"] / "student.safetensors")
    alone, _ = checkpoint.load(tmp_path / plain / "student.safetensors")
    assert {k: v.shape for k, v in exported.items()} == {k: v.shape for k, v in alone.items()}


def test_one_ordinary_teacher_serves_them_all(kd: Kd, tmp_path):
    """sskd trains it; frozen hsakd puts its heads on the same one, and kd learns from it."""
    assert kd(*TEACHER, *SHARED).code == 0
    frozen = kd(*TEACHER, *FROZEN, "--json")
    assert "training it first" not in frozen.err
    plain = kd(*STUDENT, "--teacher", "resnet14", "--method", "kd", "--json")
    assert plain.json["teacher"]["digest"] == frozen.json["backbone"]["digest"]
    assert len(list((tmp_path / "runs/digits").glob("teacher-none-*"))) == 1


@METHODS
def test_heads_for_a_network_named_by_its_path(method, kd: Kd, tmp_path):
    """Any finished network will do: a run directory or a file, and nothing else is trained."""
    plain = kd(*TEACHER, "--method", "kd", "--out", "elsewhere", "--json").json["run"]
    named = ["pretrain-teacher", "--teacher", plain, *TINY, *method]
    result = kd(*named, "--json")
    assert result.code == 0, result.err
    assert not list((tmp_path / "runs/digits").glob("teacher-none-*"))
    assert result.json["backbone"]["digest"] == checkpoint.digest(tmp_path / plain)
    taught = kd(*STUDENT, "--teacher", result.json["run"], *method, "--max-steps", "2", "--json")
    assert taught.code == 0, taught.err
    assert taught.json["teacher"]["arch"] == "resnet14"


@METHODS
def test_a_plain_teacher_is_refused_with_the_command_that_adds_the_heads(method, kd: Kd):
    """Exit 4 before anything is trained, in a preview as well."""
    plain = kd(*TEACHER, "--method", "kd", "--max-steps", "2", "--json").json["run"]
    for more in ([], ["--dry-run"]):
        result = kd(*STUDENT, "--teacher", plain, *method, *more)
        assert result.code == 4
        assert f"kd pretrain-teacher --method {method[1]} --teacher resnet14" in result.error


@METHODS
def test_the_command_that_would_make_the_teacher_makes_it(method, kd: Kd):
    """`--no-auto-teacher` ends in exit 3 with a command line whose teacher is then found."""
    words = [*STUDENT, "--teacher", "resnet14", *method, "--set", "method.teacher_scale=2", "--epochs", "1"]
    result = kd(*words, "--no-auto-teacher", "--json")
    assert result.code == 3
    program, *arguments = shlex.split(result.json["error"]["hint"].removeprefix("make it: "))
    assert program == "kd"
    assert kd(*arguments, "--threads", "1", "--quiet").code == 0
    assert kd(*words, "--no-auto-teacher").code == 0


def test_head_epochs_lengthen_the_second_stage_only(kd: Kd, tmp_path):
    """The setting is the teacher's: another one is another teacher on the same backbone."""
    assert kd(*TEACHER, *SHARED).code == 0
    longer = kd(*TEACHER, *SHARED, "--set", "method.head_epochs=2", "--json")
    lines = (tmp_path / longer.json["run"] / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    assert len(list((tmp_path / "runs/digits").glob("teacher-sskd-*"))) == 2
    assert len(list((tmp_path / "runs/digits").glob("teacher-none-*"))) == 1


@METHODS
def test_a_second_stage_that_died_goes_on_to_the_same_bits(method, kd: Kd, die_at, tmp_path):
    """Killed twice among its ten steps: heads and backbone end as in a run that was not."""
    plain = kd(*TEACHER, "--method", "kd", "--out", "plain", "--json").json["run"]
    words = ["pretrain-teacher", "--teacher", plain, *TINY, *method]
    assert kd(*words, "--out", "whole").code == 0
    for step in (4, 7):
        die_at(step)
        with pytest.raises(Died):
            kd(*words, "--out", "broken", "--checkpoint-every", "3")
    die_at(-1)
    result = kd(*words, "--out", "broken", "--checkpoint-every", "3")
    assert result.code == 0
    assert "going on at step 6" in result.err
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_a_student_of_a_two_stage_teacher_resumes_bit_for_bit(kd: Kd, die_at, tmp_path):
    """The student's own projection and its momentum are part of the state."""
    teacher = kd(*TEACHER, *SHARED, "--max-steps", "3", "--json").json["run"]
    words = [*STUDENT, "--teacher", teacher, *SHARED, "--epochs", "1"]
    assert kd(*words, "--out", "whole").code == 0
    die_at(5)
    with pytest.raises(Died):
        kd(*words, "--out", "broken", "--checkpoint-every", "2")
    die_at(-1)
    assert kd(*words, "--out", "broken", "--checkpoint-every", "2").code == 0
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_a_lost_backbone_is_no_loss(kd: Kd, tmp_path):
    """The finished teacher holds all of it: students need the first stage no more."""
    assert kd(*TEACHER, *SHARED).code == 0
    (plain,) = (tmp_path / "runs/digits").glob("teacher-none-*")
    shutil.rmtree(plain)
    result = kd(*STUDENT, "--teacher", "resnet14", *SHARED, "--max-steps", "2", "--no-auto-teacher")
    # A smoke student wants a smoke teacher, so the full one is named by its path.
    assert result.code == 3
    (teacher,) = (tmp_path / "runs/digits").glob("teacher-sskd-*")
    assert kd(*STUDENT, "--teacher", teacher, *SHARED, "--max-steps", "2").code == 0
    assert not list((tmp_path / "runs/digits").glob("teacher-none-*"))


@METHODS
def test_the_preview_shows_both_stages_networks_and_trains_nothing(method, kd: Kd, tmp_path):
    """Four views for both networks; the length told for a teacher is that of its second stage."""
    student = kd(*STUDENT, "--teacher", "resnet14", *method, "--dry-run", "--json").json
    assert student["views"] == {"student": 4, "teacher": 4}
    teacher = kd(*TEACHER, *method, "--dry-run", "--json").json
    assert teacher["steps"] == {"per_epoch": 10, "total": 10}
    assert not list(tmp_path.iterdir())
