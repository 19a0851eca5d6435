"""Checkpoints: one safetensors file that says by itself what it is, and in which no flipped bit goes unnoticed.

The file is plain safetensors and opens in any reader. All of kd's metadata is one JSON text under the single key `kd`,
because safetensors writes metadata keys in random order. Two hashes cover every byte of the file:

- `digest`: SHA-256 over the tensors, in the order of their names: a line of JSON `[name, dtype, shape]`, then bytes.
  It depends on nothing else (no dates, no paths), so equal weights have equal digests. `kd digest` prints this number.
- `seal`: SHA-256 over the header as it lies in the file (its length, padding and all, `digest` included), with the 64
  characters of the seal itself read as zeros.

Together with the checks that the tensors lie end to end and fill the file, any one-bit flip or truncation is an error.
(safetensors itself overlooks 98 % of single-bit flips.) This is protection from damage, not from forgery.

Torch-free at import; only `save`, `load` and the state functions that call them use torch, and import it when called.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from kdcli import durable
from kdcli.errors import IncompatibleError, InputError, WriteError

if TYPE_CHECKING:
    import torch

FORMAT = 1
ROLES = ("student", "teacher", "state")
HEADER_LIMIT = 8 * 2**20  # bytes; 3,000 tensors and the 21,841 names of ImageNet take about 1 MiB
CHUNK = 2**20  # bytes hashed at a time by the torch-free reader

# The types that torch.<name> and safetensors share, with their size in bytes.
DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}

_NO_SEAL = "0" * 64
_STATE_NAME = re.compile(r"step-(\d{9,18})\.safetensors")


class Entry(NamedTuple):
    """One tensor of a file: its type in safetensors' spelling, its shape, and where its bytes begin in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int  # bytes


class Header(NamedTuple):
    """What the header of a checkpoint says: the metadata, and the tensors in the order of their names."""

    metadata: dict[str, Any]
    entries: tuple[Entry, ...]
    file_size: int  # bytes


class Damaged(Exception):  # noqa: N818 - a reason on its way to an InputError, never seen outside
    """Why a file is not a sound checkpoint."""


# ------------------------------------------------------------------------------------------------------------- writing


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
        content.update(_label(name, dtype, shape))
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
    header = _sealed_header({**metadata, "format": FORMAT, "digest": digest}, table)
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


