"""Writing so that a crash, a full disk or a planted link never costs what was there; and reading that cannot hang.

The order is the whole point: bytes go to a randomly named temporary file in the same directory (`O_EXCL|O_NOFOLLOW`, so
nothing planted is ever opened), the file is synced, renamed over its name, and then the directory is synced, because a
rename is only durable once the directory is. A reader sees the old file or the new one, never a mixture.

Every `OSError` on the way becomes a `WriteError` (exit 5) that names the path and the system's reason. Torch-free.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from kdcli.errors import InputError, WriteError

Buffer = bytes | bytearray | memoryview

JSON_LIMIT = 64 * 2**20  # bytes; a spec, a summary or a report is thousands of times smaller

_TEMP = re.compile(r"\..+\.[0-9a-f]{16}\.tmp", re.DOTALL)

_HINTS = {
    errno.ENOSPC: "free some space on that disk and run the same command again",
    errno.EDQUOT: "your disk quota is used up: free some space and run the same command again",
    errno.EFBIG: "a file-size limit is in force: raise it (ulimit -f) or write elsewhere",
    errno.EROFS: "that file system is read-only: choose another directory with --out",
    errno.EACCES: "you have no permission to write there: choose another directory with --out",
    errno.EPERM: "you have no permission to write there: choose another directory with --out",
    errno.ELOOP: "that is a symbolic link: remove it, or choose another directory with --out",
    errno.ENOENT: "the directory does not exist: make it first",
    errno.ENOTDIR: "part of that path is not a directory: choose another one with --out",
}


def write_error(path: str | os.PathLike[str], problem: OSError) -> WriteError:
    """The `WriteError` that says `path` could not be written, why in the system's words, and what to do."""
    name = errno.errorcode.get(problem.errno or 0, "error")
    reason = os.strerror(problem.errno) if problem.errno else str(problem)
    hint = _HINTS.get(problem.errno or 0, "check the disk, then run the same command again")
    return WriteError(f"cannot write {os.fspath(path)}: {reason} [{name}]", hint=hint)


def write_bytes(path: str | os.PathLike[str], data: Buffer | Sequence[Buffer], *, sync: bool = True) -> None:
    """Replace `path` by `data` (one buffer, or several written one after the other) durably.

    The mode is 0666 less the umask. Replacing a hard-linked file leaves its other names as they were. With `sync=False`
    a reader still sees the old content or the new, but either may be gone after a power cut.

    Raises:
        WriteError: any failure of the system, or `path` is a directory, a link, a FIFO or a device. What was at `path`
            before is intact, and the temporary file is gone. (If only the last sync, that of the directory, fails, the
            new content is complete under its name, but may not survive a power cut.)
    """
    path = Path(path)
    buffers = cast("Sequence[Buffer]", [data] if isinstance(data, bytes | bytearray | memoryview) else data)
    _refuse_special(path)
    temp = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    try:
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            try:
                for buffer in buffers:
                    _write_all(fd, buffer)
                if sync:
                    os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(temp, path)
        except BaseException:  # Ctrl-C too: a temporary file must not outlive the attempt
            with contextlib.suppress(OSError):
                os.unlink(temp)
            raise
        if sync:
            sync_dir(path.parent)
    except OSError as problem:
        raise write_error(path, problem) from None


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Replace `path` durably by `obj` as JSON: two spaces of indent, the order of the keys kept, a newline at the end.

    Raises:
        ValueError: `obj` holds NaN or an infinity, which JSON cannot express.
        WriteError: as `write_bytes`.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    # A path that is not UTF-8 holds lone surrogates, which JSON can only hold escaped.
    text = re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)
    write_bytes(path, (text + "\n").encode())


def append_line(path: str | os.PathLike[str], text: str) -> None:
    """Add one line to a log durably; `text` has no newline of its own. One `write`, so that no reader sees half of it.

    Raises:
        WriteError: any failure of the system; `path` is a link (hard or symbolic), a directory, a FIFO or a device.
    """
    try:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(path, flags, 0o666)
        try:
            info = os.fstat(fd)
            _require_own_file(path, info)
            line = text.encode() + b"\n"
            # A line torn by an earlier crash is closed first: only that line is lost, not this one too.
            if info.st_size and os.pread(fd, 1, info.st_size - 1) != b"\n":
                line = b"\n" + line
            try:
                _write_all(fd, line)
                os.fsync(fd)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, info.st_size)  # half a line helps nobody
                raise
        finally:
            os.close(fd)
        if not info.st_size:
            sync_dir(Path(path).parent)  # the name itself may be new
    except OSError as problem:
        raise write_error(path, problem) from None


