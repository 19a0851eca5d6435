"""A run that was killed and started again ends in the same bits as one that was never interrupted."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
from harness import JOB, PER_EPOCH, STEPS, TINY, Died, finish, outcome, snapshot, spawn, steps_saved, wait_for_step

from kdcli.errors import WriteError
from kdcli.runs import lock as runlock

ALONE = ["distill", "--method", "none", "--student", "resnet8"]


def recipes(teachers: Path) -> dict[str, list[str]]:
    """A job a method, each with another part of the state: averaged weights, accumulation, AdamW, a joint head."""
    return {
        "none": [*ALONE, *TINY, "--ema", "0.9", "--accumulate", "2"],
        "kd": [
            *("distill", "--method", "kd", "--teacher", str(teachers / "kd"), "--student", "resnet8", *TINY),
            *("--optimizer", "adamw", "--lr", "0.002", "--eval-every", "2"),
        ],
        "vsd": [
            *("distill", "--method", "vsd", "--teacher", str(teachers / "vsd"), "--student", "resnet8", *TINY),
            *("--clip-grad", "1", "--val-fraction", "0.2"),
        ],
    }


def die(kd, die_at, step: int, *words: object) -> None:
    """Run a job that dies before it trains `step`."""
    die_at(step)
    with pytest.raises(Died):
        kd(*words)
    die_at(-1)


@pytest.mark.parametrize("method", ["none", "kd", "vsd"])
def test_five_deaths_change_no_bit(method, kd, die_at, teachers, tmp_path):
    """Deaths within an epoch, twice in the same one, and at its border: same network, same log, byte for byte."""
    words = recipes(teachers)[method]
    assert kd(*words, "--out", "whole").code == 0
    again = [*words, "--out", "broken", "--checkpoint-every", "3"]
    for step in (1, 4, 7, PER_EPOCH, 2 * PER_EPOCH - 3):  # whatever was not saved is trained again
        die(kd, die_at, step, *again)
    result = kd(*again)
    assert result.code == 0
    assert "going on at step 15" in result.err
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    assert not (tmp_path / "broken/state").exists()


def test_death_between_the_last_step_of_an_epoch_and_its_evaluation(kd, tmp_path, monkeypatch, teachers):
    """The epoch's evaluation, and its line in the log, are made up for."""
    from kdcli.engine import fit

    words = recipes(teachers)["none"]
    assert kd(*words, "--out", "whole").code == 0
    original, calls = fit.Training._evaluate, []

    def evaluate(self, epoch, modes):
        calls.append(epoch)
        if len(calls) in (1, 4):
            raise Died
        return original(self, epoch, modes)

    monkeypatch.setattr(fit.Training, "_evaluate", evaluate)
    again = [*words, "--out", "broken", "--checkpoint-every", "1"]
    for _ in range(2):
        with pytest.raises(Died):
            kd(*again)
    assert kd(*again).code == 0
    assert calls == [0, 0, 1, 2, 2]
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_death_before_anything_was_saved(kd, die_at, tmp_path):
    """A directory with nothing but its spec is a run that starts from the beginning, and records its environment."""
    assert kd(*ALONE, *TINY, "--out", "whole").code == 0
    die(kd, die_at, 5, *ALONE, *TINY, "--out", "broken")
    for name in ("env.json", "metrics.jsonl"):
        (tmp_path / "broken" / name).unlink(missing_ok=True)
    for path in (tmp_path / "broken/state").iterdir():
        path.unlink()
    (tmp_path / "broken/.spec.json.0123456789abcdef.tmp").write_text("half a fi")
    assert kd(*ALONE, *TINY, "--out", "broken").code == 0
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    assert json.loads((tmp_path / "broken/env.json").read_text())["threads"] == 1
    assert not list((tmp_path / "broken").glob(".*.tmp"))


