"""Checkpoints: what goes in comes out, any damage is noticed, and a resume state is never lost to a bad write."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from kdcli import checkpoint, durable
from kdcli.checkpoint import file, layout, states
from kdcli.errors import IncompatibleError, InputError, WriteError

META = {"role": "student", "arch": {"name": "wrn16_1"}, "classes": ["cat", "château"], "metrics": {"top1": 76.5}}


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.safetensors"
    tensors = {
        "b.weight": torch.tensor([1.5, -2.0, 3.25]),
        "a": torch.tensor(7),
        "c": torch.tensor([True, False, True]),
    }
    checkpoint.save(path, tensors, META)
    return path


def patched_header(path, change):
    """The file's bytes with its header changed by `change(dict)` and the seal made to fit again, as a forger would."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = json.loads(header["__metadata__"]["kd"])
    change(header, text)
    del header["__metadata__"]
    return layout.sealed_header(text, header) + content[8 + length :]


def test_round_trip_of_every_type(tmp_path):
    tensors = {name: torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name, _ in checkpoint.DTYPES.values()}
    tensors |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "strided": torch.randn(4, 6).t()[1:],
        "gradient": torch.nn.Parameter(torch.randn(3)),
        "nan": torch.tensor([math.nan, math.inf, -0.0]),
        "ünï\n\x1b": torch.ones(2),
    }
    path = tmp_path / "a.safetensors"
    digest = checkpoint.save(path, tensors, META)
    loaded, metadata = checkpoint.load(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert file._raw(loaded[name]) == file._raw(tensor)
    assert {k: metadata[k] for k in META} == META
    assert metadata["digest"] == digest == checkpoint.digest(path) == checkpoint.verify(path)["digest"]
    assert metadata == checkpoint.read_metadata(path)
    report = checkpoint.verify(path)
    assert (report["ok"], report["role"], report["tensors"]) == (True, "student", len(tensors))
    assert report["bytes"] == path.stat().st_size


def test_plain_safetensors_reads_it(small):
    theirs, (ours, _) = safetensors.torch.load_file(small), checkpoint.load(small)
    assert {n: t.tolist() for n, t in theirs.items()} == {n: t.tolist() for n, t in ours.items()}
    with safetensors.safe_open(small, "pt") as file:
        assert list(file.metadata()) == ["kd"]


def test_digest_covers_the_tensors_and_nothing_else(tmp_path):
    a, b = {"x": torch.ones(2), "y": torch.zeros(3)}, {"y": torch.zeros(3), "x": torch.ones(2)}
    digests = [
        checkpoint.save(tmp_path / "1", a, META),
        checkpoint.save(tmp_path / "2", b, {"role": "teacher", "date": "today"}),
        checkpoint.save(tmp_path / "3", {"x": torch.ones(2), "z": torch.zeros(3)}, META),
        checkpoint.save(tmp_path / "4", {"x": torch.ones(2, 1), "y": torch.zeros(3)}, META),
        checkpoint.save(tmp_path / "5", {"x": torch.ones(2), "y": torch.zeros(3, dtype=torch.int32)}, META),
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4
    assert (tmp_path / "1").read_bytes() != (tmp_path / "2").read_bytes()


def test_same_content_gives_the_same_file(tmp_path, small):
    tensors, metadata = checkpoint.load(small)
    checkpoint.save(tmp_path / "again", tensors, metadata)
    assert (tmp_path / "again").read_bytes() == small.read_bytes()


@contextlib.contextmanager
def flipped(path, bit):
    """The file with one bit changed in place."""
    with open(path, "r+b", buffering=0) as file:
        original = os.pread(file.fileno(), 1, bit // 8)
        os.pwrite(file.fileno(), bytes([original[0] ^ 1 << bit % 8]), bit // 8)
        yield
        os.pwrite(file.fileno(), original, bit // 8)


def test_every_single_bit_flip_is_noticed(small):
    for bit in range(small.stat().st_size * 8):
        with flipped(small, bit), pytest.raises(InputError):
            checkpoint.verify(small)
    checkpoint.verify(small)


def test_random_bit_flips_are_noticed_by_load(small):
    for bit in random.Random(0).sample(range(small.stat().st_size * 8), 500):
        with flipped(small, bit), pytest.raises(InputError, match="small") as caught:
            checkpoint.load(small)
        assert caught.value.code == 3
        assert "\n" not in caught.value.line()


def test_every_truncation_and_any_appendix_is_noticed(small):
    content = small.read_bytes()
    path = small.with_name("cut")
    for mutated in [
        *(content[:n] for n in range(len(content))),
        content + b"\0",
        content + content,
        content + b" " * 8,
    ]:
        path.write_bytes(mutated)
        for reader in (checkpoint.verify, checkpoint.load, checkpoint.read_metadata):
            with pytest.raises(InputError, match="cut"):
                reader(path)


def test_what_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "text").write_text("hello, this is not a checkpoint")
    (tmp_path / "zeros").write_bytes(bytes(1000))
    (tmp_path / "deep").write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000)
    (tmp_path / "huge").write_bytes((2**60).to_bytes(8, "little") + b"{}" * 100)
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "plain")
    for name in ("missing", "fifo", "text", "zeros", "deep", "huge", "plain", ""):
        for reader in (checkpoint.load, checkpoint.verify, checkpoint.read_metadata, checkpoint.digest):
            with pytest.raises(InputError):
                reader(tmp_path / name)
    with pytest.raises(InputError, match="kd import"):
        checkpoint.load(tmp_path / "plain")


@pytest.mark.parametrize(
    "change",
    [
        lambda h, t: h["a"].update(shape=[2]),
        lambda h, t: h["a"].update(shape=[-1]),
        lambda h, t: h["a"].update(shape="x"),
        lambda h, t: h["a"].update(shape=[True]),
        lambda h, t: h["a"].update(shape=[2**61] * 9),
        lambda h, t: h["a"].update(dtype="F4"),
        lambda h, t: h["a"].update(dtype=[]),
        lambda h, t: h["a"].update(data_offsets=[0, 2**50], shape=[2**47]),
        lambda h, t: h["a"].update(data_offsets=[0]),
        lambda h, t: h["a"].pop("dtype"),
        lambda h, t: h.update(a=[]),
        lambda h, t: h.update(a=None),
        lambda h, t: h.update(twin=h["a"]),
        lambda h, t: h.pop("a"),
        lambda h, t: t.update(role="king"),
        lambda h, t: t.pop("role"),
        lambda h, t: t.update(digest="0" * 64),
        lambda h, t: t.update(digest=None),
    ],
)
def test_consistent_lies_in_the_header(small, change):
    small.write_bytes(patched_header(small, change))
    with pytest.raises(InputError):
        checkpoint.load(small)
    with pytest.raises(InputError):
        checkpoint.verify(small)


def test_newer_format_is_not_called_damaged(small):
    small.write_bytes(patched_header(small, lambda h, t: t.update(format=2)))
    with pytest.raises(IncompatibleError, match=r"small.*format 2"):
        checkpoint.load(small)


def test_saving_nonsense(tmp_path):
    for tensors, metadata in [
        ({}, {}),
        ({}, {"role": "king"}),
        ({}, {"role": "state", "x": math.nan}),
        ({"__metadata__": torch.ones(1)}, META),
        ({"z": torch.ones(1, dtype=torch.complex64)}, META),
    ]:
        with pytest.raises(ValueError):  # noqa: PT011 - five different messages
            checkpoint.save(tmp_path / "a", tensors, metadata)
    assert os.listdir(tmp_path) == []


def test_digest_of_a_run_directory(tmp_path, small):
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(InputError, match="neither"):
        checkpoint.digest(run)
    teacher = checkpoint.save(run / "teacher.safetensors", {"t": torch.ones(1)}, {"role": "teacher"})
    assert checkpoint.digest(run) == teacher
    shutil.copy(small, run / "student.safetensors")
    assert checkpoint.digest(run) == checkpoint.digest(small)
    (run / "student.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="empty"):
        checkpoint.digest(run)


def test_verify_and_digest_work_without_torch(small):
    script = "import sys; sys.modules['torch'] = None; from kdcli import checkpoint as c\n"
    script += "print(c.verify(sys.argv[1])['digest'] == c.digest(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", script, str(small)], capture_output=True, text=True, timeout=30)
    assert done.stdout == "True\n", done.stderr


# ---------------------------------------------------------------------------------------------------- the resume state


def state(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((8,), float(step))}


def test_states_keep_two_and_the_newest_wins(tmp_path):
    directory = tmp_path / "state"
    assert checkpoint.load_state(directory) is None
    for step in (1, 2, 30, 4000000000):
        checkpoint.save_state(directory, step, state(step), {"epoch": 3})
    assert sorted(os.listdir(directory)) == ["step-000000030.safetensors", "step-4000000000.safetensors"]
    os.utime(directory / "step-000000030.safetensors", (2**32, 2**32))  # dates mean nothing
    tensors, metadata, notices = checkpoint.load_state(directory)
    assert tensors["w"][0] == 4000000000
    assert (metadata["step"], metadata["epoch"], metadata["role"]) == (4000000000, 3, "state")
    assert notices == []


def test_damaged_state_falls_back_and_says_so(tmp_path):
    directory = tmp_path / "state"
    for step in (1, 2, 3):
        newest = checkpoint.save_state(directory, step, state(step), {}, keep=3)
    content = bytearray(newest.read_bytes())
    content[-3] ^= 4
    newest.write_bytes(content)
    (directory / "step-000000002.safetensors").write_bytes(b"")
    (directory / "step-000000009.safetensors").mkdir()
    shutil.copy(directory / "step-000000001.safetensors", directory / "step-000000008.safetensors")
    tensors, metadata, notices = checkpoint.load_state(directory)
    assert tensors["w"][0] == metadata["step"] == 1
    assert [f"step-00000000{n}" in notice for n, notice in zip((9, 8, 3, 2), notices, strict=True)] == [True] * 4
    assert "digest differs" in notices[2]


def test_all_states_damaged(tmp_path):
    checkpoint.save_state(tmp_path, 1, state(1), {}).write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="step-000000001"):
        checkpoint.load_state(tmp_path)


