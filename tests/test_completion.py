"""What a shell gets when Tab is pressed: asked as bash, zsh and fish ask, and once in a real bash with a terminal."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from harness import ROOT, environment

from kdcli import methods, presets
from kdcli.__main__ import run
from kdcli.commands import completion
from kdcli.data import names as data_names
from kdcli.models import names

PROGRAM = """
import sys
from kdcli.__main__ import main
try:
    main()
finally:
    slow = {"torch", "torchvision", "timm", "sklearn", "matplotlib"} & set(sys.modules)
    assert not slow, slow
"""


def ask(**settings: str) -> tuple[int, str]:
    """What a `kd` that a shell asks leaves and writes; run in this process."""
    told = io.StringIO()
    with mock.patch.dict(os.environ, settings), contextlib.redirect_stdout(told):
        code = completion.respond(run)
    return code, told.getvalue()


def bash(line: str) -> list[str]:
    """The candidates for the end of a line, as bash gets them: words are broken at `:` and `=` too."""
    words = [""]
    for character in line:
        if character == " ":
            words.append("")
        elif (character in ":=") != (words[-1][-1:] in tuple(":=")) and words[-1]:
            words.append(character)
        else:
            words[-1] += character
    code, told = ask(_KD_COMPLETE="complete_bash", COMP_WORDS="\n".join(words), COMP_CWORD=str(len(words) - 1))
    assert code == 0
    return told.splitlines()


def zsh(line: str) -> str:
    """The code that zsh evaluates."""
    return ask(_KD_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=line)[1]


def fish(line: str) -> dict[str, str]:
    """Candidate → its description."""
    said = ask(_KD_COMPLETE="complete_fish", _TYPER_COMPLETE_FISH_ACTION="get-args", _TYPER_COMPLETE_ARGS=line)[1]
    return {value: about for value, _, about in (row.partition("\t") for row in said.splitlines())}


def test_commands_and_options() -> None:
    """Those that begin so."""
    assert bash("kd dis") == ["distill"]
    assert {"distill", "evaluate", "fewshot", "sweep", "export"} <= set(bash("kd "))
    assert {"--mixup", "--mix-prob", "--mix-switch"} == set(bash("kd distill --mix"))
    assert set(bash("kd distill --precision ")) == {"fp32", "bf16"}


def test_names() -> None:
    """Methods, networks, data sets, presets, sweeps, lists."""
    assert set(bash("kd distill --method ")) == {*methods.known()}
    assert set(bash("kd distill --teacher wrn")) == {name for name in names.known() if name.startswith("wrn")}
    assert {"timm:", "torchvision:", *names.known()} == set(bash("kd distill --student "))
    assert {"cifar100", "digits", "folder:"} <= set(bash("kd evaluate RUN --dataset "))
    assert len(bash("kd linear-probe RUN --dataset ")) == len(data_names.known())
    assert set(bash("kd distill --preset ")) == {*presets.names()}
    assert set(bash("kd sweep tables/vsd")) == {name for name in presets.sweeps() if name.startswith("tables/vsd")}
    assert set(bash("kd report ")) == {*presets.sweeps()}
    assert bash("kd list mo") == ["models"]
    assert bash("kd export RUN --format o") == ["onnx"]


def test_bash_gets_what_is_behind_its_breaks() -> None:
    """A colon or an equals sign breaks a word in bash, which then replaces only the rest."""
    assert bash("kd distill --teacher timm:resnet50_g") == ["resnet50_gn"]
    assert "resnet18" in bash("kd distill --teacher timm:")
    assert bash("kd distill --teacher=wrn40_2") == ["wrn40_2"]
    assert bash("kd distill --teacher=torchvision:mobilenet_v2") == ["mobilenet_v2"]
    assert bash("kd distill --student timm:resnet18 --method revie") == ["reviewkd"]
    assert set(bash("kd sweep tables/vsd-2 --only stage=")) == {"backbone", "teacher", "assistant", "student", "probe"}
    assert bash("kd sweep tables/vsd-2 --only method=reviewk") == ["reviewkd"]
    assert set(bash("kd distill --set train.optimizer=")) == {"sgd", "adamw"}


def test_settings_come_with_their_values() -> None:
    """A choice's values, a default beside nothing; at least two each, so that no space is put behind one."""
    assert set(bash("kd distill --set train.epo")) == {"train.epochs=", "train.epochs=240"}
    assert set(bash("kd distill --set system.comp")) == {"system.compile=true", "system.compile=false"}