def test_three_true_kills_two_of_them_within_one_epoch(kd, teachers, tmp_path):
    """SIGKILL of the process itself, at whatever instruction it finds."""
    words = [*recipes(teachers)["kd"], "--epochs", "8", "--checkpoint-every", "1"]
    assert kd(*words, "--out", "whole").code == 0
    killed = []
    for step in (2, 6, 25):
        process = spawn(*words, "--out", "broken", cwd=tmp_path)
        wait_for_step(process, tmp_path / "broken", step)
        process.kill()
        assert finish(process).code == -9
        killed.append(steps_saved(tmp_path / "broken"))
    assert killed == sorted(killed)
    assert killed[-1] < 8 * PER_EPOCH
    assert kd(*words, "--out", "broken").code == 0
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "kd", "vsd"])
def test_many_kills_at_random_moments(method, kd, teachers, tmp_path):
    """SIGKILL after a random time, also while torch is imported, data are read, states written, epochs evaluated."""
    draw = random.Random(method)
    words = [*recipes(teachers)[method], "--epochs", "12", "--checkpoint-every", "2"]
    assert kd(*words, "--out", "whole").code == 0
    for _ in range(8):
        process = spawn(*words, "--out", "broken", cwd=tmp_path)
        time.sleep(draw.uniform(0.2, 6))
        process.kill()
        finish(process)
    assert kd(*words, "--out", "broken").code == 0
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_damaged_newest_state_falls_back_to_the_one_before(kd, die_at, tmp_path):
    """One flipped byte in the newest state costs a few steps and a line on stderr, and no bit of the result."""
    assert kd(*ALONE, *TINY, "--out", "whole").code == 0
    again = [*ALONE, *TINY, "--out", "broken", "--checkpoint-every", "3"]
    die(kd, die_at, 8, *again)
    newest = tmp_path / "broken/state/step-000000006.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    result = kd(*again)
    assert result.code == 0
    assert "step-000000006" in result.err
    assert "going back to the state before it" in result.err
    assert "going on at step 3" in result.err
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_every_state_damaged_is_an_error_and_changes_nothing(kd, die_at, tmp_path):
    """Nothing is guessed and nothing is started anew unasked: exit 3, and --overwrite is the way out."""
    again = [*ALONE, *TINY, "--out", "broken", "--checkpoint-every", "3"]
    die(kd, die_at, 8, *again)
    for path in (tmp_path / "broken/state").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    before = snapshot(tmp_path / "broken")
    result = kd(*again)
    assert result.code == 3
    assert "--overwrite" in result.error
    assert snapshot(tmp_path / "broken") == before
    assert kd(*again, "--overwrite").code == 0


def test_a_torn_line_and_lines_of_lost_steps_are_cut_from_the_log(kd, die_at, tmp_path):
    """metrics.jsonl goes back to what the state knows, so that no epoch is told twice."""
    assert kd(*ALONE, *TINY, "--out", "whole").code == 0
    again = [*ALONE, *TINY, "--out", "broken", "--checkpoint-every", "3"]
    die(kd, die_at, PER_EPOCH + 4, *again)
    log = tmp_path / "broken/metrics.jsonl"
    log.write_bytes(log.read_bytes() + b'{"epoch": 2, "from": "lost steps"}\n{"epoch": 3, "to')
    assert kd(*again).code == 0
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("finished", [False, True])
def test_another_spec_is_refused_field_by_field(finished, kd, die_at, tmp_path):
    """Exit 4 names every differing field with both values; the run in the directory stays as it was."""
    words = [*ALONE, *TINY, "--out", "run", "--checkpoint-every", "3"]
    if finished:
        assert kd(*words).code == 0
    else:
        die(kd, die_at, 5, *words)
    before = snapshot(tmp_path / "run")
    result = kd(*words, "--epochs", "4", "--seed", "1")
    assert result.code == 4
    assert "train.epochs was 3, is 4" in result.error
    assert "seed was 0, is 1" in result.error
    assert snapshot(tmp_path / "run") == before


@pytest.mark.parametrize("finished", [False, True])
def test_images_prepared_in_another_way_are_another_run(finished, kd, die_at, tmp_path):
    """`resident_mib` where it decides how images are resized: refused in its directory, with both values; else free."""
    words = [*ALONE, *TINY, "--image-size", "16", "--out", "run", "--checkpoint-every", "3"]
    if finished:
        assert kd(*words).code == 0
    else:
        die(kd, die_at, 5, *words)
    result = kd(*words, "--resident-mib", "0")
    assert result.code == 4
    assert "data.resident_mib was 2048, is 0" in result.error
    assert kd(*words, "--resident-mib", "2").code == 0  # there is room enough