def test_other_files_are_no_states(tmp_path):
    for name in ("step-1.safetensors", "step-000000001.safetensors.bak", ".step-000000001.safetensors.00.tmp"):
        (tmp_path / name).write_bytes(b"x")
    assert checkpoint.load_state(tmp_path) is None


def test_nothing_is_removed_before_the_new_state_verifies(tmp_path, monkeypatch):
    for step in (1, 2):
        checkpoint.save_state(tmp_path, step, state(step), {})
    events = []
    real_verify, real_unlink, real_write = checkpoint.verify, os.unlink, durable.write_bytes
    monkeypatch.setattr(durable, "write_bytes", lambda *a: (events.append("write"), real_write(*a))[1])
    monkeypatch.setattr(states, "verify", lambda p: (events.append("verify"), real_verify(p))[1])
    monkeypatch.setattr(os, "unlink", lambda p: (events.append("remove"), real_unlink(p))[1])
    checkpoint.save_state(tmp_path, 3, state(3), {})
    assert events == ["write", "verify", "remove"]


def test_a_write_that_reads_back_wrong_costs_nothing(tmp_path, monkeypatch):
    for step in (1, 2):
        checkpoint.save_state(tmp_path, step, state(step), {})
    real = durable.write_bytes

    def lossy(path, data):
        real(path, [bytes(part).replace(b"\x40", b"\x41") if i else part for i, part in enumerate(data)])

    monkeypatch.setattr(durable, "write_bytes", lossy)
    with pytest.raises(WriteError, match="reads back differently"):
        checkpoint.save_state(tmp_path, 3, state(3), {})
    assert sorted(os.listdir(tmp_path)) == ["step-000000001.safetensors", "step-000000002.safetensors"]


