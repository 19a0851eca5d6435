"""How much memory a run will need at its peak, found out without needing it.

A step runs on fake tensors, which have shapes and no content: that takes about a second at any batch size, and the bytes
that are alive at once are those of the real step. To these comes what the process (on a GPU: the device) holds
before its first step, which is measured.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import math
import os
import resource
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdcli.data.loader import Batch
from kdcli.engine import distributed, optim
from kdcli.engine.device import Device
from kdcli.engine.step import Step, StepOutput, deploy
from kdcli.engine.totals import Totals
from kdcli.engine.update import Update
from kdcli.inference import Use, class_logits
from kdcli.specs import TrainSpec

_SMALL = (4, 8, 16)  # images in the real steps from which a batch is extrapolated where fake tensors do not do

# What a heap that gives nothing back (`engine.device`) grows by when more bytes are alive at once: they take
# 1.3 times their room and, up to 100 MiB, that once more, since blocks of a step seldom fit exactly where others were;
# half of what was free serves again. Fitted to runs of kd, crd, sp, rkd, slkd and vsd with 50 to 1,800 MiB alive in a
# step. Repeated, the very same run differs by a tenth of its whole, so that nothing finer would be true.
_HEAP_GROWTH, _SCATTERED, _FREE_USED = 1.3, 100 * 2**20, 0.5


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, each storage once, real or fake, autograd's included.

    What existed before counts as nothing, and as minus its size once it is gone. Memory that an operation needs only
    inside itself (workspaces of libraries) is not seen.

    Attributes:
        now: bytes alive.
        peak: the most that were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._meet(tensor, new=False)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            self._meet(tensor, new=True)
        return out

    def restart(self) -> None:
        """Forget the peak: it is what is alive now."""
        self.peak = self.now

    def _meet(self, tensor: Tensor, *, new: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        # torch keeps a storage's Python object for as long as the storage lives, in views and in autograd's graph too.
        weakref.finalize(storage, self._drop, key, size).atexit = False
        if new:
            self.now += size
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class _Unguarded(Update):
    """An update that does not ask whether its numbers are finite: fake ones are no numbers."""

    def _guard(self, bad: Tensor, output: StepOutput) -> None:
        pass


@dataclass(frozen=True)
class Training:
    """What trains in a run, as far as its memory goes.

    Attributes:
        step: on its device.
        batch: makes a batch of so many images.
        images: in a batch of this process.
        evaluated: images in a batch of an evaluation.
        ranks: processes that train together.
        kept: bytes of tensors that live through the training and are not there yet.
    """

    step: Step
    use: Use
    device: Device
    recipe: TrainSpec
    batch: Callable[[int], Batch]
    images: int
    evaluated: int
    ranks: int = 1
    kept: int = 0

    def peak(self) -> int:
        """Bytes alive at the peak, beyond what lives before the first step: networks, data and the method's own state.

        It is the largest of a step (with gradients and the optimiser's slots), an evaluation, and saving.
        """
        return max(self.steps(self.images), self._learned() + self._evaluation(), self._saving())

    def steps(self, images: int) -> int:
        """Bytes alive at the peak of steps of `images` images."""
        try:
            return self._counted(self._take, images)
        except Exception:
            # Whatever a method does that fake tensors cannot do (reading a number, say): it is no error of the run.
            sizes = sorted({min(n, images) for n in _SMALL})
            values = [self._counted(self._take, n, fake=False) for n in sizes]
            return round(max(values[-1], extrapolated(sizes, values, images)))

    def small_step(self, images: int) -> None:
        """One real step forward and backward, so that what is loaded and chosen at first use is there."""
        update = self._update(self.step, None)
        self.step.train()
        update.forward(self.batch(images), update.progress(odd=False, seed=0)).total.backward()
        for parameter in self.step.parameters():
            parameter.grad = None
        self.device.synchronize()

    def beside(self) -> int:
        """Bytes that live through the training beside the step: averaged weights, buckets for ranks, what is kept."""
        averaged = sum(t.nbytes for t in self.step.trained.state_dict().values()) if self.recipe.ema is not None else 0
        buckets = sum(p.nbytes for p in self._trainable()) if self.ranks > 1 else 0
        return averaged + buckets + self.kept

    def _counted(self, work: Callable[[Step, int], None], images: int, *, fake: bool = True) -> int:
        """Bytes alive at the peak of `work` on a copy of the step, beyond that copy."""
        mode: Any = contextlib.nullcontext()
        if fake:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
        with FakeCopyMode(mode) if fake else mode:
            step = copy.deepcopy(self.step)
        live = LiveBytes()
        with mode, live:
            work(step, images)
        return live.peak

    def _take(self, step: Step, images: int) -> None:
        """Two steps, the second with the optimiser's slots there; as in the loop, a batch lives until the next one does."""
        optimizer = optim.optimizer(self.recipe, step, self.device.cuda, step.undecayed())
        update = self._update(step, optimizer)
        step.train()
        for number in range(2):
            batch = self.batch(images)
            update(batch, odd=bool(number), seed=0)

    def _evaluation(self) -> int:
        try:
            return self._counted(self._evaluate, self.evaluated)
        except Exception:  # as in `steps`; an evaluation keeps no maps, and rarely is the peak
            return 0

    @torch.no_grad()
    def _evaluate(self, step: Step, images: int) -> None:
        """Two batches of an evaluation by each network; as in the loop, logits live until the next ones do."""
        plain = Use(scale_mode=self.use.scale_mode)
        used = [(deploy(step.trained), self.use), *((module, plain) for module in step.companions().values())]
        logits: dict[str, Tensor] = {}
        for network, use in used:
            network.eval()
            for _ in range(2):
                batch = self.batch(images)
                with self.device.autocast():
                    logits = class_logits(network, batch.images, use, use.modes)
            logits.clear()

    def _update(self, step: Step, optimizer: Any) -> Update:
        totals = Totals(self.device.torch)
        return _Unguarded(step, step, optimizer, self.recipe, self.device, totals, Path())

    def _trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self.step.parameters() if p.requires_grad]

    def _learned(self) -> int:
        """Bytes of the gradients and of the optimiser's slots."""
        return (1 + self._slots()) * sum(p.nbytes for p in self._trainable())

    def _slots(self) -> int:
        return 2 if self.recipe.optimizer == "adamw" else 1

    def _saving(self) -> int:
        """Bytes alive while the state is saved; on a GPU the copies are in the host's memory."""
        if self.device.cuda:
            return self._learned()
        # What does not lie in memory as in the file is copied: all weights in channels-last order, and their slots.
        copied = sum(t.nbytes for t in self.step.state_dict().values() if not t.is_contiguous())
        copied += self._slots() * sum(p.nbytes for p in self._trainable() if not p.is_contiguous())
        return self._learned() + copied


