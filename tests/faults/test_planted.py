"""R15: links, FIFOs and directories planted under the names that kd writes: no victim changes, and nothing hangs."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from fuzzing import complaints, stock, told, trial
from fuzzing import fresh as emptied
from outcomes import Reference, differences
from test_fuzz_imports import forked_reader
from test_kills import Fresh, Whole
from warmed import Trial, Warm

from kdcli.models import build

KINDS = ("symlink", "dangling", "fifo", "hardlink", "directory")
# A state of step 6 is the next to be written in the run prepared below, student and summary the last.
NAMES = (".lock", "env.json", "metrics.jsonl", "state", "state/step-000000006.safetensors")
NAMES += ("student.safetensors", "summary.json", "MODEL_CARD.md", "spec.json", ".replaced")
WATCHED = "state/progress.json"
NAMES += (WATCHED,)


def plant(kind: str, path: Path, victim: Path) -> None:
    """Put something of `kind` in the place of `path`; `victim` is a file, `victim.d` a directory."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    goal = victim.with_suffix(".d") if path.name in ("state", ".replaced") else victim
    if kind == "symlink":
        path.symlink_to(goal)
    elif kind == "dangling":
        path.symlink_to(victim.with_name("nowhere"))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "hardlink":
        os.link(victim, path)
    else:
        path.mkdir()
        (path / "theirs").write_text("theirs")


def planted(
    warm: Warm, wanted: Reference, folder: Path, name: str, kind: str, *variants: str
) -> tuple[Trial, list[str]]:
    """Kill a run after the state of step 4, plant, and start it again; how that ended, and which victims changed."""
    words = [*wanted.words, "--out", "run"]
    assert warm.trial(words, folder, moment=[5, "step"], blow="kill").code == -signal.SIGKILL
    victim = folder / "victim"
    victim.write_bytes(b"{}\n")
    victim.with_suffix(".d").mkdir()
    (victim.with_suffix(".d") / "step-000000099.safetensors").write_bytes(b"theirs")
    plant(kind, folder / "run" / name, victim)
    trial = warm.trial(words, folder, limit=60, states=True, variants=list(variants))
    found = ["it hung"] if trial.hung else []
    if victim.read_bytes() != b"{}\n" or (folder / "nowhere").exists():
        found.append("the victim changed")
    if sorted(os.listdir(victim.with_suffix(".d"))) != ["step-000000099.safetensors"]:
        found.append("the victim's directory changed")
    if kind == "directory" and name != WATCHED and (folder / "run" / name / "theirs").read_text() != "theirs":
        found.append("what was in the directory changed")
    return trial, found


def expected(name: str, kind: str) -> set[int]:
    """The exit codes that are right: 5 where it would have to write there, 3 where it would have to read there."""
    replaced = ("state/step-000000006.safetensors", "student.safetensors", "MODEL_CARD.md")
    if kind == "hardlink" and name in replaced:  # the name gets a new file; the victim's other names keep the old one
        return {0}
    if name == WATCHED:  # a courtesy, which is left out; it goes with the states in the end
        return {0}
    if name == "spec.json":  # a link that leads nowhere: what else is there belongs to nobody
        return {4} if kind == "dangling" else {3}
    if name == "summary.json":
        return {5} if kind == "dangling" else {3}
    if name == "env.json":  # read where it is there; written where it is not
        return {5} if kind == "dangling" else {0, 3, 5}
    return {5}


@pytest.mark.parametrize("kind", ["symlink", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[1:])])
def test_planted_names(kind: str, warm: Warm, whole: Whole, fresh: Fresh) -> None:
    wanted, codes = whole("kd"), {}
    for name in NAMES:
        if kind == "directory" and name in ("state", ".replaced"):
            continue  # that is what they are
        folder = fresh()
        trial, found = planted(warm, wanted, folder, name, kind)
        assert found == [], f"{kind} at {name}"
        assert trial.code in expected(name, kind), f"{kind} at {name}: {trial.code} {trial.err[-300:]}"
        codes[name] = trial.code
        if trial.code:
            assert "run" in trial.error, f"{kind} at {name}"
            assert trial.seconds < 60
        else:
            assert differences(wanted, folder / "run", [trial]) == []
    print(f"R15: {kind}: {codes}")


@pytest.mark.parametrize("kind", ["fifo", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "fifo")])
def test_planted_before_the_first_start(kind: str, warm: Warm, whole: Whole, fresh: Fresh) -> None:
    """In a directory without a run: refused, whatever it is, or written beside it; the victim is as it was."""
    wanted = whole("kd")
    for name in NAMES:
        if "/" in name or (kind == "directory" and name == ".replaced"):
            continue
        folder = fresh()
        (folder / "run").mkdir()
        victim = folder / "victim"
        victim.write_bytes(b"theirs")
        victim.with_suffix(".d").mkdir()
        plant(kind, folder / "run" / name, victim)
        trial = warm.trial([*wanted.words, "--out", "run"], folder, limit=60)
        assert not trial.hung
        assert trial.code in {3, 4, 5}, f"{kind} at {name}: {trial.err[-300:]}"
        assert victim.read_bytes() == b"theirs"
        assert not (folder / "nowhere").exists()
        assert os.listdir(victim.with_suffix(".d")) == []


OUTPUTS = ("out/exported.safetensors", "out/imported.safetensors", "out/report.html", "out/table.md")
OUTPUTS += ("out/teacher.safetensors",)


def outputs(folder: Path) -> dict[str, tuple[list[object], set[int]]]:
    """Files that other commands write, the command of each, and the exit codes that are right."""
    made, cpu = stock(), ["--device", "cpu", "--threads", "1"]
    torch.save({"model": build("resnet8", 5).state_dict()}, folder / "x.pth")
    teaching = ["pretrain-teacher", "--teacher", "resnet8", "--dataset", "synthetic", "--image-size", "8", *cpu]
    return {
        "out/exported.safetensors": (["export", made.student, "--random-images", "--images", "4"], {5}),
        "out/imported.safetensors": (["import", "x.pth", "--arch", "resnet8"], {5}),
        "out/report.html": (["report", made.whole["kd"], "--fast"], {5}),
        "out/table.md": (["report", made.whole["kd"], "--fast"], {5}),
        # A folder with a teacher in it and no spec is somebody's, and no run.
        "out/teacher.safetensors": ([*teaching, "--batch-size", "20", "--max-steps", "1"], {4, 5}),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_planted_at_an_output(kind: str, tmp_path: Path) -> None:
    """Checkpoints brought in and exported, reports and teachers: the same holds for their names."""
    codes: dict[str, int | None] = {}
    for name in OUTPUTS:
        folder = emptied(tmp_path / "trial")
        words, right = outputs(folder)[name]
        (folder / "out").mkdir()
        victim = folder / "victim"
        victim.write_bytes(b"theirs")
        plant(kind, folder / name, victim)
        whole_folder = words[0] in ("report", "pretrain-teacher")
        words += ["--out", "out" if whole_folder else name]
        found = trial(words, folder, before=forked_reader, writable=["out"])
        replaced = kind == "hardlink" and words[0] != "pretrain-teacher"  # the name gets a new file
        wrong = complaints(found, {0} if replaced else right)
        if victim.read_bytes() != b"theirs" or (folder / "nowhere").exists():
            wrong.append("the victim changed")
        if kind == "directory" and (folder / name / "theirs").read_text() != "theirs":
            wrong.append("what was in the directory changed")
        assert not wrong, f"{kind} at {name}: {told(found, wrong)}"
        codes[name] = found.code
    print(f"R15: {kind}: {codes}")