def test_a_full_disk_costs_nothing(tmp_path, monkeypatch):
    for step in (1, 2):
        checkpoint.save_state(tmp_path, step, state(step), {})
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(WriteError, match=r"step-000000003.*ENOSPC"):
        checkpoint.save_state(tmp_path, 3, state(3), {})
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


STATE_CALLS = ("open", "mkdir", "write", "fsync", "close", "rename", "unlink", "preadv", "listdir")


def test_every_failing_call_leaves_a_state_to_go_on_from(tmp_path, monkeypatch):
    for number in itertools.count(1):
        directory = tmp_path / str(number)
        checkpoint.save_state(directory, 1, state(1), {})
        checkpoint.save_state(directory, 2, state(2), {})
        calls = []
        with monkeypatch.context() as patch:
            for call in STATE_CALLS:
                patch.setattr(os, call, failing(getattr(os, call), number, calls))
            try:
                checkpoint.save_state(directory, 3, state(3), {})
                failed = False
            except WriteError:
                failed = True
        tensors, metadata, notices = checkpoint.load_state(directory)
        assert tensors["w"][0] == metadata["step"] >= 2
        assert notices == []
        assert durable.clean_temps(directory) == []
        if len(calls) < number:
            break
        assert failed or metadata["step"] == 3  # closing a file that was only read may fail without harm
    assert number > 10


