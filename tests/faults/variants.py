"""Variants of `kd`, by name: broken ones, which the suite must notice, and strange surroundings, which must not matter.

Each function changes the forked process that it is called in and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def _with(**others: Any) -> SimpleNamespace:
    """The `os` module, but for some functions; the shim's are found at each call."""

    class Mostly(SimpleNamespace):
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

    return Mostly(**others)


# ------------------------------------------------------------------------------------------------------- broken: R1 to R4


def no_fsync() -> None:
    """Files are not synced before they get their name."""
    from kdcli import durable

    durable.os = _with(fsync=lambda fd: None)  # type: ignore[attr-defined]


def no_directory_sync() -> None:
    """A rename is left to the system."""
    from kdcli import durable

    durable.sync_dir = lambda directory: None


def delete_before_save() -> None:
    """The previous states make room before the next one is there."""
    from kdcli import checkpoint

    save = checkpoint.save_state

    def saving(directory: Any, *args: Any, **more: Any) -> Path:
        if Path(directory).is_dir():
            for path in Path(directory).glob("step-*"):
                path.unlink()
        return save(directory, *args, **more)

    checkpoint.save_state = saving


def in_place() -> None:
    """Files are written under their own name."""
    from kdcli import durable

    def writing(path: Any, data: Any, **more: Any) -> None:
        buffers = [data] if isinstance(data, bytes | bytearray | memoryview) else data
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            for buffer in buffers:
                durable._write_all(fd, buffer)
            os.fsync(fd)
            os.close(fd)
        except OSError as problem:
            raise durable.write_error(path, problem) from None

    durable.write_bytes = writing


def optimizer_forgotten() -> None:
    """The optimiser's memory is loaded and dropped."""
    from kdcli.engine import state

    unpack = state.unpack

    def unpacking(tensors: Any, at: int, step: Any, optimizer: Any, *more: Any) -> Any:
        sums = unpack(tensors, at, step, optimizer, *more)
        optimizer.state.clear()
        return sums

    state.unpack = unpacking


def weights_loaded_loosely() -> None:
    """`strict=False`: whatever is missing stays as it was initialised. A tensor is lost on the way."""
    from kdcli.engine import state

    def loosely(module: Any, tensors: Any, what: str) -> None:
        tensors = {name: value for name, value in tensors.items() if not name.endswith("fc.weight")}
        module.load_state_dict(tensors, strict=False)

    state._strict = loosely


def epoch_begun_again() -> None:
    """After a stop within an epoch its images come from the epoch's beginning: those of the last steps twice."""
    from kdcli import training

    make_loader = training.make_loader

    def making(*args: Any, **more: Any) -> Any:
        loader = make_loader(*args, **more)
        epoch = loader.epoch
        setattr(loader, "epoch", lambda number, begun=0: epoch(number))  # noqa: B010 - other names of its arguments
        return loader

    training.make_loader = making


def counted_from_each_start() -> None:
    """The state holds how far the epoch is, counted from the start of the process: wrong from the second start on."""
    from faultjobs import PER_EPOCH

    from kdcli import checkpoint, training
    from kdcli.engine import fit

    save, load, make_loader = checkpoint.save_state, checkpoint.load_state, training.make_loader
    resume = fit.Training._resume
    begun, counted = [0], [0]

    def loading(*args: Any) -> Any:
        found = load(*args)
        counted[0] = found[1].pop("counted", 0) if found is not None else 0
        return found

    def resuming(self: Any) -> None:
        resume(self)
        begun[0] = self.at

    def saving(directory: Any, step: int, tensors: Any, metadata: Any, **more: Any) -> Path:
        same = step // PER_EPOCH == begun[0] // PER_EPOCH
        position = step - begun[0] if same else step % PER_EPOCH
        return save(directory, step, tensors, {**metadata, "counted": position}, **more)

    def making(*args: Any, **more: Any) -> Any:
        loader = make_loader(*args, **more)
        epoch = loader.epoch
        setattr(loader, "epoch", lambda number, at=0: epoch(number, counted[0] if at else 0))  # noqa: B010 - as above
        return loader

    checkpoint.save_state, checkpoint.load_state = saving, loading
    fit.Training._resume, training.make_loader = resuming, making  # type: ignore[method-assign]


def sums_forgotten() -> None:
    """The running sums of the epoch start at nothing after a stop: the log tells of a part of the epoch."""
    from kdcli.engine import state

    unpack = state.unpack

    def unpacking(*args: Any) -> Any:
        return {name: value * 0 + (name == "images") for name, value in unpack(*args).items()}

    state.unpack = unpacking


def swallowed_errors() -> None:
    """A state that cannot be written is not worth a word."""
    from kdcli import checkpoint
    from kdcli.errors import WriteError

    save = checkpoint.save_state

    def saving(*args: Any, **more: Any) -> Any:
        with contextlib.suppress(WriteError):
            return save(*args, **more)

    checkpoint.save_state = saving


def traceback_for_errors() -> None:
    """An `OSError` goes its way."""
    from kdcli import durable

    durable.write_error = lambda path, problem: problem


def temporary_files_left() -> None:
    """Nobody tidies up after a killed process."""
    from kdcli import durable

    durable.clean_temps = lambda directory: []


# --------------------------------------------------------------------------------------------------- broken: R5 and others


def signals_ignored() -> None:
    """The handler forgets."""
    from kdcli.engine.signals import StopFlag

    StopFlag.receive = lambda self, number, frame: None  # type: ignore[method-assign]


