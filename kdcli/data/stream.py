"""Images that are read and transformed per sample, in worker processes or in this one."""

from __future__ import annotations

import atexit
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kdcli.data.dataset import Split
from kdcli.data.decode import read_tensor
from kdcli.data.strong import Strong
from kdcli.data.transforms import Flipped, Transform, seeded
from kdcli.errors import KdError, WorkerError

Key = tuple[int, list[int]]
"""(epoch, positions in the split): all that a worker must be told to make a batch."""


_streaming: weakref.WeakSet[Stream] = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """End all workers before the interpreter waits for them at its exit: they ignore the SIGTERM that it sends."""
    for stream in list(_streaming):
        stream.close()


class Samples:
    """The data set as workers see it. It keeps no state: a sample is a function of seed, epoch and position.

    Args:
        function: what turns an image into the view that every method sees.
        random: whether it draws anything.
        further: what follows it, with other draws in each view; a strong view, which has operations of its own, goes
            without it.
        extra: further views of each image, `crop` or `strong` (see `Loader`).
        base: whether the batches hold the first view too, in front of the extra ones.

    Paths are one block of bytes with offsets, because a list of a million strings is copied into every worker as soon
    as its reference counts change (pytorch#13246).
    """

    def __init__(
        self,
        split: Split,
        function: Transform,
        seed: int,
        random: bool,
        *,
        further: Transform | None = None,
        extra: tuple[str, ...] = (),
        base: bool = True,
    ) -> None:
        self.images = split.images
        encoded = [os.fsencode(path) for path in split.paths or []]
        self.names = np.frombuffer(b"".join(encoded) or b"\0", dtype=np.uint8)
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.ids = split.ids.numpy()
        self.function, self.seed, self.random = function, seed, random
        self.further, self.extra, self.base = further, extra, base

    def __len__(self) -> int:
        return len(self.ids)

    def sample(self, epoch: int, position: int) -> Tensor:
        """uint8 [3,S,S], or [V,3,S,S] with further views.

        Raises:
            InputError: a file has become unreadable since it was checked.
        """
        if self.images is not None:
            image = self.images[position]
        else:
            image = read_tensor(os.fsdecode(self.names[self.ends[position] : self.ends[position + 1]].tobytes()))
        where = (self.seed, epoch, int(self.ids[position]))
        if not self.extra:
            image = seeded(self.function, image, *where, "augment") if self.random else self.function(image)
            return self._further(image, *where, "further")
        views, first, flip = [], image, False
        if self.base:  # beside resident images only strong views are wanted, which need nothing of the first
            first, flip = self._first(image, where)
            views.append(self._further(first, *where, "further"))
        for number, kind in enumerate(self.extra):
            purpose = (*where, kind, number)
            if kind == "strong":
                views.append(seeded(Strong(self.function), image, *purpose))
            elif isinstance(self.function, Flipped):
                crop = seeded(self.function.geometric, image, *purpose)
                views.append(self._further(crop.flip(-1) if flip else crop, *purpose, "further"))
            else:  # no crop to draw anew
                views.append(self._further(first, *purpose, "further"))
        return torch.stack(views)

    def _further(self, image: Tensor, *purpose: int | str) -> Tensor:
        return image if self.further is None else seeded(self.further, image, *purpose)

    def _first(self, image: Tensor, where: tuple[int, int, int]) -> tuple[Tensor, bool]:
        """The view that every method sees, and whether it is flipped."""
        if not isinstance(self.function, Flipped):
            return self.function(image), False
        flips: list[bool] = []

        def noting(image: Tensor) -> Tensor:
            augmented, flip = self.function.parts(image)  # type: ignore[attr-defined]
            flips.append(flip)
            return augmented

        return seeded(noting, image, *where, "augment"), flips[0]

    def __getitems__(self, key: Key) -> Tensor | KdError:
        """uint8 [b,3,S,S] or [b,V,3,S,S], or the error: torch would wrap a raised one into a traceback in text."""
        epoch, positions = key
        try:
            return torch.stack([self.sample(epoch, position) for position in positions])
        except KdError as error:
            return error


