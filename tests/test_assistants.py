"""Chains of assistants (takd, dgkd): each link an ordinary run, found again, resumed, and refused where it makes no sense."""

from __future__ import annotations

import json

import pytest
from harness import TINY, Kd, outcome

from kdcli import checkpoint

CHAIN = ["--teacher", "resnet20", "--student", "resnet8", "--assistant", "resnet14", *TINY, "--epochs", "1"]


def test_takd_makes_the_chain_link_by_link_and_finds_it_again(kd: Kd, tmp_path):
    """Teacher, assistant, student: three runs; the student's teacher is the assistant's network."""
    first = kd("distill", "--method", "takd", *CHAIN, "--json")
    assert first.code == 0, first.err
    (assistant,) = (tmp_path / "runs/digits").glob("takd-resnet20-resnet14-*")
    assert first.json["teacher"]["arch"] == "resnet14"
    assert first.json["teacher"]["digest"] == checkpoint.digest(assistant)
    told = checkpoint.read_metadata(assistant / "student.safetensors")
    assert told["teacher"]["arch"] == "resnet20"
    again = kd("distill", "--method", "takd", *CHAIN, "--seed", "1", "--json")
    assert "assistant resnet14: runs" in again.err  # neither teacher nor assistant is trained a second time
    assert "epoch 1/1" in again.err
    assert again.err.count("takd student resnet14") == 0
    assert again.json["teacher"]["digest"] == first.json["teacher"]["digest"]


def test_dgkd_teaches_with_teacher_and_assistants(kd: Kd, tmp_path):
    """The assistant before it is itself taught by the teacher alone; the summary names everyone who taught."""
    words = [*CHAIN[:-2], "--epochs", "1", "--assistant", "resnet8"]
    result = kd("distill", "--method", "dgkd", *words, "--json")
    assert result.code == 0, result.err
    assert result.json["teacher"]["arch"] == "resnet20"
    assert [told["arch"] for told in result.json["teacher"]["assistants"]] == ["resnet14", "resnet8"]
    second = next((tmp_path / "runs/digits").glob("dgkd-resnet20-resnet8-*/student.safetensors"))
    assert checkpoint.read_metadata(second)["role"] == "student"
    chains = [json.loads(p.read_text())["assistant"] for p in (tmp_path / "runs/digits").glob("dgkd-*/spec.json")]
    assert sorted(chains) == [[], ["resnet14"], ["resnet14", "resnet8"]]


@pytest.mark.parametrize("method", ["takd", "dgkd"])
def test_an_assistant_may_be_a_finished_run(method, kd: Kd, tmp_path):
    """Given by path, it counts by its content: another path to the same network is the same run."""
    made = kd(
        "distill", "--method", "kd", "--teacher", "resnet20", "--student", "resnet14", *TINY, "--epochs", "1", "--json"
    )
    run = tmp_path / made.json["run"]
    base = ["--teacher", "resnet20", "--student", "resnet8", *TINY, "--epochs", "1", "--json"]
    one = kd("distill", "--method", method, *base, "--assistant", run)
    assert one.code == 0, one.err
    (tmp_path / "copy.safetensors").write_bytes((run / "student.safetensors").read_bytes())
    two = kd("distill", "--method", method, *base, "--assistant", "copy.safetensors")
    assert two.json["run"] == one.json["run"]
    assert "finished already" in two.err


def test_a_chain_resumes_bit_for_bit(kd: Kd, tmp_path):
    """Stopped in the middle of the last link (--max-minutes), the same command ends in the same bits."""
    words = ["distill", "--method", "dgkd", *CHAIN]
    assert kd(*words, "--out", "whole").code == 0
    assert kd(*words, "--out", "broken", "--max-minutes", "0.0001").code == 75
    assert kd(*words, "--out", "broken").code == 0
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "broken")


def test_dry_run_shows_who_teaches(kd: Kd):
    """The panel's assistants are named and no network is trained."""
    result = kd("distill", "--method", "dgkd", *CHAIN, "--dry-run", "--json")
    assert result.json["networks"]["teacher"]["assistants"] == ["resnet14"]
    assert result.json["spec"]["assistant"] == ["resnet14"]


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["--method", "kd"], 2, "takes no assistants"),
        (["--method", "takd", "--teacher-scale", "2"], 2, "cannot teach at another scale"),
        (["--method", "takd", "--assistant", "resnet15"], 2, "no network named"),
        (["--method", "takd", "--no-auto-teacher"], 3, "make it: kd distill --method takd"),
        (["--method", "takd", "--assistant", "a.pth"], 2, "--assistant: a.pth is not a kd checkpoint"),
        (["--method", "takd", "--assistant", "no.safetensors"], 3, "--assistant: no such checkpoint"),
    ],
)
def test_what_makes_no_sense_is_refused(words, code, part, kd: Kd):
    result = kd("distill", *CHAIN, *words)
    assert result.code == code
    assert part in result.error
