"""What the page needs the networks for: one pass of each over the test images, its results kept beside the page.

A pass keeps sums and a few samples, never all logits, so its file is small whatever the data set. It is named by what it
depends on (weights, images, the version of this file), so that the same report made again computes nothing twice.
"""

from __future__ import annotations

import hashlib
import io
import os
import statistics
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from kdcli import data, durable
from kdcli.data.dataset import DataSet, Split, Triple
from kdcli.data.loader import Loader
from kdcli.data.randomness import generator
from kdcli.engine.device import Device
from kdcli.errors import KdError, NotFiniteError
from kdcli.inference import Use
from kdcli.models.network import Network
from kdcli.networks import Loaded, compare_classes, load_network
from kdcli.output import Story
from kdcli.transforms import fold, rescale, views

VERSION = 1
BATCH = 250
EMBEDDED_CLASSES, EMBEDDED_IMAGES = 10, 60  # classes drawn by t-SNE, and images of each
_TIMED = 30  # passes of one image, of which the median counts
_CORRELATED = 2000  # classes up to which the correlations of logits are kept: K x K numbers


@dataclass(frozen=True)
class Images:
    """The test images of a report's panel.

    Attributes:
        split: N images; a stratified part of them where a limit was asked for.
        sample: positions in the split of the images whose features are kept, class by class.
        print: identifies images and samples, for the names of kept results.
    """

    dataset: DataSet
    split: Split
    sample: Tensor
    print: str


@dataclass(frozen=True)
class Pass:
    """What one network said about the N test images.

    Attributes:
        predicted: int64 [N], single inference.
        confidence: float32 [N], the probability of that class.
        true_probability: float32 [N], that of the right class.
        correlation: float32 [K,K], Pearson correlation of the classes' logits over the images; empty for very many classes.
        features: float32 [S,C], the pooled features of the sample.
        latency_ms: median of single images, forward pass alone.
        device: where that was measured.
    """

    predicted: np.ndarray
    confidence: np.ndarray
    true_probability: np.ndarray
    correlation: np.ndarray
    features: np.ndarray
    latency_ms: float
    device: str


def test_images(name: str, data_dir: str | None, image_size: int | None, limit: int | None) -> Images:
    """The test images of a data set, and the seeded choice of those whose features are drawn.

    Args:
        limit: at most so many images, a seeded choice.

    Raises:
        InputError: the data set is not there.
    """
    dataset = data.load(name, data_dir, image_size=image_size)
    split = dataset.test
    if limit is not None and limit < len(split):
        split = split.subset(torch.randperm(len(split), generator=generator(0, "reported"))[:limit].sort().values)
    content = hashlib.sha256(f"{VERSION} {dataset.name} {dataset.image_size} {dataset.classes}".encode())
    content.update(split.labels.numpy().tobytes() + split.ids.numpy().tobytes())
    if split.images is not None:
        content.update(split.images.numpy().tobytes())
    else:
        content.update("\n".join(map(_version, split.paths or [])).encode("utf-8", "surrogatepass"))
    return Images(dataset, split, _sample(split.labels), content.hexdigest()[:16])


def _version(path: str) -> str:
    """A file's name with its size (bytes) and its time (ns), which tell that another image stands in its place."""
    try:
        found = os.stat(path)
    except OSError:
        return path  # it will be named when it is read
    return f"{path}\0{found.st_size}\0{found.st_mtime_ns}"


def _sample(labels: Tensor) -> Tensor:
    """Positions of up to 60 images of each of up to 10 classes, seeded, class by class."""
    counts = torch.bincount(labels)
    there = (counts > 1).nonzero().flatten()
    order = torch.randperm(len(there), generator=generator(0, "embedded classes"))
    chosen = there[order[:EMBEDDED_CLASSES]].sort().values
    parts = []
    for label in chosen.tolist():
        at = (labels == label).nonzero().flatten()
        order = torch.randperm(len(at), generator=generator(0, "embedded images", label))
        parts.append(at[order[:EMBEDDED_IMAGES]].sort().values)
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def passed(
    file: Path, digest: str, images: Images, device: Device, cache: Path, story: Story, title: str, workers: int
) -> Pass:
    """The pass of the network in `file`, whose weights have the given digest: from the cache, or made now.

    Raises:
        InputError, IncompatibleError: the network cannot be loaded, or is of other classes.
        NotFiniteError: its outputs are not finite.
    """
    kept = cache / f"{digest[:24]}-{images.print}.npz"
    found = _kept(kept)
    if found is not None and len(found.predicted) == len(images.split):
        return found
    loaded = load_network(file)
    compare_classes(loaded.metadata, images.dataset, loaded.path)
    made = _made(loaded, images, device, story, title, workers)
    _keep(kept, made)
    return made


