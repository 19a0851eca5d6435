"""What the ranks of tests/test_gather.py run; importable, because they are started afresh."""

from __future__ import annotations

import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from kdcli import methods
from kdcli.data.loader import Batch
from kdcli.data.ranks import share as share_of
from kdcli.gather import BatchNorm2d, gathered, moments, share
from kdcli.methods import slkd
from kdcli.methods.base import Progress, Setting
from kdcli.models import build
from kdcli.models.heads import Headed
from kdcli.models.network import Network
from kdcli.models.panel import Panel
from kdcli.specs import validate

K, SIZE = 5, 16


class Plain(Network):
    """Three stages of a convolution and a GELU each: no normalisation, so ranks can agree with one process."""

    def __init__(self, width: int, outputs: int, first: int = 0) -> None:
        super().__init__(outputs=outputs, n_stages=3, pooled_dim=4 * width, classifier_name="fc", first=first)
        self.width, self.arch, self.image_size = width, f"plain{width}", SIZE
        channels = [width, width, 2 * width, 4 * width]
        if first == 0:
            self.conv0 = nn.Conv2d(3, width, 3, padding=1)
        for i in self.own_stages:
            again = first > self.n_stages
            stride = 1 if i == 1 or again else 2
            self.add_module(f"conv{i}", nn.Conv2d(channels[i if again else i - 1], channels[i], 3, stride, 1))
        self.fc = nn.Linear(4 * width, outputs)

    def stem(self, x: Tensor) -> Tensor:
        return F.gelu(self.conv0(x))

    def raw_stage(self, i: int, x: Tensor) -> Tensor:
        return getattr(self, f"conv{i}")(x)

    def close(self, i: int, raw: Tensor) -> Tensor:
        return F.gelu(raw)

    def preact_norm(self, i: int) -> nn.BatchNorm2d:
        norm = nn.BatchNorm2d(self.width * (1, 2, 4)[i - 1])  # a margin for OFD; nothing is normalised by it
        return norm.to(self.fc.weight.dtype)

    def final(self, x: Tensor) -> Tensor:
        return x

    def tail(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = x.mean((2, 3))
        return pooled, self.fc(pooled)

    def truncated(self, first: int, outputs: int) -> Plain:
        return Plain(self.width, outputs, first)


def another(arch: str, outputs: int, *rest: Any, **more: Any) -> Network:
    """`build` for methods that want one more network like the teacher, which may be a `Plain` here."""
    return Plain(int(arch.removeprefix("plain")), outputs) if "plain" in arch else build(arch, outputs, *rest, **more)


slkd.build = another


def work(rank: int, world: int, folder: Path, jobs: dict[str, tuple[str, tuple[Any, ...]]]) -> None:
    """Do all jobs (label → function of this module and its arguments), each in a process group of its own.

    What a job returns, or its traceback, is saved, so that one that fails does not hide the others.
    """
    torch.set_num_threads(1)
    for label, (function, arguments) in jobs.items():
        if world > 1:
            where = f"file://{folder}/store-{label}"
            dist.init_process_group("gloo", where, rank=rank, world_size=world, timeout=timedelta(seconds=30))
        try:
            found: Any = globals()[function](rank, world, *arguments)
            if world > 1:
                dist.barrier()  # all together: one that goes while another still talks would end it with SIGABRT
        except Exception:
            found = traceback.format_exc()
        finally:
            if world > 1:
                dist.destroy_process_group()
        torch.save(found, folder / f"{label}-{rank}.pt")


def part(x: Tensor, rank: int, world: int) -> tuple[Tensor, float]:
    """This rank's rows of the whole batch and their weight, as the loader shares them out."""
    low, high, weight = share_of(0, len(x), rank, world, train=True)
    return x[low:high], weight


def parts_of_a_batch(rank: int, world: int, count: int) -> Batch:
    """A batch of `count` random images with all the extra views a method may ask for, this rank's part of it."""
    g = torch.Generator().manual_seed(7)
    views = [torch.randn(count, 3, SIZE, SIZE, generator=g, dtype=torch.float64) for _ in range(4)]
    labels = torch.randint(0, K, (count,), generator=g)
    index = torch.randperm(20, generator=g)[:count]
    labels, weight = part(labels, rank, world)
    cut = [part(x, rank, world)[0] for x in views]
    return Batch(cut[0], labels, part(index, rank, world)[0], weight, tuple(cut[1:]))


def averaged(module: nn.Module) -> dict[str, Tensor]:
    """Gradients by name, averaged over the ranks as DDP does."""
    found = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        if dist.is_initialized():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        found[name] = parameter.grad
    return found


def rows(rank: int, world: int, count: int) -> dict[str, Any]:
    """Gathered rows and their gradients, the share, and BatchNorm over all ranks."""
    whole = torch.randn(count, 6, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x, weight = part(whole, rank, world)
    x = x.clone().requires_grad_()
    batch = Batch(x.detach(), torch.arange(len(x)), torch.arange(len(x)), weight)
    everyone = gathered(x, batch)
    ((everyone @ everyone.mT).pow(3).sum() / 100 * weight).backward()
    twice = x.detach().clone().requires_grad_()  # autograd hands one and the same gradient to both terms of a sum
    ((gathered(twice.cos(), batch) + gathered(twice.sin(), batch)).pow(3).sum() * weight).backward()
    norm = BatchNorm2d(6).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 6))
        norm.bias.copy_(torch.linspace(-1, 1, 6))
    y = x.detach().clone().requires_grad_()
    normed = norm(y)
    (normed.pow(3).mean() * weight).backward()
    bare = BatchNorm2d(6, affine=False).double()
    plain = bare(x.detach())
    return {
        "rows": everyone.detach(),
        "grad": x.grad,
        "sum_grad": twice.grad,
        "share": share(batch),
        "normed": normed.detach(),
        "norm_grad": y.grad,
        "parameters": averaged(norm),
        "statistics": (norm.running_mean, norm.running_var, norm.num_batches_tracked),
        "plain": plain,
        "moments": moments(x.detach()),
    }


