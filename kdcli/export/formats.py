"""A network as the bytes of a file: kd's safetensors, ONNX, or torch.export's archive."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from kdcli import checkpoint
from kdcli.errors import IncompatibleError
from kdcli.export.artefact import KEY, Facts, facts_text, require_onnx
from kdcli.export.graph import Deployed
from kdcli.inference import Classifier
from kdcli.models import arch_spec
from kdcli.models.network import Network
from kdcli.networks import load, tensors_of

OPSET = 23
"""Of ONNX: the newest that torch's exporter writes without converting, from torch 2.9 on."""


def safetensors(network: Network, metadata: dict[str, Any], facts: Facts) -> bytes:
    """A kd checkpoint of the network alone: no heads, class logits; `kdcli.load` and every kd command take it.

    It does not say where on this machine the images, the teachers or a method's file lay.
    """
    kept = {key: _without_paths(value) for key, value in metadata.items() if key != "heads"}
    kept |= {"arch": arch_spec(network), "resize": facts.resize, "preprocessing": facts.preprocessing}
    kept |= {"inference": {**metadata.get("inference", {}), "transform": "none"}, "source": facts.source}
    kept |= {"dataset": facts.dataset}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        checkpoint.save(path, tensors_of(network), kept)
        return path.read_bytes()


def _without_paths(value: Any) -> Any:
    """Metadata without the checkpoints that they name, and with method files by their last names."""
    if isinstance(value, list):
        return [_without_paths(one) for one in value]
    if not isinstance(value, dict):
        return value
    kept = {key: _without_paths(one) for key, one in value.items() if key != "checkpoint"}
    name = kept.get("name")
    return kept | {"name": PurePath(name).name} if isinstance(name, str) and name.endswith(".py") else kept


def onnx(module: Deployed, facts: Facts, opset: int) -> bytes:
    """An ONNX model with a dynamic batch; input `images`, output `logits` or `probabilities`.

    Raises:
        UsageError: the packages of `kdcli[onnx]` are not installed.
        IncompatibleError: the network, or the opset, is beyond torch's exporter.
    """
    require_onnx()
    with _exporting("onnx"):
        program: Any = torch.onnx.export(
            module,
            (_example(facts),),
            dynamo=True,
            dynamic_shapes={"images": {0: Dim("batch")}},
            input_names=["images"],
            output_names=[facts.outputs],
            opset_version=opset,
            verbose=False,
        )
        model = program.model_proto
        for node in model.graph.node:  # each tells by which lines of which files of this machine it was made
            del node.metadata_props[:]
        model.metadata_props.add(key=KEY, value=facts_text(facts))
        model.producer_name = "kd"
        content = model.SerializeToString()
    written = {entry.domain: entry.version for entry in model.opset_import}[""]
    if written != opset:  # it keeps to its own, with a warning, where it cannot convert the graph
        raise IncompatibleError(f"the graph came out in opset {written} and not {opset}", field="--opset")
    return content


def program(module: Deployed, facts: Facts) -> bytes:
    """An archive of `torch.export` (.pt2) with a dynamic batch. Raises IncompatibleError as `onnx`."""
    with _exporting("torch"):
        exported = torch.export.export(
            module, (_example(facts),), dynamic_shapes={"images": {0: Dim("batch")}}, strict=False
        )
        for node in exported.graph.nodes:
            node.meta.pop("stack_trace", None)
        content = io.BytesIO()
        torch.export.save(exported, content, extra_files={f"{KEY}.json": facts_text(facts)})
        return content.getvalue()


def _example(facts: Facts) -> Tensor:
    """Two images: a batch of one would be taken for a constant."""
    images = torch.zeros((2, 3, facts.image_size, facts.image_size), dtype=torch.uint8)
    return images if facts.inputs == "uint8" else images.float()


@contextlib.contextmanager
def _exporting(what: str) -> Iterator[None]:
    """Without the exporters' chatter, which goes to stdout in places; what they cannot do is one line."""
    level = logging.root.manager.disable
    try:
        logging.disable(logging.CRITICAL)
        with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as problem:
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0][:200]
        hint = "--format safetensors does not need a graph"
        raise IncompatibleError(f"this network cannot be exported to {what}: {reason}", hint=hint) from problem
    finally:
        logging.disable(level)


def deployed(classifier: Classifier, facts: Facts) -> Deployed:
    """The module behind both graphs."""
    return Deployed(classifier, probabilities=facts.outputs == "probabilities").eval()


def read_back(content: bytes) -> Callable[[Tensor], Tensor]:
    """What `kdcli.load` makes of a written checkpoint: uint8 [B,3,S,S] → logits [B,K]."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        path.write_bytes(content)
        return torch.no_grad()(load(path))
