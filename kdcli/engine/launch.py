"""`--nproc N`: start one rank a process through torch's elastic launcher, and give back a rank's own exit code."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

from kdcli import presets
from kdcli.errors import KdError, LostRankError, Stopped, WorkerError

_CODE_FILE = "KD_EXIT_CODE_FILE"
_FAILED = ".failed"  # appended to its name: there as soon as the launcher ends the ranks because one of them failed
_GRACE = 2  # seconds that the other ranks have to leave after one has failed; then they are killed


def launch(nproc: int) -> None:
    """Run this very command line on `nproc` ranks and leave with their exit code; stop signals are passed on to them.

    Under the launcher a failing rank's code is lost (it leaves with 1), so the first rank to fail notes its code in a
    file, and is the one that says why.

    Raises:
        SystemExit: with the code of the first rank that failed, if one did.
        WorkerError: a rank died without a word, or stopped answering.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # the launcher's own report of a failure: a page that says less than the rank did
    close = PContext.close
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id="kd",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    )
    with tempfile.TemporaryDirectory() as folder:
        noted = Path(folder) / "code"

        def closing(context: PContext, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
            # Without a signal to pass on, a rank has failed: the SIGTERM that the others now get is not the cause, and
            # those that hang must not hold up the end for half a minute.
            if death_sig is None:
                noted.with_suffix(_FAILED).touch()
            close(context, death_sig, timeout if death_sig else _GRACE)

        PContext.close = closing  # type: ignore[method-assign]
        handed = {_CODE_FILE: str(noted), **presets.hand_on_stdin(Path(folder))}
        os.environ |= handed
        died = ""
        try:
            # The working directory is on the ranks' path only where it is on ours (`python -m kdcli`, but not `kd`).
            path = [] if {"", os.getcwd()} & set(sys.path) else ["-P"]
            elastic_launch(config, sys.executable)(*path, "-m", "kdcli", *sys.argv[1:])
        except (ChildFailedError, SignalException) as problem:
            died = str(problem).split("\n")[0]
            if isinstance(problem, ChildFailedError):
                died = _blamed({rank: failure.exitcode for rank, failure in problem.failures.items()}, nproc)
        finally:
            PContext.close = close  # type: ignore[method-assign]
            for name in handed:
                os.environ.pop(name)
        if noted.exists():
            sys.exit(int(noted.read_text()))
    if died:
        raise WorkerError(died, hint="run the same command again to go on")


def _blamed(codes: dict[int, int], nproc: int) -> str:
    """Who is to blame where no rank said why: one that a signal ended, or that the others waited for in vain.

    Args:
        codes: rank → exit code, minus the signal, of those that failed, the first of them first.
    """
    rank, code = next(iter(codes.items()))
    if code < 0:
        return f"rank {rank} was ended by {signal.Signals(-code).name}"
    if code != LostRankError.code:
        return f"rank {rank} died without a word and left with {code}"
    silent = [other for other in range(nproc) if codes.get(other, -1) < 0]  # killed in the end, or never heard of
    return f"rank {' and '.join(map(str, silent))} stopped answering" if silent else "the ranks lost each other"


def claim(error: KdError) -> bool:
    """Note the exit code of a rank that fails, for `launch`.

    Returns:
        Whether this rank speaks for all: not if another one was first, nor if all that it knows is that one is missing
        or that it was told to end (by the launcher, because another one had failed).
    """
    path = os.environ.get(_CODE_FILE)
    if path is None or "RANK" not in os.environ or error.code == 0:
        return True
    told_to_end = isinstance(error, Stopped) and Path(path).with_suffix(_FAILED).exists()
    if isinstance(error, LostRankError) or told_to_end:
        return False
    try:
        with open(path, "x") as file:
            file.write(str(error.code))
    except FileExistsError:
        return False
    except OSError:
        pass
    return True
