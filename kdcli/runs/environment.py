"""On what a run was computed."""

from __future__ import annotations

import contextlib
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kdcli.specs import RunSpec


def environment(spec: RunSpec) -> dict[str, Any]:
    """Versions and platform, recorded beside the spec: what is needed to know whether two runs are comparable."""
    versions = {}
    for package in ("kdcli", "torch", "torchvision", "timm", "safetensors", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "argv": sys.argv[1:],
        "seed": spec.seed,
    }
