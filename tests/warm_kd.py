"""A `kd` for shell scripts that answers in a fraction of a second: a process that has imported everything forks one.

`Warm(folder)` starts it and leaves `folder/kd`, a program that hands its words, directory, environment and descriptors to
the warm process. In the fork runs `kdcli.__main__.main`, on the script's own stdin, stdout and stderr, so that pipes,
redirections and exit codes are those of a real `kd`. What is added to the words of a command, by its name, makes a run small.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from harness import environment

_ADDRESS = "KD_EXAMPLES_SOCKET"
_CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as channel:
    channel.connect({address!r})
    asked = dict(words=sys.argv[1:], cwd=os.getcwd(), environment=dict(os.environ))
    text = json.dumps(asked).encode("utf-8", "surrogateescape")
    socket.send_fds(channel, [len(text).to_bytes(8, "big")], [0, 1, 2])
    channel.sendall(text)
    answer = channel.recv(8)
sys.exit(int(answer) if answer else 137)
"""


class Warm:
    """The warm process.

    Args:
        folder: where the program `kd` is written.
        added: command, or command and first word → words that are put behind its own.
        path: a folder in front of Python's path, for a `sitecustomize.py`.
    """

    def __init__(self, folder: Path, added: dict[str, list[str]], path: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kd-")  # a socket's address has at most 107 bytes
        address = str(Path(self._folder.name) / "socket")
        settings = {**environment(), _ADDRESS: address, "KD_EXAMPLES_ADDED": json.dumps(added)}
        settings["PYTHONPATH"] = os.pathsep.join([str(path), settings["PYTHONPATH"]])
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=settings,
            cwd=Path(__file__).parent,
            start_new_session=True,
        )
        program = folder / "kd"
        program.write_text(_CLIENT.format(python=sys.executable, address=address))
        program.chmod(0o755)
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == b"ready\n", "the warm process did not start"

    def close(self) -> None:
        """End it, and every `kd` that is still at work."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.communicate()
        self._folder.cleanup()


# ------------------------------------------------------------------------------------------------------- the server's side


def _serve() -> None:
    _prepare()
    added = json.loads(os.environ.pop("KD_EXAMPLES_ADDED"))
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(os.environ.pop(_ADDRESS))
        door.listen(64)
        os.write(1, b"ready\n")
        while door in select.select([door, 0], [], [])[0]:
            channel, _ = door.accept()
            if not os.fork():
                door.close()
                _child(channel, added)
            channel.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
    os.killpg(0, signal.SIGKILL)  # stdin has ended: the tests are gone, and so is every `kd` then


def _prepare() -> None:
    import sklearn.datasets
    import timm
    import torch
    import torchvision
    import typer.main

    import kdcli.cli
    import kdcli.training

    assert all((timm, torchvision, kdcli.cli, kdcli.training))
    torch.set_num_threads(1)
    typer.main.get_command = functools.cache(typer.main.get_command)
    sklearn.datasets.load_digits = functools.cache(sklearn.datasets.load_digits)
    gc.collect()
    gc.freeze()


def _child(channel: socket.socket, added: dict[str, list[str]]) -> None:
    """Become the `kd` that was asked for; does not return."""
    code = 1
    try:
        head, descriptors, _, _ = socket.recv_fds(channel, 8, 3)
        text = b""
        while len(text) < int.from_bytes(head, "big"):
            text += channel.recv(1 << 16)
        asked = json.loads(text.decode("utf-8", "surrogateescape"))
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.chdir(asked["cwd"])
        path = os.environ["PYTHONPATH"]
        os.environ.clear()
        os.environ.update(asked["environment"], PYTHONPATH=path, OMP_NUM_THREADS="1")
        words = asked["words"]
        words = words + added.get(" ".join(words[:2]), added.get(" ".join(words[:1]), []))
        sys.argv = ["kd", *words]
        from kdcli.__main__ import main

        try:
            main(words)
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        with contextlib.suppress(OSError):
            channel.sendall(str(code).encode())
        os._exit(code)


if __name__ == "__main__":
    _serve()
