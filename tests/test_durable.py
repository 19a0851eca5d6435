"""Durable writing: nothing is lost, nothing foreign is touched, nothing hangs."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kdcli import durable
from kdcli.errors import InputError, WriteError

SYSTEM_CALLS = ("open", "write", "fsync", "close", "rename")
REASONS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def fail_at(monkeypatch, call: str, number: int, reason: int) -> list[int]:
    """Make the `number`-th use of `os.<call>` from now on fail; the returned list counts the uses."""
    real, seen = getattr(os, call), []

    def failing(*args, **kwargs):
        seen.append(1)
        if len(seen) == number:
            if call == "close":
                real(*args, **kwargs)
            raise OSError(reason, os.strerror(reason))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, failing)
    return seen


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "a.bin"
    durable.write_bytes(path, b"one")
    durable.write_bytes(path, [b"tw", bytearray(b"o"), memoryview(b""), memoryview(b"!")])
    assert path.read_bytes() == b"two!"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_mode_honours_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        durable.write_bytes(tmp_path / "a", b"x")
        durable.append_line(tmp_path / "b", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == mode


def test_order_is_write_sync_rename_sync(tmp_path, monkeypatch):
    calls = []
    for call in ("write", "fsync", "rename"):
        real = getattr(os, call)
        monkeypatch.setattr(os, call, lambda *a, call=call, real=real: (calls.append(call), real(*a))[1])
    durable.write_bytes(tmp_path / "a", b"x")
    assert calls == ["write", "fsync", "rename", "fsync"]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:3]))
    durable.write_bytes(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("call", SYSTEM_CALLS)
def test_every_system_call_may_fail(tmp_path, monkeypatch, call, reason):
    path = tmp_path / "a"
    durable.write_bytes(path, b"old")
    with monkeypatch.context() as patch:
        fail_at(patch, call, 1, reason)
        with pytest.raises(WriteError) as caught:
            durable.write_bytes(path, b"new")
    assert caught.value.code == 5
    assert str(path) in caught.value.line()
    assert errno.errorcode[reason] in caught.value.line()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_failing_directory_sync_leaves_the_new_content_whole(tmp_path, monkeypatch):
    path = tmp_path / "a"
    fail_at(monkeypatch, "fsync", 2, errno.EIO)
    with pytest.raises(WriteError):
        durable.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


def test_ctrl_c_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        durable.write_bytes(tmp_path / "a", b"x")
    assert names(tmp_path) == []


def test_file_size_limit(tmp_path):
    script = """
import resource, sys
from kdcli import durable
from kdcli.errors import WriteError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    durable.write_bytes(sys.argv[1], b"x" * 5000)
except WriteError as problem:
    print(problem.line())
    sys.exit(problem.code)
