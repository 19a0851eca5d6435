"""`kd sweep --jobs N`: the same runs side by side, in order, through failures, stops and kills.

Whole processes take seconds to start, so the order of things is tested with stand-ins for them that take none.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from harness import finish, outcome, snapshot, spawn, steps_saved, wait_for_step

from kdcli.errors import IncompatibleError, KdError, Stopped, WorkerError
from kdcli.output import Story
from kdcli.sweep import side_by_side
from kdcli.sweep.carrying_out import carry_out
from kdcli.sweep.outcome import Outcome
from kdcli.sweep.planned import Planned
from kdcli.sweep.planning import steps

TINY = """
[data]
dataset = "digits"
image_size = 8
train_fraction = 0.1

[train]
epochs = 1
max_steps = 3
batch_size = 15

[system]
device = "cpu"
threads = 1
"""

METHOD = """
import time
from pathlib import Path
from typing import Any, ClassVar
from kdcli.losses import cross_entropy
from kdcli.methods.base import Method, MethodSpec

class MineSpec(MethodSpec):
    '''Settings.'''
    name: str = 'mine'
    '''Name.'''

class Mine(Method):
    '''The student alone, with a catch.'''
    Spec: ClassVar[Any] = MineSpec
    needs_teacher: ClassVar[bool] = False

    def loss(self, batch, student, teacher, progress):
        {catch}
        return {{'ce': cross_entropy(student.logits, batch.targets)}}
"""
BUGGY = METHOD.format(catch="raise RuntimeError('no such luck')")
SLOW = METHOD.format(catch="time.sleep(0.05 * Path('slow').exists())")

# A process that does what the file beside it says for its seed (and 9 for a probe), and leaves a trace of its life.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
words = sys.argv[2:]
value = lambda flag: words[words.index(flag) + 1] if flag in words else None
stage = "teacher" if words[0] == "pretrain-teacher" else "student"
name = stage + (value("--seed") or "0")
trace = Path("trace")
trace.mkdir(exist_ok=True)
attempt = len(list(trace.glob(f"{name}.*.begun")))
facts = {"threads": value("--threads"), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "at": time.time()}
facts["minutes"] = value("--max-minutes")
(trace / f"{name}.{attempt}.begun").write_text(json.dumps(facts))
acts = json.loads(Path("acts.json").read_text()).get(name, ["done"])
act = acts[min(attempt, len(acts) - 1)]
def leave(code, **document):
    (trace / f"{name}.{attempt}.ended").write_text(json.dumps({"at": time.time()}))
    print(json.dumps(document))
    sys.exit(code)
def error(code, kind, message):
    leave(code, ok=False, error={"kind": kind, "field": None, "message": message, "hint": None})
def on(number, frame):
    (trace / f"{name}.{number}.got").touch()
    if act != "stubborn":
        time.sleep(0.3)
        error(128 + number, "stopped", "saved")
signal.signal(signal.SIGTERM, on)
signal.signal(signal.SIGINT, on)
(trace / f"{name}.{attempt}.ready").touch()
if act in ("long", "stubborn"):
    for _ in range(600):
        time.sleep(0.1)
time.sleep(0.15)
if act == "timed":
    time.sleep(60 * float(facts["minutes"]))
    error(75, "stopped", "saved")
if act == "late":
    time.sleep(1)
if act == "unfit":
    error(4, "incompatible", "it never fits")
if act == "busy":
    error(9, "busy", "the directory is in use by process 7")
if act == "killed":
    print("a last word", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if act == "stopped":
    error(143, "stopped", "saved")
test = {"top1": 50.0, "n": 10}
leave(0, run="there", metrics={"test": test}, best_on_test={"top1": 51.0})
"""


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.fixture
def crew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`crew(acts, jobs, sweep)`: carry out a sweep whose processes are stand-ins; the document and the first failure."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "stand_in.py", STAND_IN)
    monkeypatch.setattr(side_by_side, "_CHILD", (str(tmp_path / "stand_in.py"),))
    monkeypatch.setattr(side_by_side, "_LOOK_EVERY", 0.01)

    def carry(acts: dict[str, list[str]], jobs: int, sweep: str, *sets: str) -> tuple[dict[str, Any], KdError | None]:
        write(tmp_path / "acts.json", json.dumps(acts))
        write(tmp_path / "s.toml", sweep)
        return carry_out("s.toml", [], sets, Story(), jobs)

    return carry


