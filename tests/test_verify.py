"""`kd verify` and `kd digest`: every kind of file, sound and not; many of them; names and places that are traps."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from harness import ROOT, TINY, command, environment, snapshot

from kdcli import checkpoint, presets
from kdcli.checkpoint import layout
from kdcli.verify.finite import finite

ALONE = ["distill", "--method", "none", "--student", "resnet8", *TINY]
META = {
    "role": "student",
    "spec_digest": "0" * 64,
    "arch": {"name": "resnet8", "outputs": 2, "image_size": 32},
    "classes": ["cat", "dog"],
    "image_size": 32,
    "normalization": None,
    "dataset": None,
    # of a state
    "facts": {},
    "threads": 1,
    "lines": 0,
    "best": None,
    "seconds": 0.0,
}


def make(path: Path, metadata: dict | None = None, **tensors: torch.Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, tensors or {"w": torch.ones(3)}, {**META, **(metadata or {})})
    return path


def newer(path: Path) -> Path:
    """A checkpoint of a later format, sealed as that kd would."""
    content = make(path).read_bytes()
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    metadata = json.loads(table.pop("__metadata__")["kd"])
    path.write_bytes(layout.sealed_header({**metadata, "format": 2}, table) + content[8 + length :])
    return path


def flip(path: Path, at: int = -1) -> Path:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)
    return path


@pytest.fixture
def stdin(monkeypatch):
    """Put bytes on stdin."""

    def put(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return put


@pytest.fixture(scope="module")
def run_made(tmp_path_factory) -> tuple[Path, Path]:
    """A finished run, and one that was stopped after a state."""
    from kdcli.__main__ import run

    folder = tmp_path_factory.mktemp("runs")
    assert run([*ALONE, "--quiet", "--max-steps", "4", "--out", str(folder / "finished")]) == 0
    words = ["--max-minutes", "0.000001", "--checkpoint-every", "1"]
    assert run([*ALONE, "--quiet", *words, "--out", str(folder / "stopped")]) == 75
    return folder / "finished", folder / "stopped"


@pytest.fixture
def runs(run_made, tmp_path) -> Path:
    """Copies of the two runs, in `runs/` of the working directory."""
    for directory in run_made:
        shutil.copytree(directory, tmp_path / "runs" / directory.name)
    return tmp_path / "runs"


# ------------------------------------------------------------------------------------------------- what a run leaves


def test_every_file_of_a_run_is_checked(kd, runs):
    """Network, states, spec, environment, log, summary; each named once, and nothing is written.

    The model card is prose for people: there is nothing in it to check.
    """
    before = snapshot(runs)
    result = kd("verify", "runs", "--json")
    assert result.code == 0, result.err
    found = {file["path"]: file["kind"] for file in result.json["files"]}
    kinds = {"spec.json": "spec", "env.json": "environment", "metrics.jsonl": "log", "summary.json": "summary"}
    for path in runs.rglob("*"):
        if path.is_file() and not path.name.startswith(".") and path.name != "MODEL_CARD.md":
            shown = str(path.relative_to(runs.parent))
            assert found.pop(shown) == kinds.get(path.name, "checkpoint"), shown
    assert found == {}
    roles = {file["role"] for file in result.json["files"] if file["kind"] == "checkpoint"}
    assert roles == {"student", "state"}
    assert snapshot(runs) == before


@pytest.mark.parametrize("name", ["student.safetensors", "spec.json", "env.json", "summary.json", "metrics.jsonl"])
def test_every_truncation_of_a_finished_runs_files_is_noticed(name, kd, runs):
    """At a few places in each; only what is cut is reported."""
    path = runs / "finished" / name
    whole = path.read_bytes()
    for keep in (0, 1, len(whole) // 3, len(whole) - 2):
        if name == "metrics.jsonl" and not keep:
            continue  # a log of no epochs is a log
        path.write_bytes(whole[:keep])
        result = kd("verify", "runs", "--quiet")
        assert result.code == 3, (name, keep)
        assert name in result.error
        assert len(result.out.splitlines()) == 1
        assert name in result.out


def test_a_torn_last_line_belongs_to_an_unfinished_run(kd, runs):
    """A resume cuts it off; in a finished run nothing will."""
    for name, code in (("stopped", 0), ("finished", 3)):
        with (runs / name / "metrics.jsonl").open("a") as file:
            file.write('{"epoch": 2, "tr')
        assert kd("verify", runs / name).code == code


def test_files_of_two_runs_in_one_directory(kd, runs):
    """The summary and the network beside it are of one run, or someone has copied one of them."""
    make(runs / "finished" / "student.safetensors")
    result = kd("verify", "runs/finished", "--json")
    assert result.code == 3
    assert "another run" in result.error
    (runs / "finished" / "student.safetensors").unlink()
    result = kd("verify", "runs/finished")
    assert result.code == 3
    assert "student.safetensors, which is gone" in result.error


def test_a_probe_names_a_network_that_lies_elsewhere(kd, runs):
    """Its encoder: that it is not in the probe's directory is no damage."""
    probe = ["linear-probe", "runs/finished", "--dataset", "digits", "--train-fraction", "0.1", "--max-steps", "1"]
    assert kd(*probe, "--batch-size", "15", "--threads", "1", "--out", "probe").code == 0
    result = kd("verify", "probe", "--json")
    assert result.code == 0, result.err
    assert "summary" in {file["kind"] for file in result.json["files"]}


