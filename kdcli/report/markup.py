"""HTML and SVG as text that is safe by construction: whatever is not `Markup` is escaped."""

from __future__ import annotations

import html

from kdcli.output import one_line

_VOID = frozenset({"br", "img", "meta", "hr", "input"})


class Markup(str):
    """Text that is markup already, made by `tag` and `join` alone."""

    __slots__ = ()


def text(value: object) -> Markup:
    """Any text as markup: escaped, its control and invisible characters made visible."""
    return value if isinstance(value, Markup) else Markup(html.escape(one_line(str(value)), quote=True))


def join(*parts: object) -> Markup:
    """Parts one after the other; None is nothing."""
    return Markup("".join(text(part) for part in parts if part is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. Attributes lose a trailing underscore (`class_`), others become hyphens; None is left out, True is bare."""
    written = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        written.append(key if value is True else f'{key}="{text(value)}"')
    head = f"<{' '.join(written)}>"
    return Markup(head if name in _VOID else f"{head}{join(*children)}</{name}>")
