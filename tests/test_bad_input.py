"""What is wrong gets its exit code and one line that names it and the fix, and nothing that existed is damaged."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
from pathlib import Path

import pytest
from harness import PER_EPOCH, TINY, Died, finish, outcome, snapshot, spawn, steps_saved

from kdcli import checkpoint

ALONE = ["distill", "--method", "none", "--student", "resnet8", *TINY]
KD = ["distill", "--method", "kd", "--teacher", "resnet14", "--student", "resnet8", *TINY]
CACHED = ["linear-probe", "teacher", "--dataset", "digits", "--cached", "--epochs", "1", "--device", "cpu"]
SMALL = ["distill", "--method", "none", "--student", "mobilenetv2", *TINY]  # its last map is a single pixel

USAGE = {
    "unknown method": ([*KD, "--method", "vds"], ["method", "did you mean vsd"]),
    "unknown student": ([*ALONE, "--student", "resnet9"], ["student", "did you mean resnet"]),
    "unknown teacher": ([*KD, "--teacher", "wrn41_2"], ["teacher", "did you mean wrn40_2"]),
    "unknown preset": (["distill", "--preset", "quikstart"], ["--preset", "did you mean quickstart"]),
    "missing preset file": (["distill", "--preset", "none/such.toml"], ["--preset", "none/such.toml"]),
    "unknown key": ([*ALONE, "--set", "train.epohcs=3"], ["train.epohcs", "did you mean epochs"]),
    "key elsewhere": ([*ALONE, "--set", "epochs=3"], ["epochs", "it is train.epochs"]),
    "unknown method key": ([*KD, "--set", "method.temprature=3"], ["method.temprature", "did you mean temperature"]),
    "a temperature that rounds away": ([*KD, "--set", "method.temperature=1e5"], ["method.temperature", "1000"]),
    "bad method value": ([*KD, "--set", "method.temperature=-1"], ["method.temperature", "greater than 0"]),
    "set without value": ([*ALONE, "--set", "train.epochs"], ["--set", "KEY=VALUE"]),
    "bad value": ([*ALONE, "--set", "train.epochs=many"], ["train.epochs", "many"]),
    "not a number": ([*ALONE, "--epochs", "many"], ["--epochs", "integer"]),
    "infinite": ([*ALONE, "--set", "train.lr=Infinity"], ["train.lr", "finite"]),
    "unknown flag": ([*ALONE, "--epohcs", "3"], ["--epohcs", "--epochs"]),
    "unknown command": (["distil"], ["distil", "distill"]),
    "unknown data set": ([*ALONE, "--dataset", "cifar101"], ["dataset", "did you mean cifar10"]),
    "no student": (["distill", "--method", "none", "--dataset", "digits"], ["--student", "name"]),
    "no teacher": (["distill", "--method", "kd", "--student", "resnet8"], ["--teacher", "needs a teacher"]),
    "a teacher too many": ([*KD, "--method", "none"], ["--teacher", "takes no teacher"]),
    "a pickle as teacher": ([*KD, "--teacher", "x.pth"], ["--teacher", "kd import x.pth"]),
    "seeds": ([*ALONE, "--seeds", "4..0"], ["--seeds", "0..4"]),
    "several seeds in one directory": ([*ALONE, "--seeds", "0..1", "--out", "run"], ["--out", "--runs-dir"]),
    "seed too large": ([*ALONE, "--seeds", "3000000000"], ["--seeds", "3000000000", "2147483647"]),
    "range of seeds too large": ([*ALONE, "--seeds", "2147483647..2147483648"], ["--seeds", "2147483648 is no seed"]),
    "a seed twice": ([*ALONE, "--seeds", "0,0,1"], ["--seeds", "twice"]),
    "data sets in one directory": (
        ["linear-probe", "teacher", "--dataset", "digits", "--dataset", "synthetic", "--out", "two"],
        ["--out", "several data sets", "--runs-dir"],
    ),
    "averaged weights, cached": ([*CACHED, "--ema", "0.9"], ["--ema", "cached", "--no-cached"]),
    "clipping, cached": ([*CACHED, "--clip-grad", "1"], ["--clip-grad", "cached"]),
    "parts, cached": ([*CACHED, "--accumulate", "2"], ["--accumulate", "cached"]),
    "augmentation, cached": ([*CACHED, "--rand-augment", "rand-m9"], ["--rand-augment", "cached", "--no-cached"]),
    "mixing, cached": ([*CACHED, "--mixup", "0.2", "--dry-run"], ["--mixup", "cached", "--no-cached"]),
    "following, cached": ([*CACHED, "--tensorboard"], ["--tensorboard", "cached"]),
    "assistants of a teacher": (
        ["pretrain-teacher", "--teacher", "resnet8", "--assistant", "resnet8"],
        ["--assistant"],
    ),
    "assistants of a probe": ([*CACHED, "--assistant", "resnet8"], ["--assistant"]),
    "adapted BatchNorm, cached": ([*CACHED, "--batchnorm", "train"], ["--batchnorm", "cached"]),
    "parts of one pixel": (
        [*SMALL, "--batch-size", "8", "--accumulate", "8"],
        ["--accumulate", "parts of one image", "BatchNorm"],
    ),
    "ratio, previewed": (["fewshot", *ALONE[1:], "--ratio", "1.5", "--dry-run"], ["--ratio", "between 0 and 1"]),
    "ratio": (["fewshot", *ALONE[1:], "--ratio", "1.5"], ["--ratio", "between 0 and 1"]),
    "batch of one": ([*ALONE, "--batch-size", "1"], ["--batch-size", "BatchNorm"]),
    "device": ([*ALONE, "--device", "gpu"], ["--device", "cuda"]),
    "device without its colon": ([*ALONE, "--device", "cuda1"], ["--device", "'cuda1' is no device"]),
    "device that is no number": ([*ALONE, "--device", "cuda:x"], ["--device", "'cuda:x' is no device"]),
    "device below zero": (["evaluate", "teacher", "--device", "cuda:-1"], ["--device", "'cuda:-1' is no device"]),
    "one GPU for two ranks": ([*ALONE, "--device", "cuda:1", "--nproc", "2"], ["--device", "2 ranks"]),
    "list": (["list", "metods"], ["did you mean methods"]),
    "inference": (["evaluate", "teacher", "--inference", "marginals"], ["--inference", "did you mean marginal"]),
    "model to inspect": (["inspect", "resnet31"], ["resnet31", "did you mean resnet"]),
    "method file": ([*ALONE, "--method", "mine.py"], ["method", "mine.py"]),
}

INPUT = {
    "missing data folder": ([*ALONE, "--dataset", "cifar10", "--data-dir", "nowhere"], ["nowhere", "--data-dir"]),
    "missing image folder": ([*ALONE, "--dataset", "folder:nowhere"], ["nowhere"]),
    "truncated train.bin": ([*ALONE, "--dataset", "cifar100", "--data-dir", "cut"], ["train.bin"]),
    "missing teacher": ([*KD, "--teacher", "gone.safetensors"], ["--teacher", "gone.safetensors"]),
    "missing checkpoint": (["evaluate", "gone.safetensors"], ["gone.safetensors"]),
    "a directory without a network": ([*KD, "--teacher", "empty"], ["empty", "student.safetensors"]),
    "a resume state as teacher": ([*KD, "--teacher", "step-000000000.safetensors"], ["is a state, not a network"]),
    "text as checkpoint": (["evaluate", "text.safetensors"], ["text.safetensors"]),
    "no trained teacher": ([*KD, "--no-auto-teacher"], ["--teacher", "kd pretrain-teacher"]),
    "flipped byte, teacher": ([*KD, "--teacher", "flipped.safetensors"], ["flipped.safetensors", "changed"]),
    "flipped byte, evaluated": (["evaluate", "flipped.safetensors"], ["flipped.safetensors", "changed"]),
    "flipped byte, verified": (["verify", "flipped.safetensors"], ["flipped.safetensors", "changed"]),
    "flipped byte, probed": (["linear-probe", "flipped.safetensors", "--dataset", "digits"], ["changed"]),
    "method file that fails": ([*ALONE, "--method", "broken.py"], ["broken.py", "ZeroDivisionError"]),
}

INCOMPATIBLE = {
    "fewer classes": ([*KD, "--teacher", "teacher", "--dataset", "synthetic:7"], ["10 classes", "7"]),
    "other names": ([*KD, "--teacher", "teacher", "--dataset", "synthetic"], ["10 of its classes", "'0'"]),
    "evaluated elsewhere": (["evaluate", "teacher", "--dataset", "synthetic"], ["10 of its classes"]),
    "no joint head": ([*KD, "--teacher", "teacher", "--method", "vsd"], ["--teacher", "kd pretrain-teacher"]),
    "directory of something else": ([*ALONE, "--out", "empty-but-log"], ["--out", "spec.json"]),
}

NOT_FINITE = {
    "NaN in the teacher": ([*KD, "--teacher", "nan.safetensors"], ["nan.safetensors", "fc.weight"]),
    "NaN evaluated": (["evaluate", "nan.safetensors"], ["nan.safetensors", "fc.weight"]),
    "a learning rate too high": ([*ALONE, "--lr", "1e30"], ["not finite at step", "--lr"]),
}

CASES = [
    pytest.param(code, words, parts, id=name)
    for code, group in ((2, USAGE), (3, INPUT), (4, INCOMPATIBLE), (6, NOT_FINITE))
    for name, (words, parts) in group.items()
]


@pytest.fixture
def belongings(tmp_path: Path, teachers: Path) -> Path:
    """Things that existed before: teachers sound and unsound, data, a directory of the user's."""
    good = (teachers / "kd/teacher.safetensors").read_bytes()
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/teacher.safetensors").write_bytes(good)
    flipped = bytearray(good)
    flipped[-1000] ^= 4
    (tmp_path / "flipped.safetensors").write_bytes(flipped)
    tensors, metadata = checkpoint.load(teachers / "kd/teacher.safetensors")
    checkpoint.save(tmp_path / "step-000000000.safetensors", tensors, {**metadata, "role": "state"})
    tensors["fc.weight"][3, 5] = float("nan")
    checkpoint.save(tmp_path / "nan.safetensors", tensors, metadata)
    (tmp_path / "text.safetensors").write_text("These are not the weights you are looking for.\n" * 9)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    for name, file in (
        ("empty", "notes.txt"),
        ("empty-but-log", "metrics.jsonl"),
        ("cut/cifar-100-binary", "train.bin"),
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / file).write_bytes(b"mine")
    for file in ("test.bin", "fine_label_names.txt", "coarse_label_names.txt"):
        (tmp_path / "cut/cifar-100-binary" / file).write_bytes(b"also mine")
    return tmp_path