def _label(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """What the digest covers of a tensor besides its bytes; it fixes how many bytes follow, so nothing is ambiguous."""
    return json.dumps([name, dtype, list(shape)]).encode() + b"\n"


def _sealed_header(metadata: dict[str, Any], table: dict[str, Any]) -> bytes:
    """Length and JSON of a safetensors header, padded to a multiple of 8 bytes, its seal filled in."""
    for name in ("__metadata__", ""):
        if name in table:
            raise ValueError(f"a tensor cannot be named {name!r}")
    text = json.dumps({**metadata, "seal": _NO_SEAL}, sort_keys=True, allow_nan=False)
    body = json.dumps({"__metadata__": {"kd": text}, **table}, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    blank = len(body).to_bytes(8, "little") + body
    field = f'\\"seal\\": \\"{_NO_SEAL}\\"'.encode()  # as escaped inside the outer JSON
    if blank.count(field) != 1:
        raise ValueError("the metadata may not hold a seal of its own")
    return blank.replace(field, field.replace(_NO_SEAL.encode(), hashlib.sha256(blank).hexdigest().encode()))


# ------------------------------------------------------------------------------------------------------------- reading


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of a checkpoint, from its header alone (the tensors are not checked). Torch-free.

    Raises:
        InputError: the file is missing, is no checkpoint of kd, or its header is damaged or does not fit its size.
        IncompatibleError: a newer kd wrote it.
    """
    with _reading(path) as fd:
        return _read_header(fd).metadata


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
        header = _read_header(fd)
        content = hashlib.sha256()
        buffer = bytearray(CHUNK)
        for entry in header.entries:
            content.update(_label(entry.name, entry.dtype, entry.shape))
            for start in range(0, entry.size, CHUNK):
                part = memoryview(buffer)[: min(CHUNK, entry.size - start)]
                _read_into(fd, part, entry.offset + start)
                content.update(part)
                if look is not None:
                    look(entry, part)
        _require_digest(header, content.hexdigest())
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
        header = _read_header(fd)
        content = hashlib.sha256()
        for entry in header.entries:
            # Each tensor gets memory of its own, never more than the file has: the header was checked against its size.
            tensor = torch.empty(entry.shape, dtype=getattr(torch, DTYPES[entry.dtype][0]))
            view = tensor.reshape(-1).view(torch.uint8).numpy().data
            _read_into(fd, view, entry.offset)
            content.update(_label(entry.name, entry.dtype, entry.shape))
            content.update(view)
            tensors[entry.name] = tensor
        _require_digest(header, content.hexdigest())
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


def _read_header(fd: int) -> Header:
    """Parse and check the header and the layout of the open file. Raises `Damaged` or `IncompatibleError`."""
    file_size = os.fstat(fd).st_size
    if not file_size:
        raise Damaged("it is empty")
    if file_size < 10:
        raise Damaged("it is cut off")
    length = int.from_bytes(_read(fd, 8, 0), "little")
    if length > HEADER_LIMIT:
        raise Damaged("it does not begin like a safetensors file")
    if 8 + length > file_size:
        raise Damaged("its header is cut off")
    body = _read(fd, length, 8)
    try:
        outer = _parse(body)
        text = outer.pop("__metadata__", {}).get("kd")
    except (AttributeError, TypeError):
        raise Damaged("its header is not that of a safetensors file") from None
    if not isinstance(text, str):
        raise Damaged("it has no kd metadata (kd import reads checkpoints of other programs)")
    metadata = _parse(text.encode("utf-8", "surrogatepass"))
    _require_seal(metadata, body)
    # From here on the header is as it was written; what follows catches a header that was written wrong, or on purpose.
    if metadata.get("format") != FORMAT:
        raise IncompatibleError(f"this is checkpoint format {metadata.get('format')!r}", hint="upgrade kd to read it")
    if metadata.get("role") not in ROLES:
        raise Damaged("its role is unknown")
    return Header(metadata, _entries(outer, 8 + length, file_size), file_size)


def _parse(text: bytes) -> dict[str, Any]:
    """A JSON object without repeated keys, NaN or boundless nesting."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        obj = dict(items)
        if len(obj) != len(items):
            raise ValueError("a key is repeated")
        return obj

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        obj = json.loads(text.decode(), object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError):
        raise Damaged("its header is not valid JSON") from None
    if not isinstance(obj, dict):
        raise Damaged("its header is not a JSON object")
    return obj


def _require_seal(metadata: dict[str, Any], body: bytes) -> None:
    seal = metadata.get("seal")
    if not isinstance(seal, str) or not re.fullmatch(r"[0-9a-f]{64}", seal):
        raise Damaged("it has no seal")
    field = f'\\"seal\\": \\"{seal}\\"'.encode()
    if body.count(field) != 1:
        raise Damaged("its header was changed")
    blank = body.replace(field, field.replace(seal.encode(), _NO_SEAL.encode()))
    if hashlib.sha256(len(body).to_bytes(8, "little") + blank).hexdigest() != seal:
        raise Damaged("its header was changed")


def _entries(table: dict[str, Any], start: int, file_size: int) -> tuple[Entry, ...]:
    """The tensors, sorted by name; they must lie end to end from `start` to the end of the file."""
    entries = [_entry(name, item, start) for name, item in table.items()]
    position = start
    for entry in sorted(entries, key=lambda e: (e.offset, e.size)):
        if entry.offset != position:
            raise Damaged("its tensors do not lie end to end")
        position += entry.size
    if position > file_size:
        raise Damaged(f"it is cut off: {position} bytes are announced and {file_size} are there")
    if position < file_size:
        raise Damaged(f"{file_size - position} bytes follow its end")
    return tuple(sorted(entries, key=lambda e: e.name))


def _entry(name: str, item: Any, start: int) -> Entry:
    """One line of the header's table; `start` is where the tensors begin. The size must follow from type and shape."""
    try:
        dtype, shape, (begin, end) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
        sound = len(item) == 3 and dtype in DTYPES and len(shape) <= 32
        sound = sound and all(type(n) is int and 0 <= n < 2**62 for n in (*shape, begin, end))
        if sound and end - begin == math.prod(shape) * DTYPES[dtype][1]:
            return Entry(name, dtype, shape, start + begin, end - begin)
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise Damaged(f"the entry of tensor {name[:80]!r} makes no sense")


def _require_digest(header: Header, found: str) -> None:
    if header.metadata.get("digest") != found:
        raise Damaged("its tensors were changed: the digest differs")


def _read(fd: int, size: int, offset: int) -> bytes:
    buffer = bytearray(size)
    _read_into(fd, memoryview(buffer), offset)
    return bytes(buffer)


def _read_into(fd: int, view: memoryview, offset: int) -> None:
    """Fill `view` from the file at `offset` (both in bytes)."""
    while view:
        count = os.preadv(fd, [view], offset)
        if not count:  # it shrank since its size was taken
            raise Damaged("it is cut off")
        view, offset = view[count:], offset + count


# ---------------------------------------------------------------------------------------------------- the resume state


def save_state(
    directory: str | os.PathLike[str],
    step: int,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write `step-<step>.safetensors` durably, read it back, and only then remove the states it makes superfluous.

    Those are all but the `keep - 1` newest earlier ones, and any of a later step: they are damaged, or were left by a
    run that this one replaces, and would otherwise win at the next start.

    Raises:
        WriteError: it could not be written or reads back differently; the earlier states are all still there.
    """
    directory = durable.make_dir(directory, links=False)
    path = directory / f"step-{step:09d}.safetensors"
    written = save(path, tensors, {**metadata, "role": "state", "step": step})
    try:
        found = verify(path)["digest"]
    except InputError as problem:
        found = problem.message
    try:
        if found != written:
            os.unlink(path)
            raise WriteError(f"{path} reads back differently from what was written", hint="the disk may be failing")
        states = _states(directory)
        earlier = [s for s in states if s < step]
        for old in [*earlier[max(keep - 1, 0) :], *(s for s in states if s > step)]:
            os.unlink(states[old])
    except OSError as problem:
        raise durable.write_error(path, problem) from None
    return path


def load_state(directory: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[str]] | None:
    """The newest sound state, by step number and never by date.

    Returns:
        Tensors, metadata (`step` among it), and one sentence for every newer file that had to be passed over; or None
        where no state was ever saved.

    Raises:
        InputError: there are states, and every one is damaged.
        IncompatibleError: a newer kd wrote the newest.
    """
    try:
        states = _states(Path(directory))
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise InputError(f"cannot read {os.fspath(directory)}: {problem.strerror}", hint="check the path") from None
    notices: list[str] = []
    for step, path in states.items():
        try:
            tensors, metadata = load(path)
            if metadata["role"] != "state" or metadata.get("step") != step:
                raise InputError(f"{path} is not the state of step {step}")
        except InputError as problem:
            notices.append(f"{problem.message}; going back to the state before it")
            continue
        return tensors, metadata, notices
    if notices:
        raise InputError(
            f"no state in {os.fspath(directory)} can be read; the newest: {notices[0].partition('; going')[0]}",
            hint="start anew with --overwrite",
        )
    return None


def _states(directory: Path) -> dict[int, Path]:
    """Step number to file, newest step first. Raises `OSError`."""
    found = {
        int(match[1]): directory / name for name in os.listdir(directory) if (match := _STATE_NAME.fullmatch(name))
    }
    return dict(sorted(found.items(), reverse=True))