def trace(name: str, attempt: int = 0) -> tuple[dict[str, Any], float]:
    """What a stand-in was given, with the time it began, and the time it ended."""
    begun = json.loads(Path(f"trace/{name}.{attempt}.begun").read_text())
    return begun, json.loads(Path(f"trace/{name}.{attempt}.ended").read_text())["at"]


def lives() -> list[tuple[float, float]]:
    """Begin and end of every stand-in."""
    ended = sorted(Path("trace").glob("*.ended"))
    return [(trace(*_of(path))[0]["at"], trace(*_of(path))[1]) for path in ended]


def _of(path: Path) -> tuple[str, int]:
    name, attempt, _ = path.name.split(".")
    return name, int(attempt)


FOUR = TINY + "[sweep]\npairs = [['resnet14', 'resnet8']]\nmethods = ['kd']\nseeds = [1, 2, 3, 4]\n"


# ----------------------------------------------------------------------------------------------------- order and shares


def test_students_start_after_their_teacher_and_no_more_than_jobs_at_a_time(crew, capfd) -> None:
    """One teacher, four students, three slots; every run once, the rows in the order of the plan."""
    document, error = crew({}, 3, FOUR)
    assert error is None
    assert [run["stage"] for run in document["runs"]] == ["teacher", *["student"] * 4]
    assert [run["status"] for run in document["runs"]] == ["done"] * 5
    _, taught = trace("teacher0")
    students = [trace(f"student{seed}") for seed in (1, 2, 3, 4)]
    assert all(begun["at"] >= taught for begun, _ in students)
    spans = lives()
    assert len(spans) == 5
    together = [sum(a <= begin < b for a, b in spans) for begin, _ in spans]
    assert max(together) == 3
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 10, lines
    assert sum("kd distill" in line for line in lines) == 4
    assert sum(" done: top-1 50.00 %" in line for line in lines) == 5


def test_cores_are_shared_out_unless_threads_are_named(crew, monkeypatch) -> None:
    """Eight cores over three jobs are two threads each; a run that began with other threads goes on with those."""
    monkeypatch.setattr(side_by_side, "_cores", lambda: 8)
    free = FOUR.replace("threads = 1", "").replace("[1, 2, 3, 4]", "[1, 2]")
    write(Path("s.toml"), free)
    begun = Path(steps("s.toml")[-1].directory)
    begun.mkdir(parents=True)
    write(begun / "env.json", '{"threads": 5}')
    crew({}, 3, free)
    assert trace("teacher0")[0]["threads"] == "2"
    assert trace("student1")[0]["threads"] == "2"
    assert trace("student2")[0]["threads"] is None


def test_named_threads_are_kept(crew) -> None:
    """The spec's threads are part of the command, and nothing is added."""
    crew({}, 8, FOUR.replace("[1, 2, 3, 4]", "[1]"))
    assert trace("student1")[0]["threads"] == "1"


