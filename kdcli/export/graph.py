"""The network as it is shipped: pixels in, answers out, with nothing of kd needed to run it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from kdcli.inference import Classifier
from kdcli.models import arch_spec, from_arch_spec
from kdcli.models.hooked import InputTap, OutputTap
from kdcli.models.network import Network
from kdcli.transforms import expand, fold, rescale, views


class Deployed(nn.Module):
    """uint8 or 0..1 float images [B,3,S,S] to class logits or probabilities [B,K], in one way of inference.

    The normalisation, the enlargement, the views and the folding of a joint head are inside. All views of a batch go
    through the network at once, which a graph can express and `class_logits` does one by one to save memory.
    """

    def __init__(self, classifier: Classifier, *, probabilities: bool) -> None:
        super().__init__()
        self.network = without_taps(classifier.network)
        self.use, self.inference, self.probabilities = classifier.use, classifier.inference, probabilities
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", classifier.mean.clone())
        self.register_buffer("std", classifier.std.clone())

    def forward(self, images: Tensor) -> Tensor:
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images
        seen = rescale((scaled - self.mean) / self.std, self.use.scale, self.use.scale_mode)
        if self.inference == "aggregate":
            seen = expand(seen, self.use.transform)
        logits = fold(self.network(seen).float(), views(self.use.transform), self.inference)
        return logits.softmax(1) if self.probabilities else logits


def without_taps(network: nn.Module) -> nn.Module:
    """A copy whose modules keep nothing of what passes through them: a traced graph has no place for it."""
    network = copy.deepcopy(network)
    for module in network.modules():
        for hooks, kind in ((module._forward_hooks, OutputTap), (module._forward_pre_hooks, InputTap)):
            for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
                del hooks[key]
    return network


def plain(network: Network, classes: int) -> Network:
    """A network with a joint head as one with `classes` outputs that computes its `single` inference.

    The rows of the last layer that stand for a class under the untransformed view are kept (class-major: y*M), the others
    are left out. A network that has one output a class already is returned as it is.
    """
    if network.outputs == classes:
        return network
    m = network.outputs // classes
    small = from_arch_spec({**arch_spec(network), "outputs": classes})
    tensors = network.state_dict()
    for name, like in small.state_dict().items():
        if tensors[name].shape != like.shape:
            tensors[name] = tensors[name][::m]
    small.load_state_dict(tensors, strict=True)
    return small.eval()