"""
    path = tmp_path / "a"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 5, done.stderr
    assert "EFBIG" in done.stdout
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def plant(kind: str, path: Path, victim: Path) -> None:
    victim.write_bytes(b"victim\n")
    if kind == "symlink":
        path.symlink_to(victim)
    elif kind == "dangling":
        path.symlink_to(victim.with_name("nowhere"))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "hardlink":
        os.link(victim, path)


@pytest.mark.parametrize("kind", ["symlink", "dangling", "fifo", "directory"])
def test_planted_target_is_refused(tmp_path, kind):
    victim = tmp_path / "victim"
    plant(kind, tmp_path / "a", victim)
    for attempt in (durable.write_bytes, lambda p, _: durable.append_line(p, "x"), durable.write_json):
        with pytest.raises(WriteError, match="cannot write"):
            attempt(tmp_path / "a", b"x" if attempt is not durable.write_json else {})
    with pytest.raises(WriteError):
        durable.truncate_lines(tmp_path / "a", 0)
    assert victim.read_bytes() == b"victim\n"
    assert names(tmp_path) == ["a", "victim"]


def test_hard_link_victim_keeps_its_content(tmp_path):
    victim = tmp_path / "victim"
    plant("hardlink", tmp_path / "a", victim)
    with pytest.raises(WriteError, match="hard link"):
        durable.append_line(tmp_path / "a", "x")
    with pytest.raises(WriteError, match="hard link"):
        durable.truncate_lines(tmp_path / "a", 0)
    durable.write_bytes(tmp_path / "a", b"x")
    assert victim.read_bytes() == b"victim\n"


def test_missing_directory_names_the_path(tmp_path):
    with pytest.raises(WriteError, match="nowhere"):
        durable.write_bytes(tmp_path / "nowhere" / "a", b"x")


def test_json_round_trip_keeps_order(tmp_path):
    path = tmp_path / "a.json"
    durable.write_json(path, {"b": 1, "a": [None, "é"]})
    assert path.read_text().endswith("}\n")
    assert list(durable.read_json(path)) == ["b", "a"]
    with pytest.raises(ValueError, match="JSON"):
        durable.write_json(path, {"x": float("nan")})
    assert durable.read_json(path)["b"] == 1


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 200_000, b'{"a": 1'])
def test_damaged_json(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json"):
        durable.read_json(path)


def test_reading_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "missing", tmp_path / "fifo", tmp_path, "nul\0byte"):
        with pytest.raises(InputError):
            durable.read_json(path)


def test_append_and_truncate(tmp_path):
    log = tmp_path / "metrics.jsonl"
    for i in range(5):
        durable.append_line(log, json.dumps({"i": i}))
    assert durable.truncate_lines(log, 3) == 3
    assert [json.loads(line)["i"] for line in log.read_text().splitlines()] == [0, 1, 2]
    assert durable.truncate_lines(log, 9) == 3
    with open(log, "a") as file:
        file.write('{"i": 3')  # torn by a crash
    assert durable.truncate_lines(log, 9) == 3
    assert log.read_text().endswith('{"i": 2}\n')
    assert durable.truncate_lines(tmp_path / "none", 3) == 0
    assert names(tmp_path) == ["metrics.jsonl"]


def test_append_after_a_torn_line_starts_a_new_one(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"one\ntor")
    durable.append_line(log, "two")
    assert log.read_bytes() == b"one\ntor\ntwo\n"


def test_failed_append_leaves_no_half_line(tmp_path, monkeypatch):
    log = tmp_path / "log"
    durable.append_line(log, "one")
    fail_at(monkeypatch, "fsync", 1, errno.ENOSPC)
    with pytest.raises(WriteError, match="ENOSPC"):
        durable.append_line(log, "two")
    assert log.read_bytes() == b"one\n"


def test_clean_temps_takes_only_our_own(tmp_path):
    stray = tmp_path / ".student.safetensors.0123456789abcdef.tmp"
    stray.write_bytes(b"x")
    others = ["a.tmp", ".a.tmp", ".lock", ".a.0123456789abcdeg.tmp"]
    for name in others:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".link.0123456789abcdef.tmp").symlink_to("a.tmp")
    assert durable.clean_temps(tmp_path) == [stray.name]
    assert names(tmp_path) == sorted([*others, ".link.0123456789abcdef.tmp"])
    assert durable.clean_temps(tmp_path / "missing") == []


def test_make_dir(tmp_path):
    assert durable.make_dir(tmp_path / "a" / "b" / "c").is_dir()
    durable.make_dir(tmp_path / "a" / "b" / "c")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "dangling").symlink_to("nowhere")
    for path in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / "dangling"):
        with pytest.raises(WriteError):
            durable.make_dir(path)
    (tmp_path / "link").symlink_to("a")
    durable.make_dir(tmp_path / "link")
    with pytest.raises(WriteError, match="symbolic link"):
        durable.make_dir(tmp_path / "link", links=False)


def test_modules_that_must_start_fast_do_not_import_torch():
    script = "import sys, kdcli.durable, kdcli.checkpoint, kdcli.runs.lock\n"
    script += "import kdcli.importing.conversion, kdcli.importing.child\n"
    script += "sys.exit(','.join({'torch', 'numpy', 'safetensors'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
