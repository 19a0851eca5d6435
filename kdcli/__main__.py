"""`kd` and `python -m kdcli`: run the command line, and turn every failure into one line and the right exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback

from kdcli import output
from kdcli.engine.signals import StopFlag, listening
from kdcli.errors import InputError, KdError, Stopped, UsageError, WriteError, unforeseen

# What a path can be, wherever it is first looked at: too long, in a folder that may not be entered, a loop of links.
_PATHS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP)


def main(argv: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    if "_KD_COMPLETE" in os.environ:  # a shell asks what could come next
        from kdcli.commands import completion

        sys.exit(completion.respond(run))
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbose = "--verbose" in arguments
    arguments = [word for word in arguments if word != "--verbose"]
    sys.exit(run(arguments, verbose=verbose))


def run(arguments: list[str], *, verbose: bool = False) -> int:
    """Run one command; returns its exit code instead of raising."""
    try:
        # From the first moment on: a stop while torch is imported, or a file is read, has its code and its line too.
        with listening(StopFlag(None, "--requeue" in arguments), at_once=True):
            from kdcli.cli import app

            return int(app(arguments or ["--help"], prog_name="kd", standalone_mode=False) or 0)
    except KdError as error:
        return _fail(error, arguments)
    except KeyboardInterrupt:
        return _fail(Stopped("interrupted", 130), arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as problem:
        # Typer's own usage errors, recognised by what they can do and not by a private module's name.
        message = getattr(problem, "format_message", None)
        if message is not None:
            return _fail(UsageError(" ".join(str(message()).split())), arguments)
        if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # help texts are written by Typer
            return _fail(WriteError(f"cannot write: {problem.strerror}", hint="free some space"), arguments)
        if isinstance(problem, OSError) and problem.errno in _PATHS and problem.filename is not None:
            path = str(os.fsdecode(problem.filename))[:200] if not isinstance(problem.filename, int) else "a file"
            return _fail(InputError(f"cannot use {path}: {problem.strerror}", hint="check the path"), arguments)
        if verbose:
            traceback.print_exc()
        return _fail(unforeseen(problem, None) if verbose else unforeseen(problem), arguments)


def _fail(error: KdError, arguments: list[str]) -> int:
    """Say what is wrong, once: one line on stderr, and one JSON document on stdout if asked for; the exit code."""
    if "RANK" in os.environ:
        from kdcli.engine.launch import claim

        if not claim(error):
            return error.code
    if "--json" in arguments:
        try:
            output.answer(output.document(output.failure(next(iter(arguments), ""), error)))
        except KdError as problem:  # the failure's own JSON could not be written
            error = problem
    _line(error.line())
    return error.code


def _line(text: str) -> None:
    try:
        sys.stderr.write("error: " + " ".join(text.split("\n")) + "\n")
        sys.stderr.flush()
    except OSError:  # nobody is listening; the exit code still speaks
        pass


if __name__ == "__main__":
    main()
