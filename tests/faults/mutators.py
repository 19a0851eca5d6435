"""Ways to damage files, each drawn from a seeded generator: bytes, checkpoint headers, specs, and the values in them."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

from kdcli.checkpoint import layout

NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**53 + 1, 2**63, 2**64, -(10**30), 10**400, 0.5, -0.0, 1e-320, 1e308),
    *(math.nan, math.inf, -math.inf, "", "x", "0", "a" * 5000, "\0", "a\0b", "../../../etc/passwd", "/dev/zero", "/"),
    *("\x1b[31mred", "\nerror: fake", "\r\n", "\u202e", "\ud800", "kd", "vsd", "resnet14", "wrn99999_1", "resnet99998"),
    *("timm:none", "timm:hf-hub:a/b", "torchvision:none", "folder:/", "synthetic:1000", "none.py", "x.pth", "-", "~"),
    *([], {}, [[]], [0], [None], ["x"], [1, 2, 3], {"name": "kd"}, {"x": {}}, {"__class__": "os.system"}, {"": ""}),
)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The content with bytes flipped, cut, moved, repeated or replaced."""
    kind = draw.choice(("flip", "flip", "flips", "cut", "cut", "zero", "insert", "remove", "repeat", "noise", "append"))
    data = bytearray(content)
    at = draw.randrange(max(len(data), 1))
    length = min(draw.choice((1, 2, 4, 8, 64, 1000)), len(data) - at)
    if kind in ("flip", "flips"):
        # Half of them early in the file, where the structure is.
        for _ in range(1 if kind == "flip" else draw.randint(2, 20)):
            place = draw.randrange(len(data) if draw.random() < 0.5 else min(len(data), 400))
            data[place] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "zero":
        data[at : at + length] = bytes(length)
    elif kind == "insert":
        data[at:at] = draw.randbytes(length)
    elif kind == "remove":
        del data[at : at + length]
    elif kind == "repeat":
        data[at:at] = data[at : at + length]
    elif kind == "noise":
        data[at : at + length] = draw.randbytes(length)
    else:
        data += draw.randbytes(draw.choice((1, 8, 100)))
    return bytes(data)


def one_fault(content: bytes, draw: random.Random) -> bytes:
    """The content with a single bit flipped, or cut off somewhere."""
    if draw.random() < 0.5:
        return content[: draw.randrange(len(content))]
    data = bytearray(content)
    bit = draw.randrange(len(data) * 8)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def twisted(value: Any, draw: random.Random, times: int = 1) -> Any:
    """A JSON value with `times` of its nodes replaced, removed, renamed or nested."""
    value = copy.deepcopy(value)
    for _ in range(times):
        places = list(_places(value))
        if not places:
            return value
        holder, key = draw.choice(places)
        kind = draw.choice(("value", "value", "value", "value", "remove", "rename", "nest", "scale"))
        if kind == "value":
            holder[key] = copy.deepcopy(draw.choice(NASTY))
        elif kind == "remove":
            del holder[key]
        elif kind == "rename" and isinstance(holder, dict):
            holder[str(key) + draw.choice(("x", " ", "\0", "é", "_"))] = holder.pop(key)
        elif kind == "scale" and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] *= draw.choice((-1, 0, 2, 10**6, 0.5))
        else:
            for _ in range(draw.choice((1, 3, 60))):
                holder[key] = [holder[key]] if draw.random() < 0.5 else {"x": holder[key]}
    return value


def _places(value: Any) -> Any:
    """Every (holder, key) of a JSON value, holders before what they hold."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def json_text(value: Any, draw: random.Random) -> bytes:
    """The value as JSON in bytes, sometimes with what JSON allows and nobody expects."""
    text = json.dumps(value, ensure_ascii=draw.random() < 0.7)
    kind = draw.random()
    if kind < 0.05:
        text = '{"seed": 1, ' + text[1:]  # a key twice
    elif kind < 0.10:
        text = text.replace(": 0", ": " + "9" * draw.choice((20, 400, 6000)), 1)
    elif kind < 0.15:
        text = '{"data": ' + "[" * (depth := draw.choice((50, 1000, 200_000))) + "]" * depth + "}"
    return text.encode("utf-8", "surrogatepass")


def header_of(content: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The metadata, the table of tensors, and the bytes behind them, of a checkpoint."""
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    return json.loads(table.pop("__metadata__")["kd"]), table, content[8 + length :]