def test_another_teacher_is_refused(kd, die_at, teachers, tmp_path):
    """A run goes on only with the teacher it began with: by content, so a copy of it elsewhere is fine."""
    one = tmp_path / "one.safetensors"
    one.write_bytes((teachers / "kd/teacher.safetensors").read_bytes())
    words = ["distill", "--method", "kd", "--student", "resnet8", *TINY, "--out", "run"]
    die(kd, die_at, 5, *words, "--teacher", one)
    assert kd("pretrain-teacher", "--method", "kd", "--teacher", "resnet14", *TINY, "--out", "other").code == 0
    result = kd(*words, "--teacher", "other")
    assert result.code == 4
    assert "teacher" in result.error
    assert kd(*words, "--teacher", teachers / "kd").code == 0


def reused(kd, other: list[object], *same: list[object]) -> None:
    """Another network in the directory of a finished run is refused, the same one by any path is the finished run."""
    refused = kd(*other, "--json")
    assert refused.code == 4, refused.out
    assert refused.json["error"]["field"] == "--out"
    assert "another" in refused.error
    for words in same:
        found = kd(*words)
        assert found.code == 0, found.err
        assert "finished already" in found.err


def test_a_finished_run_answers_for_its_own_teacher_alone(kd, teachers, tmp_path):
    """Not with the old teacher's numbers under the name of the new one."""
    shutil.copytree(teachers / "kd", tmp_path / "copy")
    words = [
        "distill",
        "--method",
        "kd",
        "--student",
        "resnet8",
        *TINY,
        "--max-steps",
        "2",
        "--out",
        "run",
        "--teacher",
    ]
    assert kd(*words, teachers / "kd").code == 0
    reused(kd, [*words, teachers / "vsd"], [*words, teachers / "kd"], [*words, "copy"])


PROBE = [
    *("--dataset", "digits", "--train-fraction", "0.1", "--batch-size", "15", "--threads", "1", "--device", "cpu"),
    *("--workers", "0"),
]


@pytest.mark.parametrize("flags", [["--max-steps", "2"], ["--cached", "--epochs", "1"]])
def test_a_finished_probe_answers_for_its_own_encoder_alone(flags, kd, teachers, tmp_path):
    """Also one that was made before its summary told the digest of the spec."""
    shutil.copytree(teachers / "kd", tmp_path / "copy")
    one, other, same = (
        ["linear-probe", p, *PROBE, *flags, "--out", "run"] for p in (teachers / "kd", teachers / "vsd", "copy")
    )
    assert kd(*one).code == 0
    reused(kd, other, one, same)
    file = tmp_path / "run/summary.json"
    summary = json.loads(file.read_text())
    assert summary.pop("spec_digest")
    file.write_text(json.dumps(summary))
    reused(kd, other, one, same)


def test_an_unfinished_probe_goes_on_with_its_own_encoder_alone(kd, die_at, teachers, tmp_path):
    """Its state is of the encoder it began with; by content, so a copy of it elsewhere is fine."""
    shutil.copytree(teachers / "kd", tmp_path / "copy")
    words = [*PROBE, "--epochs", "1", "--out", "run", "--checkpoint-every", "3"]
    die(kd, die_at, 5, "linear-probe", teachers / "kd", *words)
    refused = kd("linear-probe", teachers / "vsd", *words)
    assert refused.code == 4
    assert "another encoder" in refused.error
    assert kd("linear-probe", "copy", *words).code == 0


def test_a_run_that_starts_over_is_recorded_as_what_it_then_is(kd, teachers, tmp_path, monkeypatch):
    """A cached probe keeps no state, so it may start over with another encoder; its spec is then that one's."""
    from kdcli.probe import cached
    from kdcli.runs import directory

    words = [*PROBE, "--cached", "--epochs", "1", "--out", "run"]
    with monkeypatch.context() as patch:
        patch.setattr(cached, "_score", lambda *_: (_ for _ in ()).throw(Died))
        patch.setattr(directory, "_withdraw", lambda _: None)  # it was killed, and could not clear up
        with pytest.raises(Died):
            kd("linear-probe", teachers / "kd", *words)
    assert kd("linear-probe", teachers / "vsd", *words).code == 0
    assert json.loads((tmp_path / "run/spec.json").read_text())["encoder"] == str(teachers / "vsd")
    assert kd("linear-probe", "--preset", "run/spec.json", teachers / "vsd", "--dataset", "digits").code == 0


