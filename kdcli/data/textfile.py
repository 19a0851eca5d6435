"""Small text files that come with data sets: class names, annotations."""

from __future__ import annotations

from pathlib import Path

from kdcli.errors import InputError


def lines(path: Path, most: int = 64 << 20) -> list[str]:
    """The non-empty lines of a UTF-8 file, stripped at the right.

    Raises:
        InputError: missing, unreadable, not UTF-8, or larger than `most` bytes.
    """
    try:
        if path.stat().st_size > most:
            raise InputError(f"{path} has {path.stat().st_size} bytes, more than any such file")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    return [line.rstrip() for line in text.splitlines() if line.strip()]
