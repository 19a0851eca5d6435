"""`kd import`: a checkpoint of another program (RepDistiller, mdistiller, DIST, SSKD, HSAKD, ReviewKD) to one of kd.

The foreign file is opened by `child` in a process of its own, with limits; nothing in it is ever executed.
Here its tensors are fitted to the network: by name both ways, by shape, and finite. A tensor that has no place, or a
place that has no tensor, is an error, because a teacher loaded in part still trains students, only badly.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli import checkpoint, durable
from kdcli.errors import IncompatibleError, InputError, NotFiniteError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kdcli.models.network import Network

PATIENCE = 120  # seconds the child may take, beyond 1 s per 10 MB: importing torch on a slow disk takes most of it
HEADS = "heads."
PARTS = ("student", "teacher")
PROJECTORS = ("proj_head.",)  # SSKD's; kd's SSKD trains its own


def import_checkpoint(
    source: Path,
    *,
    arch: str,
    out: Path,
    classes: tuple[str, ...] | None = None,
    dataset: str | None = None,
    normalization: dict[str, Any] | None = None,
    image_size: int = 32,
    part: str | None = None,
) -> dict[str, Any]:
    """Convert a foreign checkpoint.

    Args:
        source: a `.pth`, `.pt`, `.bin` or `.safetensors` file; its content decides, not its name.
        arch: the architecture it was trained with.
        out: the kd checkpoint to write.
        classes: the names of the classes in the order of the outputs; "class 0", "class 1", … if not given.
        dataset: the name of the data set it was trained on.
        normalization: `mean` and `std` per channel, for pixels in [0, 1].
        image_size: side of the images in pixels.
        part: "student" or "teacher", where the file holds a whole distiller (mdistiller); None takes the one there is, of
            both the student.

    Returns:
        `path`, `digest`, `outputs` (count), `tensors` (count), `heads` (as in the metadata, or None) and `notices`
        (sentences on what was left out or changed).

    Raises:
        UsageError: no such architecture, or no such part.
        InputError: the file is missing, damaged, hostile, or not made of named tensors.
        IncompatibleError: its tensors do not fit the architecture, or its outputs do not fit the classes.
        NotFiniteError: a tensor holds NaN or an infinity.
        WriteError: `out` cannot be written.
    """
    from kdcli.models import arch_spec
    from kdcli.models.names import canonical

    arch = canonical(arch, field="--arch")
    source = Path(source)
    fingerprint, size = _fingerprint(source)
    notices: list[str] = []
    foreign = select_part(read_foreign(source, size), part, source, notices)
    tensors = _rename(foreign, arch, source)
    network = {name: tensor for name, tensor in tensors.items() if not name.startswith(HEADS)}
    heads = {name: tensor for name, tensor in tensors.items() if name.startswith(HEADS)}

    guess = _network(arch, 2, image_size)  # 2 is any number: the file says how many outputs there are
    outputs = _width(guess.classifier_name, network, guess.state_dict(), source, arch)
    if classes is not None and len(classes) != outputs:
        raise IncompatibleError(
            f"{source} has {outputs} outputs, but there are {len(classes)} classes",
            hint="name the data set it was trained on",
        )
    empty = _network(arch, outputs, image_size)
    fitted = _fit(network, empty.state_dict(), source, arch, notices)
    described = None
    if heads:
        what = f"the heads of {arch}"
        some = _heads(empty, 2)
        wide = _width(f"{HEADS}0.{some[0].classifier_name}", heads, _head_names(some), source, what)
        fitted |= _fit(heads, _head_names(_heads(empty, wide)), source, what, notices)
        described = {"outputs": wide, "count": len(some)}
    _require_finite(fitted, source)

    if normalization is None:
        notices.append("no normalization is recorded: say which data set it was trained on")
    metadata: dict[str, Any] = {
        "role": "teacher",
        "arch": arch_spec(empty),
        "classes": list(classes) if classes is not None else [f"class {i}" for i in range(outputs)],
        "image_size": image_size,
        "normalization": normalization,
        "dataset": dataset,
        "method": None,
        "imported_from": {"name": source.name, "sha256": fingerprint},
    }
    if described:
        metadata["heads"] = described
    return {
        "path": os.fspath(out),
        "digest": checkpoint.save(out, fitted, metadata),
        "outputs": outputs,
        "tensors": len(fitted),
        "heads": described,
        "notices": notices,
    }


def read_foreign(source: Path, size: int) -> dict[str, torch.Tensor]:
    """The named tensors of a foreign file of `size` bytes, read in a limited process of its own.

    Raises:
        InputError: there are none, or reading them was refused, failed, crashed or took too long.
    """
    hint = "only files of named tensors can be imported"
    package = os.fspath(Path(__file__).resolve().parents[2])
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [environment.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory(prefix="kd-import-") as private:
        out = os.path.join(os.path.realpath(private), "tensors.safetensors")
        request = {"source": os.path.abspath(source), "out": out, "size": size}
        try:
            child = subprocess.run(
                [sys.executable, "-B", "-P", "-m", "kdcli.importing.child"],
                input=json.dumps(request),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                timeout=PATIENCE + size / 10_000_000,
                cwd=private,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            raise InputError(f"cannot import {source}: reading it did not end", hint=hint) from None
        try:
            answer = json.loads(child.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            how = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
            raise InputError(f"cannot import {source}: reading it crashed or hit a limit ({how})", hint=hint) from None
        if not answer.get("ok"):
            raise InputError(f"cannot import {source}: {answer.get('reason')}", hint=hint)
        return checkpoint.load(out)[0]


def select_part(
    tensors: Mapping[str, torch.Tensor], part: str | None, source: Path, notices: list[str]
) -> dict[str, torch.Tensor]:
    """One network out of a file, `module.` stripped; what is left out is said in `notices`.

    Raises:
        UsageError: `part` is neither of the two.
        IncompatibleError: the file does not hold that part.
    """
    if part not in (None, *PARTS):
        raise UsageError(f"{part!r} is neither student nor teacher", field="--part", hint="give one of the two")
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        bare = name
        while bare.startswith("module."):
            bare = bare.removeprefix("module.")
        if bare in found:
            raise InputError(f"cannot import {source}: it holds {bare[:80]!r} twice", hint="choose another file")
        found[bare] = tensor
    parts = [p for p in PARTS if any(name.startswith(f"{p}.") for name in found)]
    if parts:
        chosen = part or parts[0]
        if chosen not in parts:
            raise IncompatibleError(f"{source} holds no {chosen}", hint=f"it holds a {parts[0]}")
        dropped = [name for name in found if not name.startswith(f"{chosen}.")]
        found = {name.removeprefix(f"{chosen}."): t for name, t in found.items() if name.startswith(f"{chosen}.")}
        if dropped:
            notices.append(f"took the {chosen}; left out {_some(dropped)}")
    elif part is not None:
        notices.append(f"it holds one network only, so --part {part} had no effect")
    projectors = [name for name in found if name.startswith(PROJECTORS)]
    if projectors:
        notices.append(f"left out SSKD's projection head: {_some(projectors)}")
    return {name: tensor for name, tensor in found.items() if name not in projectors}


def _fingerprint(source: Path) -> tuple[str, int]:
    """SHA-256 and size (bytes) of a regular, non-empty file."""
    with open(durable.open_regular(source), "rb") as file:
        try:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as problem:
            raise InputError(f"cannot read {source}: {problem.strerror}", hint="check the disk") from None
        size = os.fstat(file.fileno()).st_size
    if not size:
        raise InputError(f"cannot import {source}: it is empty", hint="download it again")
    return found, size


def _rename(tensors: Mapping[str, torch.Tensor], arch: str, source: Path) -> dict[str, torch.Tensor]:
    """The tensors under the names of kd's own network."""
    from kdcli.models.import_keys import map_keys

    names = map_keys(arch, list(tensors))
    renamed = {names.get(name, name): tensor for name, tensor in tensors.items()}
    if len(renamed) != len(tensors):
        raise IncompatibleError(f"{source} holds two tensors for one place in {arch}", hint="check --arch")
    return renamed


