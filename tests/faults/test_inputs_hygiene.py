"""R23: no network, no file outside the places named, ordinary modes, and no name that draws on the terminal."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest
from fuzzing import complaints, stock, told, trial
from harness import command, environment

from kdcli import checkpoint

CPU = ["--device", "cpu", "--threads", "1"]


def commands() -> dict[str, list[object]]:
    """A command of each kind."""
    made = stock()
    kd = made.words("kd")
    made_up = ["--dataset", "synthetic", "--image-size", "8", "--batch-size", "20", "--max-steps", "1", *CPU]
    return {
        "help": ["--help"],
        "version": ["--version"],
        "list methods": ["list", "methods"],
        "list models": ["list", "models"],
        "list datasets": ["list", "datasets"],
        "list presets": ["list", "presets", "--json"],
        "schema": ["schema"],
        "inspect": ["inspect", "wrn16_2"],
        "inspect a file": ["inspect", made.student],
        "inspect timm": ["inspect", "timm:resnet18", "--input-size", "64"],
        "verify": ["verify", made.student, made.teacher],
        "digest": ["digest", made.student],
        "pretrain-teacher": ["pretrain-teacher", "--teacher", "resnet8", *made_up, "--out", "run"],
        "distill": [*kd, "--out", "run"],
        "distill, teacher first": [
            *(
                "distill",
                "--method",
                "kd",
                "--teacher",
                "resnet14",
                "--student",
                "resnet8",
                "--runs-dir",
                "run",
                *made_up,
            )
        ],
        "dry run": [*kd, "--out", "run", "--dry-run"],
        "fewshot": [
            *("fewshot", "--method", "kd", "--teacher", made.teacher, "--student", "resnet8", "--runs-dir", "run"),
            *("--ratio", "0.5", "--dataset", "digits", "--image-size", "8", "--max-steps", "1", *CPU),
        ],
        "linear-probe": [
            *("linear-probe", made.student, "--dataset", "digits", "--epochs", "1", "--runs-dir", "run", *CPU)
        ],
        "evaluate": ["evaluate", made.student, "--teacher", made.teacher, *CPU],
        "sweep --plan": ["sweep", "tables/vsd-2", "--plan"],
        "damaged": ["verify", "/etc/hostname"],
        "missing": [*kd, "--teacher", "gone.safetensors"],
        "wrong": ["distill", "--epohcs", "3"],
    }


NAMES = (
    *("help", "version", "list methods", "list models", "list datasets", "list presets", "schema", "inspect"),
    *("inspect a file", "inspect timm", "verify", "digest", "pretrain-teacher", "distill", "distill, teacher first"),
    *("dry run", "fewshot", "linear-probe", "evaluate", "sweep --plan", "damaged", "missing", "wrong"),
)


QUICK = ("help", "verify", "pretrain-teacher", "linear-probe", "evaluate", "missing")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_no_network_and_no_file_elsewhere(name, tmp_path):
    """Connections and writes are seen as Python's audit events; every file that is left has the mode that umask 022 gives."""
    before = os.umask(0o022)
    try:
        found = trial(commands()[name], tmp_path, writable=["run"])
    finally:
        os.umask(before)
    wrong = complaints(found, [{"damaged": 3, "missing": 3, "wrong": 2}.get(name, 0)])
    assert not wrong, told(found, wrong)
    assert set(os.listdir(tmp_path)) <= {"run", ".tmp"}
    for path in (tmp_path / "run").rglob("*"):
        mode = stat.S_IMODE(path.lstat().st_mode)
        assert mode == (0o755 if path.is_dir() else 0o644), path


def unshare_works() -> bool:
    """Whether a process may be put into a network of its own here."""
    try:
        return subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not unshare_works(), reason="unshare -rn is not permitted here")
@pytest.mark.parametrize("name", ["distill", "distill, teacher first", "evaluate", "linear-probe", "inspect timm"])
def test_without_any_network(name, tmp_path):
    """True processes with no network at all, not even to themselves."""
    words = ["unshare", "-rn", *command(*commands()[name])]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


EVIL = "ev\x1b[31mil\nerror: fake\u202e"


def printed(tmp_path: Path, **patch) -> list[tuple[list[object], list[str]]]:
    """Commands on checkpoints and folders whose names and metadata draw on the terminal; what is wrong with each."""
    folder = tmp_path / EVIL
    folder.mkdir()
    tensors, metadata = checkpoint.load(stock().student)
    metadata["classes"] = [EVIL, *metadata["classes"][1:]]
    metadata["dataset"] = "digits"
    path = folder / "x.safetensors"
    checkpoint.save(path, tensors, metadata)
    sound = folder / "y.safetensors"
    sound.write_bytes(stock().student.read_bytes())
    cut = folder / "z.safetensors"
    cut.write_bytes(stock().student.read_bytes()[:-1])
    results = []
    for words, code in (
        (["verify", path, sound], 0),
        (["verify", cut], 3),
        (["verify", path, "--json"], 0),
        (["digest", path], 0),
        (["inspect", path], 0),
        (["evaluate", path, *CPU], 4),
        (["evaluate", sound, "--limit", "9", *CPU], 0),
        (["evaluate", sound, "--limit", "9", *CPU, "--json"], 0),
        (["evaluate", folder / "gone", *CPU], 3),
        ([*stock().words("kd"), "--teacher", path, "--out", "run"], 4),
        ([*stock().words("kd"), "--out", f"run/{EVIL}"], 0),
        (["distill", "--method", EVIL, "--student", "resnet8"], 2),
        (["list", EVIL], 2),
    ):
        found = trial(words, tmp_path, writable=["run"], **patch)
        results.append((words, complaints(found, [code])))
    return results


def test_names_do_not_draw(tmp_path):
    """Escapes, newlines and turns of direction in names are shown and not obeyed; there is never a second error line."""
    for words, wrong in printed(tmp_path):
        assert not wrong, (words, wrong)


def naive() -> None:
    """`kd` that prints names as they are, and asks a server what is new."""
    from kdcli import errors, output

    output.printable = output.one_line = lambda text: text
    errors.KdError.line = lambda self: self.message  # type: ignore[method-assign]
    with socket.socket() as one:
        one.settimeout(0.1)


def connecting() -> None:
    """`kd` that asks a server whether it is the newest, and keeps notes at home."""
    from kdcli import checkpoint as read

    original = read.verify

    def verify(*args):
        Path("notes").write_text("used")
        with socket.socket() as one:
            one.settimeout(0.1)
            one.connect_ex(("127.0.0.1", 9))
        return original(*args)

    read.verify = verify


def test_these_checks_have_teeth(tmp_path):
    """Names printed as they are, a connection and a file elsewhere are found out."""
    assert any(wrong for _, wrong in printed(tmp_path, before=naive))
    found = trial(["digest", stock().student], tmp_path, before=connecting)
    wrong = complaints(found, [0])
    assert any("socket" in one for one in wrong)
    assert any("notes" in one for one in wrong)
