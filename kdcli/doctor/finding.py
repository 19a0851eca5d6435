"""One thing that the doctor looked at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from kdcli.errors import IncompatibleError, InputError, KdError, WriteError
from kdcli.output import one_line

Level = Literal["ok", "warning", "problem"]
_ERRORS: dict[int, type[KdError]] = {3: InputError, 4: IncompatibleError, 5: WriteError}


@dataclass(frozen=True)
class Finding:
    """What was seen, and what to do about it.

    Attributes:
        name: what was looked at, such as `torch` or `disk`.
        hint: the fix, for warnings and problems.
        facts: the same in numbers, for `--json`; sizes in bytes.
        code: exit code that a problem leads to: 3 data, 4 what is installed does not fit, 5 cannot write.
    """

    name: str
    text: str
    level: Level = "ok"
    hint: str | None = None
    code: int = 4
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """One printable line."""
        hint = f" ({self.hint})" if self.hint else ""
        return f"{self.level:<8}  {self.name:<12}  {one_line(self.text + hint)}"

    @property
    def document(self) -> dict[str, Any]:
        """The same for `--json`."""
        told = {"name": self.name, "level": self.level, "text": self.text, "hint": self.hint}
        return {**told, "facts": self.facts}

    def error(self) -> KdError:
        """A problem as the error to leave with."""
        return _ERRORS[self.code](f"{self.name}: {self.text}", hint=self.hint)


def size(count: float) -> str:
    """Bytes for people: `3.2 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