def _network(arch: str, outputs: int, image_size: int) -> Network:
    """The network to fill, without memory for its weights."""
    import torch

    from kdcli.models import build

    with torch.device("meta"):
        return build(arch, outputs, image_size)


def _heads(network: Network, outputs: int) -> nn.ModuleList:
    import torch

    from kdcli.models.heads import build_heads

    with torch.device("meta"):
        return build_heads(network, outputs)


def _head_names(heads: nn.ModuleList) -> dict[str, torch.Tensor]:
    return {f"{HEADS}{name}": tensor for name, tensor in heads.state_dict().items()}


def _width(
    classifier: str,
    tensors: Mapping[str, torch.Tensor],
    layout: Mapping[str, torch.Tensor],
    source: Path,
    what: str,
) -> int:
    """The number of rows of the layer `classifier`, which is the number of outputs."""
    name = f"{classifier}.weight"
    if name not in tensors or not tensors[name].ndim or not tensors[name].shape[0]:
        raise _mismatch(source, what, sorted(set(layout) - set(tensors)) or [name], sorted(set(tensors) - set(layout)))
    return tensors[name].shape[0]


def _fit(
    tensors: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    source: Path,
    what: str,
    notices: list[str],
) -> dict[str, torch.Tensor]:
    """The tensors in the order and type of the network, or an `IncompatibleError` on the first five that do not fit."""
    import torch

    tensors = dict(tensors)
    counters = [name for name in expected if name.endswith("num_batches_tracked") and name not in tensors]
    if counters and len(counters) == sum(name.endswith("num_batches_tracked") for name in expected):
        # Files from before torch 0.4.1 have none; nothing reads them where BatchNorm has a fixed momentum.
        tensors |= {name: torch.zeros((), dtype=torch.int64) for name in counters}
        notices.append("it has no BatchNorm step counters (an old torch wrote it): set to 0")
    missing, unexpected = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unexpected:
        raise _mismatch(source, what, missing, unexpected)
    wrong = [
        f"{name} is {_shape(tensors[name])}, not {_shape(like)}"
        for name, like in expected.items()
        if tensors[name].shape != like.shape or tensors[name].is_floating_point() != like.is_floating_point()
    ]
    if wrong:
        raise IncompatibleError(f"{source} does not fit {what}: {_some(wrong)}", hint="check --arch and --image-size")
    converted = sorted({str(t.dtype) for name, t in tensors.items() if t.dtype != expected[name].dtype})
    if converted:
        notices.append(f"converted {', '.join(converted)} to the types of the network".replace("torch.", ""))
    return {name: tensors[name].to(like.dtype) for name, like in expected.items()}


def _mismatch(source: Path, what: str, missing: Collection[str], unexpected: Collection[str]) -> IncompatibleError:
    parts = [f"missing {_some(missing)}"] if missing else []
    parts += [f"unexpected {_some(unexpected)}"] if unexpected else []
    return IncompatibleError(f"{source} does not fit {what}: {'; '.join(parts)}", hint="check --arch")


def _require_finite(tensors: Mapping[str, torch.Tensor], source: Path) -> None:
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise NotFiniteError(f"{source} holds NaN or infinity in {_some(bad)}", hint="choose another checkpoint")


def _shape(tensor: torch.Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {'x'.join(map(str, tensor.shape)) or 'scalar'}"


def _some(names: Iterable[str]) -> str:
    """The first five, and how many more."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(name[:80] for name in names[:5]) + more
