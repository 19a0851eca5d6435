"""What a disk may hold after a power cut, from the calls that a run made: only what was synced is sure to be there.

The model is the least that POSIX promises: the content of a file is durable once the file was synced; a name that was
made, changed or removed is durable once its directory was. Everything else may have reached the disk or not, each change
on its own, whatever the order.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from typing import Any

from branches import Tree

TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp$")
FEW = 4  # how many of the latest unsynced changes of names are tried in every combination

_FOLDER = -1  # stands for an inode where the name is a directory's


class Disk:
    """Feed it the traced calls in order (`do`); `cuts` gives the directories that a power cut now may leave."""

    def __init__(self) -> None:
        self.content: dict[int, bytes] = {}
        self.synced: dict[int, bytes] = {}
        self.names: dict[str, int] = {}
        self.durable: dict[str, int] = {}
        self.pending: list[tuple[str, dict[str, int | None]]] = []  # directory, and name → inode, None: removed

    def do(self, event: dict[str, Any]) -> None:
        """Take in one traced call."""
        call, path = event["call"], event["path"]
        if call == "open":
            if path not in self.names:
                inode = len(self.content)
                self.content[inode] = self.synced[inode] = b""
                self._change(path, {path: inode})
            elif event["truncates"]:
                self.content[self.names[path]] = b""
        elif call in ("write", "pwrite"):
            data, at = bytes.fromhex(event["data"]), event["offset"]
            inode = self.names[path]
            old = self.content[inode].ljust(at, b"\0")
            self.content[inode] = old[:at] + data + old[at + len(data) :]
        elif call == "ftruncate":
            inode = self.names[path]
            self.content[inode] = self.content[inode][: event["size"]].ljust(event["size"], b"\0")
        elif call == "fsync":
            self._sync(path)
        elif call in ("rename", "replace"):
            self._change(path, {path: self.names[event["source"]], event["source"]: None})
        elif call in ("unlink", "remove", "rmdir"):
            self._change(path, {path: None})
        elif call == "mkdir":
            self._change(path, {path: _FOLDER})
        else:
            raise AssertionError(f"a call that the model does not know: {call}")

    def _change(self, path: str, names: dict[str, int | None]) -> None:
        _apply(self.names, names)
        folder = os.path.dirname(path)
        self.pending.append((folder, names))
        if not folder:  # the trial's own directory is outside of what is traced
            self._sync("")

    def _sync(self, path: str) -> None:
        if path and self.names[path] != _FOLDER:
            self.synced[self.names[path]] = self.content[self.names[path]]
            return
        for folder, names in self.pending:
            if folder == path:
                _apply(self.durable, names)
        self.pending = [change for change in self.pending if change[0] != path]

    def cuts(self) -> Iterator[Tree]:
        """The worst case first: everything that was not synced is gone; then parts of it are there after all."""
        old, late = self.pending[:-FEW], self.pending[-FEW:]
        for bygone in (False, True) if old else (False,):
            for chosen in itertools.product((False, True), repeat=len(late)):
                names = dict(self.durable)
                for change, there in [*((c, bygone) for c in old), *zip(late, chosen, strict=True)]:
                    if there:
                        _apply(names, change[1])
                for share in (0.0, 0.5, 1.0):
                    yield self._tree(names, share)

    def _tree(self, names: dict[str, int], share: float) -> Tree:
        tree: Tree = {}
        for path in sorted(names):
            parent = os.path.dirname(path)
            if parent and tree.get(parent, b"") is not None:
                continue  # its directory did not survive
            inode = names[path]
            tree[path] = None if inode == _FOLDER else self._content(inode, share)
        return tree

    def _content(self, inode: int, share: float) -> bytes:
        """A file's content where `share` of what was not synced has reached the disk."""
        sure, now = self.synced[inode], self.content[inode]
        if share == 0.0 or sure == now:
            return sure
        return now if share == 1.0 else now[: len(sure) + int((len(now) - len(sure)) * share)]


def _apply(names: dict[str, int], change: dict[str, int | None]) -> None:
    for path, inode in change.items():
        if inode is None:
            names.pop(path, None)
        else:
            names[path] = inode


def violations(trace: list[dict[str, Any]]) -> list[str]:
    """Where a rename onto a final name was not preceded by a sync of the file or not followed by one of its directory.

    The file for watchers is let off: nothing is lost with it.
    """
    found, unsynced, owed = [], set(), ""
    for event in trace:
        call, path = event["call"], event["path"]
        if owed and not (call == "fsync" and path == os.path.dirname(owed)):
            found.append(f"{owed} was renamed, and then came {call} {path} instead of a sync of its directory")
        owed = ""
        if call in ("write", "pwrite", "ftruncate") or (call == "open" and event["truncates"]):
            unsynced.add(path)
        elif call == "open()":
            found.append(f"{path} was opened past the durable way")
        elif call == "fsync":
            unsynced.discard(path)
        elif call in ("rename", "replace") and not TEMPORARY.search(path) and not path.endswith("/progress.json"):
            if event["source"] in unsynced:
                found.append(f"{path} got its name before its content was synced")
            owed = path
    return [*found, f"{owed} was renamed, and nothing more"] if owed else found