@torch.no_grad()
def _made(loaded: Loaded, images: Images, device: Device, story: Story, title: str, workers: int) -> Pass:
    network = device.place(loaded.backbone).eval()
    loader = _loader(loaded, images, images.split, device, workers)
    classes = len(images.dataset.classes)
    story.note(f"{title}: {len(images.split)} test images")
    story.begin(title, loader.steps)
    correlated = classes <= _CORRELATED
    sums = torch.zeros(classes, dtype=torch.float64)
    products = torch.zeros(classes, classes, dtype=torch.float64) if correlated else torch.zeros(0, 0)
    chosen = torch.zeros(len(images.split), dtype=torch.bool)
    chosen[images.sample] = True
    predicted, confidence, right, pooled = [], [], [], []
    for done, batch in enumerate(loader.epoch(0)):
        logits, features = _forward(network, batch.images, loaded.use)
        if not bool(torch.isfinite(logits).all()):
            raise NotFiniteError(f"{loaded.path}: its outputs are not finite on the test images", hint="train it again")
        probability = logits.softmax(1)
        best = probability.max(1)
        predicted.append(best.indices.cpu())
        confidence.append(best.values.cpu())
        right.append(probability.gather(1, batch.labels[:, None]).flatten().cpu())
        if correlated:
            exact = logits.cpu().double()
            sums += exact.sum(0)
            products += exact.T @ exact
        pooled.append(features.flatten(1).float().cpu()[chosen[batch.index.cpu()]])
        story.step(done + 1)
    story.end()
    loader.close()
    # The sample is kept class by class; the loader gave it in the order of the split.
    order = images.sample.argsort().argsort()
    count = len(images.split)
    return Pass(
        torch.cat(predicted).numpy(),
        torch.cat(confidence).numpy(),
        torch.cat(right).numpy(),
        _correlation(sums.numpy(), products.numpy(), count) if correlated else np.zeros((0, 0), np.float32),
        torch.cat(pooled)[order].numpy(),
        _latency(network, loaded, device),
        f"{device.torch.type}, threads: {device.threads}"
        if not device.cuda
        else torch.cuda.get_device_name(device.torch),
    )


def _forward(network: Network, images: Tensor, use: Use) -> tuple[Tensor, Tensor]:
    """Class logits [B,K] under single inference and pooled features [B,C] of one pass."""
    found = network.features(rescale(images, use.scale, use.scale_mode))
    return fold(found.logits.float(), views(use.transform), "single"), found.pooled


def _correlation(sums: np.ndarray, products: np.ndarray, count: int) -> np.ndarray:
    """Pearson correlation of the columns of a matrix, given their sums and products; 0 for a constant column."""
    covariance = products / count - np.outer(sums, sums) / count**2
    deviation = np.sqrt(np.clip(np.diag(covariance), 0, None))
    scale = np.outer(deviation, deviation)
    safe = np.where(scale > 0, scale, 1)
    return np.where(scale > 0, covariance / safe, 0).astype(np.float32)


def _latency(network: Network, loaded: Loaded, device: Device) -> float:
    """Milliseconds of one image, median of several passes after a few to warm up."""
    size = loaded.metadata["image_size"]
    image = torch.zeros(1, 3, size, size, device=device.torch).to(memory_format=torch.channels_last)
    image = rescale(image, loaded.use.scale, loaded.use.scale_mode)
    times = []
    for turn in range(_TIMED + 5):
        device.synchronize()
        started = time.perf_counter()
        network(image)
        device.synchronize()
        if turn >= 5:
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def _loader(loaded: Loaded, images: Images, split: Split, device: Device, workers: int) -> Loader:
    """Batches of a split as the network wants them normalised."""
    ours = {"mean": images.dataset.mean, "std": images.dataset.std}
    normalization: dict[str, Any] = loaded.metadata["normalization"] or ours
    return Loader(
        split,
        mean=cast(Triple, tuple(normalization["mean"])),
        std=cast(Triple, tuple(normalization["std"])),
        image_size=images.dataset.image_size,
        batch_size=BATCH,
        seed=0,
        augment="none",
        device=device.torch,
        train=False,
        workers=workers,
    )


def pictures(images: Images, positions: list[int]) -> np.ndarray:
    """uint8 [P,S,S,3], the test images at these positions as a network sees them, before normalisation."""
    zero: Triple = (0.0, 0.0, 0.0)
    one: Triple = (1.0, 1.0, 1.0)
    size = images.dataset.image_size
    part = images.split.subset(positions)
    loader = Loader(
        part, mean=zero, std=one, image_size=size, batch_size=BATCH, seed=0, augment="none", device="cpu", train=False
    )
    shown = torch.cat([batch.images for batch in loader.epoch(0)])
    loader.close()
    return (shown.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def _keep(path: Path, made: Pass) -> None:
    content = io.BytesIO()
    parts: dict[str, Any] = {**vars(made), "latency_ms": np.array(made.latency_ms), "device": np.array(made.device)}
    np.savez_compressed(content, **parts)
    durable.write_bytes(path, content.getvalue())


def _kept(path: Path) -> Pass | None:
    """A pass from its file; None where there is none, or it is damaged: it is only a copy."""
    try:
        with open(durable.open_regular(path), "rb") as file, np.load(file, allow_pickle=False) as parts:
            found = {name: parts[name] for name in Pass.__dataclass_fields__}
    except (KdError, OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    found |= {"latency_ms": float(found["latency_ms"]), "device": str(found["device"])}
    return Pass(**found)
