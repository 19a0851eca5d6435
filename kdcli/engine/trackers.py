"""TensorBoard and Weights & Biases, off by default: they get each line of `metrics.jsonl`, and can never stop a run.

A session begins by telling a tracker all lines that the log already holds, so what it shows is the log and nothing else:
no step twice, none missing, whatever was lost when an earlier session ended.
"""

from __future__ import annotations

import contextlib
import netrc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from kdcli.engine import distributed
from kdcli.output import Story
from kdcli.runs.directory import Run
from kdcli.runs.identity import flat
from kdcli.runs.progress import read_log

Line = dict[str, Any]


class Tracker(Protocol):
    """Somewhere else to look at a run."""

    name: str

    def log(self, step: int, values: dict[str, float]) -> None:
        """The numbers of an epoch, by name, at the optimiser step it ended with."""
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


@contextlib.contextmanager
def following(run: Run, story: Story) -> Iterator[Callable[[Line], None]]:
    """The run's trackers, fed with what the log holds; gives what takes further lines of it. Does nothing without any.

    Whatever goes wrong with a tracker is one note, and the run goes on without it.
    """
    trackers: list[Tracker] = []

    def attempt(tracker: Tracker | None, name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except ImportError as problem:
            story.note(f"no {name}: {problem.name} is not installed (pip install 'kdcli[{name}]')")
        except Exception as problem:
            story.note(f"no {name} from here on: {(str(problem) or type(problem).__name__).splitlines()[0][:200]}")
        if tracker in trackers:
            trackers.remove(tracker)
        return None

    def log(line: Line) -> None:
        if trackers:
            step, values = int(line["step"]), numbers(line)
            for tracker in list(trackers):
                attempt(tracker, tracker.name, lambda tracker=tracker: tracker.log(step, values))

    if distributed.rank() == 0:
        system = run.spec.system
        makers: dict[str, Callable[[], Tracker]] = {}
        if system.tensorboard:
            makers["tensorboard"] = lambda: _TensorBoard(run.directory / "tensorboard")
        if system.wandb is not None:
            project = system.wandb
            makers["wandb"] = lambda: _WandB(project, run)
        trackers += [made for name, make in makers.items() if (made := attempt(None, name, make)) is not None]
        if trackers:
            for line in read_log(run.metrics):
                log(line)
    try:
        yield log
    finally:
        for tracker in list(trackers):
            attempt(tracker, tracker.name, tracker.close)


def numbers(line: Line) -> dict[str, float]:
    """The numbers of a line by name: `test.single.top1` is `test/single/top1`."""
    values = {path.replace(".", "/"): value for path, value in flat(line).items() if path != "step"}
    return {path: value for path, value in values.items() if isinstance(value, int | float)}


class _TensorBoard:
    """Event files in one folder of the run, written anew by every session."""

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = SummaryWriter(str(folder), flush_secs=30)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A W&B run of the same name: online where the user is logged in, else offline in the run's folder."""

    name = "wandb"

    def __init__(self, project: str, run: Run) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
        self._run = wandb.init(
            project=project,
            name=run.directory.name,
            id=f"{run.digest[:16]}-s{run.spec.seed}",
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            dir=str(run.directory),
            config=run.spec.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, init_timeout=20),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        if step >= self._run.step:  # an online run that goes on has the earlier ones
            self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def _logged_in() -> bool:
    """Whether the user has told W&B who they are, by `wandb login` or in the environment; W&B itself would ask."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
