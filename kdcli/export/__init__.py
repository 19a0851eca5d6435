"""`kd export`: a trained network as a file for others, checked against the original before it is there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcli import data, durable
from kdcli.data.randomness import generator
from kdcli.engine.device import guarded, open_device
from kdcli.errors import IncompatibleError, KdError, UsageError, nearest
from kdcli.export import formats
from kdcli.export.artefact import Artefact, Facts, opened
from kdcli.export.graph import Deployed, plain
from kdcli.export.latency import milliseconds
from kdcli.inference import Classifier, class_logits
from kdcli.models.network import Network, macs, parameters_of
from kdcli.networks import Loaded, compare_classes, load_network
from kdcli.output import Story, envelope, table
from kdcli.preprocessing import Preprocessing
from kdcli.specs import SystemSpec, validate
from kdcli.transforms import INFERENCE, views

FORMATS = {"safetensors": ".safetensors", "onnx": ".onnx", "torch": ".pt2"}
TOLERANCE = 1e-3
"""Largest difference of two outputs that counts as equal, relative to the largest output (at least 1)."""
_BATCH = 32


@dataclass(frozen=True)
class Wish:
    """What is to be exported, and how.

    Attributes:
        format: a key of `FORMATS`; None: by the suffix of `out`.
        limit: how many images the two are compared on.
        random: compare on random images even if the test images are there.
        teacher: a checkpoint or run to print beside it; None: the one that the run names, if it is still there.
    """

    checkpoint: str
    out: Path
    format: str | None = None
    inputs: str = "float"
    outputs: str = "logits"
    inference: str = "single"
    data_dir: str | None = None
    limit: int = 256
    random: bool = False
    teacher: str | None = None
    opset: int | None = None
    threads: int | None = None


def export(wish: Wish, story: Story) -> dict[str, Any]:
    """Write the file; the document that says what it is and what it costs.

    Raises:
        UsageError: a format, input, output or inference that there is not, or a missing package.
        InputError: the checkpoint is missing or damaged.
        IncompatibleError: the network cannot be expressed in the format, or answers differently there. Nothing is written.
        WriteError: the file cannot be written.
    """
    kind = _kind(wish)
    _check_choices(wish, kind)
    if kind == "onnx":
        from kdcli.export.artefact import require_onnx

        require_onnx()  # before a large network is read
    with guarded():
        open_device(validate(SystemSpec, {"device": "cpu", "threads": wish.threads}))
        loaded = load_network(wish.checkpoint)
        if wish.out.exists() and wish.out.samefile(loaded.path):
            raise UsageError(f"{wish.out} is the network itself", field="--out", hint="name another file")
        if wish.inference not in loaded.use.modes:
            hint = f"it has {', '.join(loaded.use.modes)}"
            raise UsageError(f"no {wish.inference} inference in this network", field="--inference", hint=hint)
        original = Classifier(loaded.backbone, loaded.use, loaded.metadata, wish.inference).eval()
        images, where = _images(wish, loaded, story)
        facts = _facts(wish, loaded)
        network, shipped = loaded.backbone, original
        if wish.inference == "single":
            network = plain(loaded.backbone, len(original.classes))
            shipped = Classifier(network, replace(loaded.use, transform="none"), loaded.metadata).eval()
        story.note(f"exporting {loaded.backbone.arch} to {kind}")
        content, artefact = _made(kind, wish, loaded, network, shipped, facts)
        check = {"images": len(images), "source": where, **_compared(original, artefact, images, str(wish.out))}
        durable.write_bytes(wish.out, content)
        answers = views(loaded.use.transform) if wish.inference == "aggregate" else 1
        size = loaded.metadata["image_size"]
        document = envelope(
            "export",
            checkpoint=str(loaded.path),
            digest=loaded.digest,
            out=str(wish.out),
            format=kind,
            bytes=len(content),
            **({"opset": wish.opset or formats.OPSET} if kind == "onnx" else {}),
            **facts.model_dump(
                mode="json", include={"arch", "inputs", "outputs", "inference", "image_size", "dataset"}
            ),
            preprocessing=facts.preprocessing,
            classes=len(facts.classes),
            check=check,
            cost={
                "params": parameters_of(network),
                "macs": answers * macs(network, size * loaded.use.scale),
                "ms_per_image": milliseconds(artefact.run, size),
                "threads": torch.get_num_threads(),
            },
        )
        teacher = _teacher(wish, loaded, story)
        return document if teacher is None else document | {"teacher": teacher}


def _kind(wish: Wish) -> str:
    if wish.format is None:
        found = [kind for kind, suffix in FORMATS.items() if suffix == wish.out.suffix.lower()]
        if not found:
            raise UsageError(
                f"{wish.out.name} does not say which format", field="--format", hint=f"one of {', '.join(FORMATS)}"
            )
        return found[0]
    if wish.format not in FORMATS:
        raise UsageError(f"no format {wish.format!r}", field="--format", hint=nearest(wish.format, FORMATS))
    if wish.out.suffix.lower() != FORMATS[wish.format]:
        hint = f"name it {wish.out.stem}{FORMATS[wish.format]}"
        raise UsageError(f"a {wish.format} file ends in {FORMATS[wish.format]}", field="--out", hint=hint)
    return wish.format


def _check_choices(wish: Wish, kind: str) -> None:
    choices = {
        "inputs": ("float", "uint8"),
        "outputs": ("logits", "probabilities"),
        "inference": INFERENCE,
    }
    for name, known in choices.items():
        value = getattr(wish, name)
        if value not in known:
            raise UsageError(f"{value!r} is none of {', '.join(known)}", field=f"--{name}", hint=nearest(value, known))
        if kind == "safetensors" and value != known[0]:
            hint = (
                "kdcli.load does that by itself" if name != "inference" else "the checkpoint itself has every inference"
            )
            raise UsageError(f"a safetensors file holds weights, and no {value}", field=f"--{name}", hint=hint)
    if wish.opset is not None and (kind != "onnx" or not 18 <= wish.opset <= 64):
        raise UsageError(
            f"no opset {wish.opset} for {kind}", field="--opset", hint="onnx alone has opsets, here 18 and up"
        )


def _facts(wish: Wish, loaded: Loaded) -> Facts:
    pixels = Preprocessing.of(loaded.metadata)
    return Facts.model_validate(
        {
            "classes": loaded.metadata["classes"],
            "image_size": pixels.size,
            "resize": pixels.side,
            "inputs": wish.inputs,
            "outputs": wish.outputs,
            "inference": wish.inference,
            "arch": loaded.backbone.arch,
            "dataset": _public(loaded.metadata["dataset"]),
            "normalization": loaded.metadata["normalization"],
            "preprocessing": pixels.described(),
            "source": loaded.digest,
        }
    )


def _public(dataset: str | None) -> str | None:
    """A data set's name without the path to it: where a folder lay is nobody's business."""
    kind, colon, folder = (dataset or "").partition(":")
    return kind + colon + Path(folder).name or None


def _made(
    kind: str, wish: Wish, loaded: Loaded, network: Network, shipped: Classifier, facts: Facts
) -> tuple[bytes, Artefact]:
    """The content of the file, and the file as its reader sees it."""
    if kind == "safetensors":
        content = formats.safetensors(network, loaded.metadata, facts)
        return content, Artefact(facts, formats.read_back(content))
    module: Deployed = formats.deployed(shipped, facts)
    content = (
        formats.onnx(module, facts, wish.opset or formats.OPSET) if kind == "onnx" else formats.program(module, facts)
    )
    return content, opened(kind, content, str(wish.out))


# ----------------------------------------------------------------------------------------------------------- the check


def _images(wish: Wish, loaded: Loaded, story: Story) -> tuple[Tensor, str]:
    """Images to compare on, uint8 [N,3,S,S], and what they are: test images of its data set where they are there."""
    name = loaded.metadata["dataset"]
    pixels = Preprocessing.of(loaded.metadata)
    if name is not None and not wish.random:
        try:
            images = data.load(name, wish.data_dir, image_size=pixels.size)
            compare_classes(loaded.metadata, images, loaded.path)
            chosen = torch.randperm(len(images.test), generator=generator(0, "exported"))[: wish.limit]
            return pixels.of_split(images.test.subset(chosen.sort().values)), f"test images of {images.name}"
        except KdError as problem:
            story.note(f"checking on random images: {problem.message}")
    shape = (wish.limit, 3, pixels.size, pixels.size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(0, "exported")), "random images"


@torch.no_grad()
def _compared(original: Classifier, artefact: Artefact, images: Tensor, name: str) -> dict[str, Any]:
    """How far the exported network's outputs are from the original's.

    Raises:
        IncompatibleError: farther than `TOLERANCE`, or another class wins anywhere by more than that.
    """
    ours, theirs = [], []
    for part in images.split(_BATCH):
        logits = original(part)
        ours.append(logits.softmax(1) if artefact.facts.outputs == "probabilities" else logits)
        theirs.append(artefact.run(part).float())
    alone = artefact.run(images[:1]).float()  # a graph that took the size of its batch for a constant shows it here
    wanted, found = torch.cat(ours), torch.cat(theirs)
    if found.shape != wanted.shape or alone.shape != wanted[:1].shape:
        raise IncompatibleError(f"{name} would answer {list(found.shape)} instead of {list(wanted.shape)}")
    allowed = TOLERANCE * max(1.0, wanted.abs().max().item())
    difference = max((wanted - found).abs().max().item(), (wanted[:1] - alone).abs().max().item())
    equal = wanted.argmax(1) == found.argmax(1)
    # Where two classes are as good as equal, rounding decides, and either answer is right.
    lost = wanted.max(1).values - wanted.gather(1, found.argmax(1, keepdim=True)).squeeze(1)
    if not difference <= allowed or bool((lost > allowed).any()):  # `not <=`: NaN differs from everything
        raise IncompatibleError(
            f"the exported network does not answer as the original does: {artefact.facts.outputs} differ by up to "
            f"{difference:.3g} (allowed {allowed:.3g}), the class is the same for {100 * equal.float().mean():.2f} % of "
            f"{len(images)} images; nothing was written",
            hint="try another --format or --opset",
        )
    return {
        "max_difference": float(f"{difference:.3g}"),
        "allowed": float(f"{allowed:.3g}"),
        "equal_argmax": round(100 * equal.double().mean().item(), 4),
    }


# ---------------------------------------------------------------------------------------------------------- the teacher


def _teacher(wish: Wish, loaded: Loaded, story: Story) -> dict[str, Any] | None:
    """What the teacher costs; None where the network does not name one, or it is gone."""
    told = loaded.metadata.get("teacher")
    named = told.get("checkpoint") if isinstance(told, dict) else None
    path = wish.teacher or named
    if not isinstance(path, str):
        return None
    try:
        other = load_network(path)
    except KdError as problem:
        if wish.teacher is not None:
            raise
        story.note(f"nothing about the teacher: {problem.message}")
        return None
    if wish.teacher is None and other.digest != told.get("digest"):  # type: ignore[union-attr]
        story.note(f"nothing about the teacher: {other.path} is another network by now")
        return None
    size = other.metadata["image_size"]

    def run(images: Tensor) -> Tensor:
        return class_logits(other.backbone, images.float() / 255, other.use, ("single",))["single"]

    return {
        "arch": other.backbone.arch,
        "checkpoint": str(other.path),
        "digest": other.digest,
        "bytes": other.path.stat().st_size,
        "params": parameters_of(other.backbone),
        "macs": macs(other.backbone, size * other.use.scale),
        "ms_per_image": milliseconds(run, size),
    }


def export_text(document: dict[str, Any]) -> str:
    """The document for people."""
    check, cost = document["check"], document["cost"]
    rows = [_row(f"{document['arch']}, {document['format']}", document["bytes"], cost)]
    if teacher := document.get("teacher"):
        rows.append(_row(f"teacher {teacher['arch']}, kd", teacher["bytes"], teacher))
    header = ("network", "MiB", "parameters", "MACs", "ms/image", "ms/image, 32 at once")
    takes = "pixels 0..255 as uint8" if document["inputs"] == "uint8" else "pixels 0..1 as float"
    side, size = document["preprocessing"]["resize_shorter_side"], document["image_size"]
    if document["format"] == "safetensors":
        takes = "pixels 0..255 as uint8 or 0..1 as float, through kdcli.load"
    return "\n".join(
        [
            f"{document['out']}: {takes}, RGB, [batch, 3, {size}, {size}] → {document['outputs']} of "
            f"{document['classes']} classes; {document['inference']} inference",
            f"image files: shorter side to {side} pixels (bilinear, antialiased), then the centre {size} x {size}; "
            "the normalisation is inside",
            f"checked on {check['images']} {check['source']}: largest difference {check['max_difference']:g}, "
            f"the same class for {check['equal_argmax']:g} %",
            "",
            table(rows, header),
            f"(times: median, CPU, {cost['threads']} threads)",
        ]
    )


def _row(name: str, size: int, cost: dict[str, Any]) -> list[Any]:
    times = cost["ms_per_image"]
    return [name, size / 2**20, f"{cost['params']:,}", f"{cost['macs']:,}", f"{times['1']:.3g}", f"{times['32']:.3g}"]
