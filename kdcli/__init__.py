"""kd: distil small image classifiers from large ones, and compare distillation methods honestly.

From Python, `kdcli.load("student.safetensors")` gives a ready network with its preprocessing and class names. Importing
this package imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcli.networks import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from kdcli.networks import load

        return load
    raise AttributeError(f"module 'kdcli' has no attribute {name!r}")
