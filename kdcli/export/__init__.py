"""`kd export`: a trained network as a file for others, checked against the original before it is there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdcli import durable
from kdcli.data.names import public
from kdcli.engine.device import guarded, open_device
from kdcli.errors import KdError, UsageError
from kdcli.export import formats
from kdcli.export.artefact import Artefact, Facts, opened, require_onnx
from kdcli.export.comparison import compared, images_for
from kdcli.export.graph import Deployed, plain
from kdcli.export.latency import milliseconds
from kdcli.export.wish import FORMATS, Wish, checked
from kdcli.inference import Classifier, class_logits
from kdcli.models.network import Network, macs, parameters_of
from kdcli.networks import Loaded, load_network
from kdcli.output import Story, envelope, table
from kdcli.preprocessing import Preprocessing
from kdcli.specs import SystemSpec, validate
from kdcli.transforms import views

__all__ = ["FORMATS", "Wish", "export", "export_text"]


def export(wish: Wish, story: Story) -> dict[str, Any]:
    """Write the file; the document that says what it is and what it costs.

    Raises:
        UsageError: a format, input, output or inference that there is not, or a missing package.
        InputError: the checkpoint, or the teacher that was named, is missing or damaged.
        IncompatibleError: the network cannot be expressed in the format, or answers differently there. Nothing is written.
        WriteError: the file cannot be written.
    """
    kind = checked(wish)
    if kind == "onnx":
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
        teacher = _teacher(wish, loaded, story)
        images, source = images_for(loaded, wish.data_dir, wish.limit, story, random=wish.random)
        facts = _facts(wish, loaded)
        network, shipped = loaded.backbone, original
        if wish.inference == "single":
            network = plain(loaded.backbone, len(original.classes))
            shipped = Classifier(network, replace(loaded.use, transform="none"), loaded.metadata).eval()
        story.note(f"exporting {loaded.backbone.arch} to {kind}")
        content, artefact = _made(kind, wish, loaded, network, shipped, facts)
        check = {"images": len(images), "source": source, **compared(original, artefact, images, str(wish.out))}
        answers = views(loaded.use.transform) if wish.inference == "aggregate" else 1
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
                "macs": answers * macs(network, facts.image_size * loaded.use.scale),
                "ms_per_image": milliseconds(artefact.run, facts.image_size),
                "threads": torch.get_num_threads(),
            },
            **({} if teacher is None else {"teacher": _described(teacher)}),
        )
        durable.write_bytes(wish.out, content)  # last: whatever failed before has left nothing behind
        return document


def _facts(wish: Wish, loaded: Loaded) -> Facts:
    pixels = Preprocessing.of(loaded.metadata)
    dataset = loaded.metadata["dataset"]
    return Facts.model_validate(
        {
            "classes": loaded.metadata["classes"],
            "image_size": pixels.size,
            "resize": pixels.side,
            "inputs": wish.inputs,
            "outputs": wish.outputs,
            "inference": wish.inference,
            "arch": loaded.backbone.arch,
            "dataset": None if dataset is None else public(dataset),
            "normalization": loaded.metadata["normalization"],
            "preprocessing": pixels.described(),
            "source": loaded.digest,
        }
    )


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


# ---------------------------------------------------------------------------------------------------------- the teacher


def _teacher(wish: Wish, loaded: Loaded, story: Story) -> Loaded | None:
    """The network to print beside it; None where none is named, or the run's own is gone or another by now.

    Raises:
        KdError: the one that the wish names cannot be loaded.
    """
    if wish.teacher is not None:
        return load_network(wish.teacher)
    told = loaded.metadata.get("teacher")
    if not isinstance(told, dict) or not isinstance(told.get("checkpoint"), str):
        return None
    try:
        found = load_network(told["checkpoint"])
    except KdError as problem:
        story.note(f"nothing about the teacher: {problem.message}")
        return None
    if found.digest != told.get("digest"):
        story.note(f"nothing about the teacher: {found.path} is another network by now")
        return None
    return found


def _described(teacher: Loaded) -> dict[str, Any]:
    """What the teacher is and costs, run by kd itself."""
    network, size = teacher.backbone, teacher.metadata["image_size"]

    def run(images: Tensor) -> Tensor:
        return class_logits(network, images.float() / 255, teacher.use, ("single",))["single"]

    return {
        "arch": network.arch,
        "checkpoint": str(teacher.path),
        "digest": teacher.digest,
        "bytes": teacher.path.stat().st_size,
        "params": parameters_of(network),
        "macs": macs(network, size * teacher.use.scale),
        "ms_per_image": milliseconds(run, size),
    }


# ----------------------------------------------------------------------------------------------------------- for people


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
