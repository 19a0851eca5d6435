"""One checkpoint file: written whole or not at all, and read with every byte checked."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli import durable
from kdcli.checkpoint import layout
from kdcli.checkpoint.layout import DTYPES, FORMAT, HEADER_LIMIT, ROLES, Damaged, Entry
from kdcli.errors import IncompatibleError, InputError, WriteError

if TYPE_CHECKING:
    import torch

CHUNK = 2**20  # bytes hashed at a time by the torch-free reader


def save(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> str:
    """Write a checkpoint durably.

    Args:
        path: the file; replaced at once if it exists.
        tensors: any number of named tensors on any device; each is written on its own, even if two share memory.
        metadata: JSON values, `role` among them. `format`, `digest` and `seal` are set here, so what `load` returned
            can be given back.

    Returns:
        The digest of the tensors.

    Raises:
        ValueError: the role is unknown, or a value is not JSON (NaN included).
        WriteError: it could not be written; what was there before is intact.
    """
    if metadata.get("role") not in ROLES:
        raise ValueError(f"role must be one of {ROLES}, not {metadata.get('role')!r}")
    raw = {name: _raw(tensor) for name, tensor in tensors.items()}
    content = hashlib.sha256()
    for name in sorted(raw):
        dtype, shape, data = raw[name]
        content.update(layout.label(name, dtype, shape))
        content.update(data)
    digest = content.hexdigest()

    # Widest types first: every tensor then starts at a multiple of its own size, which readers that map the file need.
    order = sorted(raw, key=lambda name: (-DTYPES[raw[name][0]][1], name))
    table: dict[str, Any] = {}
    end = 0
    for name in order:
        dtype, shape, data = raw[name]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(data)]}
        end += len(data)
    header = layout.sealed_header({**metadata, "format": FORMAT, "digest": digest}, table)
    if len(header) > HEADER_LIMIT:
        raise WriteError(
            f"cannot write {os.fspath(path)}: its metadata is over {HEADER_LIMIT} bytes", hint="shorten it"
        )
    durable.write_bytes(path, [header, *(raw[name][2] for name in order)])
    return digest


def _raw(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], memoryview]:
    """A tensor's type, shape and bytes; the bytes are the tensor's own memory where it is contiguous on the CPU."""
    import torch

    spelling = {torch_name: ours for ours, (torch_name, _) in DTYPES.items()}
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in spelling:
        raise ValueError(f"a checkpoint cannot hold {tensor.dtype}")
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return spelling[name], tuple(tensor.shape), flat.numpy().data if len(flat) else memoryview(b"")


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of a checkpoint, from its header alone (the tensors are not checked). Torch-free.

    Raises:
        InputError: the file is missing, is no checkpoint of kd, or its header is damaged or does not fit its size.
        IncompatibleError: a newer kd wrote it.
    """
    with _reading(path) as fd:
        return layout.read_header(fd).metadata


def verify(path: str | os.PathLike[str], look: Callable[[Entry, memoryview], None] | None = None) -> dict[str, Any]:
    """Check every byte of a checkpoint. Torch-free; takes 1 MiB of memory whatever the size of the file.

    Args:
        look: called with each piece of each tensor (whole numbers, up to `CHUNK` bytes) before the digest is compared.

    Returns:
        `path`, `ok` (always true), `role`, `digest`, `seal`, `tensors` (how many) and `bytes` (of the file).

    Raises:
        InputError: it is missing or damaged in any way.
        IncompatibleError: a newer kd wrote it.
    """
    with _reading(path) as fd:
        header = layout.read_header(fd)
        content = hashlib.sha256()
        buffer = bytearray(CHUNK)
        for entry in header.entries:
            content.update(layout.label(entry.name, entry.dtype, entry.shape))
            for start in range(0, entry.size, CHUNK):
                part = memoryview(buffer)[: min(CHUNK, entry.size - start)]
                layout.read_into(fd, part, entry.offset + start)
                content.update(part)
                if look is not None:
                    look(entry, part)
        layout.require_digest(header, content.hexdigest())
    return {
        "path": os.fspath(path),
        "ok": True,
        "role": header.metadata["role"],
        "digest": header.metadata["digest"],
        "seal": header.metadata["seal"],
        "tensors": len(header.entries),
        "bytes": header.file_size,
    }


def load(
    path: str | os.PathLike[str], *, device: str | torch.device = "cpu"
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors (by name) and the metadata of a checkpoint, every byte checked.

    Args:
        path: the file.
        device: where the tensors go.

    Raises:
        InputError: the file is missing, damaged in any way, or no checkpoint of kd.
        IncompatibleError: a newer kd wrote it.
    """
    import torch

    tensors = {}
    with _reading(path) as fd:
        header = layout.read_header(fd)
        content = hashlib.sha256()
        for entry in header.entries:
            # Each tensor gets memory of its own, never more than the file has: the header was checked against its size.
            tensor = torch.empty(entry.shape, dtype=getattr(torch, DTYPES[entry.dtype][0]))
            view = tensor.reshape(-1).view(torch.uint8).numpy().data
            layout.read_into(fd, view, entry.offset)
            content.update(layout.label(entry.name, entry.dtype, entry.shape))
            content.update(view)
            tensors[entry.name] = tensor
        layout.require_digest(header, content.hexdigest())
    return {name: tensor.to(device) for name, tensor in tensors.items()}, header.metadata


def locate(path: str | os.PathLike[str]) -> Path:
    """The checkpoint file meant by `path`: itself, or the student (else the teacher) of a run directory.

    Raises:
        InputError: it is a directory without either.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for name in ("student.safetensors", "teacher.safetensors"):
        if os.path.lexists(path / name):
            return path / name
    raise InputError(
        f"{path} holds neither student.safetensors nor teacher.safetensors",
        hint="the run may be unfinished: run its command again",
    )


def digest(path: str | os.PathLike[str]) -> str:
    """The digest (64 hex digits) of the tensors of a checkpoint file or run directory, every byte checked. Torch-free.

    Raises:
        InputError: as `verify`; or a directory holds no checkpoint.
    """
    return verify(locate(path))["digest"]


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[int]:
    """An open descriptor; every way in which the content can be wrong comes out as an `InputError` naming the path."""
    fd = durable.open_regular(path)
    try:
        yield fd
    except Damaged as reason:
        hint = "restore it from a copy, or make it again"
        raise InputError(f"{os.fspath(path)} is not a sound kd checkpoint: {reason}", hint=hint) from None
    except IncompatibleError as problem:
        raise IncompatibleError(f"{os.fspath(path)}: {problem.message}", hint=problem.hint) from None
    except OSError as problem:
        raise InputError(f"cannot read {os.fspath(path)}: {problem.strerror}", hint="check the disk") from None
    finally:
        with contextlib.suppress(OSError):  # nothing was written, so nothing can be lost
            os.close(fd)
