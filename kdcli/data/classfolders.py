"""One folder per class: finding its image files without leaving the root, twice, or in an arbitrary order."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kdcli.data.images import EXTENSIONS
from kdcli.errors import InputError

Inode = tuple[int, int]


@dataclass
class Walk:
    """A walk of a data set's folders that remembers what it has seen.

    Attributes:
        root: nothing outside its real path is ever listed.
        ignored: the paths passed over, by reason; `notes` counts them.
    """

    root: Path
    ignored: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    _files: set[Inode] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._real = os.path.realpath(self.root)

    def notes(self) -> tuple[str, ...]:
        """What was passed over, for the user."""
        return tuple(f"{len(paths)} {what} ignored" for what, paths in sorted(self.ignored.items()))

    def folders(self, folder: Path) -> list[str]:
        """Names of the sub-folders in plain string order (1, 10, 2), dot-names left out.

        Raises:
            InputError: the folder cannot be listed, or a link in it leaves the root.
        """
        return sorted(entry.name for entry in self._entries(folder) if entry.is_dir())

    def images(self, folder: Path, classes: list[str]) -> tuple[list[str], list[int]]:
        """`(paths, labels)` of all images under `folder/<class>`, at any depth, by class and then by path.

        A file reached twice (links, hard links) is listed once, where it really is: real places win over links, so
        that a link into another class does not change a label.

        Raises:
            InputError: a folder cannot be listed, or a link leaves the root.
        """
        found: list[tuple[bool, int, str, Inode]] = []
        for label, name in enumerate(classes):
            place = folder / name
            if not place.is_dir():
                continue
            linked = place.is_symlink() or folder.is_symlink()
            chain = (_inode(self.root.stat()), _inode(folder.stat()))
            if _inode(place.stat()) in chain:
                self.ignored["links to an enclosing folder"].add(str(place))
                continue
            for path, via_link, inode in self._walk(place, (*chain, _inode(place.stat())), linked):
                found.append((via_link, label, path, inode))
        found.sort()
        kept: list[tuple[int, str]] = []
        for _, label, path, inode in found:
            if inode in self._files:
                self.ignored["files that are listed already (links)"].add(path)
            else:
                self._files.add(inode)
                kept.append((label, path))
        kept.sort()
        return [path for _, path in kept], [label for label, _ in kept]

    def _walk(self, folder: Path, chain: tuple[Inode, ...], linked: bool) -> Iterator[tuple[str, bool, Inode]]:
        """Image files under `folder`; `chain` are the folders entered on the way, so that loops end."""
        for entry in self._entries(folder):
            via_link = linked or entry.is_symlink()
            if entry.is_dir():
                inode = _inode(entry.stat())
                if inode in chain:
                    self.ignored["links to an enclosing folder"].add(entry.path)
                else:
                    yield from self._walk(Path(entry.path), (*chain, inode), via_link)
            elif os.path.splitext(entry.name)[1].lower() not in EXTENSIONS:
                self.ignored["files without an image's extension"].add(entry.path)
            elif entry.is_file():
                yield entry.path, via_link, _inode(entry.stat())
            else:
                raise InputError(f"{entry.path} is not a file", hint="a broken link or a device; remove it")

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        self._confine(folder)
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"{folder} cannot be listed: {error.strerror}") from error
        kept = []
        for entry in entries:
            if entry.name.startswith("."):
                self.ignored["dot-names"].add(entry.path)
                continue
            if entry.is_symlink():
                self._confine(entry.path)
            kept.append(entry)
        return kept

    def _confine(self, path: str | os.PathLike[str]) -> None:
        if os.path.commonpath([os.path.realpath(path), self._real]) != self._real:
            raise InputError(f"{path} is a link that leaves {self.root}", hint="copy the files instead")


def _inode(status: os.stat_result) -> Inode:
    return status.st_dev, status.st_ino
