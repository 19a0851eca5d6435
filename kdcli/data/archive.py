"""Unpacking official archives member by member: expected names, regular files, bounded sizes, a fresh folder.

`extractall` is never used: it has let `../` names, absolute names and links out of the target folder.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from kdcli.errors import InputError, WriteError

Wanted = Callable[[str], int | None]
"""From a member's name to the most bytes it may have, or None where the member is not needed."""


MAX_TOTAL = 4 << 30
"""Bytes that one archive may unpack to, several times what any of the sets has."""


def exactly(sizes: dict[str, int]) -> Wanted:
    """Want these names, each of at most so many bytes."""
    return sizes.get


def matching(pattern: str, most: int) -> Wanted:
    """Want names that match the whole pattern, each of at most `most` bytes."""
    compiled = re.compile(pattern)
    return lambda name: most if compiled.fullmatch(name) else None


def extract(archive: Path, folder: Path, wanted: Wanted, required: list[str]) -> None:
    """Unpack the wanted members of `archive` as `folder`, which must not exist yet.

    Everything goes to a new folder beside it first and is moved into place at the end: `folder` is whole or absent.

    Args:
        wanted: by member name; names are relative to the parent of `folder` and start with `folder`'s own name.
        required: members that must be there.

    Raises:
        InputError: damaged archive, a name that leaves the folder, a link or device, an oversized or repeated member,
            or a required member missing.
        WriteError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    scratch = None
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        found: set[str] = set()
        left = MAX_TOTAL
        for name, regular, content in _members(archive):
            parts = name.split("/")
            if name.startswith("/") or "\\" in name or ".." in parts or "\0" in name:
                raise InputError(f"{archive} is hostile: the member {name!r} leaves the folder", hint="delete it")
            name = "/".join(part for part in parts if part not in ("", "."))
            most = wanted(name)
            if most is None:
                continue
            if not regular:
                raise InputError(f"{archive} is hostile: {name!r} is not a regular file", hint="delete it")
            if name in found:
                raise InputError(f"{archive} is hostile: {name!r} is in it twice", hint="delete it")
            found.add(name)
            target = scratch / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with content() as source, _create(target) as sink:
                left -= _copy(source, sink, min(most, left), f"{archive}: {name!r}")
        lacking = [name for name in required if name not in found]
        if lacking:
            raise InputError(f"{archive} is incomplete: {', '.join(lacking)} missing", hint="fetch it again")
        os.rename(scratch / folder.name, folder)
    except InputError:
        raise
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        raise InputError(f"{archive} is damaged: {error or type(error).__name__}", hint="fetch it again") from error
    except OSError as error:
        if error.errno is None:  # gzip
            raise InputError(f"{archive} is damaged: {error}", hint="fetch it again") from error
        raise WriteError(f"{archive} cannot be unpacked into {folder.parent}: {error.strerror}") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _members(archive: Path) -> Iterator[tuple[str, bool, Callable[[], IO[bytes]]]]:
    """`(name, is a regular file, open it)` for each member, in order, folders left out."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                if not info.is_dir():
                    kind = stat.S_IFMT(info.external_attr >> 16)
                    yield info.filename, kind in (0, stat.S_IFREG), lambda info=info: file.open(info)
        return
    with tarfile.open(archive, "r|gz") as file:
        for member in file:
            if not member.isdir():
                yield (
                    member.name,
                    member.isreg() and not member.issparse(),
                    lambda member=member: _tar_open(file, member),
                )


def _tar_open(file: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = file.extractfile(member)
    if content is None:
        raise tarfile.ReadError(f"{member.name!r} has no content")
    return content


def _create(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666), "wb")


def _copy(source: IO[bytes], sink: IO[bytes], most: int, what: str) -> int:
    """Bytes copied, at most `most`: what a header says about a member's size is not to be trusted."""
    copied = 0
    while piece := source.read(1 << 20):
        copied += len(piece)
        if copied > most:
            raise InputError(f"{what} has more than the {most} bytes expected", hint="delete the archive")
        sink.write(piece)
    return copied
