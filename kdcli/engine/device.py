"""The device a run computes on: CPU threads or a GPU, its precision, and its memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from kdcli.errors import KdError, OutOfMemoryError, UsageError
from kdcli.specs import SystemSpec

M = TypeVar("M", bound=nn.Module)

# How torch says it outside of its own allocator for GPUs: on the CPU, from CUDA itself (a context, a graph), from cuBLAS.
_NO_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Device:
    """Where and in what precision the networks run."""

    torch: torch.device
    precision: str
    threads: int

    @property
    def cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.torch.type == "cuda"

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 for the networks if asked for; losses are computed outside of it."""
        if self.precision == "bf16":
            return torch.autocast(self.torch.type, torch.bfloat16)
        return contextlib.nullcontext()

    def place(self, module: M) -> M:
        """Move a module here, convolutions in channels-last, which is the faster layout on CPUs and GPUs alike."""
        module.to(device=self.torch)
        # torch's stubs lack the combination of device and memory format.
        return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """On a GPU, work on a stream of its own from here on: the default one cannot be recorded as a CUDA graph."""
        if not self.cuda:
            yield
            return
        before, own = torch.cuda.current_stream(self.torch), torch.cuda.Stream(self.torch)
        own.wait_stream(before)
        try:
            with torch.cuda.stream(own):
                yield
        finally:
            before.wait_stream(own)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given (for timing)."""
        if self.cuda:
            torch.cuda.synchronize(self.torch)

    def peak_mib(self) -> float | None:
        """The most memory used since `begin_run`, in MiB: the device's on a GPU, the process's resident set on the CPU.

        None on the CPU where an earlier run of this process may have used it, and the system cannot tell.
        """
        if self.cuda:
            return round(torch.cuda.max_memory_allocated(self.torch) / 2**20, 1)
        if not _peak.own:
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


@dataclass
class _Peak:
    """Whether runs began in this process, and whether the peak that the system tells is that of the last of them."""

    begun: bool = False
    own: bool = True


_peak = _Peak()


def begin_run() -> None:
    """Free what an earlier run of this process left, so that the peak of memory is that of the run that begins.

    A finished training is a ring of references, networks and all. glibc keeps what it held (see `_keep_freed_memory`)
    until it is told to give it back. Linux forgets a process's peak when asked to.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    if _peak.begun:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        try:
            _CLEAR_REFS.write_text("5")  # proc(5): the peak is what is resident now
            _peak.own = True
        except OSError:
            _peak.own = False
    _peak.begun = True


def choose(system: SystemSpec) -> torch.device:
    """The device a spec names; of several GPUs each rank takes one of its own, by `LOCAL_RANK`.

    Raises:
        UsageError: there is no such device, or several ranks are to share one.
    """
    name = system.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("this torch sees no GPU", field="--device", hint="use --device cpu")
    _, named, number = name.partition(":")
    if named and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise UsageError(f"{name} is one GPU, and there are several ranks", field="--device", hint="use cuda")
    index = int(number if named else os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        hint = "count from 0" if named else "start as many ranks, or use --device cpu"
        raise UsageError(f"there are {torch.cuda.device_count()} GPUs", field="--device", hint=hint)
    return torch.device("cuda", index)


def open_device(system: SystemSpec, threads: int | None = None) -> Device:
    """The device a spec names, with threads pinned.

    Args:
        threads: a thread count recorded by the run that is being continued; the spec's own wins.

    Raises:
        UsageError: as `choose`.
    """
    device = choose(system)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    count = system.threads or threads or _default_threads()
    torch.set_num_threads(count)
    if device.type == "cpu":
        _keep_freed_memory()
    return Device(device, system.precision, count)


def _keep_freed_memory() -> None:
    """Let glibc keep what torch frees instead of giving every large block back to the system and faulting it in again.

    A step allocates and frees the same large maps each time; measured on 64-pixel inputs, a training step of wrn16_2 takes
    1.2 to 1.4 times less time. Elsewhere than on glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks from the heap too, not each from a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: do not shrink the heap after every free


def _default_threads() -> int:
    """The cores this process may use, shared between the ranks on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Turn torch's out-of-memory errors into `OutOfMemoryError`."""
    try:
        yield
    except KdError:
        raise
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as problem:
        text = str(problem)
        if not (isinstance(problem, MemoryError | torch.OutOfMemoryError) or _means_memory(text)):
            raise
        raise OutOfMemoryError(
            f"out of memory: {text.splitlines()[0] if text else 'allocation failed'}",
            hint="a smaller --batch-size, or --accumulate 2",
        ) from None


def _means_memory(text: str) -> bool:
    """Whether a RuntimeError's text is how torch, CUDA or oneDNN say that memory is short.

    oneDNN says no more than that it could not make a primitive; where the address space is limited, that is why.
    """
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    return any(said in text for said in _NO_MEMORY) or (limited and "a primitive" in text)