def tampered(content: bytes, draw: random.Random) -> bytes:
    """A checkpoint with another header that does not fit its seal: lengths, types, shapes, offsets, keys, nesting."""
    metadata, table, rest = header_of(content)
    kind = draw.choice(("table", "metadata", "outer", "length", "deep", "twice"))
    outer: Any = {"__metadata__": {"kd": json.dumps(metadata, sort_keys=True)}, **table}
    if kind == "metadata":
        outer["__metadata__"]["kd"] = json.dumps(twisted(metadata, draw))
    elif kind == "table":
        name = draw.choice(list(table))
        outer[name] = twisted({"x": outer[name]}, draw).get("x")
    elif kind == "outer":
        outer = twisted(outer, draw, 3)
    body = json.dumps(outer, separators=(",", ":")).encode()
    if kind == "deep":
        body = b'{"__metadata__":' + b"[" * (depth := draw.choice((100, 2000, 500_000))) + b"]" * depth + b"}"
    elif kind == "twice":
        body = b'{"' + next(iter(table)).encode() + b'":{},' + body[1:]
    length = len(body)
    if kind == "length":
        length = draw.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))
    return length.to_bytes(8, "little") + body + rest


def forged(content: bytes, draw: random.Random) -> bytes:
    """A checkpoint whose header lies and whose seal fits all the same: what a forger can do, and damage cannot."""
    metadata, table, rest = header_of(content)
    kind = draw.random()
    if kind < 0.8:
        kept = {key: metadata.pop(key) for key in ("format", "digest", "role") if draw.random() < 0.95}
        metadata.pop("seal", None)
        metadata = {**twisted(metadata, draw, draw.choice((1, 1, 2, 4))), **kept}
    else:
        metadata.pop("seal", None)
        table = twisted(table, draw, draw.choice((1, 1, 3)))
    try:
        return resealed(metadata, table) + rest
    except ValueError:  # NaN cannot be written; another draw
        return forged(content, draw)


def resealed(metadata: dict[str, Any], table: dict[str, Any]) -> bytes:
    """A header with a seal that fits. Raises ValueError for what JSON cannot express."""
    return layout.sealed_header({key: value for key, value in metadata.items() if key != "seal"}, table)


_TOML = (
    *(
        "true",
        "0",
        "-1",
        "1e400",
        "nan",
        "inf",
        "9" * 400,
        "0x1",
        "1979-05-27T07:32:00Z",
        "07:32:00",
        '""',
        '"\\u0000"',
    ),
    *("[]", "[[]]", "{}", "{name = 1}", "[1, 'a']", "'''", '"""', "1__0", "+0", "'\x1b[31m'", "'é'", "[" * 3000),
    *("{a=" * 400, "'kd'", "'none.py'", "'../x'", "''", '"\\nerror: fake"', "2147483648", "0.5", "-0.5"),
)


_TABLES = ("[train]", "[[train]]", "[data.x.y]", "[method]", "[sweep]", "[[published]]", "[]")


def toml_text(text: str, draw: random.Random) -> bytes:
    """A TOML file with a value, a key or a line changed, or its bytes damaged."""
    if draw.random() < 0.25:
        return damaged(text.encode(), draw)
    lines = text.splitlines()
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.choice([i for i, line in enumerate(lines) if line.strip()] or [0])
        key, equals, _value = lines[at].partition("=")
        kind = draw.choice(("value", "value", "value", "key", "twice", "drop", "table", "junk", "dotted"))
        if kind == "value" and equals:
            lines[at] = f"{key}= {draw.choice(_TOML)}"
        elif kind == "key" and equals:
            lines[at] = draw.choice(("x", "a.b", '""', "data", "train.lr", "sweep.seeds")) + lines[at][len(key) :]
        elif kind == "twice":
            lines.insert(at, lines[at])
        elif kind == "drop":
            del lines[at]
        elif kind == "table":
            lines.insert(
                at, draw.choice(("[train]", "[[train]]", "[data.x.y]", "[method]", "[sweep]", "[[published]]", "[]"))
            )
        elif kind == "dotted":
            lines.insert(0, ".".join(["a"] * draw.choice((3, 500, 5000))) + " = 1")
        else:
            lines.insert(at, draw.choice(("\0", "\x1b", "=", "x", "[", "]]", "'", "\ufeff", "train = 1", "seed = 'x'")))
    return "\n".join(lines).encode("utf-8", "surrogatepass")
