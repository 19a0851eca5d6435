"""Commands on one network: measure it, write it for others, ask it, take it in from another code base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kdcli import output
from kdcli.commands import completion
from kdcli.commands.ending import conclude, leave
from kdcli.commands.options import Checkpoint, DataDir, Device, Json, Quiet, Threads, Workers
from kdcli.errors import ThresholdError


def evaluate(
    checkpoint: Checkpoint,
    inference: Annotated[
        str | None,
        typer.Option(
            "--inference",
            help="Only this way: single, marginal or aggregate; default: all it has.",
            autocompletion=completion.inferences,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", help="Default: the one it was trained on.", autocompletion=completion.datasets),
    ] = None,
    data_dir: DataDir = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="A checkpoint or run to count agreement with.")
    ] = None,
    min_top1: Annotated[
        float | None, typer.Option("--min-top1", help="Leave with exit code 10 if top-1 (percent) is below this.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only this many test images.")] = None,
    device: Device = "auto",
    threads: Threads = None,
    workers: Workers = 2,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a network on its test images: top-1, top-5, NLL, ECE, agreement with a teacher, throughput.

    kd evaluate runs/cifar100/vsd-wrn40_2-wrn16_2-s0-1a2b3c4d --data-dir data --min-top1 70
    """
    from kdcli import report
    from kdcli.evaluation import evaluate_checkpoint

    document = evaluate_checkpoint(
        checkpoint,
        inference=inference,
        dataset=dataset,
        data_dir=data_dir,
        teacher=teacher,
        limit=limit,
        device=device,
        threads=threads,
        workers=workers,
        story=output.Story(quiet=quiet),
    )
    error = None
    if min_top1 is not None and (top1 := document["metrics"]["test"]["top1"]) < min_top1:
        error = ThresholdError(f"top-1 is {top1:.2f} %, below {min_top1:g} %", field="--min-top1")
        document |= output.failure("evaluate", error)
    conclude(document, report.evaluation_table(document), json_)
    leave(error)


def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option("--out", help="The file to write: .safetensors, .onnx or .pt2.")],
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="safetensors, onnx or torch (torch.export); default: by the file's name.",
            autocompletion=completion.words("safetensors", "onnx", "torch"),
        ),
    ] = None,
    inputs: Annotated[
        str,
        typer.Option(
            "--inputs",
            help="Pixels that the graph takes: float (0..1) or uint8 (0..255). [float]",
            autocompletion=completion.words("float", "uint8"),
        ),
    ] = "float",
    outputs: Annotated[
        str,
        typer.Option(
            "--outputs",
            help="logits or probabilities. [logits]",
            autocompletion=completion.words("logits", "probabilities"),
        ),
    ] = "logits",
    inference: Annotated[
        str,
        typer.Option(
            "--inference",
            help="single, or (joint heads) marginal or aggregate. [single]",
            autocompletion=completion.inferences,
        ),
    ] = "single",
    opset: Annotated[int | None, typer.Option("--opset", help="Of ONNX; default: the exporter's newest.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", help="A network to compare the cost with; default: the run's own teacher."),
    ] = None,
    data_dir: DataDir = None,
    images: Annotated[int, typer.Option("--images", min=1, help="How many images to check it on. [256]")] = 256,
    random: Annotated[
        bool, typer.Option("--random-images", help="Check it on random images, not on test images.")
    ] = False,
    threads: Threads = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a network as a file for others, checked against the original: safetensors, ONNX or torch.export.

    kd export runs/cifar100/vsd-wrn40_2-wrn16_2-s0-1a2b3c4d --out student.onnx

    The normalisation is inside the graph, so nobody needs kd to run it. Nothing is written if the two disagree (exit code 4).
    """
    from kdcli.export import Wish, export, export_text

    wish = Wish(
        checkpoint,
        out,
        format_,
        inputs=inputs,
        outputs=outputs,
        inference=inference,
        data_dir=data_dir,
        limit=images,
        random=random,
        teacher=teacher,
        threads=threads,
        opset=opset,
    )
    document = export(wish, output.Story(quiet=quiet))
    conclude(document, export_text(document), json_)


def predict(
    network: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT|RUN|EXPORTED", help="A network, the run that made it, an .onnx or .pt2."),
    ],
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE|DIR…", help="Image files, folders of them; - reads a list of paths.")
    ],
    top: Annotated[int, typer.Option("--top", min=1, help="How many of the likeliest classes to give. [5]")] = 5,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode",
            help="single, or (joint heads) marginal or aggregate. [single]",
            autocompletion=completion.inferences,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images at a time. [64]")] = 64,
    device: Device = "auto",
    threads: Threads = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Open a .pt2 file, which may hold code: for your own.")
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Classify image files: a JSON line each (on a terminal: a row each).

    kd predict runs/cifar100/vsd-wrn40_2-wrn16_2-s0-1a2b3c4d photo.jpg holidays/

    find holidays -name '*.jpg' -print0 | kd predict student.onnx - > answers.jsonl

    A file that cannot be read is one line on stderr; the others are done, and the exit code is 3.
    """
    import sys

    from kdcli.predict import Asked, predict, prediction_line

    made: list[dict[str, Any]] = []
    rows = sys.stdout.isatty()

    def emit(prediction: dict[str, Any]) -> bool:
        if json_:
            made.append(prediction)
            return True
        return output.answer(prediction_line(prediction) if rows else output.json_line(prediction))

    asked = Asked(mode, top, batch_size, device, threads, trust)
    document, error = predict(network, images, asked, output.Story(quiet=quiet or rows), emit)
    if json_:
        failed = {} if error is None else output.failure("predict", error)
        conclude({**document, **failed, "predictions": made}, "", json_)
    leave(error)


def import_(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A .pth, .pt or .safetensors of another code base.")],
    arch: Annotated[
        str,
        typer.Option("--arch", help="The architecture it holds, such as wrn40_2.", autocompletion=completion.models),
    ],
    out: Annotated[Path, typer.Option("--out", help="Where to write the kd checkpoint (.safetensors).")],
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            help="The data set it was trained on, for class names and normalisation.",
            autocompletion=completion.datasets,
        ),
    ] = None,
    data_dir: DataDir = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size", min=4, max=1024, help="Side of its images, pixels; default: the data set's, without one 32."
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            "--part",
            help="student or teacher, of a file that holds both; default: the student.",
            autocompletion=completion.words("student", "teacher"),
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Turn a checkpoint of RepDistiller, mdistiller, SSKD or HSAKD into a kd checkpoint, running none of its pickles.

    kd import wrn_40_2_vanilla/ckpt_epoch_240.pth --arch wrn40_2 --dataset cifar100 --out teacher.safetensors
    """
    from kdcli import catalogue

    document, text = catalogue.imported(source, arch, out, dataset, data_dir, image_size, part)
    conclude(document, text, json_)
