"""`--nproc N`: start one rank a process through torch's elastic launcher, and give back a rank's own exit code."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from kdcli.errors import WorkerError

_CODE_FILE = "KD_EXIT_CODE_FILE"


def launch(nproc: int) -> None:
    """Run this very command line on `nproc` ranks and leave with their exit code; stop signals are passed on to them.

    Under the launcher a failing rank's code is lost (it leaves with 1), so the first rank to fail notes its code in a
    file, and is the one that says why.

    Raises:
        SystemExit: with the code of the first rank that failed, if one did.
        WorkerError: a rank died without a word.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # the launcher's own report of a failure: a page that says less than the rank did
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
        os.environ[_CODE_FILE] = str(noted)
        died = ""
        try:
            # The working directory is on the ranks' path only where it is on ours (`python -m kdcli`, but not `kd`).
            path = [] if {"", os.getcwd()} & set(sys.path) else ["-P"]
            elastic_launch(config, sys.executable)(*path, "-m", "kdcli", *sys.argv[1:])
        except (ChildFailedError, SignalException) as problem:
            died = str(problem).split("\n")[0]
            if isinstance(problem, ChildFailedError):
                rank, failure = problem.get_first_failure()
                died = f"rank {rank} left with {failure.exitcode}"
        finally:
            os.environ.pop(_CODE_FILE)
        if noted.exists():
            sys.exit(int(noted.read_text()))
    if died:
        raise WorkerError(f"a rank died without a word: {died}", hint="run the same command again to go on")


def claim(code: int) -> bool:
    """Note the exit code of a rank that fails, for `launch`; False if another one was first, which then speaks for all."""
    path = os.environ.get(_CODE_FILE)
    if path is None or "RANK" not in os.environ or code == 0:
        return True
    try:
        with open(path, "x") as file:
            file.write(str(code))
    except FileExistsError:
        return False
    except OSError:
        pass
    return True