@pytest.mark.parametrize(("code", "words", "parts"), CASES)
def test_one_line_the_right_code_and_nothing_damaged(code, words, parts, kd, belongings):
    """Exit code, exactly one `error:` line that names the culprit and the fix, and every file as it was."""
    before = snapshot(belongings)
    result = kd(*words)
    assert result.code == code, result.err
    for part in parts:
        assert part in result.error
    after = snapshot(belongings)
    assert {name: after.get(name) for name in before} == before
    left = {name for name in after if name not in before and not name.endswith(".lock")}
    assert code == 6 or not left, left
    if words[0] != "verify":
        assert result.out == ""


@pytest.mark.parametrize("code", [2, 3, 4, 6])
def test_json_failure_document(code, kd, belongings):
    """With --json a failure is one JSON document too, and the error line is still on stderr."""
    words = {2: [*ALONE, "--epochs", "x"], 3: INPUT["flipped byte, teacher"][0], 4: INCOMPATIBLE["other names"][0]}
    result = kd(*words.get(code, NOT_FINITE["NaN in the teacher"][0]), "--json")
    assert result.code == code
    assert result.json["ok"] is False
    assert result.json["command"] == "distill"
    assert set(result.json["error"]) == {"kind", "field", "message", "hint"}
    assert result.json["error"]["message"] in result.error