def test_killed_before_every_call_a_state_is_left_to_go_on_from(tmp_path):
    for number in itertools.count(1):
        directory = tmp_path / str(number)
        checkpoint.save_state(directory, 1, state(1), {})
        checkpoint.save_state(directory, 2, state(2), {})
        child = os.fork()
        if not child:
            calls = []
            for call in STATE_CALLS:
                setattr(os, call, dying(getattr(os, call), number, calls))
            checkpoint.save_state(directory, 3, state(3), {})
            os._exit(0)
        ending = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        tensors, metadata, notices = checkpoint.load_state(directory)
        assert tensors["w"][0] == metadata["step"] >= 2
        assert notices == []
        durable.clean_temps(directory)
        assert all(name.startswith("step-") for name in os.listdir(directory))
        if not ending:
            break
        assert ending == -signal.SIGKILL
    assert metadata["step"] == 3
    assert number > 10


def failing(real, number, calls):
    """`real`, but an error in place of the `number`-th of all `calls`."""

    def call(*args, **kwargs):
        calls.append(real)
        if len(calls) == number:
            if real.__name__ == "close":
                real(*args)
            raise OSError(errno.EIO, "Input/output error")
        return real(*args, **kwargs)

    return call


def dying(real, number, calls):
    """`real`, but a kill in place of the `number`-th of all `calls`."""

    def call(*args, **kwargs):
        calls.append(real)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    return call


def test_states_of_an_abandoned_future_go(tmp_path):
    for step in (1, 2, 50):
        checkpoint.save_state(tmp_path, step, state(step), {}, keep=3)
    checkpoint.save_state(tmp_path, 3, state(3), {})
    assert checkpoint.load_state(tmp_path)[1]["step"] == 3
    assert len(os.listdir(tmp_path)) == 2


def test_planted_state_directory(tmp_path):
    victim = tmp_path / "victim"
    checkpoint.save_state(victim, 9, state(9), {})
    (tmp_path / "state").symlink_to(victim)
    with pytest.raises(WriteError, match="symbolic link"):
        checkpoint.save_state(tmp_path / "state", 1, state(1), {})
    assert os.listdir(victim) == ["step-000000009.safetensors"]
