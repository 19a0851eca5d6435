"""What is installed: versions of kd, Python and the libraries, and whether they are those that kd and each other need."""

from __future__ import annotations

import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from kdcli import __version__
from kdcli.doctor.finding import Finding

# The floors of pyproject.toml, which is not there once kd is installed; a test keeps the two alike.
FLOORS = {
    "torch": "2.10",
    "torchvision": "0.25",
    "timm": "1.0",
    "safetensors": "0.5",
    "numpy": "1.26",
    "pillow": "10",
    "pydantic": "2.10",
    "scikit-learn": "1.5",
}
OPTIONAL = frozenset({"timm", "scikit-learn"})  # without them, no timm: networks and no digits; the rest works
PYTHON = (3, 11)


def software() -> list[Finding]:
    """Versions of everything a run depends on."""
    level = "ok" if sys.version_info >= PYTHON else "problem"
    python = platform.python_version()
    facts = {"kd": __version__, "python": python, "platform": platform.platform()}
    hint = None if level == "ok" else f"Python {'.'.join(map(str, PYTHON))} or newer is needed"
    text = f"{__version__} on Python {python}, {platform.system()} {platform.machine()}"
    return [Finding("kd", text, level, hint, facts=facts), *(_library(name, floor) for name, floor in FLOORS.items())]


def _library(name: str, floor: str) -> Finding:
    hint = f"pip install '{name}>={floor}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "is not installed", "warning" if name in OPTIONAL else "problem", hint)
    facts = {"version": found}
    if numbers(found) < numbers(floor):
        return Finding(name, f"{found} is too old, {floor} is needed", "problem", hint, facts=facts)
    if name == "torchvision" and (wanted := _torch_of(name)):
        try:
            torch = version("torch")
        except PackageNotFoundError:
            torch = ""
        if torch and numbers(torch) != numbers(wanted):
            text = f"{found} is made for torch {wanted}, and torch is {torch}"
            return Finding(name, text, "problem", "install the two together", facts=facts)
    return Finding(name, found, facts=facts)


def _torch_of(name: str) -> str | None:
    """The one torch version that a package was built for, if it says so."""
    for requirement in requires(name) or []:
        if match := re.match(r"torch\s*\(?==\s*([\d.]+)", requirement):
            return match[1]
    return None


def numbers(text: str) -> tuple[int, ...]:
    """`2.10.0+cu128` → (2, 10): the leading numbers, without zeros at the end, for comparison."""
    match = re.match(r"\d+(\.\d+)*", text)
    found = [int(part) for part in match[0].split(".")] if match else []
    while found and not found[-1]:
        found.pop()
    return tuple(found)
