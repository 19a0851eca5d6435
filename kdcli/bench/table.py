"""A benchmark as text."""

from __future__ import annotations

from typing import Any

from kdcli.output import table

_PARTS = {
    "data": "data: the batch, augmented",
    "teacher": "teacher: views and forward pass",
    "student": "student: forward and backward pass, cross-entropy alone",
    "method": "method: what its losses and modules add",
    "optimiser": "optimiser",
    "loop": "loop: everything else",
}


def bench_table(document: dict[str, Any]) -> str:
    """Speed, the parts of a step, and how far it is from what the device can do."""
    return "\n\n".join([_title(document["configuration"]), _speed(document), _split(document), _limits(document)])


def _title(told: dict[str, Any]) -> str:
    networks = told["student"] if told["teacher"] is None else f"{told['teacher']} → {told['student']}"
    pixels = f"{told['dataset']}{' (noise)' if told['made_up'] else ''} at {told['image_size']} pixels"
    how = told["precision"] + (", compiled" if told["compile"] else "")
    where = f"CPU, threads: {told['threads']}" if told["device"] == "cpu" else told["device_name"]
    return f"{told['method']['name']}, {networks}, {pixels}, batches of {told['batch_size']}, {how}, {where}"


def _speed(document: dict[str, Any]) -> str:
    rows = []
    for path in ("ours", "naive"):
        if path in document:
            found = document[path]
            times = found["ms_per_step"]
            row = [path, found["images_per_second"], times["median"], times["min"], times["max"]]
            rows.append([*row, found["steps_per_round"], found.get("peak_mib")])
    header = ("", "images/s", "ms/step", "min", "max", "steps/round", "peak MiB")
    text = f"median over {document['rounds']} rounds\n{table(rows, header)}"
    if "ratio" in document:
        ratio = document["ratio"]
        text += f"\n{ratio['median']:.2f} times as fast as naive ({ratio['min']:.2f} to {ratio['max']:.2f})"
    return text


def _split(document: dict[str, Any]) -> str:
    ours = document["ours"]
    whole = ours["split_step_ms"]
    rows = [[_PARTS[name], ms, 100 * ms / whole] for name, ms in ours["split_ms"].items()]
    about = "the parts of a step of the median round"
    if document["configuration"]["device"] != "cpu":
        about += ", run unrecorded and waited for part by part, which takes longer"
    return f"{about}\n{table([*rows, ['together', whole, 100.0]], ('', 'ms', '%'))}"


def _limits(document: dict[str, Any]) -> str:
    work, reached, ceilings, floor = (document[key] for key in ("work", "reached", "ceilings", "floor"))
    rows = [
        [
            f"multiply-accumulates (ceiling: a product of side {ceilings['matrix_side']})",
            work["macs"] / 1e6,
            reached["macs_per_second"] / 1e9,
            ceilings["macs_per_second"] / 1e9,
            100 * reached["arithmetic"],
            floor["arithmetic_ms"],
        ],
        [
            "bytes moved if nothing were fused (ceiling: a copy)",
            work["unfused_bytes"] / 1e6,
            reached["unfused_bytes_per_second"] / 1e9,
            ceilings["bytes_per_second"] / 1e9,
            100 * reached["bandwidth"],
            None,
        ],
        ["bytes moved at the least", work["least_bytes"] / 1e6, None, None, None, floor["memory_ms"]],
    ]
    text = table(rows, ("against the device", "M/step", "G/s", "ceiling G/s", "%", "floor ms"))
    # Compiled steps on a CPU multiply less than that: see `kdcli/models/winograd.py`.
    reach = f"{100 * floor['fraction']:.1f} % of that speed is reached"
    return f"{text}\nwith direct convolutions no step below {floor['ms']:.2f} ms: {reach}"