def test_jobs_are_spread_over_the_gpus(crew, monkeypatch) -> None:
    """Slots take turns on what is visible; a run that names its device is left alone, and so is all on one GPU."""
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6,7")
    crew({}, 4, FOUR.replace('device = "cpu"', ""))
    given = sorted(trace(f"student{seed}")[0]["gpu"] for seed in (1, 2, 3, 4))
    assert given == ["4", "4", "6", "6"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert side_by_side.gpus() == ["0", "1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert side_by_side.gpus() == []
    crew({}, 2, FOUR.replace("[1, 2, 3, 4]", "[5]"))
    assert trace("student5")[0]["gpu"] is None


def test_a_missing_teacher_outside_the_plan_is_made_by_one_run_alone(crew, tmp_path) -> None:
    """With the students alone asked for, the first of them makes the teacher; the others wait for it."""
    write(tmp_path / "s.toml", FOUR.replace("[1, 2, 3, 4]", "[1, 2]"))
    write(tmp_path / "acts.json", "{}")
    carry_out("s.toml", ["stage=student"], [], Story(quiet=True), 2)
    (_, first), (second, _) = trace("student1"), trace("student2")
    assert second["at"] >= first


# -------------------------------------------------------------------------------------------------------------- failures


def test_a_failure_stops_only_what_needs_it(crew, capfd) -> None:
    """One does not fit, one is killed: said with their own last words; the first in the plan's order is the sweep's."""
    document, error = crew({"student1": ["killed"], "student3": ["unfit"]}, 2, FOUR)
    assert [run["status"] for run in document["runs"]] == ["done", "failed", "done", "failed", "done"]
    assert isinstance(error, WorkerError)
    assert document["runs"][1]["exit_code"] == 8
    assert document["runs"][3]["error"] == "it never fits"
    assert document["runs"][3]["exit_code"] == 4
    err = capfd.readouterr().err
    assert "run 2 of 5 failed: its process was ended by signal 9: a last word" in err
    assert "run 4 of 5 failed: it never fits" in err


def test_without_their_teacher_students_are_not_begun(crew, capfd) -> None:
    """Each is said, and none is started."""
    document, error = crew({"teacher0": ["unfit"]}, 2, FOUR)
    assert isinstance(error, IncompatibleError)
    assert [run["status"] for run in document["runs"]] == ["failed", *["not run"] * 4]
    assert len(lives()) == 1
    assert capfd.readouterr().err.count("is not run: runs/digits/teacher-none-resnet14") == 4


def test_a_directory_in_use_is_waited_for(crew, capfd) -> None:
    """Somebody else has it for a while: that is said once, and the run is tried again."""
    document, error = crew({"student2": ["busy", "busy", "done"]}, 4, FOUR)
    assert error is None
    assert [run["status"] for run in document["runs"]] == ["done"] * 5
    begins = [trace("student2", attempt)[0]["at"] for attempt in range(3)]
    assert 0.9 < begins[1] - begins[0] < begins[2] - begins[1]
    assert capfd.readouterr().err.count("run 3 of 5 waits: the directory is in use by process 7") == 1


@pytest.mark.parametrize(
    ("code", "out", "err", "kind", "line"),
    [
        (-11, "", "", "worker", "its process was ended by signal 11 (run the same command again to go on)"),
        (1, "", "x\nImportError: y\n", "worker", "its process left with exit code 1: ImportError: y (run the same"),
        (1, '{"error": {"kind": "bug", "message": "m", "field": null, "hint": "h"}}', "", "bug", "m"),
        (
            3,
            '{"error": {"kind": "input", "message": "m", "field": "--teacher", "hint": "h"}}',
            "",
            "input",
            "--teacher: m",
        ),
        (75, '{"error": {"kind": "stopped", "message": "m", "field": null, "hint": "h"}}', "", "stopped", "m (h)"),
        (0, "[]", "", "worker", "its process left with exit code 0"),
        (3, "3", "error: z", "worker", "its process left with exit code 3: error: z"),
    ],
)
def test_how_a_process_ended(code: int, out: str, err: str, kind: str, line: str) -> None:
    """The run's own error where it told one, else how its process ended, with its last words."""
    error = side_by_side.outcome(code, out, err).error
    assert error is not None
    assert (error.kind, error.line()[: len(line)]) == (kind, line)
    assert kind != "stopped" or error.code == 75


def test_what_several_runs_answer() -> None:
    """A few-shot command and one with a baseline tell of several runs, of which the last is the one asked for."""

    def told(document: dict[str, Any]) -> Outcome:
        return side_by_side.outcome(0, json.dumps(document), "")

    def run(top1: float) -> dict[str, Any]:
        return {"run": "r", "metrics": {"test": {"top1": top1, "n": 3}}, "best_on_test": {"top1": 9.0}}

    for document in (run(2), {"runs": [run(1), run(2)]}, {"ratios": [{"runs": [run(1), run(2)]}]}):
        assert told(document).done == {
            "status": "done",
            "run": "r",
            "top1": {"epoch": "last", "single": 2, "best_on_test": 9.0, "n": 3},
        }


# ----------------------------------------------------------------------------------------------------------------- stops


@contextlib.contextmanager
def signals(*numbers: int, after: str, pause: float = 0.0):
    """Send signals to this process once stand-ins have made the files `after`, with a pause between them."""

    def send() -> None:
        until = time.monotonic() + 20
        while len(list(Path("trace").glob(after))) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(pause)

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_passed_on_once(crew, number: int, code: int) -> None:
    """Twice at once, as `timeout` sends it, is one; those at work save, nothing new is begun."""
    before = signal.getsignal(number)
    with signals(number, number, after="student*.ready", pause=0.1), pytest.raises(Stopped) as stopped:
        crew({f"student{seed}": ["long"] for seed in (1, 2, 3, 4)}, 2, FOUR)
    assert stopped.value.code == code
    assert "saved what the runs at work had done" in stopped.value.line()
    assert "same command" in stopped.value.line()
    assert len(list(Path("trace").glob(f"student*.{number}.got"))) == 2
    assert len(list(Path("trace").glob("student*.begun"))) == 2
    assert signal.getsignal(number) is before


def test_a_second_signal_kills(crew, monkeypatch) -> None:
    """Runs that do not stop are ended, with the first signal's exit code."""
    monkeypatch.setattr(side_by_side, "_ONE_WISH", 0.1)
    begun = time.monotonic()
    with signals(signal.SIGTERM, signal.SIGINT, after="student*.ready", pause=0.3), pytest.raises(Stopped) as stopped:
        crew({f"student{seed}": ["stubborn"] for seed in (1, 2)}, 2, FOUR)
    assert stopped.value.code == 143
    assert time.monotonic() - begun < 15
    assert not list(Path("trace").glob("student*.ended"))


def test_a_run_that_somebody_stops_stops_the_sweep(crew) -> None:
    """As in one process: the others are asked to save, and the code is that of the run."""
    with pytest.raises(Stopped) as stopped:
        crew({"student1": ["stopped"], "student2": ["long"]}, 2, FOUR)
    assert stopped.value.code == 143
    assert [path.name for path in Path("trace").glob("*.got")] == ["student2.15.got"]
    assert len(list(Path("trace").glob("student*.begun"))) == 2


def test_a_failure_of_the_sweep_itself_leaves_no_process(crew, monkeypatch) -> None:
    """Whatever goes wrong in it, those at work are stopped."""

    def broken(crew: Any) -> bool:
        if len(list(Path("trace").glob("student*.ready"))) == 2:
            raise RuntimeError("broken")
        return False

    monkeypatch.setattr(side_by_side._Crew, "_stopping", broken)
    with pytest.raises(RuntimeError, match="broken"):
        crew({f"student{seed}": ["long"] for seed in (1, 2)}, 2, FOUR)
    assert len(list(Path("trace").glob("student*.15.got"))) == 2


def test_the_time_of_a_sweep_is_that_of_all_jobs(crew) -> None:
    """Each run is told what is left of `system.max_minutes` and stops by itself; nothing is begun once it is over."""
    with pytest.raises(Stopped) as stopped:
        crew({"student1": ["timed"], "student2": ["late"]}, 2, FOUR, "system.max_minutes=0.01")
    assert stopped.value.code == 75
    told = [json.loads(path.read_text())["minutes"] for path in Path("trace").glob("*.begun")]
    assert len(told) in (1, 3)  # on a slow machine the time is over with the teacher
    assert all(0 < float(minutes) <= 0.01 for minutes in told)
    assert not list(Path("trace").glob("*.got"))


# -------------------------------------------------------------------------------------------------------- real processes


def test_side_by_side_is_one_by_one(kd, tmp_path: Path) -> None:
    """Two methods, two seeds and a bug: the same document, the same bits; and once more, nothing is done again."""
    write(tmp_path / "buggy.py", BUGGY)
    sweep = TINY + "[sweep]\nmethods = ['../buggy.py', 'kd', {name='vsd', label='later', needs='soon'}]\n"
    write(tmp_path / "s.toml", sweep + "pairs = [['resnet14', 'resnet8']]\nseeds = [0, 1]\n")
    single, several = tmp_path / "single", tmp_path / "several"
    for folder in (single, several):
        folder.mkdir()
    words = ["sweep", "../s.toml", "--json"]
    process = spawn(*words, "--jobs", "2", cwd=several)
    os.chdir(single)
    one = kd(*words)
    two = finish(process)
    assert (one.code, two.code) == (3, 3), two.err
    assert two.json == one.json
    assert [run["status"] for run in two.json["runs"]].count("done") == 3
    runs = sorted(path.relative_to(single) for path in single.glob("runs/*/*"))
    assert runs == sorted(path.relative_to(several) for path in several.glob("runs/*/*"))
    done = [run for run in runs if (single / run / "summary.json").exists()]
    assert len(done) == 3
    for run in done:
        assert outcome(single / run) == outcome(several / run)
    begun = [line for line in two.err.splitlines() if ": kd " in line]
    assert "pretrain-teacher" in begun[0] or "pretrain-teacher" in begun[1]
    os.chdir(several)

    def kept() -> dict[Path, dict[str, bytes]]:
        return {run: {n: b for n, b in snapshot(several / run).items() if n != ".lock"} for run in done}

    before = kept()
    again = kd(*words[:2], "--jobs", "2", "--only", "method=kd")
    assert again.code == 0
    assert again.err.count("is finished already") == 3
    assert kept() == before


LONG = """student = "resnet8"
[data]
dataset = "digits"
image_size = 8
train_fraction = 0.1

[train]
epochs = 20
batch_size = 15

[system]
device = "cpu"
threads = 1
checkpoint_every = 5

[sweep]
methods = ["slow.py"]
seeds = [0, 1]
"""


def test_killed_or_stopped_the_same_command_goes_on(kd, tmp_path: Path) -> None:
    """`kill -9`: no run outlives the sweep. SIGTERM: they save. In the end, in one process, the uninterrupted bits."""
    write(tmp_path / "s.toml", LONG)
    write(tmp_path / "slow.py", SLOW)
    (tmp_path / "slow").touch()
    places = [tmp_path / run.directory for run in planned(tmp_path)]
    process = spawn("sweep", "s.toml", "--jobs", "2", cwd=tmp_path)
    for place in places:
        wait_for_step(process, place, 10)
    orphans = [int((place / ".lock").read_text()) for place in places]
    assert all(map(alive, orphans))
    process.kill()
    process.communicate()
    # At once, while the orphans may still be saving: their directories are waited for.
    process = spawn("sweep", "s.toml", "--jobs", "2", "--json", cwd=tmp_path)
    saved = max(map(steps_saved, places))
    for place in places:
        wait_for_step(process, place, saved + 20)
    assert not any(map(alive, orphans))
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    assert result.code == 143, result.err
    assert "terminated; saved what the runs at work had done" in result.error
    assert result.json["error"]["kind"] == "stopped"
    assert all(saved + 20 <= steps_saved(place) < 200 for place in places)
    (tmp_path / "slow").unlink()
    os.chdir(tmp_path)
    assert kd("sweep", "s.toml").err.count("going on at step") == 2
    assert kd("sweep", "s.toml", "--set", "system.runs_dir=whole", "--quiet").code == 0
    for place in places:
        assert outcome(place) == outcome(tmp_path / "whole" / place.relative_to(tmp_path / "runs"))


def planned(folder: Path) -> list[Planned]:
    """The runs of the sweep in a folder."""
    with contextlib.chdir(folder):
        return steps("s.toml")


def alive(pid: int) -> bool:
    """Whether a run's process is there, and no mere entry that nobody has collected."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("jobs", ["0", "-1", "x"])
def test_a_number_of_jobs_is_needed(kd, jobs: str) -> None:
    """Anything else is a usage error."""
    result = kd("sweep", "tables/vsd-2", "--jobs", jobs)
    assert result.code == 2
    assert "--jobs" in result.error
