"""The states from which an unfinished run goes on: the newest ones, each read back before an older one goes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli import durable
from kdcli.checkpoint.file import load, save, verify
from kdcli.errors import InputError, WriteError

if TYPE_CHECKING:
    import torch

_STATE_NAME = re.compile(r"step-(\d{9,18})\.safetensors")


def save_state(
    directory: str | os.PathLike[str],
    step: int,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write `step-<step>.safetensors` durably, read it back, and only then remove the states it makes superfluous.

    Those are all but the `keep - 1` newest earlier ones, and any of a later step: they are damaged, or were left by a
    run that this one replaces, and would otherwise win at the next start.

    Raises:
        WriteError: it could not be written or reads back differently; the earlier states are all still there.
    """
    directory = durable.make_dir(directory, links=False)
    path = directory / f"step-{step:09d}.safetensors"
    written = save(path, tensors, {**metadata, "role": "state", "step": step})
    try:
        found = verify(path)["digest"]
    except InputError as problem:
        found = problem.message
    try:
        if found != written:
            os.unlink(path)
            raise WriteError(f"{path} reads back differently from what was written", hint="the disk may be failing")
        states = _states(directory)
        earlier = [s for s in states if s < step]
        for old in [*earlier[max(keep - 1, 0) :], *(s for s in states if s > step)]:
            os.unlink(states[old])
    except OSError as problem:
        raise durable.write_error(path, problem) from None
    return path


def load_state(directory: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[str]] | None:
    """The newest sound state, by step number and never by date.

    Returns:
        Tensors, metadata (`step` among it), and one sentence for every newer file that had to be passed over; or None
        where no state was ever saved.

    Raises:
        InputError: there are states, and every one is damaged.
        IncompatibleError: a newer kd wrote the newest.
    """
    try:
        states = _states(Path(directory))
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise InputError(f"cannot read {os.fspath(directory)}: {problem.strerror}", hint="check the path") from None
    notices: list[str] = []
    for step, path in states.items():
        try:
            tensors, metadata = load(path)
            if metadata["role"] != "state" or metadata.get("step") != step:
                raise InputError(f"{path} is not the state of step {step}")
        except InputError as problem:
            notices.append(f"{problem.message}; going back to the state before it")
            continue
        return tensors, metadata, notices
    if notices:
        raise InputError(
            f"no state in {os.fspath(directory)} can be read; the newest: {notices[0].partition('; going')[0]}",
            hint="start anew with --overwrite",
        )
    return None


def _states(directory: Path) -> dict[int, Path]:
    """Step number to file, newest step first. Raises `OSError`."""
    found = {
        int(match[1]): directory / name for name in os.listdir(directory) if (match := _STATE_NAME.fullmatch(name))
    }
    return dict(sorted(found.items(), reverse=True))
