"""The model card of a student: what it is, how it was made and measured, and what is not known of it, in Markdown.

It is made from the files of the finished run alone, so the same run has the same card whenever it is written.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from kdcli import checkpoint, durable
from kdcli.commandline import command_line
from kdcli.data.names import public
from kdcli.output import one_line
from kdcli.runs.directory import CARD
from kdcli.specs import RunSpec, SystemSpec, validate

_SHOWN = 200  # class names; all of them are in the checkpoint


def write(directory: Path) -> Path:
    """Write the card of a finished run's student into its directory, durably.

    Raises:
        InputError: a file of the run is missing or damaged.
        WriteError: it cannot be written.
    """
    spec: RunSpec = validate(RunSpec, durable.read_json(directory / "spec.json"))
    summary = durable.read_json(directory / "summary.json")
    environment = durable.read_json(directory / "env.json") if (directory / "env.json").exists() else {}
    metadata = checkpoint.read_metadata(directory / "student.safetensors")
    durable.write_bytes(directory / CARD, card(spec, summary, metadata, environment).encode("utf-8", "replace"))
    return directory / CARD


def card(spec: RunSpec, summary: dict[str, Any], metadata: dict[str, Any], environment: dict[str, Any]) -> str:
    """The text: `summary` and `metadata` are those of the run and of its student's checkpoint."""
    dataset, arch = public(metadata["dataset"]), metadata["arch"]["name"]
    sections = [
        _front(spec),
        f"# {_safe(arch)}, {_distilled(spec)} on {_safe(dataset)}",
        _what(spec, summary, metadata),
        "## Use\n\n" + _use(metadata),
        "## Accuracy\n\n" + _accuracy(summary, dataset),
        "## Teacher\n\n" + _teacher(summary),
        "## Training\n\n" + _training(spec, summary, environment),
        "## Classes\n\n" + _classes(metadata["classes"]),
        "## Limits\n\n" + _limits(spec, summary, dataset),
        "## Licence\n\nNot stated. Whoever publishes this network chooses one, and minds the terms of the images, of the "
        "teacher and of any library weights it started from.",
    ]
    return "\n\n".join(sections) + "\n"


def _front(spec: RunSpec) -> str:
    method = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(spec.method["name"]).stem)
    return f"---\ntags:\n- image-classification\n- knowledge-distillation\n- {method}\nlibrary_name: kdcli\n---"


def _distilled(spec: RunSpec) -> str:
    name = spec.method["name"]
    return "trained alone" if name == "none" else f"distilled with {_safe(Path(name).stem)}"


def _what(spec: RunSpec, summary: dict[str, Any], metadata: dict[str, Any]) -> str:
    size, test = metadata["image_size"], summary["metrics"]["test"]
    cost = summary["cost"]
    rows = [
        ("task", f"image classification, {len(metadata['classes'])} classes"),
        ("network", f"`{_code(metadata['arch']['name'])}`"),
        ("parameters", f"{cost['params']:,}"),
        ("multiply-accumulates", f"{cost['macs']:,} an image"),
        ("input", f"RGB, {size} x {size} pixels"),
        ("top-1", f"{test['top1']:.2f} % of {test['n']} test images, last epoch"),
        ("weights", f"`student.safetensors`, digest `{metadata['digest']}`"),
        ("spec", f"`spec.json`, digest `{summary['spec_digest']}`"),
    ]
    return _table(("", ""), rows)


def _use(metadata: dict[str, Any]) -> str:
    size, side = metadata["image_size"], metadata.get("resize") or metadata["image_size"]
    normalization = metadata["normalization"]
    text = (
        "```sh\nkd predict student.safetensors photo.jpg\nkd export student.safetensors --out student.onnx\n```\n\n"
        '```python\nimport kdcli\n\nclassify = kdcli.load("student.safetensors")\n'
        f"logits = classify(images)  # uint8 or 0..1 float, RGB, [B, 3, {size}, {size}]\n```\n\n"
        f"The shorter side of an image is brought to {side} pixels (bilinear, antialiased) and the centre of {size} x {size} "
        "is cut out. "
    )
    if normalization is not None:
        mean, std = (", ".join(f"{v:g}" for v in normalization[key]) for key in ("mean", "std"))
        text += f"The network then normalises with mean {mean} and standard deviation {std} (on the 0..1 scale)."
    if metadata.get("inference", {}).get("transform", "none") != "none":
        transform = metadata["inference"]["transform"]
        text += (
            f"\n\nIts head spans classes and views (`{_code(transform)}`). `single` inference, the default, takes one "
            "pass; `--mode marginal` and `--mode aggregate` use the other views, aggregate at as many passes as views."
        )
    return text