def method(
    rank: int, world: int, name: str, settings: dict[str, Any], count: int, normed: bool = False
) -> dict[str, Any]:
    """Loss and averaged gradients of a method's step on a part of a batch; two steps, for the banks.

    In float64 on networks without BatchNorm, or (`normed`) in float32 on real ones with it.
    """
    found = methods.method_class(name)
    spec = validate(found.Spec, {"name": name, **settings}, prefix="method")
    found.check(spec)
    torch.manual_seed(0)
    dtype = torch.float32 if normed else torch.float64
    outputs = found.student_outputs(spec, K), found.teacher_outputs(spec, K)
    student: Network = build("resnet8", outputs[0], SIZE) if normed else Plain(3, outputs[0]).double()
    network: Network = build("resnet14", outputs[1], SIZE) if normed else Plain(4, outputs[1]).double()
    heads = found.teacher_heads(spec, network, K)
    teacher: Any = network if heads is None else Headed(network, heads)
    if found.assistants == "all":
        other = build("resnet8", network.outputs, SIZE) if normed else Plain(3, network.outputs)
        teacher = Panel(network, [other])
    teacher = teacher.to(dtype).eval().requires_grad_(False)
    labels = torch.arange(20) % K
    parts = parts_of_a_batch(0, 1, count)
    labels[parts.index] = parts.labels
    setting = Setting(K, SIZE, 0.0, scale=spec.teacher_scale, labels=labels)
    step = nn.ModuleDict({"student": student, "method": found(spec, setting, student, teacher).to(dtype)}).train()
    losses = []
    for number in range(2):
        step.zero_grad()
        progress = Progress(torch.tensor(30.0), torch.tensor(0.5), odd_step=False, seed=number)
        batch = parts_of_a_batch(rank, world, count)
        views = tuple(view.to(dtype) for view in batch.extra[: len(found.augmentations(spec))])
        batch = replace(batch, images=batch.images.to(dtype), extra=views)
        torch.manual_seed(11)
        objective: Any = step["method"]
        with torch.no_grad():
            taught = objective.teacher_features(teacher, objective.teacher_views(batch, progress))
        learned = objective.student_features(student, objective.student_views(batch, progress))
        learned = objective.joint_features(learned, taught)
        terms = objective.loss(batch, learned, taught, progress)
        total = torch.stack(list(terms.values())).sum() * batch.weight
        total.backward()
        mean = total.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
            mean /= world
        losses.append(mean)
    buffers = {n: b for n, b in step.named_buffers() if b.is_floating_point()}
    return {"losses": losses, "gradients": averaged(step), "buffers": buffers}