def test_a_finished_run_that_was_moved_tells_where_it_is_now(kd, teachers, tmp_path):
    """Of itself and of its network; a probe's encoder stays where it was."""
    words = [*ALONE, *TINY, "--max-steps", "2"]
    first = kd(*words, "--out", "here", "--json").json
    (tmp_path / "here").rename(tmp_path / "there")
    moved = kd(*words, "--out", "there", "--json")
    assert moved.code == 0
    assert moved.json == first | {"run": "there", "checkpoint": "there/student.safetensors"}
    assert (tmp_path / moved.json["checkpoint"]).is_file()
    probe = ["linear-probe", teachers / "kd", *PROBE, "--max-steps", "2"]
    first = kd(*probe, "--out", "p", "--json").json["runs"][0]
    (tmp_path / "p").rename(tmp_path / "q")
    assert kd(*probe, "--out", "q", "--json").json["runs"][0] == first | {"run": "q"}


def test_a_finished_run_that_cannot_be_written_is_read(kd, tmp_path, monkeypatch):
    """On a read-only disk or in another user's folder: exit 0 and no work; anything else is refused as ever."""
    words = [*ALONE, *TINY, "--max-steps", "2", "--out", "run"]
    first = kd(*words, "--json")
    (tmp_path / "run/MODEL_CARD.md").unlink()
    before = snapshot(tmp_path)
    (tmp_path / "run").chmod(0o555)
    (tmp_path / "run/.lock").chmod(0o444)
    opened, access = os.open, os.access  # root may write everything: it is told what others are

    def refuse(path, flags, *rest, **more):
        if "run/" in os.fspath(path) and flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not (mode & os.W_OK))
    again = kd(*words, "--json")
    assert again.code == 0, again.err
    assert again.json == first.json
    assert kd(*words, "--seed", "1").code == 4
    assert kd(*words, "--overwrite").code == 5
    monkeypatch.undo()
    assert snapshot(tmp_path) == before
    (tmp_path / "run").chmod(0o755)


def test_a_run_in_use_is_refused(kd, tmp_path):
    """Exit 9 while another holds the directory; afterwards it is free."""
    (tmp_path / "run").mkdir()
    with runlock.hold(tmp_path / "run"):
        result = kd(*ALONE, *TINY, "--max-steps", "2", "--out", "run")
        assert result.code == 9
        assert "in use" in result.error
        assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock"]
    assert kd(*ALONE, *TINY, "--max-steps", "2", "--out", "run").code == 0


def test_two_processes_in_one_directory(kd, tmp_path):
    """A second process leaves at once with 9 and does not disturb the first."""
    words = [*ALONE, *TINY, "--epochs", "20", "--checkpoint-every", "5", "--out", "run"]
    assert kd(*words[:-1], "whole").code == 0
    first = spawn(*words, cwd=tmp_path)
    wait_for_step(first, tmp_path / "run", 5)
    assert kd(*words).code == 9
    assert finish(first).code == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_threads_are_recorded_and_pinned_again(kd, die_at, tmp_path):
    """Bits depend on the number of threads: an unfinished run goes on with its own, whatever the default is now."""
    import torch

    assert kd(*ALONE, *JOB, "--threads", "2", "--out", "whole").code == 0
    die(kd, die_at, 8, *ALONE, *JOB, "--threads", "2", "--checkpoint-every", "3", "--out", "broken")
    assert json.loads((tmp_path / "broken/env.json").read_text())["threads"] == 2
    torch.set_num_threads(1)
    result = kd(*ALONE, *JOB, "--out", "broken")
    assert result.code == 0
    assert torch.get_num_threads() == 2
    assert "threads" not in result.err
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_other_threads_are_obeyed_and_told(kd, die_at):
    """An explicit --threads wins over the record, with a note that the last bits may differ."""
    die(kd, die_at, 8, *ALONE, *JOB, "--threads", "2", "--checkpoint-every", "3", "--out", "broken")
    result = kd(*ALONE, *JOB, "--threads", "1", "--out", "broken")
    assert result.code == 0
    assert "began with 2 threads and goes on with 1" in result.err