def test_a_spec_is_validated(kd, runs):
    """An unknown key, a wrong type, an unknown method: the file and the field are named."""
    path = runs / "finished" / "spec.json"
    good = json.loads(path.read_text())
    for section, key, value, part in (
        ("train", "epohcs", 3, "train.epohcs"),
        ("train", "epochs", "many", "train.epochs"),
        (None, "method", {"name": "kdd"}, "kdd"),
        (None, "command", "evaluate", "evaluate"),
        ("data", "dataset", "cifar101", "cifar101"),
    ):
        bad = json.loads(json.dumps(good))
        (bad if section is None else bad[section])[key] = value
        path.write_text(json.dumps(bad))
        result = kd("verify", path)
        assert result.code == 3, key
        assert "spec.json" in result.error
        assert part in result.error


def test_all_shipped_presets_and_sweeps_are_sound(kd):
    """By path, like a user's own."""
    files = [*presets.names().values(), *presets.sweeps().values()]
    result = kd("verify", "--json", *files)
    assert result.code == 0, result.err
    kinds = [file["kind"] for file in result.json["files"]]
    assert kinds.count("sweep") == len(presets.sweeps())
    assert kinds.count("preset") == len(presets.names())


BAD_TEXTS = {
    "not toml": ("a.toml", b"epochs = "),
    "deep toml": ("a.toml", b"a = " + b"[" * 20_000),
    "huge number": ("a.toml", b"seed = " + b"9" * 6000),
    "not utf-8": ("a.toml", b'title = "\xff"'),
    "unknown setting": ("a.toml", b"[train]\nepohcs = 3\n"),
    "wrong type": ("a.toml", b"[train]\nepochs = 'many'\n"),
    "infinite": ("a.toml", b"[train]\nlr = inf\n"),
    "a table as a value": ("a.toml", b"train = 3\n"),
    "unknown data set": ("a.toml", b"[data]\ndataset = 'cifar101'\n"),
    "unknown method": ("a.toml", b"method = 'kdd'\n"),
    "bad sweep": ("a.toml", b"[sweep]\nmethods = 3\n"),
    "unknown axis": ("a.toml", b"[sweep]\nmethods = ['kd']\ncolours = [1]\n"),
    "not json": ("a.json", b"{"),
    "deep json": ("a.json", b"[" * 100_000),
    "no object": ("a.json", b"[1, 2]"),
    "NaN": ("a.json", b'{"seed": NaN}'),
    "huge integer": ("a.json", b'{"seed": ' + b"9" * 6000 + b"}"),
    "NUL": ("a.json", b'{"seed"\0: 1}'),
    "another schema": ("summary.json", b'{"schema": 9, "command": "distill"}'),
    "log line": ("metrics.jsonl", b'{"epoch": 1}\n[]\n'),
    "log NaN": ("metrics.jsonl", b'{"loss": NaN}\n'),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_texts_that_are_not_sound(name, kd, tmp_path):
    """One line that names the file, no traceback."""
    file, content = BAD_TEXTS[name]
    (tmp_path / file).write_bytes(content)
    result = kd("verify", file)
    assert result.code == (4 if name == "another schema" else 3)
    assert file in result.error
    assert len(result.out.splitlines()) == 1


def test_mutated_texts_are_sound_or_refused(kd, runs, tmp_path):
    """300 changed specs, presets and logs (seed 0): exit 0 or 3 or 4, one error line, never a traceback."""
    chance = random.Random(0)
    sources = [(runs / "finished" / name).read_bytes() for name in ("spec.json", "summary.json", "metrics.jsonl")]
    sources += [presets.names()["quickstart"].read_bytes(), presets.sweeps()["tables/vsd-2"].read_bytes()]
    names = ["spec.json", "summary.json", "metrics.jsonl", "a.toml", "b.toml"]
    tokens = [b"null", b"-1", b"1e999", b"[]", b"{}", b'""', b"true", b"\xff", b"\0", b"9" * 400, b"[[[[", b'"\x1b[2J"']
    codes = []
    (tmp_path / "m").mkdir()
    for _ in range(300):
        which = chance.randrange(len(sources))
        content = bytearray(sources[which])
        for _ in range(chance.randint(1, 3)):
            start = chance.randrange(len(content))
            content[start : start + chance.randint(0, 8)] = chance.choice([*tokens, bytes([chance.randrange(256)])])
        (tmp_path / "m" / names[which]).write_bytes(content)
        result = kd("verify", f"m/{names[which]}")
        codes.append(result.code)
        assert result.code in (0, 3, 4), result.err
        if result.code:
            assert names[which] in result.error
    assert codes.count(3) > 100


# ---------------------------------------------------------------------------------------------------- codes, verdicts


def test_one_line_a_file_and_the_worst_code(kd, tmp_path):
    """Damage (3) goes before not finite (6), that before a newer format (4); sound alone is 0."""
    make(tmp_path / "good.safetensors")
    newer(tmp_path / "newer.safetensors")
    make(tmp_path / "nan.safetensors", w=torch.tensor([1.0, float("nan")]))
    flip(make(tmp_path / "flipped.safetensors"))
    names = ["good", "newer", "nan", "flipped", "gone"]
    words = dict(zip(names, ["ok", "newer", "not finite", "damaged", "missing"], strict=True))
    for first, code in ((1, 0), (2, 4), (3, 6), (4, 3), (5, 3)):
        files = [f"{name}.safetensors" for name in names[:first]]
        result = kd("verify", *files, "--json")
        assert result.code == code
        assert [file["status"] for file in result.json["files"]] == [words[name] for name in names[:first]]
        assert result.json["ok"] is (code == 0)
        assert [file["ok"] for file in result.json["files"]] == [name == "good" for name in names[:first]]
        lines = kd("verify", *files).out.splitlines()
        assert [line[:10].strip() for line in lines] == [words[name] for name in names[:first]]
        if first == 5:
            assert "4 of 5" in result.error
            assert result.json["error"]["message"] in result.error
    quiet = kd("verify", "--quiet", *(f"{name}.safetensors" for name in names))
    assert [line.split()[0] for line in quiet.out.splitlines()] == ["newer", "not", "damaged", "missing"]
    assert kd("verify", "--quiet", "good.safetensors").out == ""


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e5m2", "float8_e4m3fn"])
def test_not_finite_is_seen_from_the_bits(dtype):
    """Against torch: every pattern of the small types, random and special ones of the large."""
    kind = getattr(torch, dtype)
    spelling = next(ours for ours, (theirs, _) in checkpoint.DTYPES.items() if theirs == dtype)
    width = torch.empty(0, dtype=kind).element_size()
    if width <= 2:
        bits = np.arange(256**width, dtype=f"<u{width}")
    else:
        bits = np.random.default_rng(0).integers(0, 2 ** (8 * width) - 1, 20_000, dtype=f"<u{width}")
        special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40], dtype=kind)
        largest = torch.tensor([torch.finfo(kind).max, torch.finfo(kind).min], dtype=kind)
        bits = np.concatenate([bits, torch.cat([special, largest]).view(torch.uint8).numpy().view(f"<u{width}")])
    tensor = torch.from_numpy(bits.view(np.uint8).copy()).view(kind)
    expected = torch.isfinite(tensor.double()).tolist()
    found = [finite(spelling, memoryview(word.tobytes())) for word in bits[:, None]]
    assert found == expected
    assert not all(expected)


