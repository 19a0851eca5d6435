"""What there is: listings, inspection of networks, import of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdcli import presets
from kdcli.errors import UsageError, nearest
from kdcli.output import envelope, table

_SIZE = 32  # pixels, where nothing says how large the images are
_LISTS = ("methods", "models", "datasets", "presets")


def listing(what: str) -> tuple[dict[str, Any], str]:
    """`kd list`: names with a line each, as a document and as text. Imports no torch.

    Raises:
        UsageError: there is no such list.
    """
    if what not in _LISTS:
        raise UsageError(f"nothing called {what!r} to list", field="list", hint=nearest(what, _LISTS))
    if what == "methods":
        from kdcli import methods

        entries = sorted(methods.known().items())
    elif what == "models":
        from kdcli.models import names

        entries = [(name, names.describe(name)) for name in names.known()]
    elif what == "datasets":
        from kdcli.data import names as data_names

        entries = [(name, data_names.describe(name)) for name in data_names.known()]
    else:
        entries = [(name, str(presets.about(name).get("title", ""))) for name in [*presets.names(), *presets.sweeps()]]
    rows = [{"name": name, "about": about} for name, about in entries]
    return envelope("list", **{what: rows}), table(entries, (what, "about"))


def inspection(model: str, input_size: int | None, classes: int, taps: str | None) -> tuple[dict[str, Any], str]:
    """`kd inspect`: stage shapes, parameters and multiply-accumulates of a network by name or checkpoint.

    Args:
        input_size: side in pixels of what the network is given; None: as in its own evaluation, 32 for one by name.
    """
    from kdcli.models import build
    from kdcli.models.network import macs, parameters_of, stage_shapes
    from kdcli.networks import load_network

    path = Path(model)
    if path.exists():
        loaded = load_network(path)
        network, own_size = loaded.backbone, loaded.metadata["image_size"] * loaded.use.scale
    else:
        own_size = _SIZE
        wanted = None if taps is None else tuple(word.strip() for word in taps.split(","))
        network = build(model, classes, input_size or own_size, taps=wanted)
    side = input_size or own_size
    shapes = stage_shapes(network, side)
    document = envelope(
        "inspect",
        model=network.arch,
        input_size=side,
        outputs=network.outputs,
        kind=network.kind,
        stages=[{"name": f"F{i}", "shape": list(shape)} for i, shape in enumerate(shapes)],
        pooled=network.pooled_dim,
        head_taps=[f"F{i}" for i in network.head_taps],
        params=parameters_of(network),
        macs=macs(network, side),
    )
    rows = [[f"F{i}" + (" (stem)" if i == 0 else ""), "x".join(map(str, shape))] for i, shape in enumerate(shapes)]
    rows += [["pooled", str(network.pooled_dim)], ["logits", str(network.outputs)]]
    text = (
        f"{network.arch} at {side}x{side}: {document['params']:,} parameters, "
        f"{document['macs']:,} multiply-accumulates\n" + table(rows, ("features", "CxHxW"))
    )
    return document, text


def imported(
    source: Path,
    arch: str,
    out: Path,
    dataset: str | None,
    data_dir: str | None,
    image_size: int | None,
    part: str | None,
) -> tuple[dict[str, Any], str]:
    """`kd import`: a foreign checkpoint as one of ours; class names and normalisation from the data set, if named.

    Args:
        image_size: side of the images in pixels; None: the data set's own, 32 without one.
        part: see `import_checkpoint`.
    """
    from kdcli.importing.conversion import import_checkpoint

    classes, normalization, name = None, None, None
    if dataset is not None:
        from kdcli import data

        images = data.load(dataset, data_dir, image_size=image_size)
        classes, image_size, name = images.classes, images.image_size, images.name
        normalization = {"mean": list(images.mean), "std": list(images.std)}
    result = import_checkpoint(
        source,
        arch=arch,
        out=out,
        classes=classes,
        dataset=name,
        normalization=normalization,
        image_size=image_size or _SIZE,
        part=part,
    )
    document = envelope("import", checkpoint=str(out), **result)
    lines = [f"{out}: {arch}, {result['outputs']} outputs, {result['tensors']} tensors, digest {result['digest']}"]
    return document, "\n".join([*lines, *result["notices"]])
