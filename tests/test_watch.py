"""A run can be followed by its files alone: while it trains, when it has ended, and when nobody trains it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from harness import JOB, TINY, Died, environment, finish, outcome, spawn, wait_for_step

from kdcli import durable
from kdcli.engine import pulse
from kdcli.errors import InputError
from kdcli.runs import lock as runlock
from kdcli.runs import progress, watch

ALONE = ["distill", "--method", "none", "--student", "resnet8", *TINY]


def test_a_finished_run_is_told_and_left(kd, tmp_path):
    """One line an epoch and one for the end on stdout, exit 0; the same as a document."""
    assert kd(*ALONE, "--out", "run").code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    result = kd("watch", "run")
    assert result.code == 0
    told = result.out.splitlines()
    assert [line.split()[:2] for line in told[:3]] == [["epoch", "1"], ["epoch", "2"], ["epoch", "3"]]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert told[3] == f"finished: top-1 {summary['metrics']['test']['top1']:.2f} % of 360 test images at the last epoch"
    document = kd("watch", "run", "--json").json
    assert (document["finished"], document["epochs"], document["training"]) == (True, 3, None)
    assert document["summary"] == summary
    assert document["last"] == json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_run_under_way_is_followed_to_its_end(tmp_path):
    """From another process: every epoch once, in order, and exit 0 when the run has finished."""
    trainer = spawn(*ALONE, "--epochs", "30", "--checkpoint-every", "5", "--out", "run", cwd=tmp_path)
    wait_for_step(trainer, tmp_path / "run", 5)
    watcher = spawn("watch", "run", "--interval", "0.2", cwd=tmp_path)
    seen = finish(watcher)
    assert finish(trainer).code == 0
    assert seen.code == 0, seen.err
    *epochs, last = seen.out.splitlines()
    assert [int(line.split()[1]) for line in epochs] == list(range(1, 31))
    assert last.startswith("finished: top-1 ")


def test_a_run_that_nobody_trains(kd, die_at, tmp_path):
    """Exit 75 and the advice to run its command again; `--once` only says how far it is."""
    die_at(14)
    with pytest.raises(Died):
        kd(*ALONE, "--checkpoint-every", "3", "--out", "run")
    result = kd("watch", "run", "--interval", "0.1")
    assert result.code == 75
    assert "nobody is training it (run its command again)" in result.error
    assert result.out.startswith("epoch 1 ")
    once = kd("watch", "run", "--once", "--json")
    assert once.code == 0
    assert (once.json["finished"], once.json["training"], once.json["epochs"]) == (False, False, 1)
    with runlock.hold(tmp_path / "run"):
        assert kd("watch", "run", "--once", "--json").json["training"] is True


def test_silence_is_not_the_end_while_the_lock_is_held(kd, die_at, tmp_path):
    """A step may take minutes; the watcher gives up only when the lock is free, twice asked."""
    die_at(14)
    with pytest.raises(Died):
        kd(*ALONE, "--checkpoint-every", "3", "--out", "run")
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with runlock.hold(tmp_path / "run"):
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    watcher = spawn("watch", "run", "--interval", "0.1", cwd=tmp_path)
    time.sleep(3)
    still = watcher.poll() is None
    done.set()
    thread.join()
    assert still
    assert finish(watcher).code == 75


def test_once_says_where_it_is(kd, die_at, tmp_path):
    """Also within an epoch, and whether anybody trains it."""
    die_at(14)
    with pytest.raises(Died):
        kd(*ALONE, "--checkpoint-every", "3", "--out", "run")
    now = progress.Now(
        title="none student", phase="training", epoch=2, epochs=3, step=14, steps=30, terms={"ce": 1.25}, lr=0.05,
        images_per_second=812.4, eta_seconds=7, peak_mib=700.0, best=None,
    )  # fmt: skip
    durable.write_bytes(tmp_path / "run/state/progress.json", now.model_dump_json().encode())
    first, second = kd("watch", "run", "--once").out.splitlines()
    assert first.startswith("epoch 1 ")
    assert second.startswith("unfinished, and nobody is training it: run its command again  epoch 2/3  step 14/30")
    with runlock.hold(tmp_path / "run"):
        assert kd("watch", "run", "--once").out.splitlines()[1].startswith("training  epoch 2/3  step 14/30  ce 1.25")


def test_a_run_that_ends_between_two_reads_is_told_whole(kd, tmp_path, monkeypatch):
    """The last epoch is logged and the summary written after the watcher has read the log: no line is missing."""
    assert kd(*ALONE, "--out", "run").code == 0
    log, summary = ((tmp_path / "run" / name).read_bytes() for name in ("metrics.jsonl", "summary.json"))
    (tmp_path / "run/metrics.jsonl").write_bytes(b"".join(log.splitlines(keepends=True)[:2]))
    (tmp_path / "run/summary.json").unlink()

    def reading(path):
        found = progress.read_log(path)
        (tmp_path / "run/metrics.jsonl").write_bytes(log)
        (tmp_path / "run/summary.json").write_bytes(summary)
        return found

    monkeypatch.setattr(watch, "read_log", reading)
    told = kd("watch", "run", "--interval", "0.1").out.splitlines()
    assert [line.split()[:2] for line in told[:3]] == [["epoch", "1"], ["epoch", "2"], ["epoch", "3"]]
    assert told[3].startswith("finished: top-1 ")


def test_a_session_that_goes_on_tells_no_epoch_twice(tmp_path):
    """Its log goes back to the state that it began with; an empty one is that of another run."""
    lines = [{"epoch": epoch, "step": 10 * epoch} for epoch in (1, 2, 3)]
    told: list[str] = []

    def write(text: str) -> bool:
        told.append(text.split("  ")[0])
        return True

    shown = watch.Lines(write)
    for count in (1, 3, 2, 3):
        assert shown(watch.View(tmp_path, lines[:count])) is True
    assert told == ["epoch 1", "epoch 2", "epoch 3"]
    for count in (0, 1):
        shown(watch.View(tmp_path, lines[:count]))
    assert told[3:] == ["epoch 1"]


def test_a_reader_that_leaves_ends_it(kd, tmp_path):
    """`kd watch RUN | head -1` does not go on for nobody until the run ends."""
    assert kd(*ALONE, "--out", "run").code == 0
    (tmp_path / "run/summary.json").unlink()
    shown = watch.Lines(lambda text: False)
    with runlock.hold(tmp_path / "run"):
        document = watch.watch(tmp_path / "run", once=False, interval=0.1, show=shown)
    assert (document["finished"], document["training"]) == (False, True)


def test_nothing_to_watch(kd, tmp_path):
    """A directory without a run, or none at all: exit 3."""
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none"):
        result = kd("watch", name)
        assert result.code == 3
        assert "holds no run" in result.error


def test_watching_imports_no_torch(kd, tmp_path):
    """It starts at once, and on machines without a GPU or much memory."""
    assert kd(*ALONE, "--max-steps", "2", "--out", "run").code == 0
    program = (
        "import sys; from kdcli.__main__ import run; code = run(['watch', 'run']); print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 False"


# ----------------------------------------------------------------------------------------------- what is read, as it is


HOSTILE = [
    b"",
    b"{",
    b"[]\n{}\nnull\n",
    b'{"step": "x"}\n{"step": 3, "epoch": [], "train": 7, "test": {"single": 4}, "terms": {"\x1b[2J": "y"}, "lr": null}\n',
    b"\xff\xfe\x00\n" * 5,
    b"[" * 100000 + b"\n",
    b'{"step": 1, "epoch": 1, "test": {"single": {"top1": 12.5}}}\n{"step": 2, "ep',
    b'{"step": 1, "lr": NaN}\n{"step": 2, "lr": 1e999}\n{"step": 3, "lr": -Infinity}\n',
]


@pytest.mark.parametrize("content", HOSTILE)
def test_files_of_anyone(content, kd, tmp_path):
    """Torn, foreign and hostile files: what makes sense is shown, nothing else, and never a traceback or an escape."""
    (tmp_path / "run/state").mkdir(parents=True)
    (tmp_path / "run/spec.json").write_text("{}")
    (tmp_path / "run/metrics.jsonl").write_bytes(content)
    (tmp_path / "run/state/progress.json").write_bytes(content)
    result = kd("watch", "run", "--once")
    assert result.code == 0
    assert "\x1b" not in result.out
    assert "Traceback" not in result.err
    assert result.out.count("\n") == len(progress.read_log(tmp_path / "run/metrics.jsonl")) + 1
    assert kd("watch", "run", "--once", "--json").json["now"] is None


def test_a_pipe_in_a_files_place_does_not_hang(kd, tmp_path):
    """Nor does a damaged summary pass for an end."""
    (tmp_path / "run/state").mkdir(parents=True)
    (tmp_path / "run/spec.json").write_text("{}")
    os.mkfifo(tmp_path / "run/metrics.jsonl")
    os.mkfifo(tmp_path / "run/state/progress.json")
    assert kd("watch", "run", "--once").code == 0
    (tmp_path / "run/summary.json").write_text("{}")
    assert kd("watch", "run").code == 3


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [
        ([], 10, ""),
        ([5.0], 10, "▁"),
        ([0.0, 50.0, 100.0], 10, "▁▅█"),
        ([3.0, 3.0], 10, "▁▁"),
        ([float(i) for i in range(80)], 8, "▁▂▃▄▅▆▇█"),
    ],
)
def test_sparkline(values, width, drawn):
    """From smallest to largest, at most as wide as asked, neighbours averaged."""
    assert watch.sparkline(values, width) == drawn


def test_the_live_view(tmp_path, capsys):
    """All there is to say, drawn without a terminal too; hostile titles stay on their line."""
    from kdcli.runs.watch import Live, View

    lines = [{"step": i, "epoch": i, "test": {"single": {"top1": 10.0 * i}}, "train": {"loss": 1.5}} for i in (1, 2, 3)]
    now = progress.Now(
        title="kd\x1b[2J student", phase="training", epoch=4, epochs=9, step=31, steps=90, terms={"ce": 1.25, "kd": 0.5},
        lr=0.05, images_per_second=812.4, eta_seconds=3700, peak_mib=700.0, best=None,
    )  # fmt: skip
    live = Live()
    live(View(tmp_path, lines, now))
    live.close()
    shown = capsys.readouterr().out
    for text in (
        "kd\\x1b[2J student",
        "epoch 4/9",
        "step 31/90",
        "ce 1.25",
        "kd 0.5",
        "lr 0.05",
        "812 img/s",
        "1:01:40 left",
    ):
        assert text in shown, text
    assert "▁▅█  30.00" in shown
    assert "best 30.00 in epoch 3" in shown


# ---------------------------------------------------------------------------------------------- what a training writes


def test_a_training_says_where_it_is(kd, monkeypatch, tmp_path):
    """Every few seconds, in the state folder: it is whole whenever it is read, and gone with the folder at the end."""
    seen: list[progress.Now] = []
    write = durable.write_bytes

    def noting(path, data, **more):
        write(path, data, **more)
        if Path(path).name == progress.FILE:
            found = progress.read_now(Path(path))
            assert found is not None
            seen.append(found)

    monkeypatch.setattr(pulse, "_EVERY", 0.0)
    monkeypatch.setattr(pulse, "_REREAD", 0.0)
    monkeypatch.setattr(durable, "write_bytes", noting)
    assert kd(*ALONE, "--out", "run").code == 0
    steps = [now for now in seen if now.phase == "training"]
    assert [now.step for now in steps] == list(range(1, 31))
    assert [now.epoch for now in steps] == [1] * 10 + [2] * 10 + [3] * 10
    assert all((now.steps, now.epochs) == (30, 3) for now in seen)
    assert steps[-1].eta_seconds == 0
    assert all(now.images_per_second > 0 and now.peak_mib > 0 for now in steps)
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps[9].terms == pytest.approx(log[0]["terms"], abs=1e-5)
    assert steps[19].lr == pytest.approx(log[1]["lr"])
    assert steps[-1].best is not None
    assert steps[-1].best.top1 == max(line["test"]["single"]["top1"] for line in log[:2])
    assert any(now.phase.startswith("evaluating 1/2") for now in seen)
    assert not (tmp_path / "run/state").exists()


def test_what_it_writes_changes_no_bit_and_can_fail(kd, monkeypatch, tmp_path):
    """Full disk, no permission: the training does not mind, and its result is the same with and without."""
    assert kd(*ALONE, "--out", "silent").code == 0
    monkeypatch.setattr(pulse, "_EVERY", 0.0)
    assert kd(*ALONE, "--out", "telling").code == 0
    write = durable.write_bytes

    def failing(path, data, **more):
        if Path(path).name == progress.FILE:
            raise durable.write_error(path, OSError(28, "No space left on device"))
        write(path, data, **more)

    monkeypatch.setattr(durable, "write_bytes", failing)
    assert kd(*ALONE, "--out", "failing").code == 0
    assert outcome(tmp_path / "silent") == outcome(tmp_path / "telling") == outcome(tmp_path / "failing")


def test_the_terminal_shows_it_too(tmp_path):
    """On a terminal: epoch, step, losses by term, learning rate, speed, time left, memory."""
    import pty

    leader, follower = pty.openpty()
    words = ["distill", "--method", "none", "--student", "resnet8", *JOB, "--threads", "1", "--out", "run"]
    env = {**environment(), "COLUMNS": "200", "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-m", "kdcli", *words], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=follower
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # what a pseudo-terminal says when the other end is closed
            break
        if not part:
            break
        shown += part
    assert process.wait(60) == 0
    os.close(leader)
    text = shown.decode()
    for word in ("none student resnet8", "/30", "ce ", "lr 0.05", "img/s", " left", " MiB"):
        assert word in text, word


def test_asking_whether_somebody_works_there(tmp_path):
    """By the lock, without keeping it: None where it cannot be known."""
    assert runlock.is_held(tmp_path) is False
    with runlock.hold(tmp_path):
        assert runlock.is_held(tmp_path) is True
    assert runlock.is_held(tmp_path) is False
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").symlink_to("elsewhere")
    assert runlock.is_held(tmp_path) is None
    with pytest.raises(InputError):
        watch.look(tmp_path)
