"""A frozen encoder with a linear layer on its pooled features, and one step of that layer's training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdcli.data.loader import Batch
from kdcli.engine.device import Device
from kdcli.engine.step import Step, StepOutput
from kdcli.inference import Use
from kdcli.losses import cross_entropy
from kdcli.methods.base import Progress
from kdcli.models.network import Network
from kdcli.transforms import rescale


class Probe(nn.Module):
    """A frozen encoder and a fresh linear layer on its pooled features [B,C]; forward gives logits [B,K].

    Args:
        device: in whose precision the encoder computes.
        adapt: keep the encoder's BatchNorm in training mode.
    """

    def __init__(self, encoder: Network, use: Use, classes: int, device: Device, *, adapt: bool) -> None:
        super().__init__()
        self.encoder, self.use, self.adapt = encoder.requires_grad_(False), use, adapt
        self.device = device
        self.linear = nn.Linear(encoder.pooled_dim, classes)

    def train(self, mode: bool = True) -> Probe:
        """Only the linear layer has a training mode, unless the encoder's BatchNorm is to adapt."""
        super().train(mode)
        self.encoder.train(mode and self.adapt)
        return self

    def pooled(self, images: Tensor) -> Tensor:
        """[B,C] fp32 features of normalised images, without gradient."""
        with torch.no_grad(), self.device.autocast():
            return self.encoder.features(rescale(images, self.use.scale, self.use.scale_mode)).pooled.float()

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.pooled(images))


class ProbeStep(Step):
    """One step of a probe's training: cross-entropy of the linear layer."""

    def __init__(self, probe: Probe, smoothing: float) -> None:
        super().__init__()
        self.trained, self.smoothing = probe, smoothing

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """Loss of a batch: images [B,C,H,W], labels [B]."""
        logits = self.trained(batch.images)
        loss = cross_entropy(logits, batch.targets, self.smoothing)
        correct = (logits.detach().argmax(1) == batch.labels).sum()
        return StepOutput(loss, {"ce": loss.detach()}, {}, correct)
