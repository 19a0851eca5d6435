"""`kd` and `python -m kdcli`: run the command line, and turn every failure into one line and the right exit code."""

from __future__ import annotations

import os
import sys
import traceback

from kdcli import output
from kdcli.errors import KdError


def main(argv: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbose = "--verbose" in arguments
    arguments = [word for word in arguments if word != "--verbose"]
    code = run(arguments, verbose=verbose)
    if "RANK" in os.environ:
        from kdcli.engine.launch import note_code

        note_code(code)
    sys.exit(code)


def run(arguments: list[str], *, verbose: bool = False) -> int:
    """Run one command; returns its exit code instead of raising."""
    from kdcli.cli import app

    try:
        try:
            return int(app(arguments, prog_name="kd", standalone_mode=False) or 0)
        except KdError as error:
            _tell(error, arguments)
            return error.code
    except KdError as error:  # the failure's own JSON could not be written
        _line(error.line())
        return error.code
    except KeyboardInterrupt:
        _line("interrupted")
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as problem:
        # Typer's own usage errors, recognised by what they can do and not by a private module's name.
        message = getattr(problem, "format_message", None)
        if message is not None:
            _line(" ".join(str(message()).split()))
            return int(getattr(problem, "exit_code", 2))
        if verbose:
            traceback.print_exc()
        where = traceback.extract_tb(problem.__traceback__)[-1]
        hint = "" if verbose else "; --verbose shows the traceback"
        _line(
            f"a bug in kd: {type(problem).__name__}: {problem} at {os.path.basename(where.filename)}:{where.lineno}{hint}"
        )
        return 1


def _tell(error: KdError, arguments: list[str]) -> None:
    if "--json" in arguments:
        output.answer(output.document(output.failure(next(iter(arguments), ""), error)))
    _line(error.line())


def _line(text: str) -> None:
    try:
        sys.stderr.write("error: " + " ".join(text.split("\n")) + "\n")
        sys.stderr.flush()
    except OSError:  # nobody is listening; the exit code still speaks
        pass


if __name__ == "__main__":
    main()
