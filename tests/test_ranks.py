"""Two ranks (gloo, on this machine): the same results as one, run after run, and a rank's death is survived."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import TINY, Kd, Result, environment, finish, outcome, spawn, steps_saved, wait_for_step

from kdcli import checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo on this platform is untested")

LAYERNORM = [
    *("distill", "--method", "none", "--student", "timm:vit_tiny_patch16_224", "--dataset", "digits"),
    *("--image-size", "32", "--train-fraction", "0.1", "--batch-size", "15", "--epochs", "1", "--max-steps", "6"),
    *("--threads", "1", "--device", "cpu"),
]
BATCHNORM = ["distill", "--method", "kd", "--teacher", "resnet14", "--student", "resnet8", *TINY]


def ranks(*words: object, cwd: Path) -> Result:
    """A command on two ranks, through kd's own launcher."""
    return finish(spawn(*words, "--nproc", "2", cwd=cwd))


def test_a_network_without_batchnorm_is_the_same_on_one_and_two_ranks(kd: Kd, tmp_path):
    """Weights within 1e-5 of one process's, uneven last batch and all; under bare torchrun the bits of --nproc."""
    import torch

    assert kd(*LAYERNORM, "--out", "one").code == 0
    two = ranks(*LAYERNORM, "--out", "two", cwd=tmp_path)
    assert two.code == 0, two.err
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kdcli"]
    bare = subprocess.run(
        [*torchrun, *LAYERNORM, "--out", "bare", "--json"],
        cwd=tmp_path,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=180,
        check=False,
    )
    assert bare.returncode == 0, bare.stderr
    assert Result(0, bare.stdout, bare.stderr).json["ok"] is True
    alone, metadata = checkpoint.load(tmp_path / "one/student.safetensors")
    together, others = checkpoint.load(tmp_path / "two/student.safetensors")
    assert alone.keys() == together.keys()
    for name, weights in alone.items():
        assert torch.allclose(weights, together[name], rtol=0, atol=1e-5), name
    assert metadata["metrics"]["test"]["n"] == others["metrics"]["test"]["n"]
    assert metadata["metrics"]["test"]["nll"] == pytest.approx(others["metrics"]["test"]["nll"], abs=1e-4)
    assert outcome(tmp_path / "two") == outcome(tmp_path / "bare")
    assert two.err.count("epoch 1/1") == 1  # one line an epoch, not one a rank


def test_with_batchnorm_two_ranks_repeat_themselves_and_survive_a_death(kd: Kd, tmp_path):
    """Teacher on the way and student: equal bits from two runs, one of which lost a rank to SIGKILL (exit 8)."""
    assert ranks(*BATCHNORM, "--runs-dir", "whole", cwd=tmp_path).code == 0
    (student,) = (tmp_path / "whole/digits").glob("kd-*")
    (teacher,) = (tmp_path / "whole/digits").glob("teacher-*")

    again = [*BATCHNORM, "--runs-dir", "broken", "--checkpoint-every", "2"]
    process = spawn(*again, "--nproc", "2", cwd=tmp_path)
    wait_for_step(process, tmp_path / "broken/digits" / teacher.name, 4)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    died = finish(process)
    assert died.code == 8
    assert "rank" in died.error
    assert ranks(*again, cwd=tmp_path).code == 0
    for run in (student, teacher):
        assert outcome(tmp_path / "broken/digits" / run.name) == outcome(run)

    # What the ranks measured together is what the exported network gives: its BatchNorm statistics are the ones used.
    told = checkpoint.read_metadata(student / "student.safetensors")["metrics"]["test"]
    measured = kd("evaluate", student, "--device", "cpu", "--threads", "1", "--json").json["metrics"]["test"]
    assert measured["n"] == told["n"]
    assert measured["nll"] == pytest.approx(told["nll"], abs=1e-5)
    assert measured["top1"] == told["top1"]


