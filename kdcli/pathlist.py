"""Paths on a command line, of which one may be `-`: a list on stdin."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator

from kdcli.errors import UsageError

_LIMIT = 256 * 2**20  # bytes of a list on stdin: millions of paths


def named(paths: Iterable[str]) -> Iterator[str]:
    """The paths, with `-` replaced by the list on stdin: one a line, or separated by NUL bytes (`find -print0`).

    Raises:
        UsageError: the list is empty or too long, or stdin is closed.
    """
    for path in paths:
        if path == "-":
            yield from _listed()
        else:
            yield path


def _listed() -> list[str]:
    source = getattr(sys.stdin, "buffer", None)
    content = source.read(_LIMIT + 1) if source is not None else b""
    if len(content) > _LIMIT:
        raise UsageError(f"the list on stdin has more than {_LIMIT >> 20} MiB", hint="split it")
    words = content.split(b"\0") if b"\0" in content else content.splitlines()
    listed = [os.fsdecode(word) for word in words if word]
    if not listed:
        raise UsageError("the list on stdin is empty", hint="one path a line, for example from find")
    return listed
