"""What a command line asks for, before presets and defaults are merged, and how its words are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kdcli.errors import UsageError

_MOST_SEEDS = 1000
_SEEDS_END = 2**31  # of a run spec's `seed`


@dataclass(frozen=True)
class Request:
    """What the command line said, before presets and defaults are merged.

    Attributes:
        flags: dotted spec path → value, only for the flags that were given.
        presets: names or paths of presets in the order given (`-` is stdin).
        sets: `dotted.key=value` strings in the order given.
    """

    flags: dict[str, Any]
    presets: list[str]
    sets: list[str]
    dry_run: bool
    json: bool
    quiet: bool


def with_flags(request: Request, given: dict[str, Any]) -> Request:
    """The same request with other flags."""
    return replace(request, flags=given)


def parse_tuple(text: str) -> list[Any]:
    """`0.5,0.75` → [0.5, 0.75]; words stay words (`layer2,layer3`)."""

    def item(word: str) -> Any:
        try:
            return float(word)
        except ValueError:
            return word

    return [item(word.strip()) for word in text.split(",") if word.strip()]


def parse_seeds(text: str, field: str) -> list[int]:
    """`0..4` or `0,1,2` → the seeds.

    Raises:
        UsageError: it is neither, one is no seed of a run or named twice, or a range of more than a thousand; names
            `field`.
    """
    try:
        if ".." in text:
            low, high = map(int, text.split(".."))
            seeds = list(range(low, high + 1)) if high - low < _MOST_SEEDS else []
        else:
            seeds = [int(word) for word in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0:
        raise UsageError(f"{text!r} is no list of seeds", field=field, hint="for example 0..4 or 0,1,2")
    if max(seeds) >= _SEEDS_END:
        raise UsageError(f"{max(seeds)} is no seed", field=field, hint=f"they end at {_SEEDS_END - 1}")
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"{text!r} names a seed twice", field=field, hint="name each once")
    return seeds
