"""Makes forks of a large process cheap: they copy its page tables, which are five hundred times shorter with huge pages."""

from __future__ import annotations

import contextlib
import ctypes
import gc

_HUGE, _COLLAPSE = 14, 25  # advice numbers of Linux; the second is of 6.1 and later
_SIZE = 2**21  # bytes of a huge page


def settle() -> None:
    """Call it once, when all is imported: no collection will touch what is there, and it moves into huge pages.

    Where the system has no such pages nothing happens; forks then take longer.
    """
    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, every page of this process
    with contextlib.suppress(OSError, AttributeError):
        madvise = ctypes.CDLL(None).madvise
        for begin, end in _own_memory():
            if end > begin:
                for advice in (_HUGE, _COLLAPSE):
                    madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)


def _own_memory() -> list[tuple[int, int]]:
    """The ranges of whole huge pages in writable memory that belongs to no file."""
    found = []
    with open("/proc/self/maps") as file:
        for line in file.read().splitlines():
            span, rights, *_, name = line.split(maxsplit=5) if line.count(" ") > 4 else (*line.split(), "")
            if rights.startswith("rw-p") and (not name.strip("0123456789") or name.startswith("[heap")):
                begin, end = (int(part, 16) for part in span.split("-"))
                found.append((-(-begin // _SIZE) * _SIZE, end // _SIZE * _SIZE))
    return found