def test_looking_whether_one_image_will_do_changes_no_bit(kd, tmp_path, monkeypatch):
    """Parts of one image are fine where the last map is more than a pixel; a pass before the training tells."""
    from kdcli.engine import fit

    words = [*ALONE, *TINY, "--max-steps", "2", "--accumulate", "15"]
    assert kd(*words, "--out", "looked").code == 0
    monkeypatch.setattr(fit, "_trains_on_one", lambda *_: True)
    assert kd(*words, "--out", "trusted").code == 0
    assert outcome(tmp_path / "looked") == outcome(tmp_path / "trusted")


def test_max_steps_finishes_a_run(kd, tmp_path):
    """`--max-steps` is a finished run: the same command has nothing more to do."""
    words = [*ALONE, *TINY, "--max-steps", "4", "--out", "run", "--json"]
    first = kd(*words)
    assert first.code == 0
    assert first.json["steps"] == 4
    before = snapshot(tmp_path / "run")
    second = kd(*words)
    assert second.code == 0
    assert second.json == first.json
    assert "finished already" in second.err
    assert snapshot(tmp_path / "run") == before


def test_max_steps_leaves_the_schedule_unscaled(kd, tmp_path):
    """The first steps of a cut run are those of the whole one: the same learning rate at the same step."""
    assert kd(*ALONE, *TINY, "--out", "whole").code == 0
    assert kd(*ALONE, *TINY, "--max-steps", PER_EPOCH, "--out", "cut").code == 0
    whole = json.loads((tmp_path / "whole/metrics.jsonl").read_text().splitlines()[0])
    cut = json.loads((tmp_path / "cut/metrics.jsonl").read_text().splitlines()[0])
    assert (whole["lr"], whole["train"], whole["step"]) == (cut["lr"], cut["train"], cut["step"])


@pytest.mark.parametrize("finished", [False, True])
def test_overwrite_starts_anew(finished, kd, die_at, tmp_path):
    """`--overwrite` forgets the run in the directory, finished or not, even one with another spec."""
    if finished:
        assert kd(*ALONE, *TINY, "--seed", "5", "--out", "run").code == 0
    else:
        die(kd, die_at, 8, *ALONE, *TINY, "--seed", "5", "--checkpoint-every", "3", "--out", "run")
    assert kd(*ALONE, *TINY, "--out", "whole").code == 0
    result = kd(*ALONE, *TINY, "--out", "run", "--overwrite", "--json")
    assert result.code == 0
    assert result.json["steps"] == STEPS
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_the_spec_of_an_overwriting_run_does_not_erase_it(kd, tmp_path):
    """`--preset run/spec.json` of a run made with --overwrite finds that run finished, and does not start it anew."""
    assert kd(*ALONE, *TINY, "--max-steps", "2", "--out", "run", "--overwrite").code == 0
    before = snapshot(tmp_path / "run")
    result = kd("distill", "--preset", "run/spec.json")
    assert result.code == 0
    assert "finished already" in result.err
    assert snapshot(tmp_path / "run") == before


def test_a_failure_after_the_summary_takes_nothing_of_the_finished_run(kd, tmp_path, monkeypatch):
    """The model card is written last. A disk that fails there is told, and the run stays whole and finished."""
    words = ["distill", "--method", "none", "--student", "resnet8", *TINY, "--max-steps", "2", "--out", "run"]

    def fail(directory: Path) -> Path:
        raise WriteError(f"cannot write {directory}/MODEL_CARD.md: no space left on device [ENOSPC]")

    with monkeypatch.context() as patch:
        patch.setattr("kdcli.modelcard.write", fail)
        assert kd(*words).code == 5
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"spec.json", "env.json", "metrics.jsonl", "summary.json", "student.safetensors"} <= left
    again = kd(*words)
    assert again.code == 0, again.err
    assert "is finished already" in again.err
    assert (tmp_path / "run" / "MODEL_CARD.md").is_file()
