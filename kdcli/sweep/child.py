"""The process of one run of `kd sweep --jobs N`: `kd` itself, which does not outlive the sweep that started it.

Called with the sweep's process number and the words of the command. Torch-free until the command starts its work.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

_LOOK_EVERY = 0.5  # seconds


def main() -> None:
    """Carry out the command, and stop it as SIGTERM does (it saves) once the sweep is no more, however that ended."""
    parent, *words = sys.argv[1:]
    # Until the command listens to it, an interrupt ends the process at once; as an exception it could get lost in an import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_watch, args=(int(parent),), daemon=True).start()
    sys.argv[1:] = words  # the run records them

    runpy.run_module("kdcli", run_name="__main__")


def _watch(parent: int) -> None:
    while os.getppid() == parent:  # an orphan is given another parent
        time.sleep(_LOOK_EVERY)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
