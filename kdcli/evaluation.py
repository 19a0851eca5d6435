"""`kd evaluate`: a network on the test images of a data set."""

from __future__ import annotations

from typing import Any, cast

import torch

from kdcli import data
from kdcli.data.dataset import Triple
from kdcli.data.loader import Loader
from kdcli.data.randomness import generator
from kdcli.engine.device import guarded, open_device
from kdcli.engine.evaluate import evaluate
from kdcli.errors import UsageError, nearest
from kdcli.models.network import macs, parameters_of
from kdcli.networks import compare_classes, load_network
from kdcli.output import Story, envelope
from kdcli.specs import SystemSpec, validate
from kdcli.transforms import INFERENCE


def evaluate_checkpoint(
    checkpoint: str,
    *,
    inference: str | None,
    dataset: str | None,
    data_dir: str | None,
    teacher: str | None,
    limit: int | None,
    device: str,
    threads: int | None,
    workers: int,
    story: Story,
) -> dict[str, Any]:
    """The evaluation document of a checkpoint or run directory.

    Args:
        inference: the headline mode; None reports every mode the network has, with `single` as the headline.
        limit: evaluate on this many images, a seeded choice, instead of all.

    Raises:
        UsageError: an unknown inference mode. InputError, IncompatibleError: as loading says.
    """
    if inference is not None and inference not in INFERENCE:
        raise UsageError(f"no inference mode {inference!r}", field="--inference", hint=nearest(inference, INFERENCE))
    with guarded():
        loaded = load_network(checkpoint)
        name = dataset or loaded.metadata["dataset"]
        if name is None:
            raise UsageError("the checkpoint does not say what it was trained on", field="--dataset", hint="name it")
        images = data.load(name, data_dir, image_size=loaded.metadata["image_size"])
        compare_classes(loaded.metadata, images, loaded.path)
        machine = open_device(validate(SystemSpec, {"device": device, "threads": threads, "workers": workers}))
        split = images.test
        if limit is not None and limit < len(split):
            chosen = torch.randperm(len(split), generator=generator(0, "evaluated"))[:limit]
            split = split.subset(chosen.sort().values)
        ours = {"mean": images.mean, "std": images.std}
        normalization = loaded.metadata["normalization"] or ours
        loader = Loader(
            split,
            mean=cast(Triple, tuple(normalization["mean"])),
            std=cast(Triple, tuple(normalization["std"])),
            image_size=images.image_size,
            batch_size=250,
            seed=0,
            augment="none",
            device=machine.torch,
            train=False,
            workers=workers,
        )
        backbone = machine.place(loaded.backbone)
        other = None
        if teacher is not None:
            theirs = load_network(teacher)
            compare_classes(theirs.metadata, images, theirs.path)
            other = (machine.place(theirs.backbone), theirs.use)
        modes = (inference,) if inference is not None else loaded.use.modes
        story.begin(f"evaluating {loaded.path.name}", loader.steps)
        try:
            result = evaluate(
                backbone, loaded.use, loader, machine, modes, teacher=other, tick=lambda done, _: story.step(done)
            )
        finally:
            story.end()
        return envelope(
            "evaluate",
            run=None,
            checkpoint=str(loaded.path),
            dataset=images.name,
            metrics={"test": {**result.modes[modes[0]], "inference": modes[0]}},
            inference=result.modes,
            cost={
                "params": parameters_of(backbone),
                "macs": macs(backbone, images.image_size * loaded.use.scale),
                "images_per_second": round(result.images_per_second, 2),
                "peak_mib": machine.peak_mib(),
            },
            digest=loaded.digest,
        )