def test_integers_have_no_nan(kd, tmp_path):
    """All bits set is a fine integer; what a state only follows may be infinite."""
    make(tmp_path / "a.safetensors", w=torch.full((4,), -1), b=torch.full((4,), 255, dtype=torch.uint8))
    make(tmp_path / "b.safetensors", {"role": "state"}, **{"sum.followed.gap": torch.tensor(float("inf"))})
    assert kd("verify", "a.safetensors", "b.safetensors").code == 0
    make(tmp_path / "b.safetensors", {"role": "state"}, **{"model.w": torch.tensor(float("inf"))})
    assert kd("verify", "b.safetensors").code == 6


@pytest.mark.parametrize(
    "lie", [{"classes": []}, {"arch": {"name": 3}}, {"role": "state", "lines": -1}, {"role": "state", "facts": None}]
)
def test_metadata_that_nothing_can_be_built_from(lie, kd, tmp_path):
    """Every hash is right, and yet no command could use the file."""
    make(tmp_path / "a.safetensors", lie)
    assert kd("verify", "a.safetensors").code == 3


def test_what_is_not_ours(kd, tmp_path):
    """A foreign file is not called sound, and the way out is named."""
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "foreign.safetensors")
    torch.save({"a": torch.ones(2)}, tmp_path / "foreign.pth")
    for name in ("foreign.safetensors", "foreign.pth"):
        result = kd("verify", name)
        assert result.code == 3
        assert name in result.error
    assert "kd import" in kd("verify", "foreign.safetensors").error


