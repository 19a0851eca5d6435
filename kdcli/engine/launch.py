"""`--nproc N`: start one rank a process through torch's elastic launcher, and give back a rank's own exit code."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from kdcli.errors import WorkerError

_CODE_FILE = "KD_EXIT_CODE_FILE"


def launch(nproc: int) -> None:
    """Run this very command line on `nproc` ranks and leave with their exit code.

    Under the launcher a failing rank's code is lost (it leaves with 1), so the first rank to fail notes its code in a
    file.

    Raises:
        SystemExit: with the code of the first rank that failed, if one did.
        WorkerError: a rank died without a word.
    """
    with tempfile.TemporaryDirectory() as folder:
        noted = Path(folder) / "code"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
        environment = {**os.environ, _CODE_FILE: str(noted), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        done = subprocess.run([*command, "-m", "kdcli", *sys.argv[1:]], env=environment, check=False)
        if done.returncode == 0:
            return
        if noted.exists():
            sys.exit(int(noted.read_text()))
    raise WorkerError(f"a rank died without a word (the launcher left with {done.returncode})")


def note_code(code: int) -> None:
    """Note the exit code of a rank that fails, for `launch`; the first one to fail wins."""
    path = os.environ.get(_CODE_FILE)
    if path is None or code == 0:
        return
    try:
        with open(path, "x") as file:
            file.write(str(code))
    except OSError:  # another rank was first
        pass
