"""`kd watch`: follow a run from another terminal or machine, by its files alone. Imports no torch.

The files may come from anyone, so whatever does not look as it should is left out.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcli import durable
from kdcli.errors import InputError, Stopped
from kdcli.metadata import require_summary
from kdcli.output import envelope, one_line
from kdcli.progress import FILE, Now, read_log, read_now
from kdcli.runlock import is_held

_SILENT = 10.0  # seconds without any change after which it is asked whether anybody works there
_BARS = "▁▂▃▄▅▆▇█"


@dataclass
class View:
    """What the files of a run say.

    Attributes:
        lines: the epochs of `metrics.jsonl`.
        now: where the session under way stands; None before its first seconds and between sessions.
        summary: of a finished run.
    """

    directory: Path
    lines: list[dict[str, Any]] = field(default_factory=list)
    now: Now | None = None
    summary: dict[str, Any] | None = None

    @property
    def curve(self) -> list[float]:
        """Top-1 on the test images (else the validation images), by epoch, in percent, where it was measured."""
        found = [score(line) for line in self.lines]
        return [value for value in found if value is not None]


def look(directory: Path) -> View:
    """Read a run directory.

    Raises:
        InputError: it holds no run.
    """
    if not (directory / "spec.json").is_file():
        raise InputError(f"{directory} holds no run", hint="name the directory of a run, which holds a spec.json")
    view = View(directory, read_log(directory / "metrics.jsonl"), read_now(directory / "state" / FILE))
    path = directory / "summary.json"
    if path.exists():
        view.summary = require_summary(durable.read_json(path), path)
    return view


def watch(directory: Path, *, once: bool, interval: float, show: Callable[[View], None]) -> dict[str, Any]:
    """Show the run until it ends; the document about it.

    Args:
        interval: seconds between two looks.
        show: is called with what is new.

    Raises:
        InputError: it holds no run.
        Stopped: it is unfinished and nobody trains it (exit 75: run its command again). Not with `once`.
    """
    before, changed, doubts = None, time.monotonic(), 0
    while True:
        view = look(directory)
        seen = (len(view.lines), view.now, view.summary is not None, _stamp(directory))
        if seen != before:
            before, changed, doubts = seen, time.monotonic(), 0
            show(view)
        if view.summary is not None:
            return _document(view, busy=None)
        if once:
            return _document(view, busy=is_held(directory))
        if time.monotonic() - changed >= min(_SILENT, 5 * interval):
            # Asked twice, so that a run between two sessions of a scheduler, or one that has just ended, is not given up.
            doubts = doubts + 1 if is_held(directory) is False else 0
            if doubts >= 2:
                raise Stopped(f"{directory} is unfinished, and nobody is training it", 75, hint="run its command again")
        time.sleep(interval)


def _stamp(directory: Path) -> Any:
    """Something that changes whenever the session under way writes: names and times of its states."""
    try:
        with os.scandir(directory / "state") as entries:
            return sorted((entry.name, entry.stat().st_mtime_ns) for entry in entries)
    except OSError:
        return None


def _document(view: View, busy: bool | None) -> dict[str, Any]:
    return envelope(
        "watch",
        run=str(view.directory),
        finished=view.summary is not None,
        training=busy,
        epochs=len(view.lines),
        now=None if view.now is None else view.now.model_dump(mode="json"),
        last=view.lines[-1] if view.lines else None,
        summary=view.summary,
    )


def score(line: dict[str, Any]) -> float | None:
    """Top-1 of an epoch, percent, on the test images, else on the validation images; None if it was not measured."""
    for split in ("test", "val"):
        try:
            value = line[split]["single"]["top1"]
        except (KeyError, TypeError):
            continue
        if isinstance(value, int | float):
            return float(value)
    return None


def sparkline(values: list[float], width: int) -> str:
    """The course of some numbers in at most `width` characters, from their smallest to their largest."""
    if not values:
        return ""
    count = min(width, len(values))
    # Each character stands for the mean of its share of the numbers.
    cuts = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    low, high = min(means), max(means)
    steps = len(_BARS) - 1
    return "".join(_BARS[round((value - low) / (high - low) * steps) if high > low else 0] for value in means)


def epoch_line(line: dict[str, Any]) -> str:
    """An epoch on one line: losses by term, accuracies, learning rate."""
    train = line.get("train") if isinstance(line.get("train"), dict) else {}
    parts = [f"epoch {_text(line.get('epoch'))}", f"step {_text(line.get('step'))}"]
    parts += [f"loss {_text(train.get('loss'))}", f"train {_text(train.get('top1'))}"]  # type: ignore[union-attr]
    parts += [f"test {found:.2f}"] if (found := score(line)) is not None else []
    parts.append(f"lr {_text(line.get('lr'))}")
    if isinstance(terms := line.get("terms"), dict):
        parts += [f"{name} {_text(value)}" for name, value in terms.items()]
    return one_line("  ".join(parts))


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if isinstance(value, int) else "-"


class Lines:
    """Shows a run as one line an epoch, each once."""

    def __init__(self, write: Callable[[str], Any]) -> None:
        self._write, self._told = write, 0

    def __call__(self, view: View) -> None:
        for line in view.lines[self._told :]:
            self._write(epoch_line(line))
        self._told = len(view.lines)
        if view.summary is not None:
            self._write(end_line(view.summary))


def end_line(summary: dict[str, Any]) -> str:
    """How a run ended."""
    test = summary["metrics"]["test"]
    return one_line(f"finished: top-1 {test['top1']:.2f} % of {test['n']} test images at the last epoch")


class Live:
    """Shows a run as a view that is drawn again and again on the terminal behind stdout."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self._live = RichLive(console=Console(no_color="NO_COLOR" in os.environ), auto_refresh=False)
        self._live.start()

    def __call__(self, view: View) -> None:
        self._live.update(self._drawn(view), refresh=True)

    def close(self) -> None:
        """Leave the last view on the terminal."""
        self._live.stop()

    def _drawn(self, view: View) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        now, curve = view.now, view.curve
        title = one_line(now.title if now else view.directory.name)
        rows: list[Any] = [Text(title, style="bold")]
        if now is not None and view.summary is None:
            rows.append(ProgressBar(total=now.steps, completed=now.step, width=40))
            rows += [Text(one_line(part)) for part in now.facts()]
        if curve:
            width = max(10, self._live.console.width - 24)
            rows.append(Text(f"top-1  {sparkline(curve, width)}  {curve[-1]:.2f}", no_wrap=True))
            best = max(curve)
            rows.append(Text(f"best {best:.2f} in epoch {1 + curve.index(best)} of those measured", style="dim"))
        rows += [Text(epoch_line(line), style="dim", no_wrap=True, overflow="ellipsis") for line in view.lines[-5:]]
        if view.summary is not None:
            rows.append(Text(end_line(view.summary), style="bold"))
        return Group(*rows)
