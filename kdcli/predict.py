"""`kd predict`: image files to class names, with a checkpoint, a run, or a file of `kd export`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcli.data.images import EXTENSIONS, threads
from kdcli.engine.device import guarded, open_device
from kdcli.errors import IncompatibleError, InputError, KdError, NotFiniteError, UsageError, nearest
from kdcli.export.artefact import SUFFIXES, open_artefact
from kdcli.inference import Classifier, class_logits
from kdcli.networks import load_network
from kdcli.output import Story, envelope, one_line
from kdcli.pathlist import named
from kdcli.preprocessing import Preprocessing
from kdcli.specs import SystemSpec, validate
from kdcli.transforms import INFERENCE

_WIDTH = 24  # characters of a class name in a row
Prediction = dict[str, Any]
"""`path`, `class`, `index`, `confidence` (0..1), and `top`, the likeliest classes as `class`, `index`, `confidence`."""


@dataclass(frozen=True)
class Predictor:
    """A network and all it needs.

    Attributes:
        probabilities: uint8 [B,3,S,S] → [B,K] on the CPU.
    """

    classes: tuple[str, ...]
    pixels: Preprocessing
    probabilities: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Asked:
    """How to classify. `mode` None: `single`, or what an exported file was exported for."""

    mode: str | None = None
    top: int = 5
    batch_size: int = 64
    device: str = "auto"
    threads: int | None = None
    trust: bool = False


def predict(
    source: str, paths: Iterable[str], asked: Asked, story: Story, emit: Callable[[Prediction], bool]
) -> tuple[dict[str, Any], KdError | None]:
    """Classify the files in their order.

    Args:
        paths: files; folders, for all images below them; `-` for a list on stdin.
        emit: is given each prediction as it is made, and says whether anybody still reads them.

    Returns:
        How many files were classified and which could not be read, and the error to end with if there are any.

    Raises:
        KdError: whatever keeps all of it from beginning.
    """
    with guarded():
        predictor = open_predictor(source, asked)
        files, bad = _found(paths, story)
        total, done = len(files) + len(bad), 0
        what = "paths" if bad else "images"
        story.begin(f"classifying with {source}", total)
        try:
            for names, images in _decoded(files, predictor.pixels, asked.batch_size, bad, story):
                answers = predictor.probabilities(images)
                if not bool(torch.isfinite(answers).all()):
                    raise NotFiniteError(f"{source} answers with NaN or infinity", hint="the network is damaged")
                for path, shares in zip(names, answers, strict=True):
                    if not emit(_prediction(path, shares, predictor.classes, asked.top)):
                        return _document(source, done, bad), None
                    done += 1
                story.step(done + len(bad))
        finally:
            story.end()  # also where it is interrupted: the bar has hidden the cursor
    error = None
    if bad:
        hint = "the others are done" if done else None
        error = InputError(f"{len(bad)} of {total} {what} could not be read", hint=hint)
    return _document(source, done, bad), error


def _document(source: str, done: int, bad: list[dict[str, str]]) -> dict[str, Any]:
    return envelope("predict", network=source, classified=done, unreadable=bad)


def open_predictor(source: str, asked: Asked) -> Predictor:
    """The network that `source` names, in a way of inference.

    Raises:
        UsageError: no such way of inference, or a GPU for an exported file.
        IncompatibleError: it does not have that way.
        InputError: as loading says.
    """
    mode = asked.mode
    if mode is not None and mode not in INFERENCE:
        raise UsageError(f"no inference mode {mode!r}", field="--mode", hint=nearest(mode, INFERENCE))
    path = Path(source)
    exported = path.suffix.lower() in SUFFIXES and not path.is_dir()
    device = "cpu" if exported and asked.device == "auto" else asked.device
    if exported and device != "cpu":
        raise UsageError("exported files run on the CPU here", field="--device", hint="or name the checkpoint")
    machine = open_device(validate(SystemSpec, {"device": device, "threads": asked.threads}))
    if exported:
        artefact = open_artefact(path, trust=asked.trust)
        facts = artefact.facts
        if mode not in (None, facts.inference):
            raise IncompatibleError(f"{source} was exported for {facts.inference} inference", field="--mode")

        def answer(images: Tensor) -> Tensor:
            found = artefact.run(images).float()
            if found.shape != (len(images), len(facts.classes)):
                raise IncompatibleError(f"{source} answers {list(found.shape)} to {len(images)} images")
            return found if facts.outputs == "probabilities" else found.softmax(1)

        return Predictor(tuple(facts.classes), facts.pixels, answer)
    loaded = load_network(path)
    mode = mode or "single"
    if mode not in loaded.use.modes:
        hint = f"it has {', '.join(loaded.use.modes)}"
        raise IncompatibleError(f"{source} has no {mode} inference", field="--mode", hint=hint)
    classifier = machine.place(Classifier(loaded.backbone, loaded.use, loaded.metadata, mode).eval())

    @torch.no_grad()
    def probabilities(images: Tensor) -> Tensor:
        seen = classifier.preprocess(images.to(machine.torch)).contiguous(memory_format=torch.channels_last)
        return class_logits(classifier.network, seen, classifier.use, (mode,))[mode].softmax(1).cpu()

    return Predictor(classifier.classes, Preprocessing.of(loaded.metadata), probabilities)


def _found(paths: Iterable[str], story: Story) -> tuple[list[str], list[dict[str, str]]]:
    """All files that `paths` stand for, and the folders without an image, which are told on stderr, one line each.

    Raises:
        InputError: a folder cannot be listed, or there is no file at all.
    """
    files: list[str] = []
    empty = []
    for path in named(paths):
        inside = list(_files(path))
        files += inside
        if not inside:
            empty.append({"path": path, "message": f"{path} holds no image"})
    if empty and not files:
        raise InputError(empty[0]["message"], hint=f"looked for {', '.join(sorted(EXTENSIONS))}")
    for folder in empty:
        story.warn(f"skipped: {one_line(folder['message'])}")
    return files, empty


def _files(path: str) -> Iterator[str]:
    """A file as it is named; of a folder, all images below it in the order of names, without dot-names and linked folders.

    Raises:
        InputError: a folder cannot be listed.
    """
    if not os.path.isdir(path):
        yield path
        return

    def refuse(problem: OSError) -> None:
        raise InputError(f"{problem.filename} cannot be listed: {problem.strerror}", hint="check its permissions")

    for folder, inner, names in os.walk(path, onerror=refuse):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith("."):
                yield os.path.join(folder, name)


def _decoded(
    files: list[str], pixels: Preprocessing, batch_size: int, bad: list[dict[str, str]], story: Story
) -> Iterator[tuple[list[str], Tensor]]:
    """Batches of the files that can be read, decoded in threads while the batch before is being classified.

    What cannot be read is told on stderr, one line each, and added to `bad`.
    """

    def read(path: str) -> Tensor | InputError:
        try:
            return pixels.read(path)
        except InputError as problem:
            return problem

    pool = ThreadPoolExecutor(threads())

    def begin(at: int) -> list[Future[Tensor | InputError]]:
        return [pool.submit(read, path) for path in files[at : at + batch_size]]

    try:
        ahead = begin(0)
        for at in range(0, len(files), batch_size):
            waiting, ahead = ahead, begin(at + batch_size)
            names, images = [], []
            for path, future in zip(files[at : at + batch_size], waiting, strict=True):
                result = future.result()
                if isinstance(result, InputError):
                    bad.append({"path": path, "message": result.message})
                    story.warn(f"skipped: {one_line(result.message)}")
                else:
                    names.append(path)
                    images.append(result)
            if images:
                yield names, torch.stack(images)
    finally:
        pool.shutdown(cancel_futures=True)  # whoever stops in the middle does not wait for what nobody wants any more


def _prediction(path: str, shares: Tensor, classes: tuple[str, ...], top: int) -> Prediction:
    values, indices = shares.topk(min(top, len(classes)))
    ranked = [
        {"class": classes[index], "index": index, "confidence": round(value, 6)}
        for value, index in zip(values.tolist(), indices.tolist(), strict=True)
    ]
    return {"path": path, **ranked[0], "top": ranked}


def prediction_line(prediction: Prediction) -> str:
    """A prediction as a row for people: confidence, class, path, and the runners-up."""
    others = [f"{_cut(other['class'])} {100 * other['confidence']:.1f} %" for other in prediction["top"][1:3]]
    beside = f"  ({', '.join(others)})" if others else ""
    name = _cut(prediction["class"])
    return f"{100 * prediction['confidence']:6.2f} %  {name.ljust(_WIDTH)}  {one_line(prediction['path'])}{beside}"


def _cut(name: str) -> str:
    name = one_line(name)
    return name if len(name) <= _WIDTH else name[: _WIDTH - 1] + "…"