class _Keys:
    """The batch sampler: hands out whatever keys it was last given, one a batch."""

    def __init__(self) -> None:
        self.keys: list[Key] = []

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class Stream:
    """Batches of transformed uint8 images, the same for any number of workers.

    Args:
        workers: processes; 0 reads in this one.
        timeout: seconds without a batch after which the workers are given up.
    """

    def __init__(self, samples: Samples, *, workers: int, timeout: float) -> None:
        self.samples, self.workers, self.timeout = samples, workers, timeout
        self._keys = _Keys()
        self._loader: DataLoader[Any] | None = None

    def batches(self, keys: list[Key]) -> Iterator[Tensor]:
        """uint8 [b,3,S,S] or [b,V,3,S,S] for each key, in order.

        Raises:
            InputError: an image cannot be read.
            WorkerError: a worker died, or none answered in time; all of them are ended first.
        """
        source = self._in_workers(keys) if self.workers and keys else map(self.samples.__getitems__, keys)
        for batch in source:
            if isinstance(batch, KdError):
                raise batch
            yield batch

    def close(self) -> None:
        """End the workers; the next epoch starts new ones."""
        processes, self._loader = self._processes(), None
        for process in processes:
            process.kill()  # they ignore SIGTERM, and a stopped one would hold up the interpreter's exit
        for process in processes:
            process.join(5)

    def _in_workers(self, keys: list[Key]) -> Iterator[Tensor | KdError]:
        self._keys.keys = keys
        try:
            with quiet_children():
                source = iter(self._start())
            for _ in keys:
                with self._watching():
                    batch = next(source)
                yield batch
        except WorkerError:
            self.close()
            raise
        except (RuntimeError, OSError, EOFError) as error:
            # torch's own words for a dead or silent worker, and what its broken pipes look like from here.
            ours = str(error).startswith("DataLoader") or not isinstance(error, RuntimeError)
            if not ours and all(process.is_alive() for process in self._processes()):
                raise
            late = "timed out" in str(error)
            reason = f"no data worker answered within {self.timeout:g} s" if late else f"a data worker died ({error})"
            self.close()
            raise _gave_up(reason) from error

    def _start(self) -> DataLoader[Any]:
        if self._loader is None:
            _streaming.add(self)
            self._loader = DataLoader(
                self.samples,  # type: ignore[arg-type]
                batch_sampler=self._keys,  # type: ignore[arg-type]
                num_workers=self.workers,
                timeout=self.timeout,
                collate_fn=_as_is,
                worker_init_fn=_ignore_signals,
                persistent_workers=True,
                generator=torch.Generator(),  # torch draws a seed for the workers, which must not move the global one
            )
        return self._loader

    def _processes(self) -> list[Any]:
        iterator = None if self._loader is None else self._loader._iterator
        return list(getattr(iterator, "_workers", []))

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """While waiting for a batch, notice a worker's death at once and a worker's silence in any case.

        torch installs a SIGCHLD handler that raises wherever the program happens to be; `quiet_children` takes it out
        and this one stands in, here only. torch's own timeout covers the wait for a batch to be announced, but not the
        fetching of it from the worker: one that is stopped in between would be waited for without end, so an alarm
        rings two seconds after the timeout. Signals reach only the main thread: elsewhere torch's timeout has to do.
        """

        def check(*_: object) -> None:
            dead = [process for process in self._processes() if not process.is_alive()]
            if dead:
                raise _gave_up(f"data worker {dead[0].pid} died (exit {dead[0].exitcode})")

        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ring(*_: object) -> None:
            raise _gave_up(f"no data worker answered within {self.timeout:g} s")

        before = {number: signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGALRM)}
        signal.signal(signal.SIGCHLD, check)
        signal.signal(signal.SIGALRM, ring)
        others = signal.setitimer(signal.ITIMER_REAL, self.timeout + 2)
        try:
            check()
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, *others)
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def quiet_children() -> Iterator[None]:
    """Leave the SIGCHLD handler as it was, whatever is started inside."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)


def _gave_up(reason: str) -> WorkerError:
    hint = "the same command goes on; --workers 0 reads in the main process, --data-timeout waits longer"
    return WorkerError(reason, hint=hint)


def _as_is(batch: Any) -> Any:
    return batch


def _ignore_signals(_: int) -> None:
    """Ctrl-C and SIGTERM are for the main process, which finishes its step and saves; workers end when it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