def stopped_at_once() -> None:
    """The handler leaves from wherever it finds the training, with the state as it happens to be."""
    from kdcli.engine import fit

    listening = fit.listening
    fit.listening = lambda flag: listening(flag, at_once=True)


def spec_withdrawn_first() -> None:
    """What a run that did not begin has left is removed, the spec first."""
    from kdcli.runs import directory as runs

    def withdraw(directory: Path) -> None:
        for name in ("spec.json", "env.json", "metrics.jsonl", ".lock"):
            with contextlib.suppress(OSError):
                (directory / name).unlink()
        with contextlib.suppress(OSError):
            directory.rmdir()

    runs._withdraw = withdraw


def unseeded() -> None:
    """torch's generator is seeded by the system."""
    import torch

    seed = torch.manual_seed
    torch.manual_seed = lambda number: seed(int.from_bytes(os.urandom(6), "little"))


def follows_links() -> None:
    """Whatever bears the name is written to."""
    in_place()


def no_lock() -> None:
    """Nobody asks whether the directory is in use."""
    from kdcli.runs import directory

    directory.hold = contextlib.nullcontext


def newest_by_date() -> None:
    """The newest state is the one with the latest date."""
    from kdcli.checkpoint import states as kept

    states = kept._states

    def by_date(directory: Path) -> dict[int, Path]:
        return dict(sorted(states(directory).items(), key=lambda item: item[1].stat().st_mtime, reverse=True))

    kept._states = by_date


def time_left_by_the_wall_clock() -> None:
    """What is left is told from the difference of two times of day."""
    from kdcli.engine import pulse

    pulse.time = SimpleNamespace(monotonic=lambda: time.time())  # type: ignore[attr-defined]


def memory_errors_unknown() -> None:
    """Nobody recognises that the memory is used up."""
    from kdcli import training
    from kdcli.engine import fit

    training.guarded = fit.guarded = contextlib.nullcontext


# ----------------------------------------------------------------------------------------- broken: R7 to R9, true processes


def gradients_not_shared() -> None:
    """Each rank learns from its own part of the batch."""
    from kdcli.engine import fit

    fit.DistributedDataParallel = lambda module, **_: module  # type: ignore[assignment,misc]


def ranks_waited_for() -> None:
    """As long as torch does by itself: half an hour."""
    from datetime import timedelta

    from kdcli.engine import distributed

    distributed.timedelta = lambda **_: timedelta(minutes=30)  # type: ignore[assignment,misc]


def workers_waited_for() -> None:
    """Without end, as torch does by itself."""
    from kdcli.data.stream import Stream

    init = Stream.__init__

    def initialising(self: Any, samples: Any, *, workers: int, timeout: float) -> None:
        init(self, samples, workers=workers, timeout=0)

    Stream.__init__ = initialising  # type: ignore[method-assign]
    Stream._watching = lambda self: contextlib.nullcontext()  # type: ignore[method-assign]


# -------------------------------------------------------------------------------------------------------------- surroundings


def stopped_while_reading() -> None:
    """SIGTERM comes when the images are read."""
    from kdcli import training

    load_data = training.load_data

    def loading(*args: Any, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return load_data(*args, **more)

    training.load_data = loading


def slow_step() -> None:
    """Before step 5 it waits until there is a file `go` beside the run."""
    from kdcli.engine import fit

    step = fit.Training.step

    def stepping(self: Any, *args: Any) -> None:
        until = time.monotonic() + 60
        while self.at == 5 and not os.path.exists("go") and time.monotonic() < until:
            time.sleep(0.01)
        step(self, *args)

    fit.Training.step = stepping  # type: ignore[method-assign]


TIMED: dict[str, Any] = {}


def timed_saves() -> None:
    """How long each save took, and the whole training, by the clock and of the processor, is noted (seconds)."""
    from kdcli.engine import fit

    save, run, saves = fit.Training._save, fit.Training.run, []

    def saving(self: Any) -> None:
        begun = time.perf_counter()
        save(self)
        saves.append(time.perf_counter() - begun)

    def running(self: Any) -> Any:
        begun, worked = time.perf_counter(), time.process_time()
        try:
            return run(self)
        finally:
            TIMED.update(
                saves=saves, total=time.perf_counter() - begun, work=time.process_time() - worked, steps=self.at
            )

    fit.Training._save, fit.Training.run = saving, running  # type: ignore[method-assign]


def _clock(wall: Any, monotonic: Any) -> None:
    time.time, time.monotonic = wall, monotonic


def clock_an_hour_back() -> None:
    """The wall clock is an hour late."""
    real = time.time
    _clock(lambda: real() - 3600, time.monotonic)


def clock_three_years_on() -> None:
    """The wall clock is three years ahead."""
    real = time.time
    _clock(lambda: real() + 3 * 365 * 86400, time.monotonic)


def clock_set_back() -> None:
    """The wall clock is an hour earlier at every look."""
    real, looks = time.time, [0]

    def earlier() -> float:
        looks[0] += 1
        return real() - 3600 * looks[0]

    _clock(earlier, time.monotonic)


def clock_frozen() -> None:
    """All clocks stand still."""
    wall, since_boot = time.time(), time.monotonic()
    _clock(lambda: wall, lambda: since_boot)


def clock_jumping() -> None:
    """The wall clock jumps both ways, the other one ahead, as after a suspension."""
    draw, wall, since_boot, ahead = random.Random(0), time.time, time.monotonic, [0.0]

    def jumping() -> float:
        ahead[0] += draw.choice([0.0, 0.0, 0.0, 3600.0])
        return since_boot() + ahead[0]

    _clock(lambda: wall() + draw.uniform(-1e8, 1e8), jumping)
