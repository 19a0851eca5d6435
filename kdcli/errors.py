"""Everything that can stop a run on purpose: one class per exit code.

A `KdError` is a sentence for the user (what, where) and a hint (the fix). The command line prints it as one line on
stderr and leaves with `code`; a traceback is only ever a bug in `kd` itself.
"""

from __future__ import annotations

import difflib
import os
import traceback
from collections.abc import Iterable
from typing import ClassVar


class KdError(Exception):
    """Base of every deliberate stop.

    Args:
        message: what is wrong, and where (a path, a key, a tensor, a step).
        field: the dotted spec field or flag at fault, if there is one.
        hint: what to do about it, as an imperative.
    """

    code: ClassVar[int] = 1
    kind: ClassVar[str] = "bug"

    def __init__(self, message: str, *, field: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message, self.field, self.hint = message, field, hint

    def line(self) -> str:
        """The error as one printable line, control characters neutralised (a file name may hold an escape code)."""
        text = f"{self.field}: {self.message}" if self.field else self.message
        if self.hint:
            text += f" ({self.hint})"
        return "".join(c if c.isprintable() else " " if c.isspace() else f"\\x{ord(c):02x}" for c in text)


class UsageError(KdError):
    """The command line or the spec is not valid."""

    code, kind = 2, "usage"


class InputError(KdError):
    """A data set, checkpoint or archive is missing, damaged or hostile."""

    code, kind = 3, "input"


class IncompatibleError(KdError):
    """Two valid things do not fit: classes, architectures, a teacher without heads, a resumed run with another spec."""

    code, kind = 4, "incompatible"


class WriteError(KdError):
    """Something could not be written; what was there before is intact."""

    code, kind = 5, "write"


class NotFiniteError(KdError):
    """A loss term, gradient or weight is NaN or infinite; the update was not applied."""

    code, kind = 6, "not_finite"


class OutOfMemoryError(KdError):
    """The device or the host ran out of memory."""

    code, kind = 7, "out_of_memory"


class WorkerError(KdError):
    """A data worker or a rank died or stopped answering."""

    code, kind = 8, "worker"


class LostRankError(WorkerError):
    """Another rank died or stopped answering; which one, kd's own launcher can tell, and a rank cannot."""


class BusyError(KdError):
    """Another process is using the run directory."""

    code, kind = 9, "busy"


class ThresholdError(KdError):
    """A measured value is below the threshold the caller asked for."""

    code, kind = 10, "threshold"


class Stopped(KdError):  # noqa: N818 - not an error: the run was asked to stop
    """Training stopped early, after saving. `code` says why: 75 go on later, 130 Ctrl-C, 143 SIGTERM."""

    kind = "stopped"

    def __init__(self, message: str, code: int, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.code = code  # type: ignore[misc]


USERS = "kd_method_"
"""A user's method file is imported as a module whose name begins so."""


def unforeseen(problem: Exception, hint: str | None = "--verbose shows the traceback") -> KdError:
    """An exception that nobody turned into a sentence: in a user's method file if it passed one, else a bug of ours."""
    frames = list(traceback.walk_tb(problem.__traceback__))
    theirs = [frame for frame in frames if str(frame[0].f_globals.get("__name__")).startswith(USERS)]
    frame, line = (theirs or frames)[-1]
    text = f"{type(problem).__name__}: {problem} at {os.path.basename(frame.f_code.co_filename)}:{line}"
    return InputError(text, field="method", hint=hint) if theirs else KdError(f"a bug in kd: {text}", hint=hint)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint naming the closest of `known` to a mistyped `name`, or listing what there is."""
    names = sorted(known)
    folded = {n.lower().replace("-", "").replace("_", ""): n for n in names}
    close = difflib.get_close_matches(name.lower().replace("-", "").replace("_", ""), folded, n=1, cutoff=0.5)
    if close:
        return f"did you mean {folded[close[0]]}?"
    return f"known: {', '.join(names)}" if len(names) <= 12 else f"known: {', '.join(names[:12])}, …"