# ------------------------------------------------------------------------------------------------ many, and from stdin


def test_a_thousand_files_in_seconds_and_without_torch(tmp_path):
    """A real process; the processor's time is counted, not the clock's."""
    content = make(tmp_path / "0.safetensors").read_bytes()
    for number in range(1, 1000):
        (tmp_path / f"{number}.safetensors").write_bytes(content)
    flip(tmp_path / "777.safetensors")
    program = "import sys; sys.modules['torch'] = None; from kdcli.__main__ import main; main()"
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", program, "verify", "-"],
        input="\n".join(str(p) for p in sorted(tmp_path.iterdir())),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
        check=False,
    )
    after = os.times()
    assert done.returncode == 3, done.stderr
    assert len(done.stdout.splitlines()) == 1000
    assert sum(line.startswith("ok ") for line in done.stdout.splitlines()) == 999
    assert "777.safetensors" in done.stderr
    assert after.children_user + after.children_system - before.children_user - before.children_system < 5


def test_lists_on_stdin(kd, tmp_path, stdin):
    """One path a line, or NUL between them; an empty list is a mistake and not a success."""
    make(tmp_path / "a b.safetensors")
    make(tmp_path / "c.safetensors")
    for content in (b"a b.safetensors\nc.safetensors\n", b"a b.safetensors\0c.safetensors\0", b"\n\nc.safetensors"):
        stdin(content)
        result = kd("verify", "-", "--json")
        assert result.code == 0
        assert result.json["files"][-1]["path"] == "c.safetensors"
    stdin(b"c.safetensors\ngone.safetensors\n")
    assert kd("digest", "-").code == 3
    for content in (b"", b"\n\n"):
        stdin(content)
        result = kd("verify", "-")
        assert result.code == 2
        assert "empty" in result.error


