"""What computes: the CPU, the GPUs, and whether they give right answers in the precisions that kd has."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli.doctor.finding import Finding, size

if TYPE_CHECKING:
    import torch

DRIVER = Path("/proc/driver/nvidia/version")
LOW_MEMORY = 1 << 30  # bytes free on a GPU below which most trainings do not fit


def devices() -> list[Finding]:
    """The CPU and every GPU that torch sees; each computes a small product in fp32 and bf16."""
    try:
        import torch
    except Exception as problem:  # a missing library, a wrong CUDA: whatever it is, nothing can be trained
        reason = " ".join(str(problem).split())[:200]
        return [
            Finding("torch", f"cannot be imported: {type(problem).__name__}: {reason}", "problem", "install it anew")
        ]
    found = [_cpu()]
    driver = _driver()
    built = torch.version.cuda or getattr(torch.version, "hip", None)
    facts = {"cuda": built, "driver": driver, "devices": 0}
    if not torch.cuda.is_available():
        return [*found, _no_gpu(built, driver, facts)]
    for index in range(torch.cuda.device_count()):
        found.append(_gpu(index, built, driver))
    return found


def _cpu() -> Finding:
    import torch

    works, bad = _precisions(torch.device("cpu"))
    fast = _bf16_instructions()
    facts: dict[str, Any] = {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "precisions": works,
        "bf16_fast": fast,
    }
    if bad:
        return Finding(
            "cpu", bad, "problem", "torch does not work on this processor: install another build", facts=facts
        )
    bf16 = "" if fast else " (bf16 without instructions of its own: slow)"
    return Finding("cpu", f"{facts['capability']}, {' and '.join(works)}{bf16}", facts=facts)


def _no_gpu(built: str | None, driver: str | None, facts: dict[str, Any]) -> Finding:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if driver is not None and hidden in ("", "-1"):
        return Finding("gpu", "hidden by CUDA_VISIBLE_DEVICES: trainings use the CPU", facts=facts)
    if driver is not None:
        what = f"for CUDA {built}" if built else "without CUDA"
        text = f"there is a driver ({driver}), but torch, built {what}, sees no GPU: trainings use the CPU"
        return Finding("gpu", text, "warning", "install a torch build that fits the driver", facts=facts)
    return Finding("gpu", "none: trainings use the CPU", facts=facts)


def _gpu(index: int, built: str | None, driver: str | None) -> Finding:
    import torch

    name = f"cuda:{index}"
    facts: dict[str, Any] = {"cuda": built, "driver": driver}
    try:
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        works, bad = _precisions(torch.device("cuda", index))
    except RuntimeError as problem:
        works, bad = [], f"does not answer: {str(problem).splitlines()[0]}"
        return Finding(name, bad, "problem", "is another program holding it? nvidia-smi tells", facts=facts)
    facts |= {"name": about.name, "memory": total, "free": free, "precisions": works}
    facts["capability"] = f"{about.major}.{about.minor}"
    told = (
        f"{about.name}, {size(free)} of {size(total)} free, {' and '.join(works)}, CUDA {built}, driver {driver or '?'}"
    )
    if bad:
        return Finding(name, f"{told}: {bad}", "problem", "install a torch build for this GPU", facts=facts)
    if free < LOW_MEMORY:
        return Finding(name, told, "warning", "another program uses its memory: nvidia-smi tells which", facts=facts)
    return Finding(name, told, facts=facts)


def _precisions(device: torch.device) -> tuple[list[str], str]:
    """The precisions in which a product of ones comes out right, and what is wrong with the others."""
    import torch

    works, bad = [], []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        try:
            ones = torch.ones(64, 64, dtype=dtype, device=device)
            right = bool(((ones @ ones) == 64).all())
            reason = "" if right else f"{name} gives wrong results"
        except RuntimeError as problem:
            reason = f"{name} does not work: {str(problem).splitlines()[0]}"
        if reason:
            bad.append(reason)
        else:
            works.append(name)
    return works, "; ".join(bad)


def _bf16_instructions() -> bool:
    """Whether the processor multiplies bf16 by itself, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False
    return bool(re.search(r"^(flags|Features)\s*:.*\b(avx512_bf16|amx_bf16|avx_ne_convert|bf16)\b", text, re.MULTILINE))


def _driver() -> str | None:
    """The version of the NVIDIA driver that is loaded, if one is."""
    try:
        text = DRIVER.read_text(errors="replace")
    except OSError:
        return None
    match = re.search(r"Module\s.*?(\d+(\.\d+)+)", text)
    return match[1] if match else "unknown"
