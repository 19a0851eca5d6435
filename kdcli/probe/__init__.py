"""Linear probe: one linear layer on the frozen pooled features of a network, on another data set.

The defaults are the protocol of HSAKD's code (METHODS 7.1): the encoder's BatchNorm in eval mode, RandomResizedCrop to the
encoder's input size and flip, SGD 0.9 nesterov, lr 0.1, no weight decay, 100 epochs, decay at 30, 60 and 90.
"""

from __future__ import annotations

from kdcli.probe.layer import Probe, ProbeStep
from kdcli.probe.previewing import preview
from kdcli.probe.running import probe

__all__ = ["Probe", "ProbeStep", "preview", "probe"]
