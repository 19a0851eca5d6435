"""One process at a time in a run directory.

The lock is the kernel's (`flock` on `.lock`), not the existence of a file: it ends with its process, however that dies,
so nothing is ever stale. The file stays behind on purpose, since removing it would let two processes lock two files
of the same name. Torch-free.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from kdcli.durable import write_error
from kdcli.errors import BusyError, WriteError

_held: set[int] = set()


@contextlib.contextmanager
def hold(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of an existing directory for the length of a `with` block; never waits.

    Raises:
        BusyError: another process (or another `hold` in this one) has it.
        WriteError: the lock file cannot be opened, or something planted has its name.
    """
    path = Path(directory) / ".lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as problem:
        raise write_error(path, problem) from None
    try:
        _lock(fd, path)
        _held.add(fd)
        yield
    finally:
        _held.discard(fd)
        os.close(fd)


def is_held(directory: str | os.PathLike[str]) -> bool | None:
    """Whether some process works in a directory; None where that cannot be found out.

    It asks by taking a shared lock for an instant, in which a run that starts would be refused: not to be asked often.
    """
    try:
        fd = os.open(Path(directory) / ".lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(fd)
    return False


def _lock(fd: int, path: Path) -> None:
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:  # the process number is written into it
        raise WriteError(f"cannot write {path}: it is not a regular file of its own", hint="remove it")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 20, 0).strip()
        who = f"process {int(holder)}" if holder.isdigit() else "another process"
        raise BusyError(f"{path.parent} is in use by {who}", hint="wait for it, or name another --out") from None
    except OSError as problem:
        raise write_error(path, problem) from None
    with contextlib.suppress(OSError):  # only for the message above; a full disk must not stop a reader of the lock
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)


def _release_in_child() -> None:
    """A forked data worker would share the lock and keep it for seconds after its parent was killed."""
    for fd in _held:
        with contextlib.suppress(OSError):
            os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)