def test_json_of_a_bad_flag(kd):
    """Also where the command line could not be parsed at all."""
    result = kd("distill", "--nonsense", "--json")
    assert result.code == 2
    assert result.json["error"]["kind"] == "usage"
    assert "--nonsense" in result.error


@pytest.mark.parametrize("text", ["train = 3", "[train]\nepochs = ", '{"train": ', "[train]\nepohcs = 3"])
def test_bad_presets_from_a_file_and_from_stdin(text, kd, tmp_path, monkeypatch):
    """A preset that is no TOML, no JSON, or says nonsense: exit 2, named."""
    (tmp_path / "bad.toml").write_text(text)
    assert kd(*ALONE, "--preset", "bad.toml").code == 2
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    result = kd(*ALONE, "--preset", "-")
    assert result.code == 2
    assert "train" in result.error or "stdin" in result.error


def test_every_flipped_byte_region_of_a_teacher_is_noticed(kd, belongings):
    """Header, metadata, first, middle and last weights: exit 3 wherever the byte lies."""
    good = (belongings / "teacher/teacher.safetensors").read_bytes()
    for at in (0, 9, 200, 2000, len(good) // 3, len(good) // 2, len(good) - 1):
        bad = bytearray(good)
        bad[at] ^= 1
        (belongings / "bad.safetensors").write_bytes(bad)
        result = kd("evaluate", "bad.safetensors", "--dataset", "digits")
        assert result.code == 3, at
        assert "bad.safetensors" in result.error


def test_not_finite_leaves_the_last_good_state(kd, tmp_path):
    """Exit 6 names term, step and state; the update was not applied, and the saved states are sound."""
    result = kd(*ALONE, "--lr", "1e30", "--checkpoint-every", "1", "--out", "run")
    assert result.code == 6
    assert str(Path("run/state")) in result.error
    assert steps_saved(tmp_path / "run") >= 0
    assert kd("verify", "run").code == 0


@pytest.mark.parametrize(
    "words", [["--teacher", "nan.safetensors"], ["--epochs", "x"], ["--dataset", "folder:nowhere"]]
)
def test_overwrite_with_bad_input_keeps_the_old_run(words, kd, belongings):
    """`--overwrite` gives up the old run only for a new one that begins, not for a mistake."""
    assert kd(*KD, "--teacher", "teacher", "--max-steps", "2", "--out", "run").code == 0
    before = snapshot(belongings / "run")
    assert kd(*KD, "--teacher", "teacher", "--out", "run", "--overwrite", *words).code in (2, 3, 6)
    after = snapshot(belongings / "run")
    assert {**after, ".lock": before[".lock"]} == before


# ------------------------------------------------------------------------------------------------------- cannot write


def fill_disk(monkeypatch, at: int, larger_than: int, named: str = "") -> None:
    """From training step `at` on the disk takes no file of more than `larger_than` bytes, as a full one does."""
    from kdcli.engine import fit

    original, write, full = fit.Training.step, os.write, []

    def step(self, epoch, batch):
        original(self, epoch, batch)
        if self.at >= at:
            full.append(True)

    def refuse(fd, data):
        if full and len(data) > larger_than and named in os.readlink(f"/proc/self/fd/{fd}"):
            if len(data) > 10:
                write(fd, bytes(data[: len(data) // 2]))  # a full disk takes what fits
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data)

    monkeypatch.setattr(fit.Training, "step", step)
    monkeypatch.setattr(os, "write", refuse)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to see which file is written")
@pytest.mark.parametrize(
    ("at", "named"),
    [
        pytest.param(PER_EPOCH + 4, "state/", id="a resume state in mid-epoch"),
        pytest.param(PER_EPOCH, "metrics.jsonl", id="the log of the epochs"),
        pytest.param(3 * PER_EPOCH, "student.safetensors", id="the finished network"),
        pytest.param(3 * PER_EPOCH, "summary.json", id="the summary"),
    ],
)
def test_full_disk_in_mid_run(at, named, kd, tmp_path, monkeypatch):
    """Exit 5, the previous state is intact, no half file is left; with space again the run ends in the same bits."""
    assert kd(*ALONE, "--out", "whole").code == 0
    words = [*ALONE, "--out", "run", "--checkpoint-every", "4"]
    with monkeypatch.context() as patch:
        fill_disk(patch, at, 0, named)
        result = kd(*words, "--json")
    assert result.code == 5
    assert "No space left on device" in result.error
    assert result.json["error"]["kind"] == "write"
    assert kd("verify", "run").code == 0
    assert steps_saved(tmp_path / "run") == (at - 1) // 4 * 4
    assert not [name for name in snapshot(tmp_path / "run") if name.endswith(".tmp")]
    assert kd(*words).code == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_file_size_limit_from_the_start(kd, tmp_path):
    """A real process that may write next to nothing leaves with 5 before it has trained a step."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    result = finish(spawn(*ALONE, "--out", "run", cwd=tmp_path, preexec_fn=limit))
    assert result.code == 5
    assert "File too large" in result.error
    assert "Traceback" not in result.err
    assert steps_saved(tmp_path / "run") == -1
    assert kd(*ALONE, "--out", "run").code == 0
    assert kd(*ALONE, "--out", "whole").code == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_places_that_cannot_be_written(kd, tmp_path):
    """A file where the run directory should be, a link where its state should be: exit 5, both untouched."""
    (tmp_path / "file").write_text("mine")
    assert kd(*ALONE, "--out", "file").code == 5
    assert kd(*ALONE, "--out", "file/below").code == 5
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/spec.json").symlink_to(tmp_path / "file")
    assert kd(*ALONE, "--out", "run").code in (3, 5)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_planted_link_as_state_folder_is_not_followed(kd, die_at, tmp_path):
    """A state folder that is a symbolic link is refused, and nothing is written at its other end."""
    die_at(3)
    with pytest.raises(Died):
        kd(*ALONE, "--out", "run")
    for path in (tmp_path / "run/state").iterdir():
        path.unlink()
    (tmp_path / "run/state").rmdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run/state").symlink_to(tmp_path / "elsewhere")
    die_at(-1)
    result = kd(*ALONE, "--out", "run")
    assert result.code == 5
    assert "symbolic link" in result.error
    assert not list((tmp_path / "elsewhere").iterdir())


def test_control_characters_do_not_reach_the_terminal(kd):
    """A name with an escape code is shown harmlessly, in the one line."""
    result = kd(*KD, "--teacher", "red\x1b[31m\nerror: fake.safetensors")
    assert result.code in (2, 3)
    assert "\x1b" not in result.err
    assert len(result.errors) == 1


def test_a_damaged_spec_or_summary_is_told(kd, tmp_path):
    """Damaged files of a run directory are named, and not overwritten."""
    assert kd(*ALONE, "--max-steps", "2", "--out", "run").code == 0
    for name in ("spec.json", "summary.json"):
        good = (tmp_path / "run" / name).read_bytes()
        (tmp_path / "run" / name).write_bytes(good[: len(good) // 2])
        before = snapshot(tmp_path / "run")
        result = kd(*ALONE, "--max-steps", "2", "--out", "run")
        assert result.code == 3
        assert name in result.error
        assert snapshot(tmp_path / "run") == before
        (tmp_path / "run" / name).write_bytes(good)
    assert json.loads((tmp_path / "run/summary.json").read_text())["ok"] is True