def _accuracy(summary: dict[str, Any], dataset: str) -> str:
    rows = []
    for split, values in summary["metrics"].items():
        rows.append((f"{split}, single", values["n"], *_numbers(values)))
        rows += [
            (f"{split}, {mode}", values["n"], *_numbers(values[mode]))
            for mode in ("marginal", "aggregate")
            if isinstance(values.get(mode), dict)
        ]
    table = _table(("images, inference", "n", "top-1 %", "top-5 %", "NLL", "ECE %"), rows)
    return f"Of {_safe(dataset)}, at the **last epoch**; nothing was chosen on the test images.\n\n{table}"


def _numbers(values: dict[str, Any]) -> list[str]:
    return [
        f"{values[key]:.{d}f}" if key in values else "" for key, d in (("top1", 2), ("top5", 2), ("nll", 4), ("ece", 2))
    ]


def _teacher(summary: dict[str, Any]) -> str:
    told = summary.get("teacher")
    if told is None:
        return "None: the network learned from the labels alone."
    lines = []
    for who, one in [("teacher", told), *(("assistant", other) for other in told.get("assistants", []))]:
        accuracy = f", top-1 {one['top1']:.2f} % of {one['n']} test images" if "top1" in one and "n" in one else ""
        lines.append(f"- {who}: `{_code(one['arch'])}`{accuracy}, digest `{_code(one['digest'])}`")
    return "\n".join(lines)


def _training(spec: RunSpec, summary: dict[str, Any], environment: dict[str, Any]) -> str:
    train, data, cost = spec.train, spec.data, summary["cost"]
    peak = cost["peak_mib"]  # null where it could not be told from that of an earlier run of the process
    settings = {key: value for key, value in spec.method.items() if key != "name"}
    rows = [
        ("method", f"`{_code(Path(spec.method['name']).name)}`"),
        ("method's settings", ", ".join(f"`{_code(f'{k}={v}')}`" for k, v in settings.items()) or "none"),
        ("epochs", f"{train.epochs}" + ("" if train.max_steps is None else f", cut off after {train.max_steps} steps")),
        (
            "optimiser",
            f"{train.optimizer}, learning rate {train.lr}, batch {train.batch_size}, {train.schedule} schedule",
        ),
        ("weight decay", f"{train.weight_decay:g}"),
        ("augmentation", _augmentation(spec)),
        ("share of the training images", f"{data.train_fraction * data.ratio:g}"),
        ("seed", f"{spec.seed} (splits: {data.split_seed})"),
        ("precision", spec.system.precision),
        ("steps", f"{summary['steps']:,}"),
        ("cost", f"{cost['seconds'] / 60:.1f} minutes" + (f", {peak:.0f} MiB" if peak is not None else "")),
    ]
    versions = environment.get("versions") if isinstance(environment, dict) else None
    if isinstance(versions, dict):
        rows.append(("versions", ", ".join(f"{_safe(k)} {_safe(v)}" for k, v in versions.items())))
    # Where it ran and where its files lay is nobody's business, and changes nothing.
    bare = SystemSpec(precision=spec.system.precision, compile=spec.system.compile)
    public = spec.model_copy(update={"system": bare, "data": data.model_copy(update={"data_dir": None})})
    command = one_line(command_line("distill", public))
    return _table(("", ""), rows) + f"\n\n```sh\n{command.replace('```', '')}\n```"


def _augmentation(spec: RunSpec) -> str:
    data = spec.data
    parts = [data.augment]
    parts += [_safe(data.rand_augment)] if data.rand_augment else []
    parts += [
        f"{name} {value:g}"
        for name, value in (
            ("colour jitter", data.color_jitter),
            ("erasing", data.erasing),
            ("mixup", data.mixup),
            ("cutmix", data.cutmix),
        )
        if value
    ]
    return ", ".join(parts)


def _classes(classes: list[str]) -> str:
    shown = ", ".join(f"`{_code(name)}`" for name in classes[:_SHOWN])
    return shown + (f" … and {len(classes) - _SHOWN} more, all in the checkpoint" if len(classes) > _SHOWN else "")


def _limits(spec: RunSpec, summary: dict[str, Any], dataset: str) -> str:
    lines = [
        f"- Measured on the test images of {_safe(dataset)} and on nothing else: not on other sources, damaged or "
        "adversarial images, nor by groups of people or places.",
        "- It always names one of its classes, whatever the image shows; its confidence was not calibrated (ECE above).",
        "- One run with one seed: another seed gives another accuracy.",
    ]
    if spec.train.max_steps is not None:
        lines.append("- The training was cut off (`max_steps`): this is a trial and no finished network.")
    if "val" not in summary["metrics"]:
        lines.append("- No validation images were held out; whoever tuned settings on the test images knows it.")
    return "\n".join(lines)


def _table(header: tuple[str, ...], rows: list[Any]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _safe(text: Any) -> str:
    """Plain text in Markdown: names come from folders and files, and may look like markup."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(one_line(str(text)), quote=False))


def _code(text: Any) -> str:
    """Text between backticks, also in a table."""
    return one_line(str(text)).replace("`", "'").replace("|", "\\|")
