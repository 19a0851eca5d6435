"""docs/methods.md, made from what the methods say about themselves: `python -m kdcli.pages.methods > docs/methods.md`.

A method's module docstring begins with `NAME: a phrase.`, goes on with free paragraphs, and ends with labelled lines
(`Equation:`, `Source:` …) whose continuation lines are indented. Its settings come from its Spec, the published numbers
from the table presets.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from dataclasses import dataclass, field

from kdcli import methods
from kdcli.methods.base import MethodSpec
from kdcli.sweep import file

LABELS = ("Equation", "Teacher", "Reductions", "Source", "Tensors", "Cost", "Our reading")
_SHARED = tuple(name for name in MethodSpec.model_fields if name != "name")

_HEAD = """# Methods

Made by `python -m kdcli.pages.methods` from the methods' own docstrings; do not edit.

B images a batch, K classes, `s` and `t` the logits of student and teacher, T a temperature, CE the cross-entropy (a mean
over rows), KL(p ‖ q) summed over the classes. Teachers are frozen and get no gradient; they are in evaluation mode unless
a method says otherwise. Losses and gradients are compared with numbers from public reference implementations
(`tests/golden`).

Every setting is `--set method.NAME=VALUE`; `kd schema --method METHOD` prints them as JSON. Settings that the literature
chose for a pair of networks are taken for that pair unless you set them: `--dry-run` shows what a run will use. Your own
method: [own-method.md](own-method.md).

Settings of every method:
"""


@dataclass
class Page:
    """A method's docstring, taken apart.

    Attributes:
        labelled: the text behind each label, in the order of the docstring.
    """

    phrase: str
    paragraphs: list[str] = field(default_factory=list)
    labelled: dict[str, str] = field(default_factory=dict)


def read(docstring: str) -> Page:
    """Take a method module's docstring apart.

    Raises:
        ValueError: it has not the form that this module's docstring describes, or lacks equation, source, tensors or cost.
    """
    first, _, rest = inspect.cleandoc(docstring).partition("\n")
    page = Page(first.partition(": ")[2])
    label = None
    for block in re.split(r"\n\s*\n", rest.strip()):
        if not re.match(rf"({'|'.join(LABELS)}): ", block):
            page.paragraphs.append(" ".join(block.split()))
            continue
        for line in block.splitlines():
            found = re.match(rf"({'|'.join(LABELS)}): (.*)", line)
            if found:
                label = found[1]
                page.labelled[label] = found[2].strip()
            elif label is not None and line.startswith("    "):
                page.labelled[label] += " " + line.strip()
            else:
                raise ValueError(f"a line that belongs to no label: {line!r}")
    missing = [name for name in ("Equation", "Source", "Tensors", "Cost") if name not in page.labelled]
    if missing or not page.phrase:
        raise ValueError(f"the docstring has no {missing or 'phrase'}")
    return page


def page_of(name: str) -> Page:
    """The docstring of a shipped method's module, taken apart."""
    return read(importlib.import_module(f"kdcli.methods.{name}").__doc__ or "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _settings(spec: type[MethodSpec], names: list[str]) -> list[str]:
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for name in names:
        described = spec.model_fields[name]
        default = json.dumps(described.get_default(call_default_factory=True), default=str, ensure_ascii=False)
        lines.append(f"| `{name}` | `{default}` | {_cell(described.description or '')} |")
    return lines


def _section(name: str) -> list[str]:
    page, spec = page_of(name), methods.method_class(name).Spec
    lines = [f"## {name}", "", page.phrase[:1].upper() + page.phrase[1:], ""]
    for paragraph in page.paragraphs:
        lines += [paragraph, ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {label} | {_cell(text)} |" for label, text in page.labelled.items()]
    base = MethodSpec.model_fields
    own = [
        field
        for field, described in spec.model_fields.items()
        if field != "name" and (field not in base or described.default != base[field].default)
    ]
    if own:
        lines += ["", *_settings(spec, own)]
    return [*lines, "", *_published(name)]


def _published(name: str) -> list[str]:
    """The numbers that the papers' tables print for a method, each with its table, teachers and epoch."""
    rows = []
    for table, row in file.published(name):
        teachers, epoch = row.teachers or table.about.teachers, row.epoch or table.about.epoch
        of = {"last": "last epoch", "best": "best epoch", "unknown": "epoch not stated"}[epoch]
        teaching = "" if teachers == "none" else f"; teachers: {teachers}"
        copied = f"; {row.source}" if row.source else ""
        numbers = zip(file.keys(table, row), row.values, strict=True)
        values = ", ".join(f"{_place(*place)} {value:.2f}" for place, value in numbers)
        rows.append(f"- `{table.name}` ({of}{teaching}{copied}): {values}")
    return ["Published top-1, %:", "", *rows, ""] if rows else []


def _place(pair: tuple[str, str], ratio: float | None, probe: str | None) -> str:
    networks = "→".join(filter(None, pair))
    return " ".join([networks, *([f"at {100 * ratio:g} %"] if ratio else []), *([f"on {probe}"] if probe else [])])


def text() -> str:
    """The whole page."""
    shared = _settings(MethodSpec, list(_SHARED))
    lines = [_HEAD, *shared, ""]
    for name in methods.SHIPPED:
        lines += _section(name)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
