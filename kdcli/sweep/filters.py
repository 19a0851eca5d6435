"""`--only KEY=VALUE[,VALUE]`: which runs of a sweep are meant."""

from __future__ import annotations

from collections.abc import Sequence

from kdcli.data.names import canonical as canonical_dataset
from kdcli.errors import UsageError, nearest
from kdcli.sweep.draft import Draft
from kdcli.sweep.file import Sweep, network
from kdcli.sweep.planned import ORDER, STAGES

_KEYS = ("method", "label", "pair", "teacher", "student", "preset", "dataset", "ratio", "probe", "seed", "stage")


def parse(sweep: Sweep, only: Sequence[str]) -> dict[str, set[str]]:
    """`--only` as sets of accepted values by key, in their canonical spelling; a key given twice accepts what both do.

    Raises:
        UsageError: it is no filter, or there is no such key, stage or probe.
    """
    known = (*_KEYS, *sweep.axes.settings)
    found: dict[str, set[str]] = {}
    for text in only:
        key, equals, given = text.partition("=")
        if not equals or not given:
            raise UsageError(f"{text!r} is not KEY=VALUE", field="--only", hint="for example --only method=vsd,kd")
        if key not in known:
            raise UsageError(f"no such key: {key}", field="--only", hint=nearest(key, known))
        accepted = {_spelling(key, word.strip()) for word in given.split(",") if word.strip()}
        if key == "probe":
            _require_probes(sweep, accepted)
        found[key] = found[key] & accepted if key in found else accepted
    if not found.get("stage", set(STAGES)) <= set(ORDER):
        raise UsageError("no such stage", field="--only", hint=f"stages: {', '.join(STAGES)}")
    if "probe" in found:
        _require_probes(sweep, found["probe"])
    return found


def _require_probes(sweep: Sweep, wanted: set[str]) -> None:
    """Refuse probes that the sweep lacks, and none at all: students pass whichever are chosen, so nothing else would."""
    if not wanted or not wanted <= set(sweep.axes.probes):
        lost = ", ".join(sorted(wanted - set(sweep.axes.probes)))
        hint = f"its probes: {', '.join(sweep.axes.probes)}" if sweep.axes.probes else "leave the filter out"
        raise UsageError(f"{sweep.name} has no probe {lost or 'that passes'}", field="--only", hint=hint)


def _spelling(key: str, word: str) -> str:
    """One spelling of a filter's value: registry names of networks and data sets, numbers as Python prints them."""
    if key == "pair" and word.count(":") == 1:
        return ":".join(network(part) for part in word.split(":"))
    if key in ("teacher", "student"):
        return network(word)
    if key in ("dataset", "probe"):
        return canonical_dataset(word, field="--only")
    if key == "ratio":
        try:
            return str(float(word))
        except ValueError:
            raise UsageError(f"{word!r} is no ratio", field="--only", hint="for example --only ratio=0.25") from None
    return word.casefold()


def facts(draft: Draft) -> dict[str, set[str]]:
    """What filters see of a point; a key that is missing passes none."""
    teacher, student = (network(name) for name in draft.pair)
    found = {"label": {draft.label.casefold()}, "pair": {f"{teacher}:{student}"}}
    found |= {"teacher": {teacher}, "student": {student}}
    found["method"] = {draft.label.casefold()} | ({draft.entry.name.casefold()} if draft.entry is not None else set())
    for key, value in (("preset", draft.preset), ("dataset", draft.dataset), ("seed", draft.seed)):
        found[key] = set() if value is None else {str(value).casefold()}
    found["ratio"] = set() if draft.ratio is None else {str(draft.ratio)}
    return found | {path: {str(value).casefold()} for path, value in draft.settings.items()}


def passes(filters: dict[str, set[str]], facts: dict[str, set[str]]) -> bool:
    """Whether a point with these facts is meant; probes are chosen later, one by one."""
    return all(
        (key == "probe" and key not in facts) or accepted & facts.get(key, set()) for key, accepted in filters.items()
    )


def choices(sweep: Sweep) -> str:
    """What there is to filter by, for a filter that left nothing."""
    axes = sweep.axes
    names = list(dict.fromkeys(entry.name for entry in axes.methods))
    return f"methods: {', '.join(names)}; pairs: {', '.join(map(':'.join, axes.pairs))}"
