"""Data sets and the loader that feeds them: `load` finds and checks a set, `loader.Loader` makes batches of it.

Importing this package imports neither torch nor torchvision; `load` does.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdcli.data import names
from kdcli.data.request import Request
from kdcli.errors import InputError, UsageError

if TYPE_CHECKING:
    from kdcli.data.dataset import DataSet

_READERS = {
    "cifar100": "cifar",
    "cifar10": "cifar",
    "stl10": "stl10",
    "tinyimagenet": "tinyimagenet",
    "imagenet": "folder",
    "folder": "folder",
    "digits": "digits",
    "synthetic": "synthetic",
}


def data_root(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """The data directory: the argument, else the environment's KD_DATA_DIR, else `./data`."""
    return Path(data_dir or os.environ.get("KD_DATA_DIR") or "data").expanduser()


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    image_size: int | None = None,
    download: bool = False,
    resident_mib: int = 2048,
    class_names: Sequence[str] | None = None,
) -> DataSet:
    """Find, read and check a data set.

    Args:
        name: any spelling `names.canonical` takes.
        data_dir: where to look, see `data_root`. `folder:PATH` looks at PATH itself.
        image_size: side S of the images the network will see; the set's own default if None.
        download: fetch the official archive into the data directory if the set is not there.
        resident_mib: decoded images up to this many MiB are kept in memory; larger sets of files are streamed.
        class_names: the class order to use, as stored in a checkpoint. The same names in another order renumber the
            labels; other names do not fit.

    Returns:
        The data set; every label is in range and every class has a training image.

    Raises:
        UsageError: unknown name, or an image size below 4.
        InputError: the data are missing, damaged or hostile.
        IncompatibleError: the classes are not `class_names`.
    """
    name = names.canonical(name)
    size = names.default_size(name) if image_size is None else image_size
    if size < 4:
        raise UsageError(f"{size} pixels are too few", field="data.image_size", hint="use at least 4")
    kind, _, argument = name.partition(":")
    root = Path(argument).expanduser() if kind == "folder" else data_root(data_dir)
    reader = importlib.import_module(f"kdcli.data.{_READERS[kind]}")
    try:
        dataset: DataSet = reader.read(Request(name, root, size, download, resident_mib << 20))
    except OSError as error:  # a folder that may not be entered, a disk that fails
        raise InputError(f"{error.filename or root} cannot be read: {error.strerror or error}") from error
    return dataset if class_names is None else dataset.with_classes(class_names)
