"""Which files a path stands for: itself, or everything that kd writes below a directory.

Links found inside a directory never lead out of it. What merely looks like a file of kd (a FIFO called
`student.safetensors`) is listed too, since whoever reads the directory would meet it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from kdcli.errors import InputError, KdError

_NAMES = frozenset({"spec.json", "env.json", "summary.json", "metrics.jsonl"})


@dataclass(frozen=True)
class Place:
    """A file to check.

    Attributes:
        found: it was met below a named directory, so it may be gone by the time it is opened.
        error: what is wrong before it is opened (a link that leads out of the directory).
        skipped: it is a directory that was not entered, and `error` says why; nothing is known to be wrong with it.
    """

    path: str
    found: bool = False
    error: KdError | None = None
    skipped: bool = False


def places(path: str) -> Iterator[Place]:
    """The files that `path` stands for; a directory that holds nothing of kd's is an error.

    A link that is named itself is followed, since that is what was asked for.
    """
    if not os.path.isdir(path):
        yield Place(path)
        return
    empty = True
    for place in _below(path):
        empty = False
        yield place
    if empty:
        hint = "name a checkpoint, a spec, a run directory or a directory of runs"
        yield Place(path, error=InputError(f"{path} holds no checkpoint and no run", hint=hint))


def _below(root: str) -> Iterator[Place]:
    """Every file of kd's below a directory, in the order of names; dot-names are kd's own temporary files."""
    real = os.path.realpath(root)
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except FileNotFoundError:  # a run that finishes removes its states
            continue
        except OSError as problem:
            reason = InputError(f"{folder} cannot be listed: {problem.strerror}", hint="check its permissions")
            yield Place(folder, error=reason)
            continue
        inner = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            ours = entry.name in _NAMES or entry.name.endswith(".safetensors")
            if entry.is_symlink():
                yield from _link(entry.path, real, ours)
            elif entry.is_dir(follow_symlinks=False):
                # A directory in a file's place is somebody's mistake, or a trap.
                if ours:
                    yield Place(entry.path, error=InputError(f"{entry.path} is a directory", hint="remove it"))
                inner.append(entry.path)
            elif ours:
                yield Place(entry.path, found=True)
        folders.extend(reversed(inner))


def _link(path: str, root: str, ours: bool) -> Iterator[Place]:
    """A link below a directory, whose real path is `root`: what it leads to inside is met where it is."""
    target = os.path.realpath(path)
    out = os.path.commonpath([target, root]) != root
    if ours and out:
        reason = InputError(f"{path} is a symbolic link that leads out of the directory", hint="name its target")
        yield Place(path, error=reason)
    elif ours:
        yield Place(path, found=True)
    elif out and _is_dir(target):
        reason = InputError(f"{path} is a symbolic link that leads out of the directory", hint="name its target")
        yield Place(path, error=reason, skipped=True)


def _is_dir(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError:
        return False
