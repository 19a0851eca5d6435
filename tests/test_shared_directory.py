"""A working or runs directory that others can write to: what they plant there is neither run nor written through."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from harness import TINY, Died, snapshot

ALONE = ["distill", "--method", "none", "--student", "resnet8", *TINY]


@pytest.mark.parametrize("name", ["state", ".replaced"])
@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_a_planted_folder_link_moves_nobodys_files(name, flags, kd, die_at, tmp_path):
    """Not into the victim's folder, when `--overwrite` puts the old run aside, and not out of it."""
    assert kd(*ALONE, "--max-steps", "2", "--out", "victim").code == 0
    (tmp_path / "victim" / f".student.safetensors.{'0' * 16}.tmp").write_bytes(b"at work")
    die_at(3)
    with pytest.raises(Died):
        kd(*ALONE, "--out", "run")
    die_at(-1)
    run = tmp_path / "run"
    if name == "state":
        for path in (run / "state").iterdir():
            path.unlink()
        (run / "state").rmdir()
    (run / name).symlink_to(tmp_path / "victim")
    before = snapshot(tmp_path / "victim")
    result = kd(*ALONE, "--out", "run", *flags)
    assert result.code == 5
    assert f"{name}: it is a symbolic link" in result.error
    assert snapshot(tmp_path / "victim") == before
    (run / "spec.json").unlink()
    assert kd(*ALONE, "--out", "run", *flags).code == 5
    assert snapshot(tmp_path / "victim") == before


@pytest.mark.parametrize("ours", [False, True])
def test_ranks_look_for_modules_where_we_do(ours, tmp_path, monkeypatch):
    """`python -m` would put the working directory first: a planted torch.py there would be run by every rank."""
    from torch.distributed.launcher import api

    from kdcli.engine.launch import launch

    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(api, "elastic_launch", lambda *_: lambda *words: calls.append(words))
    monkeypatch.chdir(tmp_path)
    elsewhere = [path for path in sys.path if path and Path(path) != tmp_path]
    monkeypatch.setattr(sys, "path", ["", *elsewhere] if ours else elsewhere)
    launch(2)
    assert calls[0][: 2 if ours else 3] == (("-m", "kdcli") if ours else ("-P", "-m", "kdcli"))
