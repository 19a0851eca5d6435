"""TensorBoard and W&B show what metrics.jsonl holds, each step once, and can never stop or change a run."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from harness import TINY, Died, finish, outcome, spawn, wait_for_step

from kdcli.engine import trackers

RUN = ["distill", "--method", "none", "--student", "resnet8", *TINY, "--checkpoint-every", "3", "--out", "run"]


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar in the folder's event files, by name, just as it was written: nothing is dropped or purged."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, float(make_ndarray(value.tensor))))
    return found


def expected(lines: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in trackers.numbers(line).items():
            found.setdefault(name, []).append((line["step"], pytest.approx(value, rel=1e-6)))
    return found


@pytest.fixture
def tensorboard() -> None:
    pytest.importorskip("tensorboard", reason="the extra kdcli[tensorboard] is not installed")


def test_numbers_of_a_line():
    """Names by their place, numbers only; the step is where they stand and no number of its own."""
    line = {
        "epoch": 1,
        "step": 10,
        "terms": {"ce": 0.5},
        "test": {"single": {"top1": 9.0}},
        "alarms": ["x"],
        "followed": {"a": None},
    }
    assert trackers.numbers(line) == {"epoch": 1, "terms/ce": 0.5, "test/single/top1": 9.0}


def test_tensorboard_holds_the_log(tensorboard, kd, tmp_path):
    """RUN/tensorboard has every number of every epoch; without the flag there is no such folder, and the bits are equal."""
    assert kd(*RUN, "--tensorboard").code == 0
    found = events(tmp_path / "run/tensorboard")
    assert found == expected(log(tmp_path / "run"))
    assert {"epoch", "lr", "train/loss", "train/top1", "terms/ce", "test/single/top1"} <= set(found)
    assert kd(*RUN[:-1], "plain").code == 0
    assert not (tmp_path / "plain/tensorboard").exists()
    assert outcome(tmp_path / "plain") == outcome(tmp_path / "run")


def test_a_resumed_run_goes_on_without_doubled_steps(tensorboard, kd, die_at, tmp_path):
    """Also where epochs were told and then lost, and where the flag comes only with the last session."""
    for at, flags in ((14, ["--tensorboard"]), (24, ["--tensorboard"])):
        die_at(at)
        with pytest.raises(Died):
            kd(*RUN, *flags)
    die_at(-1)
    told = events(tmp_path / "run/tensorboard")
    assert [step for step, _ in told["epoch"]] == [10, 20]
    assert kd(*RUN, "--tensorboard").code == 0
    assert events(tmp_path / "run/tensorboard") == expected(log(tmp_path / "run"))
    die_at(14)
    with pytest.raises(Died):
        kd(*RUN[:-1], "late")
    die_at(-1)
    assert kd(*RUN[:-1], "late", "--tensorboard").code == 0
    assert [step for step, _ in events(tmp_path / "late/tensorboard")["epoch"]] == [10, 20, 30]


def test_a_killed_run_goes_on_in_the_same_log(tensorboard, kd, tmp_path):
    """After a true kill, at whatever instruction."""
    words = [*RUN[:-2], "--epochs", "12", "--out", "run", "--tensorboard"]
    process = spawn(*words, cwd=tmp_path)
    wait_for_step(process, tmp_path / "run", 45)
    process.kill()
    finish(process)
    assert kd(*words).code == 0
    assert events(tmp_path / "run/tensorboard") == expected(log(tmp_path / "run"))


def test_what_else_lies_in_the_folder_is_left_alone(tensorboard, kd, tmp_path):
    """Only event files are written anew."""
    (tmp_path / "run/tensorboard").mkdir(parents=True)
    (tmp_path / "run/tensorboard/notes.txt").write_text("mine")
    assert kd(*RUN, "--tensorboard", "--max-steps", "2").code == 0
    assert (tmp_path / "run/tensorboard/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("flag", [["--tensorboard"], ["--wandb", "project"]])
def test_a_missing_package_is_one_note(flag, kd, monkeypatch, tmp_path):
    """The run is carried out, and says what to install."""
    name = flag[0].removeprefix("--")
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = kd(*RUN, *flag, "--max-steps", "2")
    assert result.code == 0
    notes = [line for line in result.err.splitlines() if line.startswith(f"no {name}")]
    assert len(notes) == 1
    assert f"kdcli[{name}]" in notes[0]
    assert (tmp_path / "run/summary.json").exists()


# ------------------------------------------------------------------------------------------------------------------ W&B


class FakeRun:
    """What kd uses of a W&B run; like it, it forgets nothing and takes no earlier step."""

    def __init__(self, fails_at: int | None) -> None:
        self.step, self.rows, self.finished, self.fails_at = 0, [], 0, fails_at

    def log(self, values: dict[str, float], step: int) -> None:
        if self.fails_at is not None and len(self.rows) >= self.fails_at:
            raise OSError("the network is gone\nand more")
        self.rows.append((step, values))
        self.step = step + 1

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A stand-in for the package: `runs` by id, `calls` of init, `fails_at` the row from which logging fails."""
    fake = types.SimpleNamespace(runs={}, calls=[], fails_at=None, Settings=lambda **values: values)

    def init(**values: Any) -> FakeRun:
        fake.calls.append(values)
        return fake.runs.setdefault(values["id"], FakeRun(fake.fails_at))

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    monkeypatch.setattr(trackers.netrc, "netrc", _nobody)
    return fake


