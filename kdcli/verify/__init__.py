"""`kd verify` and `kd digest`: whether files are sound, and which networks are the same. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kdcli import checkpoint
from kdcli.errors import KdError
from kdcli.output import envelope, failure, one_line
from kdcli.pathlist import named
from kdcli.verify.files import check
from kdcli.verify.walk import Place, places

_WORDS = {3: "damaged", 4: "newer", 6: "not finite"}
_WORST_FIRST = (3, 6, 4)


@dataclass(frozen=True)
class Finding:
    """What was found out about one file.

    Attributes:
        path: as it was named, or as it was met below a named directory.
        facts: what a sound file is; empty otherwise.
        error: what is wrong, or why it was skipped; None where it is sound.
        skipped: a directory behind a link, which was not entered.
    """

    path: str
    facts: dict[str, Any] = field(default_factory=dict)
    error: KdError | None = None
    skipped: bool = False

    @property
    def ok(self) -> bool:
        """Whether it is sound."""
        return self.error is None

    @property
    def status(self) -> str:
        """ok, missing, damaged, not finite, newer or skipped."""
        if self.error is None:
            return "ok"
        if self.skipped:
            return "skipped"
        if not os.path.lexists(self.path):
            return "missing"
        return _WORDS.get(self.error.code, self.error.kind)

    @property
    def line(self) -> str:
        """One printable line: the status, the path, and what it is or what is wrong with it."""
        if self.error is None:
            what = self.facts["kind"]
            if what == "checkpoint":
                what = f"{self.facts['role']}, {self.facts['tensors']} tensors"
        else:
            what = self.error.line().removeprefix(one_line(self.path)).lstrip(" ,:")
        return f"{self.status:<10}  {one_line(self.path)}  {what}"

    @property
    def document(self) -> dict[str, Any]:
        """The same for `--json`."""
        told = {"path": self.path, "ok": self.ok, "status": self.status, **self.facts}
        if self.error is not None:
            told["error"] = self.error.line()
        return told


def verify(paths: Iterable[str]) -> Iterator[Finding]:
    """Check every file that the paths stand for (`-`: the paths on stdin), one after the other.

    Raises:
        UsageError: there is no list on stdin.
    """
    for path in named(paths):
        for place in places(path):
            finding = _finding(place)
            if finding is not None:
                yield finding


def _finding(place: Place) -> Finding | None:
    """What is found at a place; None where it is gone since its directory was listed, as states of a live run may be."""
    if place.error is not None:
        return Finding(place.path, error=place.error, skipped=place.skipped)
    try:
        return Finding(place.path, check(place.path))
    except KdError as problem:
        if place.found and not os.path.lexists(place.path):
            return None
        return Finding(place.path, error=problem)


def conclusion(findings: list[Finding]) -> tuple[dict[str, Any], KdError | None]:
    """The document of `kd verify`, and the error to leave with: damage first, then what is not finite, then newer files."""
    document = envelope("verify", files=[finding.document for finding in findings])
    return _concluded("verify", document, [f.error for f in findings if f.error is not None and not f.skipped])


def digests(paths: Iterable[str]) -> Iterator[Finding]:
    """The content digest of every checkpoint file or run directory; every byte is checked on the way.

    The facts are `digest`, `seal` (of the header, the digest in it), `role`, `tensors` and `bytes`.
    """
    for path in named(paths):
        try:
            facts = checkpoint.verify(checkpoint.locate(path))
            yield Finding(path, {key: facts[key] for key in ("digest", "seal", "role", "tensors", "bytes")})
        except KdError as problem:
            yield Finding(path, error=problem)


def digest_line(finding: Finding, whole: bool) -> str:
    """`DIGEST  PATH` of a sound file, or `DIGEST  SEAL  PATH`."""
    words = [finding.facts["digest"], *([finding.facts["seal"]] if whole else []), one_line(finding.path)]
    return "  ".join(words)


def digest_conclusion(findings: list[Finding], whole: bool) -> tuple[dict[str, Any], KdError | None]:
    """The document of `kd digest`, and the error to leave with."""
    files = [finding.document for finding in findings]
    if not whole:
        for told in files:
            told.pop("seal", None)
    return _concluded("digest", envelope("digest", files=files), [f.error for f in findings if f.error is not None])


def _concluded(command: str, document: dict[str, Any], errors: list[KdError]) -> tuple[dict[str, Any], KdError | None]:
    if not errors:
        return document, None
    worst = min(errors, key=lambda error: _WORST_FIRST.index(error.code) if error.code in _WORST_FIRST else -1)
    if len(errors) > 1:
        of = len(document["files"])
        message = f"{len(errors)} of {of} are not sound, among them {worst.message}"
        worst = type(worst)(message, field=worst.field, hint=worst.hint)
    return document | failure(command, worst), worst
