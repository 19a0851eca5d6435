"""Between a running `kd` and the system: counts every call that changes a file, and strikes at the one it is told to.

It lives in the child of a trial. It sees the calls made through Python's `os`, and `open()` for writing; that kd makes no
others is shown by `test_order.py` with strace. Only calls on files below the trial's working directory count.

A *blow* is what happens at a call: `kill` (SIGKILL in its place), `half` (a write does its first half, then SIGKILL), an
error such as `ENOSPC` (raised in its place), `half-ENOSPC` (a write does half, then the error), or `signal-15` (the signal,
then the call).
"""

from __future__ import annotations

import builtins
import errno
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_STATE = re.compile(r"step-(\d+)\.safetensors")
# Calls that need no room: they work on a full disk.
_ROOMLESS = ("unlink", "rmdir", "ftruncate", "fsync")

BY_PATH = ("open", "unlink", "remove", "mkdir", "rmdir")
BY_DESCRIPTOR = ("write", "pwrite", "fsync", "ftruncate")
TO_PATH = ("rename", "replace", "link", "symlink")


def play(words: list[str], plan: dict[str, Any], report: int) -> int:
    """Run `kd WORDS` under a plan; its exit code.

    Args:
        plan: any of
            `modules`: report what was imported;
            `trace`: report every call; with `data` also what was written;
            `states`: report the digest and the metadata of every resume state that gets its name;
            `at`, `blow`, `onward`: strike at that call (counted from 1), and at all after it if `onward`;
            `moment`, `blow`: strike at a moment of the training, `[step, phase]`, see `Shim.moment`;
            `branch`: strike at many calls of one run, see `branches.Branches`;
            `variants`: names in `variants.py`;
            `limits`: name of a resource limit → bytes;
            `memory`: report the address space before and at most (bytes).
        report: a descriptor to which events are written as lines of JSON.
    """
    from kdcli.__main__ import run

    shim = Shim(Path.cwd(), plan, report)
    for name in plan.get("variants", []):
        import variants

        getattr(variants, name)()
    shim.install()
    before = _mapped("VmSize")
    for name, value in plan.get("limits", {}).items():
        resource.setrlimit(getattr(resource, name), (value, value))
    code = run(words)
    if plan.get("modules"):
        shim.tell(modules=sorted(sys.modules))
    if plan.get("memory"):
        shim.tell(memory=[before, _mapped("VmPeak")])
    shim.tell(calls=shim.count)
    return code


