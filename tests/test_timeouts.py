"""`--data-timeout`, from the command line to the exit code: a silent data worker ends the run and costs no state."""

from __future__ import annotations

import os
import time

from harness import TINY, outcome, steps_saved

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
