"""The process in which `kd import` opens a foreign checkpoint: what goes wrong here, goes wrong here.

A `.pth` is a pickle, which is a program. It is read by torch's restricted reader (`weights_only=True`), which builds
tensors and plain containers and calls nothing else. Published files also hold an `argparse.Namespace` and numpy scalars
beside the weights; these names are let through, but to a stand-in that forgets what it is given, so no foreign class is
ever made. Should a hostile file get past that reader all the same, this process may not use more memory, time and disk
than the file's size justifies, and it may not connect, start programs or write anywhere but into its own directory.

Request (JSON on stdin): `source`, `out` (paths) and `size` (bytes of the source).
Answer (one line of JSON on stdout): `{"ok": true}` once `out` holds the tensors, or `{"ok": false, "reason": …}`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from typing import Any

from kdcli.errors import KdError

SPARE_MEMORY = 512 * 2**20  # bytes beyond what the tensors need, for torch itself
SPARE_SECONDS = 8  # of processor time, beyond 1 s per 20 MB

# Where the programs of the field keep the weights, in the order they are looked for.
CONTAINERS = ("state_dict", "model", "net", "model_state_dict", "network")
PARTS = ("student", "teacher")

ALLOWED = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    *(f"numpy.dtypes.{kind}DType" for kind in ("Bool", "Int32", "Int64", "Float16", "Float32", "Float64")),
)

_FORBIDDEN = re.compile(
    r"socket\.|subprocess\.|os\.(system|exec|posix_spawn|spawn|fork|startfile|kill)|pty\.|webbrowser"
)
_WRITING = re.compile(r"os\.(remove|rename|link|symlink|mkdir|rmdir|chmod|chown|truncate|utime)|shutil\.")


class Refused(Exception):  # noqa: N818 - a reason on its way to the parent's InputError
    """Why the file is not imported; a clause to follow its name."""


class Forgotten:
    """Stands in for every foreign class: takes any arguments and any state, and keeps neither."""

    def __new__(cls, *args: Any) -> Forgotten:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def main() -> None:
    """Answer the request on stdin."""
    request = json.load(sys.stdin)
    try:
        convert(request["source"], request["out"], request["size"])
        answer = {"ok": True}
    except Refused as reason:
        answer = {"ok": False, "reason": str(reason)}
    except MemoryError:
        answer = {"ok": False, "reason": "it asks for more memory than its size justifies"}
    except KdError as problem:
        answer = {"ok": False, "reason": problem.message}
    print(json.dumps(answer), flush=True)


def convert(source: str, out: str, size: int) -> None:
    """Read `source` and write its weights to `out` as a kd state file. Raises `Refused`, `MemoryError` or `KdError`."""
    import numpy
    import torch

    from kdcli import checkpoint

    torch.set_num_threads(1)
    assert numpy  # imported while importing is still free of limits
    limit(size)
    confine(os.path.dirname(out))
    tensors = weights(read(source, size))
    if not tensors:
        raise Refused("it holds no named tensors")
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            raise Refused(f"tensor {name[:80]!r} is of a kind that is not imported")
        if tensor.numel() * tensor.element_size() > size:  # one number shown as a million is a million once written
            raise Refused(f"tensor {name[:80]!r} claims to be larger than the file")
    try:
        checkpoint.save(out, tensors, {"role": "state"})
    except RuntimeError as problem:
        raise Refused(_reason(problem)) from None


def limit(size: int) -> None:
    """Bound this process by the size (bytes) of the file it reads, as far as the system can."""
    try:
        import resource
    except ImportError:
        return
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):
        room = 2 * size + 2**24
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    with contextlib.suppress(OSError, ValueError):
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        seconds = int(used) + SPARE_SECONDS + size // 20_000_000
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")  # torch maps gigabytes it never touches
        memory = mapped + 3 * size + SPARE_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def confine(directory: str) -> None:
    """From now on: no connections, no programs, no changes outside `directory`. A second wall, not the first."""
    inside = os.path.join(directory, "")
    changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def within(path: str | bytes | os.PathLike[str]) -> bool:
        return os.path.abspath(os.fsdecode(path)).startswith(inside)

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            wrong = isinstance(flags, int) and flags & changing and not isinstance(path, int) and not within(path)
        elif _WRITING.match(event):
            paths = [arg for arg in args if isinstance(arg, str | bytes | os.PathLike)]
            wrong = not (paths and all(map(within, paths)))
        else:
            wrong = _FORBIDDEN.match(event)
        if wrong:
            raise Refused(f"reading it tried to do something a checkpoint has no business doing ({event})")

    sys.addaudithook(watch)


def read(source: str, size: int) -> Any:
    """What the file holds: a mapping, with any luck. Raises `Refused` or `MemoryError`."""
    import torch

    with open(source, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size:
        import safetensors.torch

        try:
            return safetensors.torch.load_file(source)
        except Exception as problem:
            raise Refused(_reason(problem)) from None
    if start[:2] == b"PK":
        _check_zip(source, size)
    elif _is_tar(source):
        raise Refused("it is a tar archive; unpack it and import the file inside")
    try:
        with torch.serialization.safe_globals([(Forgotten, name) for name in ALLOWED]):
            return torch.load(source, map_location="cpu", weights_only=True)
    except (Refused, MemoryError):
        raise
    except Exception as problem:  # whatever a hostile file can raise in torch is a reason not to import it
        raise Refused(_reason(problem)) from None


def weights(loaded: Any) -> dict[str, Any]:
    """The named tensors of a checkpoint, without optimizers, counters and settings. Empty if there are none."""
    for _ in range(4):  # {"model": {"state_dict": …}} occurs
        if not isinstance(loaded, Mapping):
            return {}
        inner = next((loaded[name] for name in CONTAINERS if _tensors(loaded.get(name), deep=True)), None)
        if inner is None:
            break
        loaded = inner
    found = _tensors(loaded)
    for part in PARTS:
        found |= {f"{part}.{name}": tensor for name, tensor in _tensors(loaded.get(part)).items()}
    return found


def _tensors(value: Any, *, deep: bool = False) -> dict[str, Any]:
    import torch

    if not isinstance(value, Mapping):
        return {}
    found = {name: t for name, t in value.items() if isinstance(name, str) and isinstance(t, torch.Tensor)}
    if not found and deep:
        return next((inner for name in (*CONTAINERS, *PARTS) if (inner := _tensors(value.get(name)))), {})
    return found


def _is_tar(source: str) -> bool:
    try:
        return tarfile.is_tarfile(source)
    except Exception:  # a mutated tar makes the library raise more than its own errors
        return False


def _check_zip(source: str, size: int) -> None:
    """torch stores the members of its zip files as they are; one that is compressed, or counted twice, is a bomb."""
    try:
        with zipfile.ZipFile(source) as archive:
            members = archive.infolist()
    except Exception:  # as above
        raise Refused("it is damaged: not a readable zip file") from None
    if any(os.path.basename(m.filename) in ("constants.pkl", "model.json") for m in members):
        raise Refused("it is a TorchScript program, which holds code; save the state_dict of its network instead")
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
        raise Refused("its members are compressed or overlap, as in a zip bomb")


def _reason(problem: Exception) -> str:
    text = " ".join(str(problem).split())
    if match := re.search(r"GLOBAL (\S{1,80})", text):
        return f"it is more than weights: loading it would call {match[1]}; save the state_dict alone"
    if "memory" in text or "alloc" in text:
        return "it asks for more memory than its size justifies"
    if ".tar format" in text:
        return "it is in torch's oldest format (before 0.1.10); load and save it again with a newer torch"
    return "it is damaged, or no checkpoint of torch"


if __name__ == "__main__":
    main()