def test_where_kd_knows_nothing_the_shell_offers_files() -> None:
    """Nothing for bash (`-o default` takes over), `_files` for zsh, failure for fish's question."""
    assert bash("kd distill --teacher runs/") == []
    assert bash("kd evaluate ") == []
    assert zsh("kd distill --teacher runs/").strip() == "_files"
    question = {"_KD_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "is-args"}
    assert ask(**question, _TYPER_COMPLETE_ARGS="kd evaluate ")[0] == 1
    assert ask(**question, _TYPER_COMPLETE_ARGS="kd dis")[0] == 0


def test_zsh_and_fish_see_a_line_about_each() -> None:
    """Names with what they are."""
    assert fish("kd distill --method kd")["kd"] == methods.SHIPPED["kd"]
    assert "resnet50_gn" in fish("kd distill --teacher timm:resnet50_g").popitem()[0]
    assert '"reviewkd":"' in zsh("kd distill --method revie")
    assert '"distill"' in zsh("kd dis")


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_the_libraries_networks_are_all_there(library: str) -> None:
    """Read off their sources they are the libraries' own lists."""
    listed = __import__("timm").list_models() if library == "timm" else _classifiers()
    assert sorted(listed) == completion.library_models(f"{library}:")


def _classifiers() -> list[str]:
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def test_a_library_that_is_not_there_has_no_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """And that is no error."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert completion.library_models("timm:") == []


def test_it_answers_at_once() -> None:
    """And imports none of the slow libraries. Measured were 0.4 s of processor time; the bound is for a busy machine."""
    words = ["kd", "distill", "--teacher", "timm", ":", "vit_t"]
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**environment(), "_KD_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(words), "COMP_CWORD": "5"},
        capture_output=True,
        text=True,
        check=False,
    )
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert "vit_tiny_patch16_224" in done.stdout.splitlines()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 2, spent


@pytest.mark.parametrize(
    ("shell", "part"), [("bash", "-o default"), ("zsh", "compdef"), ("fish", "complete --command kd")]
)
def test_scripts_for_the_shells(shell: str, part: str) -> None:
    """What belongs into a start-up file, also where the shell cannot be recognised."""
    code, told = ask(_KD_COMPLETE=f"source_{shell}")
    assert code == 0
    assert part in told


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_in_a_real_bash(tmp_path: Path) -> None:
    """Typed at a terminal, with the script that kd prints: the word under the cursor is completed."""
    (tmp_path / "kd").write_text(f'#!/bin/sh\nexec {sys.executable} -m kdcli "$@"\n')
    (tmp_path / "kd").chmod(0o755)
    settings = {
        **environment(),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PS1": "> ",
        "TERM": "dumb",
        "HOME": str(tmp_path),
    }
    settings["PYTHONPATH"] = str(ROOT)
    process, terminal = pty.fork()
    if not process:
        os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], settings)
    try:
        _type(terminal, 'eval "$(_KD_COMPLETE=source_bash kd)"; echo re""ady\n', "ready")
        _type(terminal, "kd distill --teacher timm:resnet50_g\t", "timm:resnet50_gn")
        _type(terminal, "\x15kd distill --student-t\t", "--student-taps")
        _type(terminal, "x --student resnet11\t", "resnet110")
        _type(terminal, " --set=train.optimizer=ada\t", "train.optimizer=adamw")
    finally:
        os.kill(process, 9)
        os.waitpid(process, 0)
        os.close(terminal)


def _type(terminal: int, keys: str, expected: str) -> None:
    """Type keys and wait for a text to appear."""
    os.write(terminal, keys.encode())
    seen, until = "", time.monotonic() + 60
    while expected not in seen:
        assert time.monotonic() < until, f"no {expected!r} in {seen!r}"
        if select.select([terminal], [], [], 1)[0]:
            seen += os.read(terminal, 4096).decode("utf-8", "replace")
