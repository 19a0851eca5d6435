"""Reading the python layout of CIFAR, which is pickles, without running what a pickle may ask for."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from kdcli.errors import InputError

MAX_BYTES = 256 << 20
"""Larger than any CIFAR batch (154 MB); a file beyond it is not one."""


class _RefusedError(Exception):
    """The pickle asks for a name that no CIFAR batch needs."""


class _Restricted(pickle.Unpickler):
    """An unpickler that can build lists, dicts, strings, numbers and numpy arrays, and call nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            # The name under which numpy 1 and numpy 2 pickle arrays; both resolve to the same function.
            return np.empty(0).__reduce__()[0]
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) == ("_codecs", "encode"):
            # Python 2 byte strings inside protocol-2 pickles written by Python 3. Made anew for each file, so that no
            # file can alter it for the next; only latin-1, because a codec name is otherwise a module to import.
            return lambda text, encoding="latin1": text.encode({"latin1": "latin-1"}[encoding])
        raise _RefusedError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError("a persistent object")


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a CIFAR batch file, keys as str.

    Raises:
        InputError: unreadable, damaged, hostile (it asks for anything but arrays), too large, or not a dictionary.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} has {path.stat().st_size} bytes, more than any CIFAR batch")
        with path.open("rb") as file:
            value = _Restricted(file, encoding="latin1").load()
    except _RefusedError as refused:
        raise InputError(
            f"{path} is hostile: its pickle asks for {refused}, which no CIFAR batch needs; nothing was run",
            hint="delete it and fetch the official archive",
        ) from None
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle raises almost anything; MemoryError is a forged length
        raise InputError(f"{path} is damaged: {type(error).__name__} while reading its pickle") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a CIFAR batch: it holds a {type(value).__name__}")
    return {k.decode("latin1") if isinstance(k, bytes) else str(k): v for k, v in value.items()}