def extrapolated(sizes: Sequence[int], values: Sequence[float], at: int) -> float:
    """The value at `at` of the polynomial through the points: with three, losses that compare B² pairs of images are met."""
    total = 0.0
    for i, (size, value) in enumerate(zip(sizes, values, strict=True)):
        total += value * math.prod((at - x) / (size - x) for j, x in enumerate(sizes) if j != i)
    return total


def ranks_of(nproc: int) -> int:
    """How many processes will train together: those there are, or those that `--nproc` will start."""
    return max(nproc, distributed.world())


def estimate(trainings: Sequence[Training]) -> float:
    """MiB at the peak, as `Device.peak_mib` will report it, of a process that has set up everything for `trainings`.

    They take place one after the other. On the CPU it is the resident set of the process: interpreter, libraries, data,
    networks, and what the heap grows by. On a GPU it is what torch has allocated, with the workspaces that libraries
    ask for in a small step.
    """
    device = trainings[0].device
    few = min(_SMALL[0], *(training.images for training in trainings))
    if device.cuda:
        held = torch.cuda.memory_allocated(device.torch)
        most = workspace = 0
        for training in trainings:
            torch.cuda.reset_peak_memory_stats(device.torch)
            before_it = torch.cuda.memory_allocated(device.torch)
            with LiveBytes() as live:
                training.small_step(few)
            seen = torch.cuda.max_memory_allocated(device.torch) - before_it
            workspace = max(workspace, seen - live.peak)
            most = max(most, training.peak() + training.beside())
        return (held + most + workspace) / 2**20
    for training in trainings:
        training.small_step(few)
    before = _Process.now()  # what follows loads modules that a run does not need
    most = max(training.peak() + training.beside() for training in trainings)
    return before.peak_with(most) / 2**20


@dataclass(frozen=True)
class _Process:
    """The memory of this process in bytes.

    Attributes:
        resident: of it in memory now.
        peak: the most so far.
        free: of `resident`, what the heap keeps although nothing is in it; None if it is not glibc's and keeps nothing.
    """

    resident: int
    peak: int
    free: int | None

    @classmethod
    def now(cls) -> _Process:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        with contextlib.suppress(OSError):
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return cls(resident, max(peak, resident), _free_in_heap())  # the kernel tells both a little late

    def peak_with(self, alive: int) -> float:
        """Bytes resident at the peak once `alive` more are alive at once."""
        if self.free is None:
            return max(self.peak, self.resident + alive)
        growth = _HEAP_GROWTH * alive + min(alive, _SCATTERED) - _FREE_USED * self.free
        return max(self.peak, self.resident + max(0.0, growth))


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _free_in_heap() -> int | None:
    """Free bytes in glibc's heap; None where the C library is another one or too old to tell."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return None
    mallinfo.restype = _Mallinfo
    return mallinfo().fordblks