def _mapped(which: str) -> int:
    """The address space of this process, now (`VmSize`) or at most (`VmPeak`), in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(which))


class Shim:
    """The counter and the striker.

    Attributes:
        root: the directory below which calls count.
        count: calls so far.
        step: training step (0 before the first is done).
    """

    def __init__(self, root: Path, plan: dict[str, Any], report: int) -> None:
        self.root, self.plan, self.report = str(root), plan, report
        self.count = self.step = self.evaluations = 0
        self.struck = False
        self.real: dict[str, Callable[..., Any]] = {}
        self.branches: Any = None
        if "branch" in plan:
            from branches import Branches

            self.branches = Branches(self, **plan["branch"])

    def tell(self, **event: Any) -> None:
        """Report an event; it is safe from whatever happens next."""
        write = self.real.get("write", os.write)
        write(self.report, (json.dumps(event) + "\n").encode())

    def install(self) -> None:
        """Put the shim in front of the system's calls and of the training's moments."""
        for name in (*BY_PATH, *BY_DESCRIPTOR, *TO_PATH):
            self.real[name] = getattr(os, name)
            setattr(os, name, self._wrapped(name))
        self.real["open()"] = builtins.open
        builtins.open = self._open_file  # type: ignore[assignment]
        if {"moment", "trace", "at"} & set(self.plan):
            self._moments()

    # ----------------------------------------------------------------------------------------------------- the calls

    def _wrapped(self, name: str) -> Callable[..., Any]:
        real = self.real[name]

        def call(*args: Any, **more: Any) -> Any:
            path = self._path(name, args, more)
            if path is None:
                return real(*args, **more)
            return self._passing(name, path, args, lambda: real(*args, **more))

        return call

    def _open_file(self, file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        real = self.real["open()"]
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return real(file, mode, *args, **more)
        path = os.path.abspath(os.fspath(file))
        if not self._below(path):
            return real(file, mode, *args, **more)
        return self._passing("open()", path, (), lambda: real(file, mode, *args, **more))

    def _path(self, name: str, args: tuple[Any, ...], more: dict[str, Any]) -> str | None:
        """What the call is about to change, if it lies below the root."""
        if name in BY_DESCRIPTOR:
            try:
                path = os.readlink(f"/proc/self/fd/{args[0]}")
            except OSError:
                return None
        else:
            if name == "open" and not args[1] & _WRITING:
                return None
            base = more.get("dir_fd")
            folder = os.getcwd() if base is None else os.readlink(f"/proc/self/fd/{base}")
            path = os.path.abspath(os.path.join(folder, os.fsdecode(args[1 if name in TO_PATH else 0])))
        return path if self._below(path) else None

    def _below(self, path: str) -> bool:
        return path.startswith(self.root + "/")

    def _passing(self, name: str, path: str, args: tuple[Any, ...], go_on: Callable[[], Any]) -> Any:
        """Count the call, strike if it is the one, else let it pass."""
        self.count += 1
        shown = os.path.relpath(path, self.root)
        if self.plan.get("trace"):
            self._trace(name, shown, args)
        if self.branches is not None:
            blow = self.branches.visit(self.count, name, shown, args)
        else:
            first = self.plan.get("at", 0)
            due = self.count == first or (self.plan.get("onward", False) and 0 < first < self.count)
            blow = self.plan.get("blow") if due else None
        if blow is not None:
            self.strike(blow, name, shown, args)
        result = go_on()
        if self.plan.get("states") and name in ("rename", "replace") and (match := _STATE.fullmatch(Path(path).name)):
            from kdcli import checkpoint

            metadata = checkpoint.read_metadata(path)
            told = {key: metadata[key] for key in ("digest", "facts", "threads", "lines", "best")}
            self.tell(state=int(match[1]), **told)
        return result

    def _trace(self, name: str, shown: str, args: tuple[Any, ...]) -> None:
        event: dict[str, Any] = {"call": name, "path": shown, "n": self.count, "step": self.step}
        if name in TO_PATH:
            event["source"] = os.path.relpath(os.path.abspath(os.fsdecode(args[0])), self.root)
        if name == "ftruncate":
            event["size"] = args[1]
        if name == "open":
            event["truncates"] = bool(args[1] & os.O_TRUNC)
        if name in ("write", "pwrite"):
            event["size"] = len(args[1])
            event["offset"] = args[2] if name == "pwrite" else os.lseek(args[0], 0, os.SEEK_CUR)
            if self.real["open()"](f"/proc/self/fdinfo/{args[0]}").read().split("flags:")[1].split()[0][-4] in "2367":
                event["offset"] = os.fstat(args[0]).st_size  # opened to append
            if self.plan.get("data"):
                event["data"] = bytes(args[1]).hex()
        self.tell(**event)

    def strike(self, blow: str, name: str, shown: str, args: tuple[Any, ...]) -> None:
        """Do what `blow` says. Raises `OSError` where it is an error; does not return from a kill."""
        if not self.struck:
            self.tell(struck=blow, call=name, path=shown, n=self.count, step=self.step, time=time.monotonic())
        self.struck = True
        if blow.startswith("signal-"):
            for number in blow.removeprefix("signal-").split("-"):
                os.kill(os.getpid(), int(number))
            return
        if blow.startswith("half") and name == "write":
            self.real["write"](args[0], bytes(args[1])[: len(args[1]) // 2])
        if blow in ("kill", "half"):
            os.kill(os.getpid(), signal.SIGKILL)
        reason = getattr(errno, blow.removeprefix("half-"))
        if name in _ROOMLESS and name != "fsync" and reason in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return
        raise OSError(reason, os.strerror(reason))

    # --------------------------------------------------------------------------------------------------- the moments

    def moment(self, phase: str, number: int) -> None:
        """Strike if the plan's moment is this one: `[number, phase]`.

        Phases: `step`, `backward`, `stepped` (before a step, after its backward pass, after the step; number: the step),
        `evaluating`, `tick` (before an evaluation, after its first batch; number: the evaluation, from 1), `data`
        (before the images are read; number 0), `export` (before the network is written; number 0).
        """
        if self.plan.get("moment") == [number, phase] and not self.struck:
            self.strike(self.plan["blow"], phase, "", ())

    def _moments(self) -> None:
        import torch

        from kdcli import training
        from kdcli.engine import fit

        step, evaluate, backward = fit.Training.step, fit.evaluate, torch.Tensor.backward
        load_data, export = training.load_data, training._export

        def stepping(trainer: Any, epoch: int, batch: Any) -> None:
            self.step = trainer.at
            self.moment("step", trainer.at)
            step(trainer, epoch, batch)
            self.step = trainer.at
            self.moment("stepped", trainer.at - 1)

        def going_back(tensor: Any, *args: Any, **more: Any) -> None:
            backward(tensor, *args, **more)
            self.moment("backward", self.step)

        def evaluating(*args: Any, tick: Any = None, **more: Any) -> Any:
            self.evaluations += 1
            self.moment("evaluating", self.evaluations)

            def ticking(done: int, of: int) -> None:
                if done == 1:
                    self.moment("tick", self.evaluations)
                if tick is not None:
                    tick(done, of)

            return evaluate(*args, tick=ticking, **more)

        def loading(*args: Any, **more: Any) -> Any:
            self.moment("data", 0)
            return load_data(*args, **more)

        def exporting(*args: Any, **more: Any) -> Any:
            self.moment("export", 0)
            return export(*args, **more)

        fit.Training.step = stepping  # type: ignore[method-assign]
        fit.evaluate = evaluating
        torch.Tensor.backward = going_back  # type: ignore[method-assign]
        training.load_data = loading
        training._export = exporting
