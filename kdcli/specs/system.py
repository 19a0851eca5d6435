"""Where and how."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import field_validator, model_validator

from kdcli.errors import UsageError
from kdcli.specs.section import Section, aside


class SystemSpec(Section):
    """Where and how the run is carried out."""

    device: str = aside("auto")
    """auto, cpu, cuda or cuda:N; auto takes a GPU if there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the networks; losses are always computed in fp32."""
    compile: bool = False
    """Compile the training step with torch.compile: a minute or two at the start, faster steps after."""
    cuda_graphs: bool = aside(True)
    """On a GPU, record the training step once and replay it: small networks wait for the host otherwise."""
    threads: int | None = aside(None, ge=1, le=1024)
    """CPU threads; recorded, because the last bits depend on them; default: all cores."""
    workers: int = aside(2, ge=0, le=256)
    """Data worker processes for data sets that stream; results do not depend on it."""
    data_timeout: float = aside(120.0, gt=0)
    """Seconds to wait for a data worker before the run ends with exit code 8."""
    nproc: int = aside(1, ge=1, le=1024)
    """Processes to train with on this machine, one rank each (torch's elastic launcher)."""
    rank_timeout: float = aside(600.0, gt=0)
    """Seconds to wait for another rank before the run ends with exit code 8."""
    out: str | None = aside(None)
    """The run directory; default: a name made from the spec under runs_dir."""
    runs_dir: str = aside("runs")
    """Where run directories are made and teachers are looked for."""
    overwrite: bool = aside(False)
    """Start anew in a run directory that holds a run already."""
    checkpoint_every: int | None = aside(None, ge=1)
    """Steps between checkpoints; default: one every 30 seconds."""
    max_minutes: float | None = aside(None, gt=0)
    """Save and stop after this many minutes (exit code 75); the same command goes on."""
    requeue: bool = aside(False)
    """On SIGTERM leave with exit code 75 (run the same command again) instead of 143."""
    tensorboard: bool = aside(False)
    """Also write what metrics.jsonl holds to RUN/tensorboard (needs kdcli[tensorboard])."""
    wandb: str | None = aside(None)
    """Also log to this project of Weights & Biases, offline unless you are logged in (needs kdcli[wandb])."""

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", value):
            return value
        raise UsageError(f"{value!r} is no device", field="--device", hint="auto, cpu, cuda or cuda:N")

    @model_validator(mode="after")
    def _a_gpu_each(self) -> Self:
        if self.nproc > 1 and self.device.startswith("cuda:"):
            raise UsageError(
                f"{self.device} is one GPU, and there are {self.nproc} ranks", field="--device", hint="use cuda"
            )
        return self
