"""A process that has imported everything once and forks a `kd` for every trial: a third of a second instead of several.

`Warm` starts it and talks to it in lines of JSON. It is a process of its own, not the one of the tests: those may have
started OpenMP threads, which do not live through a fork. In each child the command line's own entry runs as it is,
`kdcli.__main__.run(words)`, under the plan of `shim.play`. What differs has no say in the result: cached are the imports,
Typer's parser and the text file of the digits; and the file for watchers is written more often.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent, HERE.parent.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from forking import settle  # noqa: E402 - found through the lines above when this file is the server
from harness import Result  # noqa: E402

LIMIT = 120.0  # seconds; a trial that takes longer hangs, also on a busy machine


@dataclass
class Trial(Result):
    """What a trial left behind, besides its files.

    Attributes:
        code: as `subprocess` gives it: negative where a signal ended the process.
        seconds: from the fork to the end.
        events: what the shim reported, in order.
        ended: when it ended (the system's monotonic clock, seconds).
        hung: it had to be killed after `LIMIT`.
    """

    seconds: float = 0.0
    events: list[dict[str, Any]] = field(default_factory=list)
    ended: float = 0.0
    hung: bool = False

    def only(self, key: str) -> list[dict[str, Any]]:
        """The events that have `key`."""
        return [event for event in self.events if key in event]


class Warm:
    """The client's side: start the server, ask for trials, end it."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        self._server = subprocess.Popen(
            [sys.executable, str(HERE / "warmed.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def trial(self, words: list[str], cwd: Path, **plan: Any) -> Trial:
        """Run `kd WORDS` in `cwd` under `plan` (see `shim.play`).

        The plan's `signals` (seconds after the start, number) and `limit` (seconds until it counts as hung) are obeyed by
        the server, from outside.
        """
        return Trial(**self._ask({"words": [str(word) for word in words], "cwd": str(cwd), "plan": plan}))

    def learn(self, words: list[str], cwd: Path) -> None:
        """Let the server import what a child imported for this command."""
        answer = self._ask({"words": words, "cwd": str(cwd), "plan": {"modules": True, "limit": 600}})
        assert answer["code"] == 0, answer["err"]
        names = [name for event in answer["events"] if "modules" in event for name in event["modules"]]
        self._ask({"import": names})

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        try:
            self._server.wait(10)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        assert self._server.stdout is not None
        self._server.stdout.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        line = self._server.stdout.readline()
        assert line, "the warmed process is gone"
        return json.loads(line)


# ------------------------------------------------------------------------------------------------------- the server's side


def _serve() -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _prepare()
    for line in sys.stdin:
        request = json.loads(line)
        if "import" in request:
            for name in request["import"]:
                if name not in sys.modules:
                    with contextlib.suppress(Exception):  # C extensions that only their package can import
                        importlib.import_module(name)
            settle()
            answer: dict[str, Any] = {}
        else:
            answer = _trial(request["words"], request["cwd"], request["plan"])
        channel.write(json.dumps(answer) + "\n")
        channel.flush()


def _prepare() -> None:
    import sklearn.datasets
    import torch
    import typer.main

    import kdcli.training  # noqa: F401
    from kdcli.engine import pulse

    # The file for watchers is written by the clock, every few seconds. Written at every step and every evaluated batch,
    # it is there in these short runs too, and runs alike make the same calls.
    assert hasattr(pulse, "_EVERY")
    pulse._EVERY = 0.0
    torch.set_num_threads(1)
    typer.main.get_command = functools.cache(typer.main.get_command)
    sklearn.datasets.load_digits = functools.cache(sklearn.datasets.load_digits)


def _trial(words: list[str], cwd: str, plan: dict[str, Any]) -> dict[str, Any]:
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not live through a fork"
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as report:
        started = time.monotonic()
        pid = os.fork()
        if not pid:
            _child(words, cwd, plan, out.fileno(), err.fileno(), report.fileno())
        hung = _mind(pid, started, plan)
        _, status = os.waitpid(pid, 0)
        ended = time.monotonic()
        texts = []
        for file in (out, err, report):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return {
        "code": os.waitstatus_to_exitcode(status),
        "out": texts[0],
        "err": texts[1],
        "seconds": ended - started,
        "events": [json.loads(line) for line in texts[2].splitlines()],
        "ended": ended,
        "hung": hung,
    }


def _child(words: list[str], cwd: str, plan: dict[str, Any], out: int, err: int, report: int) -> None:
    code = 99
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.chdir(cwd)
        import shim

        code = shim.play(words, plan, report)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _mind(pid: int, started: float, plan: dict[str, Any]) -> bool:
    """Send the plan's signals in time and wait for the end; whether the process had to be killed.

    Nothing comes from the client during a trial: if its end of the pipe stirs, it is gone, and so is its trial then. The
    limit is counted in seconds in which this server ran: a machine that is suspended hangs nobody.
    """
    watch = os.pidfd_open(pid)
    try:
        for after, number in plan.get("signals", []):
            if select.select([watch], [], [], max(0.0, started + after - time.monotonic()))[0]:
                return False
            os.kill(pid, number)
        for _ in range(int(plan.get("limit", LIMIT))):
            stirred = select.select([watch, 0], [], [], 1.0)[0]
            if watch in stirred:
                return False
            if stirred:
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        return True
    finally:
        os.close(watch)


if __name__ == "__main__":
    _serve()