def _nobody() -> None:
    raise FileNotFoundError


def test_wandb_goes_on_in_the_same_run(wandb, kd, die_at, tmp_path):
    """One run, offline without a login, each step once, closed at the end of every session."""
    die_at(14)
    with pytest.raises(Died):
        kd(*RUN, "--wandb", "mine")
    die_at(-1)
    assert kd(*RUN, "--wandb", "mine").code == 0
    (run,) = wandb.runs.values()
    assert [step for step, _ in run.rows] == [10, 20, 30]
    assert [values for _, values in run.rows] == [trackers.numbers(line) for line in log(tmp_path / "run")]
    assert run.finished == len(wandb.calls) == 2
    for call in wandb.calls:
        assert (call["project"], call["name"], call["mode"], call["dir"]) == ("mine", "run", "offline", "run")
        assert call["settings"]["console"] == "off"
        assert call["config"]["method"]["name"] == "none"


def test_wandb_is_online_only_where_the_user_said_so(wandb, kd, monkeypatch):
    """A key in the environment, or a mode, which always wins."""
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert kd(*RUN, "--wandb", "mine", "--max-steps", "2").code == 0
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert kd(*RUN, "--wandb", "mine", "--max-steps", "2", "--overwrite").code == 0
    assert [call["mode"] for call in wandb.calls] == ["online", "disabled"]


def test_a_tracker_that_fails_is_left_behind(wandb, kd, tmp_path):
    """One note of one line; the run ends as ever, with the same bits."""
    wandb.fails_at = 1
    result = kd(*RUN, "--wandb", "mine")
    assert result.code == 0
    assert [line for line in result.err.splitlines() if "wandb" in line] == [
        "no wandb from here on: the network is gone"
    ]
    (run,) = wandb.runs.values()
    assert len(run.rows) == 1
    assert kd(*RUN[:-1], "plain").code == 0
    assert outcome(tmp_path / "plain") == outcome(tmp_path / "run")


def test_stdout_stays_one_document(wandb, kd):
    """Whatever trackers do, --json is one JSON document, and --quiet is quiet."""
    result = kd(*RUN, "--wandb", "mine", "--max-steps", "2", "--json", "--quiet")
    assert result.json["ok"] is True
    assert result.err == ""


@pytest.mark.slow
def test_the_true_package_offline(tmp_path):
    """W&B itself, without a network or a login: a folder in the run, nothing on stdout, and no prompt."""
    pytest.importorskip("wandb", reason="the extra kdcli[wandb] is not installed")
    process = spawn(*RUN, "--wandb", "mine", "--json", cwd=tmp_path)
    result = finish(process)
    assert result.code == 0, result.err
    assert result.json["ok"] is True
    assert "no wandb" not in result.err
    assert list((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
