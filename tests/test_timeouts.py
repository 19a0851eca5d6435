"""`--data-timeout`, from the command line to the exit code: a silent data worker ends the run and costs no state."""

from __future__ import annotations

import os
import time

import pytest
from harness import TINY, finish, outcome, spawn, steps_saved
from PIL import Image

STREAMED = ["distill", "--method", "none", "--student", "resnet8", *TINY, "--max-steps", "8", "--color-jitter", "0.1"]


def test_a_stuck_worker_ends_the_run_and_the_same_command_goes_on(kd, tmp_path, monkeypatch):
    """Exit 8 within the timeout plus five seconds, one line with the flag in it, and the same bits in the end."""
    from kdcli.data import stream

    whole = kd(*STREAMED, "--workers", "1", "--out", "whole")
    assert whole.code == 0, whole.err
    main, original, fetched = os.getpid(), stream.Samples.__getitems__, []

    def silent(self, keys):
        fetched.append(1)  # counted in the worker, of which there is one
        if os.getpid() != main and len(fetched) == 5:
            time.sleep(60)
        return original(self, keys)

    words = [*STREAMED, "--workers", "1", "--checkpoint-every", "1", "--out", "run"]
    with monkeypatch.context() as patch:
        patch.setattr(stream.Samples, "__getitems__", silent)
        began = time.monotonic()
        result = kd(*words, "--data-timeout", "2")
        seconds = time.monotonic() - began
    assert result.code == 8
    assert "within 2 s" in result.error
    assert "--data-timeout" in result.error
    assert "same command" in result.error
    assert seconds < 40  # most of it is the start of the run
    assert 0 < steps_saved(tmp_path / "run") < 8
    assert kd("verify", "run").code == 0
    again = kd(*words)
    assert again.code == 0
    assert "going on at step" in again.err
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(("flags", "code"), [(["--max-steps", "1"], 0), (["--lr", "1e38"], 6)])
def test_no_data_worker_holds_up_the_end(flags, code, tmp_path):
    """Workers ignore SIGTERM, and the interpreter waits for those that are left: after an error, or of the test images."""
    for part, count in (("train", 8), ("test", 2)):
        for name in ("light", "dark"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("L", (16, 16), number + 200 * (name == "light")).save(folder / f"{number}.png")
    words = ["distill", "--method", "none", "--student", "resnet8", "--dataset", "folder:images", "--image-size", "16"]
    words += ["--set", "data.resident_mib=0", "--batch-size", "8", "--epochs", "2", "--device", "cpu", "--threads", "1"]
    result = finish(spawn(*words, *flags, "--workers", "1", "--quiet", cwd=tmp_path), timeout=90)
    assert result.code == code, result.err
