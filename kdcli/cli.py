"""The command line: which commands there are. Each parses, and hands a validated spec to the module that does the work.

Nothing here or in `kdcli.commands` imports torch; the work's modules are imported when work starts.
"""

from __future__ import annotations

from typing import Annotated

import typer

from kdcli import __version__, output
from kdcli.commands import looking, studying, training, using

app = typer.Typer(
    name="kd",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help=(
        "Distil small image classifiers from large ones, and compare distillation methods honestly.\n\n"
        "Settings: defaults < the data set's recipe < --preset < flags < --set KEY=VALUE. The answer goes to stdout "
        "(--json: one JSON document), progress to stderr. --verbose, anywhere, shows the traceback of a bug."
    ),
)


def _version(value: bool) -> None:
    if value:
        output.answer(f"kd {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = None,
) -> None: ...


_COMMANDS = {
    **training.COMMANDS,
    "evaluate": using.evaluate,
    "export": using.export,
    "predict": using.predict,
    "watch": studying.watch,
    "sweep": studying.sweep,
    "report": studying.report,
    "list": looking.list_,
    "inspect": looking.inspect,
    "schema": looking.schema,
    "import": using.import_,
    "verify": looking.verify,
    "digest": looking.digest,
    "doctor": looking.doctor,
}
for _name, _function in _COMMANDS.items():
    app.command(_name)(_function)
