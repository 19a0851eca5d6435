"""A run's directory: what is in it, and whether it is new, unfinished or finished."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kdcli import durable
from kdcli.errors import IncompatibleError, WriteError
from kdcli.metadata import require_summary
from kdcli.runs.drift import refuse_drift
from kdcli.runs.identity import digest_of, directory_for, identity
from kdcli.runs.lock import hold
from kdcli.specs import RunSpec

CARD = "MODEL_CARD.md"
_OWN = ("spec.json", "env.json", "metrics.jsonl", "summary.json", "student.safetensors", "teacher.safetensors", CARD)


@dataclass(frozen=True)
class Run:
    """An open run directory.

    Attributes:
        status: `new`, `unfinished` (there is a spec and no summary) or `finished`.
        digest: of the spec's identity; two runs with equal digests compute the same.
        writable: whether the system lets us write here; a finished run may be read where it does not.
    """

    directory: Path
    status: Literal["new", "unfinished", "finished"]
    digest: str
    spec: RunSpec
    writable: bool = True

    @property
    def state(self) -> Path:
        """Where the resume state is kept while the run is unfinished."""
        return self.directory / "state"

    @property
    def metrics(self) -> Path:
        """One JSON line an epoch."""
        return self.directory / "metrics.jsonl"

    def summary(self) -> dict[str, Any]:
        """The summary of a finished run, with the paths that hold now: it may have been moved. Raises InputError."""
        path = self.directory / "summary.json"
        summary = require_summary(durable.read_json(path), path)
        here = {"run": str(self.directory)}
        if summary["command"] != "linear-probe":  # that names its encoder's checkpoint, which lies elsewhere
            here["checkpoint"] = str(self.directory / Path(summary["checkpoint"]).name)
        return {**summary, **here}

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, which marks the run as finished, and drop the resume state it no longer needs."""
        durable.write_json(self.directory / "summary.json", summary)
        shutil.rmtree(self.state, ignore_errors=True)


@contextlib.contextmanager
def open_run(spec: RunSpec, contents: dict[str, str] | None = None, *, readonly: bool = False) -> Iterator[Run]:
    """Open the spec's run directory, alone, and find out how far it is.

    Args:
        contents: content digests of what the spec names by path, as for `identity`.
        readonly: for ranks other than the first, which look but do not write or lock.

    Raises:
        BusyError: another process has it open.
        IncompatibleError: it holds a run with another spec (every differing field is named).
        WriteError: it cannot be made or written. (A finished run need not be: it is only looked at.)
    """
    mine = identity(spec, contents)
    digest = digest_of(mine)
    directory = directory_for(spec, digest)
    if readonly:
        yield Run(directory, _status(directory), digest, spec)
        return
    durable.make_dir(directory)
    if not spec.system.overwrite and _status(directory) == "finished" and not _writable(directory):
        refuse_drift(directory, spec, mine)
        # Nobody writes here, so there is nothing to lock.
        yield Run(directory, "finished", digest, spec, writable=False)
        return
    aside = directory / ".replaced"
    with hold(directory):
        for own in (directory / "state", aside):  # a planted link would move, or clean up, files that are not ours
            if own.is_symlink():
                raise WriteError(f"cannot write in {own}: it is a symbolic link", hint="remove the link")
            if os.path.lexists(own) and not own.is_dir():  # a FIFO among them, on which `rmtree` would wait for ever
                raise WriteError(f"cannot write in {own}: it is not a directory", hint="remove it")
        durable.clean_temps(directory)
        if (directory / "state").is_dir():
            durable.clean_temps(directory / "state")
        if aside.is_dir() and not (directory / "spec.json").exists():  # killed before the new run had begun
            _move(aside, directory)
        if spec.system.overwrite:
            shutil.rmtree(aside, ignore_errors=True)
            _move(directory, aside)
        status = _status(directory)
        if status == "new":
            stray = [name for name in _OWN[1:] if (directory / name).exists()]
            if stray or (directory / "state").exists():
                raise IncompatibleError(
                    f"{directory} holds {stray[0] if stray else 'state'} but no spec.json",
                    field="--out",
                    hint="name an empty directory, or --overwrite",
                )
            _write_spec(directory, spec)
        else:
            refuse_drift(directory, spec, mine)
            if status == "unfinished" and not (directory / "state").exists():  # it starts over, with what is named now
                _write_spec(directory, spec)
        if status == "finished":
            shutil.rmtree(directory / "state", ignore_errors=True)  # it may have been killed before it had cleared up
        try:
            yield Run(directory, status, digest, spec)
        except BaseException:
            begun = (directory / "state").exists() or (directory / "summary.json").exists()
            if status == "new" and not begun:
                _withdraw(directory)  # nothing was computed: leave nothing behind, and what was there before
                _move(aside, directory)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _status(directory: Path) -> Literal["new", "unfinished", "finished"]:
    if not (directory / "spec.json").exists():
        return "new"
    return "finished" if (directory / "summary.json").exists() else "unfinished"


def _writable(directory: Path) -> bool:
    """Whether the lock of a run directory can be taken: not on a read-only disk, nor in another user's folder."""
    lock = directory / ".lock"
    return os.access(lock if lock.exists() else directory, os.W_OK)


def _write_spec(directory: Path, spec: RunSpec) -> None:
    """Write `spec.json`; without `overwrite`: run again as a preset, it would erase the very run that wrote it."""
    stored = spec.model_copy(update={"system": spec.system.model_copy(update={"overwrite": False})})
    durable.write_json(directory / "spec.json", stored.model_dump(mode="json"))


def _move(source: Path, target: Path) -> None:
    """Move a run's files from one folder to another of the same disk: out of the way of `--overwrite`, or back."""
    try:
        for name in (*_OWN, "state"):
            if os.path.lexists(source / name):
                target.mkdir(exist_ok=True)
                (source / name).rename(target / name)
        if source.name == ".replaced" and source.is_dir():
            source.rmdir()
    except OSError as problem:
        raise durable.write_error(target, problem) from None


def _withdraw(directory: Path) -> None:
    """Remove a run directory in which no run began; anything else in it stays, and so does the directory then."""
    # The spec goes last: killed or failing in between, this is a run that has not begun, and not somebody else's folder.
    for name in ("env.json", "metrics.jsonl", "spec.json", ".lock"):
        try:
            (directory / name).unlink(missing_ok=True)
        except OSError:
            return
    with contextlib.suppress(OSError):
        directory.rmdir()
