"""Which device a run takes, alone or as one of several ranks, and what is out of memory; torch is mocked."""

from __future__ import annotations

import resource
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kdcli.engine import distributed
from kdcli.engine.device import choose, guarded, open_device
from kdcli.errors import OutOfMemoryError, UsageError
from kdcli.specs import SystemSpec, validate


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A machine with two GPUs; what is asked of torch, in order: the GPU to use, the process group to join."""
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(("set", device)))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: asked.append((backend, more)))
    monkeypatch.setattr(dist, "barrier", lambda: asked.append("barrier"))
    return asked


def as_rank(number: int, of: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a rank on a machine of its own launcher."""
    for name, value in {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": of, "LOCAL_WORLD_SIZE": of}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_one_process_takes_the_gpu_that_is_named(name: str, index: int, calls: list[Any]) -> None:
    device = open_device(SystemSpec(device=name, threads=1))
    assert device.torch == torch.device("cuda", index)
    assert calls == [("set", device.torch)]


@pytest.mark.parametrize(
    "name", ["cuda1", "cuda:", "cuda:x", "cuda:-1", "cuda:1.0", "CUDA", "gpu", "mps", "", "cuda:٣"]
)
def test_other_names_are_no_device(name: str) -> None:
    """The spec says so, wherever it comes from, and not torch, in the middle of the work."""
    with pytest.raises(UsageError, match="is no device") as caught:
        validate(SystemSpec, {"device": name})
    assert caught.value.field == "--device"


def test_a_gpu_that_is_not_there(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="there are 2 GPUs"):
        choose(SystemSpec(device="cuda:2"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose(SystemSpec(device="auto")) == torch.device("cpu")
    with pytest.raises(UsageError, match="sees no GPU"):
        choose(SystemSpec(device="cuda"))


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_ranks_take_their_gpus_before_they_meet(name: str, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would take the first GPU for every rank at the first barrier."""
    as_rank(1, 2, monkeypatch)
    distributed.start(SystemSpec(device=name, rank_timeout=7))
    own = torch.device("cuda", 1)
    first, (backend, more), last = calls
    assert (first, backend, last) == (("set", own), "nccl", "barrier")
    assert more["device_id"] == own
    assert more["timeout"].total_seconds() == 7


def test_ranks_on_the_cpu_meet_by_gloo(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is asked of a GPU."""
    as_rank(1, 2, monkeypatch)
    distributed.start(SystemSpec(device="cpu"))
    (backend, more), last = calls
    assert (backend, set(more), last) == ("gloo", {"timeout"}, "barrier")


def test_more_ranks_than_gpus_are_refused_before_they_meet(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the number of GPUs, and not with NCCL's own words."""
    as_rank(2, 3, monkeypatch)
    with pytest.raises(UsageError, match="there are 2 GPUs"):
        distributed.start(SystemSpec(device="cuda"))
    assert calls == []


def test_ranks_of_one_machine_share_no_gpu(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--nproc` the spec says so, under torchrun the rank; a rank alone on its machine may name its GPU."""
    with pytest.raises(UsageError, match="cuda:1 is one GPU"):
        SystemSpec(device="cuda:1", nproc=2)
    as_rank(0, 2, monkeypatch)
    with pytest.raises(UsageError, match="cuda:1 is one GPU"):
        distributed.start(SystemSpec(device="cuda:1"))
    assert calls == []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    distributed.start(SystemSpec(device="cuda:1"))
    assert calls[0] == ("set", torch.device("cuda", 1))


@pytest.mark.parametrize(
    "problem",
    [
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory"),
        MemoryError(),
    ],
)
def test_every_way_to_run_out_of_memory_is_exit_7(problem: Exception) -> None:
    with pytest.raises(OutOfMemoryError, match="out of memory") as caught, guarded():
        raise problem
    assert caught.value.code == 7


def test_other_errors_of_a_gpu_are_not_out_of_memory() -> None:
    with pytest.raises(torch.AcceleratorError), guarded():
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(("limit", "expected"), [(2**32, OutOfMemoryError), (resource.RLIM_INFINITY, RuntimeError)])
def test_one_dnn_is_short_of_memory_only_under_a_limit(
    limit: int, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its words are the same for whatever it cannot do."""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, resource.RLIM_INFINITY))
    with pytest.raises(expected), guarded():
        raise RuntimeError("could not create a primitive")
