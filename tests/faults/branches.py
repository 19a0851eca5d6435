"""Every call of one run struck in turn: the run pauses before a call, forks, and its copy is struck there.

What all trials have in common, everything before the call, is computed once; the blow itself falls on a real process in the
middle of a real run. Afterwards the directory is put back to what it was before the fork, the files the run holds open among
it, and the run goes on to its next call.

The same file contents resume alike, so of several blows that leave the same directory one copy is kept: `key` names it.
Temporary files count by their name without its random part: a start removes them whatever is in them.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from forking import settle

_RANDOM = re.compile(r"\.[0-9a-f]{16}\.tmp$")

Tree = dict[str, bytes | None]  # relative path → content; None for a directory


class Branches:
    """Decides at every call whether, and how often, to branch.

    Args:
        shim: the shim of the process.
        blows: what to do at each chosen call.
        onward: errors stay: every later call of the branch fails too.
        keep: directory for the directories that the blows leave, by key.
        every, first: choose each `every`-th call, from call `first` on.
        in_turn: writes, which are most of the calls, get one of the blows each, one after the other; all others get all.
    """

    def __init__(
        self,
        shim: Any,
        blows: list[str],
        keep: str,
        every: int = 1,
        first: int = 1,
        onward: bool = False,
        in_turn: bool = False,
    ) -> None:
        self.shim, self.blows, self.keep = shim, blows, Path(keep)
        self.every, self.first, self.onward, self.in_turn = every, first, onward, in_turn
        self.blow: str | None = None  # in a branch: what it is struck with
        settle()  # the run that is forked so often has written to much of its memory

    def visit(self, number: int, call: str, shown: str, args: tuple[Any, ...]) -> str | None:
        """Branch once a blow; None in the trunk, the blow in a branch."""
        if self.blow is not None:
            return self.blow if self.onward else None
        if number < self.first or (number - self.first) % self.every:
            return None
        turn = [self.blows[number % len(self.blows)]] if self.in_turn and call == "write" else self.blows
        for blow in turn:
            if blow.startswith("half") and call != "write":
                continue
            if self._branch(blow, number, call, shown):
                self.blow = blow
                return blow
        return None

    def _branch(self, blow: str, number: int, call: str, shown: str) -> bool:
        """Fork; true in the branch. The trunk waits, reports, and puts everything back."""
        from kdcli.runs import lock as runlock

        root = Path(self.shim.root)
        open_files = _open_files(root)
        before = read_tree(root)
        with tempfile.TemporaryFile() as err:
            held = set(runlock._held)  # a branch is no data worker: it keeps the lock that its run has taken
            runlock._held.clear()
            pid = os.fork()
            runlock._held.update(held)
            if not pid:
                os.dup2(err.fileno(), 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                return True
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            err.seek(0)
            text = err.read().decode(errors="replace")
        after = read_tree(root)
        key = key_of(after)
        if not (self.keep / key).exists():
            write_tree(self.keep / key, after, self.shim.real)
        self._put_back(root, before, after, open_files)
        self.shim.tell(branch=blow, n=number, call=call, path=shown, code=code, err=text, key=key)
        return False

    def _put_back(
        self, root: Path, before: Tree, after: Tree, open_files: list[tuple[int, str, int, int, int]]
    ) -> None:
        real = self.shim.real
        for name in sorted(set(after) - set(before), reverse=True):
            (real["rmdir"] if after[name] is None else real["unlink"])(root / name)
        write_tree(root, {name: content for name, content in before.items() if after.get(name, 0) != content}, real)
        for fd, path, flags, offset, inode in open_files:
            if os.stat(path).st_ino != inode:  # the branch removed it: the name is now another file's
                again = real["open"](path, flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC))
                os.dup2(again, fd, inheritable=False)
                os.close(again)
            if os.path.isfile(path):
                os.lseek(fd, offset, os.SEEK_SET)


def _open_files(root: Path) -> list[tuple[int, str, int, int, int]]:
    """Descriptor, path, flags, offset and inode of what this process has open below `root`."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            path = os.readlink(f"/proc/self/fd/{fd}")
            if not path.startswith(f"{root}/"):
                continue
            flags, info = fcntl.fcntl(fd, fcntl.F_GETFL), os.fstat(fd)
            offset = os.lseek(fd, 0, os.SEEK_CUR)
        except OSError:  # the listing's own descriptor
            continue
        found.append((fd, path, flags, offset, info.st_ino))
    return found


def read_tree(root: Path) -> Tree:
    """Everything below a directory."""
    tree: Tree = {}
    for folder, folders, files in os.walk(root):
        for name in folders:
            tree[os.path.relpath(os.path.join(folder, name), root)] = None
        for name in files:
            with open(os.path.join(folder, name), "rb") as file:
                tree[os.path.relpath(os.path.join(folder, name), root)] = file.read()
    return tree


def write_tree(root: Path, tree: Tree, real: dict[str, Any]) -> None:
    """Make directories and files as `tree` has them, through the system's own calls."""
    if not root.exists():
        real["mkdir"](root)
    for name in sorted(tree):
        content = tree[name]
        if content is None:
            if not (root / name).is_dir():
                real["mkdir"](root / name)
            continue
        with real["open()"](root / name, "r+b" if (root / name).exists() else "wb") as file:
            file.truncate(0)
            file.write(content)


def key_of(tree: Tree) -> str:
    """A hash of what matters about a directory.

    That is not the random part of temporary names, nor what is in them, in the lock, and in the file for watchers.
    """
    content = hashlib.sha256()
    for name in sorted(tree, key=lambda name: _RANDOM.sub(".tmp", name)):
        plain = _RANDOM.sub(".tmp", name)
        part = tree[name]
        if part is None:
            part = b"directory"
        elif plain != name or Path(name).name in (".lock", "progress.json"):
            part = b"anything"
        content.update(f"{plain}\0".encode() + _digest(part))
    return content.hexdigest()[:24]


@functools.lru_cache(64)  # a power cut in a long row of calls leaves most files as they were
def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def unpack(kept: Path, target: Path) -> None:
    """A copy of a kept directory, to resume in."""
    shutil.copytree(kept, target, dirs_exist_ok=True)
