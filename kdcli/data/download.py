"""Fetching official archives: torchvision's addresses and checksums, our own unpacking."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from kdcli.errors import InputError


def fetch(url: str, root: Path, filename: str, md5: str) -> Path:
    """The archive `root/filename`, fetched unless a copy with the right checksum is there.

    torchvision prints its progress on stdout, which belongs to the answer: it goes to stderr here.

    Raises:
        InputError: no network, the server refused, the checksum differs, or the folder cannot be written.
    """
    from torchvision.datasets.utils import download_url

    try:
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(sys.stderr):
            download_url(url, str(root), filename, md5)
    except Exception as error:  # urllib, ssl, socket and torchvision each have their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{url} could not be fetched into {root}: {reason}",
            hint="fetch it by hand, put it there, and run again without --download",
        ) from error
    return root / filename
