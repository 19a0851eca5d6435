"""Whether an exported network answers as the original does, on test images of its data set where they are there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcli import data
from kdcli.data.randomness import generator
from kdcli.errors import IncompatibleError, KdError
from kdcli.export.artefact import Artefact
from kdcli.inference import Classifier
from kdcli.networks import Loaded, compare_classes
from kdcli.output import Story
from kdcli.preprocessing import Preprocessing

TOLERANCE = 1e-3
"""Largest difference of two outputs that counts as equal, relative to the largest output (at least 1)."""
_BATCH = 32


def images_for(loaded: Loaded, data_dir: str | None, limit: int, story: Story, *, random: bool) -> tuple[Tensor, str]:
    """Up to `limit` images to compare on, uint8 [N,3,S,S], and what they are.

    Args:
        random: do not even look for the test images.
    """
    name = loaded.metadata["dataset"]
    pixels = Preprocessing.of(loaded.metadata)
    if name is not None and not random:
        try:
            images = data.load(name, data_dir, image_size=pixels.size)
            compare_classes(loaded.metadata, images, loaded.path)
            chosen = torch.randperm(len(images.test), generator=generator(0, "exported"))[:limit]
            found = pixels.of_split(images.test.subset(chosen.sort().values))
            return found, f"test images of {images.name}"
        except KdError as problem:
            story.note(f"checking on random images: {problem.message}")
    shape = (limit, 3, pixels.size, pixels.size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(0, "exported")), "random images"


@torch.no_grad()
def compared(original: Classifier, artefact: Artefact, images: Tensor, name: str) -> dict[str, Any]:
    """How far the outputs of the exported network, which is to be called `name`, are from the original's.

    Raises:
        IncompatibleError: farther than `TOLERANCE`, or another class wins anywhere by more than that.
    """
    ours, theirs = [], []
    for part in images.split(_BATCH):
        logits = original(part)
        ours.append(logits.softmax(1) if artefact.facts.outputs == "probabilities" else logits)
        theirs.append(artefact.run(part).float())
    # Once more by itself: a graph that took the size of its batch for a constant shows it here.
    ours.append(ours[0][:1])
    theirs.append(artefact.run(images[:1]).float())
    for wanted, found in zip(ours, theirs, strict=True):
        if found.shape != wanted.shape:
            raise IncompatibleError(f"{name} would answer {list(found.shape)} instead of {list(wanted.shape)}")
    wanted, found = torch.cat(ours), torch.cat(theirs)
    allowed = TOLERANCE * max(1.0, wanted.abs().max().item())
    difference = (wanted - found).abs().max().item()
    equal = 100 * (wanted.argmax(1) == found.argmax(1))[: len(images)].double().mean().item()
    # Where two classes are as good as equal, rounding decides, and either answer is right.
    lost = wanted.max(1).values - wanted.gather(1, found.argmax(1, keepdim=True)).squeeze(1)
    if not difference <= allowed or bool((lost > allowed).any()):  # `not <=`: NaN differs from everything
        raise IncompatibleError(
            f"the exported network does not answer as the original does: {artefact.facts.outputs} differ by up to "
            f"{difference:.3g} (allowed {allowed:.3g}), the class is the same for {equal:.2f} % of {len(images)} images; "
            "nothing was written",
            hint="try another --format or --opset",
        )
    return {
        "max_difference": float(f"{difference:.3g}"),
        "allowed": float(f"{allowed:.3g}"),
        "equal_argmax": round(equal, 4),
    }
