"""Run specs: every setting of a run, declared once, validated before torch is imported.

A field's docstring is its help text, its place gives its dotted name (`train.epochs`) and its flag (`--epochs`). A field
made with `aside` does not change what is computed, only where or how it is carried out, so it is left out of the spec
digest: a run may be continued on another machine or with another checkpoint interval.
"""

from __future__ import annotations

from kdcli.specs.checking import explain, validate
from kdcli.specs.data import Augment, DataSpec
from kdcli.specs.fields import bare, field_at, field_paths
from kdcli.specs.run import Command, ProbeSpec, RunSpec
from kdcli.specs.section import Section, strip_asides
from kdcli.specs.system import SystemSpec
from kdcli.specs.train import TrainSpec

__all__ = [
    "Augment",
    "Command",
    "DataSpec",
    "ProbeSpec",
    "RunSpec",
    "Section",
    "SystemSpec",
    "TrainSpec",
    "bare",
    "explain",
    "field_at",
    "field_paths",
    "strip_asides",
    "validate",
]
