"""Reading the python layout of CIFAR, which is pickles, without running what a pickle may ask for.

A pickle is a program for a small machine. Here the machine is Python's own reader in Python, because the one in C can be
made to crash or to take all memory by a few bytes; it gets a bounded number of steps, and of the names that it may ask for
there are stand-ins that only note what they are told. An array is made from these notes at the end, once they make sense.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kdcli.errors import InputError

MAX_BYTES = 256 << 20
"""Larger than any CIFAR batch (154 MB); a file beyond it is not one."""
MAX_STEPS = 2_000_000
"""Instructions of a pickle; the largest CIFAR batch has about 500,000. Each can make an object of some hundred bytes."""

_NUMBERS = re.compile(r"([|<>=]?)([uif][1248]|b1)")


class _RefusedError(Exception):
    """The pickle asks for a name that no CIFAR batch needs."""


class _Dtype:
    """Stands for `numpy.dtype`; the state that follows says the byte order."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = code, "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class _Array:
    """Stands for `numpy.ndarray`: notes the state that a pickle gives it."""

    def __init__(self) -> None:
        self.state: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def made(self) -> np.ndarray:
        """The array. Raises ValueError, TypeError or AttributeError where the notes make no sense."""
        _, shape, dtype, by_columns, content = self.state
        spelled = f"{dtype.order}{dtype.code.lstrip('|<>=')}"
        if not _NUMBERS.fullmatch(spelled) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("not an array of numbers")
        if isinstance(content, str):  # written by Python 2
            content = content.encode("latin-1")
        kind = np.dtype(spelled)
        if not isinstance(content, bytes) or len(content) != math.prod(shape) * kind.itemsize:
            raise ValueError("an array's size is not that of its content")
        return np.frombuffer(content, kind).reshape(shape, order="F" if by_columns else "C")


class _Restricted(pickle._Unpickler):
    """A reader that can build lists, dicts, strings, numbers and notes on numpy arrays, and call nothing else."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")
        self.steps, self.encoded = MAX_STEPS, MAX_BYTES

    def find_class(self, module: str, name: str) -> Any:
        # Functions made anew for each file: a pickle can set attributes of what it is handed.
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return lambda *_: _Array()  # numpy 1 and numpy 2
        if (module, name) == ("numpy", "ndarray"):
            return "ndarray"  # only an argument of the above
        if (module, name) == ("numpy", "dtype"):
            return lambda code, *_: _Dtype(code)
        if (module, name) == ("_codecs", "encode"):
            return self._encode()
        raise _RefusedError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError("a persistent object")

    def _encode(self) -> Callable[..., bytes]:
        """Python 2 byte strings inside protocol-2 pickles written by Python 3; latin-1 is the only codec."""

        def encode(text: str, encoding: str = "latin1") -> bytes:
            self.encoded -= len(text)
            if encoding != "latin1" or self.encoded < 0:
                raise ValueError("not a byte string")
            return text.encode("latin-1")

        return encode


def _counted(load: Callable[[Any], None]) -> Callable[[Any], None]:
    def step(self: Any) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise _RefusedError(f"more than {MAX_STEPS} steps")
        load(self)

    return step


_Restricted.dispatch = {code: _counted(load) for code, load in pickle._Unpickler.dispatch.items()}


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a CIFAR batch file, keys as str.

    Raises:
        InputError: unreadable, damaged, hostile (it asks for anything but arrays), too large, or not a dictionary.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} has {path.stat().st_size} bytes, more than any CIFAR batch")
        value = _Restricted(path.read_bytes()).load()
        if isinstance(value, dict):
            return {_text(key): one.made() if isinstance(one, _Array) else one for key, one in value.items()}
    except _RefusedError as refused:
        raise InputError(
            f"{path} is hostile: its pickle asks for {str(refused)[:80]}, which no CIFAR batch needs; nothing was run",
            hint="delete it and fetch the official archive",
        ) from None
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle raises almost anything; MemoryError is a forged length
        raise InputError(f"{path} is damaged: {type(error).__name__} while reading its pickle") from error
    raise InputError(f"{path} is not a CIFAR batch: it holds a {type(value).__name__}")


def _text(key: Any) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)
