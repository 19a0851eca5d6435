"""The progress bar of a terminal: one line with bar and times, and below it what goes on."""

from __future__ import annotations

import os
from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text


class _TwoLines(Progress):
    """A bar with a line of facts below it, cut to the width of the terminal."""

    facts = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.facts:
            yield Text(f"  {self.facts}", style="dim", no_wrap=True, overflow="ellipsis")


class Bar:
    """A bar over `steps` steps on stderr; it disappears when it is stopped."""

    def __init__(self, title: str, steps: int, done: int) -> None:
        self._progress = _TwoLines(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            console=Console(stderr=True, no_color="NO_COLOR" in os.environ),
            transient=True,
        )
        self._progress.start()
        self._task = self._progress.add_task(title, total=steps, completed=done)

    def update(self, done: int, facts: str) -> None:
        """`done` steps are done, and this is the line below."""
        self._progress.facts = facts
        self._progress.update(self._task, completed=done)

    @property
    def console(self) -> Console:
        """Where lines can be printed above the bar."""
        return self._progress.console

    def stop(self) -> None:
        """Take the bar away."""
        self._progress.stop()
