"""The lock of a run directory: one holder, never stale, never blocking."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from kdcli.errors import BusyError, WriteError
from kdcli.runs import lock as runlock

HOLDER = """
import sys, time
from kdcli.runs import lock as runlock
with runlock.hold(sys.argv[1]):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_second_process_is_refused_at_once_and_told_who(tmp_path, holder):
    start = time.monotonic()
    with pytest.raises(BusyError, match=f"process {holder.pid}") as caught, runlock.hold(tmp_path):
        pass
    assert time.monotonic() - start < 1
    assert caught.value.code == 9
    assert str(tmp_path) in caught.value.line()
    assert holder.poll() is None


def test_lock_dies_with_its_process(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with runlock.hold(tmp_path):
        assert (tmp_path / ".lock").read_text().strip() == str(os.getpid())


def test_forked_worker_does_not_keep_the_lock(tmp_path):
    with runlock.hold(tmp_path):
        worker = os.fork()
        if not worker:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.2)
    try:
        with runlock.hold(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_released_after_use_and_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), runlock.hold(tmp_path):
        raise ZeroDivisionError
    with runlock.hold(tmp_path), pytest.raises(BusyError), runlock.hold(tmp_path):
        pass
    with runlock.hold(tmp_path):
        pass


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory", "hardlink"])
def test_planted_lock_is_refused(tmp_path, kind):
    victim, lock = tmp_path / "victim", tmp_path / ".lock"
    victim.write_bytes(b"victim")
    if kind == "symlink":
        lock.symlink_to(victim)
    elif kind == "fifo":
        os.mkfifo(lock)
    elif kind == "directory":
        lock.mkdir()
    else:
        os.link(victim, lock)
    with pytest.raises(WriteError, match=r"\.lock"), runlock.hold(tmp_path):
        pass
    assert victim.read_bytes() == b"victim"


def test_missing_directory(tmp_path):
    with pytest.raises(WriteError, match="nowhere"), runlock.hold(tmp_path / "nowhere"):
        pass
