"""Commands that look and change nothing: what there is, what a file holds, what this machine has."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kdcli import output
from kdcli.commands import completion
from kdcli.commands.ending import conclude, leave
from kdcli.commands.options import Json
from kdcli.specs import RunSpec


def list_(
    what: Annotated[
        str,
        typer.Argument(
            metavar="methods|models|datasets|presets",
            help="What to list.",
            autocompletion=completion.words("methods", "models", "datasets", "presets"),
        ),
    ],
    json_: Json = False,
) -> None:
    """List the methods, networks, data sets or presets there are.

    kd list methods
    """
    from kdcli import catalogue

    document, text = catalogue.listing(what)
    conclude(document, text, json_)


def inspect(
    model: Annotated[
        str,
        typer.Argument(help="A network's name, a checkpoint or a run directory.", autocompletion=completion.models),
    ],
    input_size: Annotated[
        int | None,
        typer.Option(
            "--input-size", min=4, max=1024, help="Side of the input, pixels; default: the checkpoint's, for a name 32."
        ),
    ] = None,
    classes: Annotated[int, typer.Option("--classes", min=1, help="Outputs of the classifier. [100]")] = 100,
    taps: Annotated[
        str | None, typer.Option("--taps", help="Modules to tap instead of the automatic choice (timm:, torchvision:).")
    ] = None,
    json_: Json = False,
) -> None:
    """Show a network's stages, their shapes, its parameters and multiply-accumulates.

    kd inspect wrn40_2 --input-size 64
    """
    from kdcli import catalogue

    document, text = catalogue.inspection(model, input_size, classes, taps)
    conclude(document, text, json_)


def schema(
    method: Annotated[
        str | None,
        typer.Option("--method", help="The schema of this method's settings only.", autocompletion=completion.methods),
    ] = None,
) -> None:
    """Print the JSON Schema of the run spec, or of a method's settings.

    kd schema --method vsd
    """
    model: Any = RunSpec
    if method is not None:
        from kdcli import methods

        model = methods.method_class(method).Spec
    output.answer(output.document(model.model_json_schema()))


def verify(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH…", help="Files, run directories, directories of runs; - reads a list.")
    ],
    json_: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only what is not sound.")] = False,
) -> None:
    """Check every byte of checkpoints and resume states, and specs, presets and logs; exit code 3 if one is damaged.

    kd verify runs student.safetensors

    find /archive -name '*.safetensors' -print0 | kd verify --quiet -
    """
    from kdcli import verify

    findings = []
    for finding in verify.verify(paths):
        findings.append(finding)
        if not json_ and not (quiet and finding.ok):
            output.answer(finding.line)
    document, error = verify.conclusion(findings)
    if json_:
        conclude(document, "", json_)
    leave(error)


def digest(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH…", help="Checkpoints or run directories; - reads a list.")
    ],
    whole: Annotated[
        bool, typer.Option("--whole", help="Also print the seal of the header: the two cover every byte of the file.")
    ] = False,
    json_: Json = False,
) -> None:
    """Print a hash of the weights alone, the path after it: equal networks have equal digests.

    kd digest runs/a/student.safetensors runs/b/student.safetensors
    """
    from kdcli import verify

    findings = []
    for finding in verify.digests(paths):
        findings.append(finding)
        if finding.ok and not json_:
            output.answer(verify.digest_line(finding, whole))
    document, error = verify.digest_conclusion(findings, whole)
    if json_:
        conclude(document, "", json_)
    leave(error)


def doctor(
    data_dir: Annotated[
        str | None, typer.Option("--data-dir", help="Where the data sets lie; default $KD_DATA_DIR, else ./data.")
    ] = None,
    runs_dir: Annotated[str, typer.Option("--runs-dir", help="Where runs are to be written. [runs]")] = "runs",
    json_: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only warnings and problems.")] = False,
) -> None:
    """Look over this machine: versions, devices, data sets, disk, limits. Each problem comes with its fix.

    kd doctor --data-dir data --runs-dir runs

    Exit code 0 unless there is a problem: 3 (data), 4 (what is installed does not fit), 5 (cannot write).
    """
    from kdcli import doctor

    document, text, error = doctor.examine(data_dir, runs_dir, quiet=quiet)
    if json_ or text:
        conclude(document, text, json_)
    leave(error)
