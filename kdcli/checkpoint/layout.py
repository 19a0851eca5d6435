"""The header of a checkpoint and where its tensors lie: written sealed, read with suspicion. Torch-free."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from typing import Any, NamedTuple, NoReturn

from kdcli.errors import IncompatibleError

FORMAT = 1
ROLES = ("student", "teacher", "state")
HEADER_LIMIT = 8 * 2**20  # bytes; 3,000 tensors and the 21,841 names of ImageNet take about 1 MiB

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


def label(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """What the digest covers of a tensor besides its bytes; it fixes how many bytes follow, so nothing is ambiguous."""
    return json.dumps([name, dtype, list(shape)]).encode() + b"\n"


def sealed_header(metadata: dict[str, Any], table: dict[str, Any]) -> bytes:
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


def read_header(fd: int) -> Header:
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
    require_seal(metadata, body)
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


def require_seal(metadata: dict[str, Any], body: bytes) -> None:
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


def require_digest(header: Header, found: str) -> None:
    if header.metadata.get("digest") != found:
        raise Damaged("its tensors were changed: the digest differs")


def _read(fd: int, size: int, offset: int) -> bytes:
    buffer = bytearray(size)
    read_into(fd, memoryview(buffer), offset)
    return bytes(buffer)


def read_into(fd: int, view: memoryview, offset: int) -> None:
    """Fill `view` from the file at `offset` (both in bytes)."""
    while view:
        count = os.preadv(fd, [view], offset)
        if not count:  # it shrank since its size was taken
            raise Damaged("it is cut off")
        view, offset = view[count:], offset + count