def test_a_closed_pipe_is_no_traceback(tmp_path):
    """`kd verify … | head -1`."""
    make(tmp_path / "a.safetensors")
    words = command("verify", *["a.safetensors"] * 3000)
    done = subprocess.run(
        ["sh", "-c", '"$@" | head -n 1', "sh", *words], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.stdout.startswith("ok ")
    assert done.stderr == ""


# ------------------------------------------------------------------------------------------------------------- traps


def test_links_do_not_lead_out_of_what_was_named(kd, tmp_path):
    """A file behind a link that leaves is not read and not sound; a directory behind one is skipped and named."""
    outside = make(tmp_path / "outside" / "student.safetensors")
    make(tmp_path / "run" / "teacher.safetensors")
    (tmp_path / "run" / "elsewhere").symlink_to(tmp_path / "outside")
    (tmp_path / "run" / "loop").symlink_to("..")
    (tmp_path / "run" / "inside").symlink_to(".")
    (tmp_path / "run" / "again.safetensors").symlink_to("teacher.safetensors")
    result = kd("verify", "run", "--json")
    assert result.code == 0
    assert [(file["path"], file["status"]) for file in result.json["files"]] == [
        ("run/again.safetensors", "ok"),
        ("run/elsewhere", "skipped"),
        ("run/loop", "skipped"),
        ("run/teacher.safetensors", "ok"),
    ]
    (tmp_path / "run" / "student.safetensors").symlink_to(outside)
    result = kd("verify", "run")
    assert result.code == 3
    assert "run/student.safetensors" in result.error
    assert "leads out" in result.error
    assert kd("verify", "run/student.safetensors").code == 0  # what is named itself is followed
    (tmp_path / "run" / "student.safetensors").unlink()
    (tmp_path / "run" / "spec.json").symlink_to("nowhere")
    assert "spec.json" in kd("verify", "run").error


def test_fifos_directories_and_devices_in_a_files_place(kd, tmp_path):
    """None of them hangs, and none is sound."""
    for name in ("student.safetensors", "spec.json", "metrics.jsonl"):
        (tmp_path / "fifo" / name).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / "fifo" / name)
    os.mkfifo(tmp_path / "preset.toml")
    (tmp_path / "folder" / "teacher.safetensors").mkdir(parents=True)
    (tmp_path / "folder" / "spec.json").write_text("{}")
    began = time.monotonic()
    for names in (["fifo"], ["fifo/student.safetensors"], ["preset.toml"], ["folder"], ["/dev/zero"], ["/dev/null"]):
        result = kd("verify", *names)
        assert result.code == 3, names
        assert names[0] in result.error
    assert len(kd("verify", "fifo").out.splitlines()) == 3
    assert time.monotonic() - began < 10


def test_escapes_and_odd_bytes_in_names_are_text(kd, tmp_path):
    """No control character reaches the terminal, no name breaks its line, and JSON gives the very name back."""
    names = [b"\x1b[2J.safetensors", b"two\nlines.safetensors", b"\xff\xfe.safetensors", b"\xc2\x9b1m.safetensors"]
    names.append("\u202eslaed.safetensors".encode())
    good = make(tmp_path / "good").read_bytes()
    (tmp_path / "run").mkdir()
    for name in names:
        Path(os.fsdecode(bytes(tmp_path) + b"/run/" + name)).write_bytes(good)
    for words in (["verify", "run"], ["verify", *(f"run/{os.fsdecode(name)}" for name in names)]):
        result = kd(*words)
        assert result.code == 0
        assert len(result.out.splitlines()) == len(names)
        assert all(c.isprintable() or c == "\n" for c in result.out)
        raw = kd(*words, "--json")
        assert sorted(file["path"] for file in raw.json["files"]) == sorted(f"run/{os.fsdecode(n)}" for n in names)
        assert all(c.isprintable() or c == "\n" for c in raw.out)
    digests = kd("digest", *(f"run/{os.fsdecode(name)}" for name in names)).out.splitlines()
    assert len(digests) == len(names)
    bad = kd("verify", os.fsdecode(b"run/\x1b[2J\xff\n.safetensors"))
    assert bad.code == 3
    assert "\x1b" not in bad.error + bad.out


