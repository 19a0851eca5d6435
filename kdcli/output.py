"""What goes where: the answer to stdout, the story to stderr.

With `--json` stdout holds exactly one JSON document. Progress is rich on a terminal and one plain line an epoch elsewhere.
A reader that goes away (closed pipe) or a full device behind stdout is no traceback.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kdcli.errors import KdError, WriteError

SCHEMA = 1


def printable(text: str) -> str:
    """`text` with control characters (terminal escapes in file or class names) made visible."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def one_line(text: str) -> str:
    """`text`, such as a path, on one line: newlines and tabs made visible too, and bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def answer(text: str) -> bool:
    """Write the answer to stdout.

    Returns:
        Whether anybody still reads it: False once the pipe was closed.

    Raises:
        WriteError: stdout cannot be written (exit 5).
    """
    text = text if text.endswith("\n") else text + "\n"
    try:
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError:  # a terminal of another encoding, or a name that is not UTF-8
            encoding = sys.stdout.encoding or "ascii"
            sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has what it wanted; keep the interpreter's own flush at exit from complaining.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    except OSError as problem:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise WriteError(f"cannot write to stdout: {problem.strerror}") from None
    return True


def document(values: dict[str, Any]) -> str:
    """One JSON document as text; NaN is refused rather than written, since it is not JSON.

    Control characters and bytes of names that are not UTF-8 are escaped, so that a reader gets them and a terminal not.
    """
    return _escaped(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False))


def json_line(values: dict[str, Any]) -> str:
    """As `document`, on one line."""
    return _escaped(json.dumps(values, ensure_ascii=False, allow_nan=False))


def _escaped(text: str) -> str:
    return re.sub(r"[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", _escape, text)


def _escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def envelope(command: str, **values: Any) -> dict[str, Any]:
    """The common frame of every JSON answer."""
    return {"schema": SCHEMA, "command": command, "ok": True, **values}


def failure(command: str, error: KdError) -> dict[str, Any]:
    """The JSON answer of a command that did not succeed."""
    fields = {"kind": error.kind, "field": error.field, "message": error.message, "hint": error.hint}
    return {"schema": SCHEMA, "command": command, "ok": False, "error": fields}


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """A plain-text table: first column left, numbers right, fitted to its contents so that pipes can cut it."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    numeric = [i > 0 and all(_is_number(row[i]) for row in rows) for i in range(len(header))]

    def line(values: Iterable[str]) -> str:
        parts = [v.rjust(w) if right else v.ljust(w) for v, w, right in zip(values, widths, numeric, strict=True)]
        return "  ".join(parts).rstrip()

    return "\n".join([line(header), line("-" * w for w in widths), *(line(row) for row in cells)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}"
    return one_line(str(value))


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


class Story:
    """Notes and progress of the work, on stderr.

    On a terminal a rich progress bar follows the steps; otherwise each epoch is one line, so that logs stay readable.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Any = None
        self._drawn = 0.0
        self._noted: set[str] = set()

    def note(self, text: str) -> None:
        """One line for people, such as a teacher that is trained on the way."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(one_line(text), markup=False, highlight=False)
        else:
            self._write(one_line(text))

    def note_once(self, text: str) -> None:
        """A note that several runs of one command would repeat, such as one about their data set."""
        if text not in self._noted:
            self._noted.add(text)
            self.note(text)

    def warn(self, text: str) -> None:
        """One line about something that went wrong without ending the work; said even when quiet."""
        quiet, self.quiet = self.quiet, False
        self.note(text)
        self.quiet = quiet

    def begin(self, title: str, steps: int, done: int = 0) -> None:
        """Start following `steps` steps of training, evaluation or probing."""
        if self.quiet or not sys.stderr.isatty():
            return
        from kdcli.bar import Bar

        self.end()
        self._bar = Bar(one_line(title), steps, done)

    def step(self, done: int, facts: Callable[[], str] | None = None) -> None:
        """`done` steps are done; drawn at most ten times a second. `facts`: what else to say, made only when drawn."""
        if self._bar is None or time.monotonic() - self._drawn < 0.1:
            return
        self._drawn = time.monotonic()
        self._bar.update(done, "" if facts is None else one_line(facts()))

    def end(self) -> None:
        """Stop following."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()
        except OSError:  # a closed or full stderr must not stop the work
            self.quiet = True