def test_a_rank_that_is_ended_because_another_died_is_not_the_cause(tmp_path):
    """Rank 1 is killed while rank 0 is still building, where SIGTERM ends it at once: exit 8 for rank 1, not 143."""
    (tmp_path / "dies.py").write_text(
        "import os, signal, time\n"
        "from kdcli.methods.base import Method\n"
        "class Dies(Method):\n"
        "    'One rank dies, the other waits.'\n"
        "    def loss(self, batch, student, teacher, progress): return {'ce': student.logits.sum()}\n"
        "if 'RANK' in os.environ:\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '1' else time.sleep(120)\n"
    )
    words = ["distill", "--method", tmp_path / "dies.py", "--teacher", "resnet14", "--student", "resnet8", *TINY]
    died = ranks(*words, cwd=tmp_path)
    assert died.code == 8, died.err
    assert died.error == "error: rank 1 was ended by SIGKILL (run the same command again to go on)"


def test_a_failure_on_every_rank_is_told_once_with_its_own_code(tmp_path):
    """The launcher's 1 does not hide what went wrong: exit 3, one line, one document."""
    result = ranks(*BATCHNORM, "--no-auto-teacher", "--json", cwd=tmp_path)
    assert result.code == 3
    assert result.json["error"]["field"] == "--teacher"
    assert "kd pretrain-teacher" in result.error
    assert not (tmp_path / "runs/digits").exists() or not list((tmp_path / "runs/digits").iterdir())


def test_a_preset_on_stdin_reaches_the_ranks(tmp_path):
    """The launcher has read it, and hands it on."""
    (tmp_path / "given.toml").write_text("[train]\nlr = 0.123\nepochs = 2\nmax_steps = 1\n")
    words = ["distill", "--method", "none", "--student", "resnet8", *TINY[:-4], "--threads", "1", "--device", "cpu"]
    words = [word for word in words if word not in ("--epochs", "3")]
    with open(tmp_path / "given.toml") as given:
        result = finish(spawn(*words, "--nproc", "2", "--preset", "-", "--out", "run", cwd=tmp_path, stdin=given))
    assert result.code == 0, result.err
    train = json.loads((tmp_path / "run/spec.json").read_text())["train"]
    assert (train["lr"], train["epochs"], train["max_steps"]) == (0.123, 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "flags", "code"),
    [
        (signal.SIGTERM, [], 143),
        (signal.SIGTERM, ["--requeue"], 75),
        (signal.SIGUSR1, [], 75),
        (signal.SIGINT, [], 130),
    ],
)
def test_stop_signals_reach_the_ranks(number, flags, code, tmp_path):
    """The launcher passes them on; the ranks save together, and the same command ends in the same bits."""
    words = ["distill", "--method", "none", "--student", "resnet8", *TINY, "--epochs", "20", "--checkpoint-every", "10"]
    process = spawn(*words, "--nproc", "2", "--out", "run", *flags, cwd=tmp_path)
    wait_for_step(process, tmp_path / "run", 20)
    process.send_signal(number)
    stopped = finish(process)
    assert stopped.code == code
    assert "saved at step" in stopped.error
    assert steps_saved(tmp_path / "run") > 20
    assert ranks(*words, "--out", "run", *flags, cwd=tmp_path).code == 0
    assert ranks(*words, "--out", "whole", cwd=tmp_path).code == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_accumulated_parts_are_as_many_on_every_rank(tmp_path):
    """15 images on two ranks are 8 and 7: in 8 parts each the ranks would wait for each other where a loss gathers."""
    words = ["distill", "--method", "crd", "--teacher", "resnet14", "--student", "resnet8", *TINY, "--epochs", "1"]
    result = ranks(*words, "--accumulate", "8", "--rank-timeout", "60", cwd=tmp_path)
    assert result.code == 0, result.err


def test_the_rank_to_blame_is_named():
    """One that a signal ended, one that left without a word, and one that the others waited for in vain."""
    from kdcli.engine.launch import _blamed

    assert _blamed({1: -9, 0: 8}, 2) == "rank 1 was ended by SIGKILL"
    assert _blamed({0: 3}, 2) == "rank 0 died without a word and left with 3"
    assert _blamed({0: 8, 1: -9, 2: 8}, 3) == "rank 1 stopped answering"
    assert _blamed({0: 8, 2: 8}, 4) == "rank 1 and 3 stopped answering"
    assert _blamed({0: 8, 1: 8}, 2) == "the ranks lost each other"
