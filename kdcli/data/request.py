"""What a reader is asked for: one value instead of six parameters, and the one way to say that data are missing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kdcli.errors import InputError


@dataclass(frozen=True)
class Request:
    """A data set to read.

    Attributes:
        name: canonical name, argument and all (`folder:PATH`, `synthetic:K`).
        root: the data directory (the user's PATH for `folder:PATH`).
        size: side S of the square images wanted, in pixels.
        download: whether fetching is allowed.
        limit: bytes that decoded images may take in memory; above it images stay files (or keep their native size).
    """

    name: str
    root: Path
    size: int
    download: bool = False
    limit: int = 2048 << 20

    @property
    def argument(self) -> str:
        """What follows the colon of the name."""
        return self.name.partition(":")[2]

    def fits(self, count: int) -> bool:
        """Whether `count` decoded images (3*S*S bytes each) may be kept in memory."""
        return count * 3 * self.size * self.size <= self.limit

    def missing(self, looked_for: Iterable[str]) -> InputError:
        """The error for data that are not there, naming what was looked for, where, and the fix."""
        return InputError(
            f"{self.name} is not in {self.root}: looked for {', '.join(looked_for)}",
            hint="point --data-dir (or KD_DATA_DIR) at it, or fetch it with --download",
        )
