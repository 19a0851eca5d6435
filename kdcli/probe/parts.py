"""From a probe's spec to its parts: the encoder, the images as the encoder takes them, the layer to be trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kdcli import checkpoint
from kdcli.building import load_data
from kdcli.data.dataset import DataSet
from kdcli.data.randomness import mix
from kdcli.engine.device import Device
from kdcli.errors import UsageError
from kdcli.networks import Loaded, load_network
from kdcli.output import Story
from kdcli.probe.layer import Probe
from kdcli.specs import RunSpec


@dataclass(frozen=True)
class Parts:
    """What a probe is made of.

    Attributes:
        loaded: the encoder's checkpoint.
        dataset: at the encoder's input size, with the normalisation that the spec asks for.
        module: on its device.
    """

    loaded: Loaded
    dataset: DataSet
    module: Probe


def build(spec: RunSpec, device: Device, story: Story | None = None) -> Parts:
    """The parts of a probe; the weights of its layer depend on the seed and nothing else.

    Raises:
        UsageError: a setting would have no effect.
        KdError: the encoder or the images cannot be read.
    """
    assert spec.encoder is not None
    _refuse_ignored(spec)
    loaded = load_network(checkpoint.locate(spec.encoder))
    dataset = _dataset(spec, loaded, story)
    torch.manual_seed(mix(spec.seed, "probe"))
    adapt = spec.probe.batchnorm == "train"
    module = device.place(Probe(loaded.backbone, loaded.use, len(dataset.classes), device, adapt=adapt))
    return Parts(loaded, dataset, module)


def _refuse_ignored(spec: RunSpec) -> None:
    """Refuse settings that a probe on cached features would pass over.

    Raises:
        UsageError: one of them is set.
    """
    if not spec.probe.cached:
        return
    data, train, system = spec.data, spec.train, spec.system
    ignored = {
        "--ema": train.ema is not None,
        "--clip-grad": train.clip_grad is not None,
        "--accumulate": train.accumulate > 1,
        "--batchnorm": spec.probe.batchnorm == "train",
        "--rand-augment": data.rand_augment is not None,
        "--color-jitter": data.color_jitter > 0,
        "--erasing": data.erasing > 0,
        "--mixup": data.mixup > 0,
        "--cutmix": data.cutmix > 0,
        "--tensorboard": system.tensorboard,
        "--wandb": system.wandb is not None,
        "--checkpoint-every": system.checkpoint_every is not None,
    }
    for flag, given in ignored.items():
        if given:
            raise UsageError("has no effect on cached features", field=flag, hint="leave it out, or use --no-cached")


def _dataset(spec: RunSpec, loaded: Loaded, story: Story | None) -> DataSet:
    dataset = load_data(spec, story)
    # Images keep their own size in memory; the loader brings them to the encoder's.
    dataset = replace(dataset, image_size=loaded.metadata["image_size"])
    if spec.probe.normalization == "target":
        return dataset
    if spec.probe.normalization == "half":
        return replace(dataset, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    source = loaded.metadata["normalization"] or {"mean": dataset.mean, "std": dataset.std}
    return replace(dataset, mean=tuple(source["mean"]), std=tuple(source["std"]))