def truncate_lines(path: str | os.PathLike[str], keep: int) -> int:
    """Cut a log down to its first `keep` complete lines, durably; a torn last line is never kept.

    Returns:
        How many lines are left: fewer than `keep` if the log is shorter, 0 if there is none.

    Raises:
        WriteError: it cannot be read or rewritten, or is not a regular file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    except OSError as problem:
        raise write_error(path, problem) from None
    try:
        _require_own_file(path, os.fstat(fd))
        with open(fd, "rb", closefd=False) as file:
            content = file.read()
    except OSError as problem:
        raise write_error(path, problem) from None
    finally:
        os.close(fd)
    *lines, _torn = content.split(b"\n")
    kept = b"".join(line + b"\n" for line in lines[:keep])
    if kept != content:
        write_bytes(path, kept)
    return min(keep, len(lines))


def clean_temps(directory: str | os.PathLike[str]) -> list[str]:
    """Remove the temporary files that a killed process left in `directory`; call it while holding the run's lock.

    Returns:
        The names removed; none if there is no such directory.
    """
    removed = []
    try:
        with os.scandir(directory) as entries:
            stray = [e.path for e in entries if _TEMP.fullmatch(e.name) and e.is_file(follow_symlinks=False)]
        for path in sorted(stray):
            os.unlink(path)
            removed.append(os.path.basename(path))
    except FileNotFoundError:
        pass
    except OSError as problem:
        raise write_error(directory, problem) from None
    return removed


def make_dir(path: str | os.PathLike[str], *, links: bool = True) -> Path:
    """Make a directory and its parents durably; fine if it is there. With `links=False` it must not be a symbolic link.

    Raises:
        WriteError: it cannot be made, or something else bears its name.
    """
    wanted = Path(path)
    there, missing = wanted, []
    try:
        while not os.path.lexists(there):
            missing.append(there)
            there = there.parent
        if not there.is_dir():
            raise WriteError(f"cannot make a directory at {wanted}: {there} is in the way", hint="move it away")
        if not links and wanted.is_symlink():
            raise WriteError(f"cannot write in {wanted}: it is a symbolic link", hint="remove the link")
        for directory in reversed(missing):
            try:
                os.mkdir(directory)
            except FileExistsError:  # another process was faster
                if not directory.is_dir():
                    raise
            sync_dir(directory.parent)
    except OSError as problem:
        raise write_error(wanted, problem) from None
    return wanted


def sync_dir(directory: str | os.PathLike[str]) -> None:
    """Make the names in `directory` durable. Raises `OSError`; a file system that cannot is let off."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network and FUSE file systems
            raise
    finally:
        os.close(fd)


def open_regular(path: str | os.PathLike[str]) -> int:
    """A descriptor to read the regular file `path` (a link to one is followed); a FIFO or device does not hang it.

    Raises:
        InputError: there is no such file, it may not be read, or it is not a regular file.
    """
    shown = os.fspath(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise InputError(f"{shown} does not exist", hint="check the path") from None
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the path
        reason = os.strerror(problem.errno) if isinstance(problem, OSError) and problem.errno else str(problem)
        raise InputError(f"cannot read {shown}: {reason}", hint="check the path and its permissions") from None
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise InputError(f"{shown} is {kind}", hint="give the path of a file")
    return fd


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: it is missing, not a regular file, larger than `JSON_LIMIT`, or not `strict_json` in UTF-8.
    """
    with open(open_regular(path), "rb") as file:
        try:
            content = file.read(JSON_LIMIT + 1)
        except OSError as problem:
            raise InputError(f"cannot read {os.fspath(path)}: {problem.strerror}", hint="check the disk") from None
    if len(content) > JSON_LIMIT:
        raise InputError(f"{os.fspath(path)} is too large for a JSON file of kd", hint="check the path")
    try:
        return strict_json(content.decode())
    except (ValueError, RecursionError) as problem:
        reason = "nested too deeply" if isinstance(problem, RecursionError) else str(problem)
        raise InputError(f"{os.fspath(path)} is not valid JSON: {reason}", hint="restore it or remove it") from None


def strict_json(text: str | bytes) -> Any:
    """The value of a JSON text, without what Python alone takes for JSON and what could not be written again.

    Raises:
        ValueError: it is not JSON, or holds NaN, an infinity or a number beyond the floats.
    """
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:40]} is no finite number")
    return value


def _write_all(fd: int, buffer: Buffer) -> None:
    """Write all of `buffer`: the system may take less at once (2 GiB at most, less on a nearly full disk)."""
    view = memoryview(buffer).cast("B")
    while view:
        written = os.write(fd, view)
        if not written:  # not an error to the system, but an endless loop to us
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        view = view[written:]


def _refuse_special(path: Path) -> None:
    """Only a regular file or nothing may be replaced: a rename onto a link or FIFO would silently take its place."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as problem:
        raise write_error(path, problem) from None
    if not stat.S_ISREG(mode):
        raise WriteError(f"cannot write {path}: {_kind(mode)} is in the way", hint="remove it, or write elsewhere")


def _require_own_file(path: str | os.PathLike[str], info: os.stat_result) -> None:
    """A file changed in place must be regular and have no second name, or somebody else's file would change with it."""
    if not stat.S_ISREG(info.st_mode):
        problem = f"{_kind(info.st_mode)} is in the way"
    elif info.st_nlink > 1:
        problem = "it is a hard link to another file"
    else:
        return
    raise WriteError(f"cannot write {os.fspath(path)}: {problem}", hint="remove it, or write elsewhere")


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a directory"
    if stat.S_ISLNK(mode):
        return "a symbolic link"
    return "a FIFO" if stat.S_ISFIFO(mode) else "something that is no regular file"
