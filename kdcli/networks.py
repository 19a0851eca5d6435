"""Between checkpoints and networks: build from metadata, load strictly, describe for saving, compare class names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcli import checkpoint
from kdcli.data.dataset import DataSet
from kdcli.data.transforms import evaluated_side
from kdcli.errors import IncompatibleError, InputError, NotFiniteError, UsageError
from kdcli.inference import Classifier, Use
from kdcli.metadata import require_network
from kdcli.models import arch_spec, from_arch_spec
from kdcli.models.heads import Headed, from_heads_spec, heads_spec
from kdcli.models.network import Network
from kdcli.transforms import check


@dataclass
class Loaded:
    """A network read from a checkpoint.

    Attributes:
        network: the backbone, or a `Headed` one if the checkpoint holds auxiliary heads.
        digest: of the weights; the same weights have the same digest.
    """

    network: Network | Headed
    metadata: dict[str, Any]
    use: Use
    digest: str
    path: Path

    @property
    def backbone(self) -> Network:
        """The network without its heads."""
        return self.network.network if isinstance(self.network, Headed) else self.network


def load_network(path: str | Path) -> Loaded:
    """Read a checkpoint, or the student (else teacher) of a run directory, into a network in eval mode.

    Raises:
        InputError: missing, damaged, or not a network's checkpoint.
        IncompatibleError: its tensors do not fit the architecture it names.
        NotFiniteError: a weight or buffer is NaN or infinite.
    """
    file = checkpoint.locate(path)
    tensors, metadata = checkpoint.load(file)
    if metadata["role"] not in ("student", "teacher") or "arch" not in metadata:
        raise InputError(f"{file} is a {metadata['role']}, not a network", hint="name a student or a teacher")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NotFiniteError(f"{file}: the tensor {name} is not finite", hint="train it again")
    require_network(metadata, file)
    network = _built(metadata, tensors, file)
    _load(network, tensors, file)
    return Loaded(network.eval(), metadata, Use.of(metadata), metadata["digest"], file)


def _built(metadata: dict[str, Any], tensors: dict[str, torch.Tensor], file: Path) -> Network | Headed:
    """The network that the metadata describe, with weights still to be filled in.

    Its shapes are compared before it gets any memory: a small file must not be able to ask for a huge network.
    """

    def build() -> Network | Headed:
        backbone = from_arch_spec(metadata["arch"])
        heads = metadata.get("heads")
        return backbone if heads is None else Headed(backbone, from_heads_spec(heads, backbone))

    try:
        check(metadata.get("inference", {}).get("transform", "none"))
        with torch.device("meta"):
            expected = tensors_of(build())
        for name, like in expected.items():
            if name in tensors and tensors[name].shape != like.shape:
                found = f"{name} is {list(tensors[name].shape)}, not {list(like.shape)}"
                raise IncompatibleError(f"{file} does not fit its architecture: {found}")
        return build()
    except UsageError as problem:  # no network of that name; taps it does not have
        raise IncompatibleError(f"{file}: {problem.message}", hint="upgrade kd, or make the checkpoint again") from None


def _load(network: Network | Headed, tensors: dict[str, torch.Tensor], file: Path) -> None:
    modules: list[tuple[nn.Module, dict[str, torch.Tensor]]] = []
    if isinstance(network, Headed):
        own = {k: v for k, v in tensors.items() if not k.startswith("heads.")}
        heads = {k.removeprefix("heads."): v for k, v in tensors.items() if k.startswith("heads.")}
        modules = [(network.network, own), (network.heads, heads)]
    else:
        modules = [(network, tensors)]
    for module, state in modules:
        try:
            module.load_state_dict(state, strict=True)
        except RuntimeError as problem:
            raise IncompatibleError(
                f"{file} does not fit its architecture: {' '.join(str(problem).split())[:240]}"
            ) from None


def tensors_of(network: Network | Headed) -> dict[str, torch.Tensor]:
    """What a checkpoint holds: the backbone's tensors under the public names, heads under `heads.<j>.`."""
    if not isinstance(network, Headed):
        return dict(network.state_dict())
    heads = {f"heads.{key}": value for key, value in network.heads.state_dict().items()}
    return {**network.network.state_dict(), **heads}


def fingerprint(network: nn.Module) -> str:
    """SHA-256 (hex) of a module's parameters and buffers, to show that a frozen network stayed as it was."""
    content = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        content.update(name.encode())
        content.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def describe(network: Network | Headed, dataset: DataSet, use: Use) -> dict[str, Any]:
    """The part of a checkpoint's metadata that makes it usable on its own."""
    backbone = network.network if isinstance(network, Headed) else network
    described: dict[str, Any] = {
        "arch": arch_spec(backbone),
        "classes": list(dataset.classes),
        "image_size": dataset.image_size,
        "resize": evaluated_side(dataset.image_size, files=dataset.test.images is None),
        "normalization": {"mean": list(dataset.mean), "std": list(dataset.std)},
        "dataset": dataset.name,
        "inference": {"transform": use.transform, "scale": use.scale, "scale_mode": use.scale_mode},
    }
    if isinstance(network, Headed):
        described["heads"] = heads_spec(network.heads)
    return described


def compare_classes(metadata: dict[str, Any], dataset: DataSet, path: Path) -> None:
    """Refuse a network whose classes are not the data set's, by name and in order.

    Raises:
        IncompatibleError: naming the first difference.
    """
    theirs, ours = list(metadata["classes"]), list(dataset.classes)
    if theirs == ours:
        return
    if sorted(theirs) == sorted(ours):
        where = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
        problem = f"its classes are in another order (class {where} is {theirs[where]!r}, here {ours[where]!r})"
    elif len(theirs) != len(ours):
        problem = f"it knows {len(theirs)} classes and {dataset.name} has {len(ours)}"
    else:
        other = sorted(set(theirs) - set(ours))
        problem = f"{len(other)} of its classes are not in {dataset.name}, among them {other[0]!r}"
    raise IncompatibleError(f"{path}: {problem}", hint=f"train or import it for {dataset.name}")


def load(path: str | Path, inference: str = "single") -> Classifier:
    """A trained student or teacher, ready to use: preprocessing, class names, class logits.

    Args:
        path: a checkpoint or a finished run directory.
        inference: `single`, `marginal` or `aggregate` for networks with a joint head.

    Raises:
        InputError, IncompatibleError, NotFiniteError: as `load_network`.
    """
    loaded = load_network(path)
    return Classifier(loaded.backbone, loaded.use, loaded.metadata, inference).eval()