def test_a_terminal_that_knows_only_ascii(tmp_path):
    """Names are escaped rather than fatal."""
    make(tmp_path / "café.safetensors")
    extra = {**environment(), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command("verify", "."), cwd=tmp_path, env=extra, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "caf\\xe9" in done.stdout


def test_files_that_go_while_they_are_listed(kd, tmp_path, monkeypatch):
    """A live run drops its old states: what is gone is not damaged; but a file that was named must be there."""
    from kdcli.verify import files

    make(tmp_path / "run" / "student.safetensors")
    old = make(tmp_path / "run" / "state" / "step-000000001.safetensors", {"role": "state"})
    original = files.checkpoint.verify

    def verify(path, look=None):
        if "step" in str(path):
            old.unlink(missing_ok=True)
        return original(path, look)

    monkeypatch.setattr(files.checkpoint, "verify", verify)
    result = kd("verify", "run")
    assert (result.code, len(result.out.splitlines())) == (0, 1)
    assert kd("verify", "run/state/step-000000001.safetensors").code == 3


def test_directories_without_anything(kd, tmp_path):
    """An empty directory is not sound: a script would take silence for success."""
    (tmp_path / "empty" / ".replaced").mkdir(parents=True)
    make(tmp_path / "empty" / ".replaced" / "student.safetensors")
    result = kd("verify", "empty")
    assert result.code == 3
    assert "no checkpoint and no run" in result.error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list everything")
def test_a_directory_that_may_not_be_listed(kd, tmp_path):
    """It is named, and the rest is checked."""
    make(tmp_path / "a" / "student.safetensors")
    (tmp_path / "b").mkdir(mode=0)
    result = kd("verify", ".")
    assert result.code == 3
    assert "b cannot be listed" in result.error


# ------------------------------------------------------------------------------------------------------------ digest


def test_digest_is_of_the_tensors_alone(kd, tmp_path):
    """Not of their order, the metadata, or where and when the file was written; every tensor and name counts."""
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(4, dtype=torch.int64)
    make(tmp_path / "1.safetensors", {"seconds": 1.5}, a=a, b=b)
    make(tmp_path / "2.safetensors", {"seconds": 99, "role": "teacher", "seed": 7}, b=b, a=a)
    tensors, metadata = checkpoint.load(tmp_path / "1.safetensors")
    checkpoint.save(tmp_path / "3.safetensors", tensors, metadata)
    make(tmp_path / "4.safetensors", a=a.reshape(3, 2), b=b)
    make(tmp_path / "5.safetensors", a=a, c=b)
    make(tmp_path / "6.safetensors", a=a, b=b.int())
    make(tmp_path / "7.safetensors", a=-(-a).abs(), b=b)
    files = [f"{number}.safetensors" for number in range(1, 8)]
    result = kd("digest", *files)
    assert result.code == 0
    rows = [line.split("  ") for line in result.out.splitlines()]
    assert [path for _, path in rows] == files
    assert len({digest for digest, _ in rows[:3]}) == 1
    assert len({digest for digest, _ in rows}) == 5
    told = kd("digest", *files, "--json").json
    assert [(file["digest"], file["path"]) for file in told["files"]] == [tuple(row) for row in rows]
    assert (told["schema"], told["command"], told["ok"]) == (1, "digest", True)
    assert "seal" not in told["files"][0]


def test_the_seal_covers_the_whole_file(kd, tmp_path):
    """`--whole` tells two files of equal weights apart, and both numbers are checked against the bytes."""
    make(tmp_path / "1.safetensors", {"seed": 1})
    make(tmp_path / "2.safetensors", {"seed": 2})
    first, second = (
        line.split() for line in kd("digest", "--whole", "1.safetensors", "2.safetensors").out.splitlines()
    )
    assert first[0] == second[0]
    assert first[1] != second[1]
    assert first[1] == checkpoint.read_metadata(tmp_path / "1.safetensors")["seal"]
    assert kd("digest", "--whole", "--json", "1.safetensors").json["files"][0]["seal"] == first[1]
    flip(tmp_path / "1.safetensors", 100)
    assert kd("digest", "--whole", "1.safetensors").code == 3


def test_digest_goes_on_after_a_bad_file(kd, tmp_path):
    """All the others are printed; the exit code and the one error line are for what is wrong."""
    make(tmp_path / "a.safetensors")
    flip(make(tmp_path / "b.safetensors"))
    make(tmp_path / "run" / "student.safetensors")
    result = kd("digest", "a.safetensors", "b.safetensors", "run")
    assert result.code == 3
    assert "b.safetensors" in result.error
    assert [line.split()[1] for line in result.out.splitlines()] == ["a.safetensors", "run"]
    told = kd("digest", "a.safetensors", "b.safetensors", "--json")
    assert [file["ok"] for file in told.json["files"]] == [True, False]


def test_neither_command_imports_torch(tmp_path):
    """On a checkpoint, a spec, a preset and a sweep."""
    make(tmp_path / "a.safetensors")
    (tmp_path / "a.toml").write_text("[train]\nepochs = 3\n")
    table = str(presets.sweeps()["tables/vsd-2"])
    program = "import sys; sys.modules['torch'] = None; from kdcli.__main__ import run\n"
    program += f"assert run(['verify', 'a.safetensors', 'a.toml', {table!r}]) == 0\n"
    program += "assert run(['digest', '--whole', 'a.safetensors']) == 0\n"
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4
    assert str(ROOT) not in done.stderr
