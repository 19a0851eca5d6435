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
from kdcli.runs.lock import is_held
from kdcli.runs.progress import FILE, Now, read_log, read_now

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
    def curve(self) -> list[tuple[Any, float]]:
        """Epochs with their top-1 on the test images (else the validation images), in percent, where it was measured."""
        found = [(line.get("epoch"), score(line)) for line in self.lines]
        return [(epoch, value) for epoch, value in found if value is not None]


def look(directory: Path) -> View:
    """Read a run directory.

    Raises:
        InputError: it holds no run.
    """
    if not (directory / "spec.json").is_file():
        raise InputError(f"{directory} holds no run", hint="name the directory of a run, which holds a spec.json")
    path = directory / "summary.json"
    # The summary first: it is written after the last line of the log, which is complete then and cannot be missed.
    summary = require_summary(durable.read_json(path), path) if path.exists() else None
    return View(directory, read_log(directory / "metrics.jsonl"), read_now(directory / "state" / FILE), summary)


def watch(directory: Path, *, once: bool, interval: float, show: Callable[[View], bool]) -> dict[str, Any]:
    """Show the run until it ends; the document about it.

    Args:
        interval: seconds between two looks.
        show: is called with what is new, and says whether anybody still looks at it.

    Raises:
        InputError: it holds no run.
        Stopped: it is unfinished and nobody trains it (exit 75: run its command again). Not with `once`.
    """
    before, changed, doubts, read = None, time.monotonic(), 0, True
    while True:
        view = look(directory)
        seen = (len(view.lines), view.now, view.summary is not None, _stamp(directory))
        if seen != before:
            before, changed, doubts = seen, time.monotonic(), 0
            read = show(view)
        if view.summary is not None:
            return _document(view, busy=None)
        if once or not read:
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
    """Shows a run as one line an epoch, each once: a session that goes on does the last ones again, to the same bits.

    Args:
        write: writes a line, and says whether anybody still reads them.
    """

    def __init__(self, write: Callable[[str], bool]) -> None:
        self._write, self._told = write, 0

    def __call__(self, view: View) -> bool:
        lines = [epoch_line(line) for line in view.lines[self._told :]]
        self._told = max(self._told, len(view.lines)) if view.lines else 0  # without any it was begun anew
        lines += [] if view.summary is None else [end_line(view.summary)]
        return all(self._write(line) for line in lines)


def end_line(summary: dict[str, Any]) -> str:
    """How a run ended."""
    test = summary["metrics"]["test"]
    return one_line(f"finished: top-1 {test['top1']:.2f} % of {test['n']} test images at the last epoch")


def state_line(document: dict[str, Any]) -> str:
    """How far an unfinished run is, and whether anybody trains it."""
    who = {True: "training", False: "unfinished, and nobody is training it: run its command again", None: "unfinished"}
    now = document["now"]
    return one_line("  ".join([who[document["training"]], *([] if now is None else Now(**now).facts())]))


class Live:
    """Shows a run as a view that is drawn again and again on the terminal behind stdout."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self._live = RichLive(console=Console(no_color="NO_COLOR" in os.environ), auto_refresh=False)
        self._live.start()

    def __call__(self, view: View) -> bool:
        self._live.update(self._drawn(view), refresh=True)
        return True

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
            values = [value for _, value in curve]
            rows.append(Text(f"top-1  {sparkline(values, width)}  {values[-1]:.2f}", no_wrap=True))
            epoch, best = max(curve, key=lambda point: point[1])
            rows.append(Text(f"best {best:.2f} in epoch {_text(epoch)}", style="dim"))
        rows += [Text(epoch_line(line), style="dim", no_wrap=True, overflow="ellipsis") for line in view.lines[-5:]]
        if view.summary is not None:
            rows.append(Text(end_line(view.summary), style="bold"))
        return Group(*rows)
