"""What a shell offers when Tab is pressed: names of methods, networks, data sets, presets and sweeps, and settings.

Typer speaks with the shells; here is what it cannot know. Nothing here imports torch, timm or torchvision: the libraries'
networks are read off their source files, so that an answer takes a fraction of a second.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from pathlib import Path

Offers = list[tuple[str, str]]
"""Candidates with a line about each, which zsh and fish show."""

VARIABLE = "_KD_COMPLETE"
"""Set by a shell that asks: `complete_bash`, `source_zsh` …"""

# A decorated function of a library's `models` folder is a network that the library builds by that name.
_REGISTERED = re.compile(r"^@register_model\b.*?^def (\w+)\(", re.MULTILINE | re.DOTALL)
_BREAKS = ":="


def methods(incomplete: str) -> Offers:
    """The methods, shipped or plugged in."""
    from kdcli.methods import known

    return _starting(incomplete, known().items())


def models(incomplete: str) -> Offers:
    """The networks of the registry; those of a library once its prefix is begun. Paths are left to the shell."""
    from kdcli.models import names

    own = _starting(incomplete, names.DESCRIPTIONS.items())
    if not incomplete:
        return own + [(library, f"a network of {library.removesuffix(':')}") for library in names.LIBRARIES]
    begun = [one for one in names.LIBRARIES if incomplete.startswith(one) or one.startswith(incomplete)]
    return own + _starting(incomplete, [(one + name, "") for one in begun for name in library_models(one)])


def library_models(library: str) -> list[str]:
    """The names of the networks of `timm:` or `torchvision:`, sorted; none where it is not installed."""
    found = importlib.util.find_spec(library.removesuffix(":"))
    names: set[str] = set()
    for folder in (found.submodule_search_locations or []) if found else []:
        for file in (Path(folder) / "models").glob("*.py"):
            names.update(_REGISTERED.findall(file.read_text("utf-8", "replace")))
    return sorted(names)


def datasets(incomplete: str) -> Offers:
    """The data sets; `folder:` is followed by a path."""
    from kdcli.data import names

    return _starting(incomplete, [(name.removesuffix("PATH"), names.describe(name)) for name in names.known()])


def presets(incomplete: str) -> Offers:
    """The shipped presets of one run."""
    from kdcli import presets as shipped

    return [
        (name, str(shipped.about(name).get("title", ""))) for name in shipped.names() if name.startswith(incomplete)
    ]


def sweeps(incomplete: str) -> Offers:
    """The shipped sweeps."""
    from kdcli import presets as shipped

    return [
        (name, str(shipped.about(name).get("title", ""))) for name in shipped.sweeps() if name.startswith(incomplete)
    ]


def settings(incomplete: str) -> Offers:
    """Settings for `--set`, each with the values it may have, or its default beside an empty one.

    Every setting is at least two candidates: a shell would put a space behind a single one.
    """
    from kdcli.specs import bare, field_at, field_paths

    offers: Offers = []
    for path in field_paths().values():
        field = field_at(path)
        kind = bare(field.annotation)
        if kind is bool:
            values = ["true", "false"]
        elif typing.get_origin(kind) is typing.Literal:
            values = [str(value) for value in typing.get_args(kind)]
        else:
            values = ["", str(field.default)] if isinstance(field.default, int | float | str) else [""]
        offers += [(f"{path}={value}", " ".join((field.description or "").split())) for value in values]
    return _starting(incomplete, offers)


def only(incomplete: str) -> Offers:
    """Filters of a sweep's runs."""
    from kdcli.methods import known

    stages = ("backbone", "teacher", "assistant", "student", "probe")
    keys = ("label", "pair", "teacher", "student", "preset", "dataset", "ratio", "probe", "seed")
    offers = [(f"stage={stage}", "") for stage in stages] + [(f"method={name}", text) for name, text in known().items()]
    return _starting(incomplete, offers + [(f"{key}=", "") for key in keys])


def words(*known: str) -> Callable[[str], Offers]:
    """A fixed choice."""

    def offer(incomplete: str) -> Offers:
        return _starting(incomplete, [(word, "") for word in known])

    return offer


devices = words("auto", "cpu", "cuda")
inferences = words("single", "marginal", "aggregate")

OF_SETTING: dict[str, Callable[[str], Offers]] = {
    "method": methods,
    "teacher": models,
    "student": models,
    "assistant": models,
    "dataset": datasets,
    "device": devices,
}
"""Leaf name of a spec's field → what may stand behind its flag."""


def _starting(incomplete: str, offers: Iterable[tuple[str, str]]) -> Offers:
    return [(name, about) for name, about in offers if name.startswith(incomplete)]


def respond(run: Callable[[list[str]], int]) -> int:
    """Answer the shell whose question stands in the environment; the exit code.

    Bash breaks words at `:` and `=` before it asks, and replaces only what is behind the break: the words are joined again
    for Typer, and the candidates shortened for bash.

    Args:
        run: the command line.
    """
    if os.environ.get(VARIABLE) != "complete_bash":
        return run([])
    word = _join(os.environ)
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        code = run([])
    with contextlib.suppress(OSError):  # the shell has gone
        sys.stdout.write("".join(f"{_behind_the_break(line, word)}\n" for line in told.getvalue().split()))
        sys.stdout.flush()
    return code


def _join(environment: MutableMapping[str, str]) -> str:
    """Join what bash broke apart, in COMP_WORDS and COMP_CWORD; the word under the cursor."""
    try:
        cursor = int(environment["COMP_CWORD"])
    except (KeyError, ValueError):
        return ""
    pieces = environment.get("COMP_WORDS", "").split("\n")
    joined: list[str] = []
    at = 0
    for index, piece in enumerate(pieces):
        broken = bool(piece) and bool(joined) and (not piece.strip(_BREAKS) or joined[-1].endswith(tuple(_BREAKS)))
        if broken:
            joined[-1] += piece
        else:
            joined.append(piece)
        if index <= cursor:
            at = len(joined) - 1
    if cursor >= len(pieces):
        at = len(joined)
    environment["COMP_WORDS"], environment["COMP_CWORD"] = "\n".join(joined), str(at)
    return joined[at] if at < len(joined) else ""


def _behind_the_break(line: str, word: str) -> str:
    """A candidate without what stands in front of the last `:` or `=` of the word already."""
    head = word[: max(word.rfind(mark) for mark in _BREAKS) + 1]
    for start in _starts(head):
        if line.startswith(head[start:]):
            return line[len(head) - start :]
    return line


def _starts(head: str) -> Iterator[int]:
    yield 0
    yield from (index + 1 for index, character in enumerate(head) if character in _BREAKS)
