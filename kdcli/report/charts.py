"""Charts as SVG by hand: text stays text, colours are the page's own variables, so that dark mode is a matter of CSS.

A chart is about 400 units wide, which is the width of a phone, and is drawn larger only where there is room.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kdcli.report.markup import Markup, join, tag

WIDTH, HEIGHT = 400, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 40
COLOURS = 10
_SMALLEST = 1e-30  # on a logarithmic axis


@dataclass(frozen=True)
class Series:
    """A named line or cloud of points.

    Attributes:
        style: its class on the page: `s0` to `s9` are colours, `teacher` and `alone` are drawn apart.
        faint: further lines drawn thin in the same colour, such as the single seeds of a mean.
        spread: of each y, half the height of its error bar.
    """

    name: str
    style: str
    xs: Sequence[float]
    ys: Sequence[float]
    faint: Sequence[tuple[Sequence[float], Sequence[float]]] = ()
    spread: Sequence[float | None] = ()


@dataclass(frozen=True)
class Axis:
    """A scale with its label and ticks."""

    label: str
    low: float
    high: float
    log: bool = False
    whole: bool = False
    """Ticks at whole numbers only, for what is counted."""

    def at(self, value: float) -> float:
        """Where a value lies, 0..1."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log10(max(value, 1e-300)), math.log10(low), math.log10(high)
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values between the ends: about five, or those of the decades."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found: list[float] = []
            for factors in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):  # ever finer, until there are some
                values = [factor * 10.0**power for power in decades for factor in factors]
                found = [value for value in values if self.low <= value <= self.high]
                if len(found) >= 3:
                    break
            return found[:: max(1, math.ceil(len(found) / 7))]
        step = _round((self.high - self.low) / 5)
        step = max(1.0, step) if self.whole else step
        first = math.ceil(self.low / step - 1e-9)
        return [round(step * i, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _round(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return power * min((1, 2, 5, 10), key=lambda factor: abs(math.log(step / (factor * power))))


def axis(label: str, values: Sequence[float], *, log: bool = False, zero: bool = False) -> Axis:
    """An axis that holds all values with a little room; `zero`: begins at 0."""
    there = [value for value in values if math.isfinite(value) and (value > _SMALLEST or not log)] or [1.0]
    low, high = min(there), max(there)
    if log:
        return Axis(label, low / 1.15, high * 1.15, log=True)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(label, 0.0 if zero and low >= 0 else low - room, high + room)


def shown(value: float) -> str:
    """A tick's number, short."""
    size = abs(value)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scale = 1e3 if suffix == "k" else limit
            return f"{value / scale:.4g}{suffix}"
    if size >= 1000:
        return f"{value:.0f}"
    return f"{value:.4g}" if size >= 0.01 or size == 0 else f"{value:.2g}".replace("e-0", "e-")


def _place(x: Axis, y: Axis) -> Callable[[float, float], tuple[float, float]]:
    wide, tall = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def place(a: float, b: float) -> tuple[float, float]:
        return round(_LEFT + wide * x.at(a), 1), round(_TOP + tall * (1 - y.at(b)), 1)

    return place


def _frame(x: Axis, y: Axis) -> Markup:
    """Grid, ticks and labels."""
    place = _place(x, y)
    parts = []
    for value in y.ticks():
        _, at = place(x.low, value)
        parts.append(tag("line", class_="grid", x1=_LEFT, x2=WIDTH - _RIGHT, y1=at, y2=at))
        parts.append(tag("text", shown(value), x=_LEFT - 6, y=at + 4, text_anchor="end"))
    for value in x.ticks():
        at, _ = place(value, y.low)
        parts.append(tag("line", class_="grid", x1=at, x2=at, y1=_TOP, y2=HEIGHT - _BOTTOM))
        parts.append(tag("text", shown(value), x=at, y=HEIGHT - _BOTTOM + 15, text_anchor="middle"))
    middle = _LEFT + (WIDTH - _LEFT - _RIGHT) / 2
    parts.append(tag("text", x.label, class_="axis", x=middle, y=HEIGHT - 6, text_anchor="middle"))
    centre = _TOP + (HEIGHT - _TOP - _BOTTOM) / 2
    turned = f"rotate(-90 12 {centre})"
    parts.append(tag("text", y.label, class_="axis", x=12, y=centre, text_anchor="middle", transform=turned))
    return join(*parts)


def svg(alt: str, *content: object, width: float = WIDTH, height: float = HEIGHT) -> Markup:
    """A picture with its alternative text."""
    return tag("svg", *content, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=alt)


def lines(alt: str, x_label: str, y_label: str, series: Sequence[Series], *, log: bool = False) -> Markup:
    """Lines over a common axis, with a point at each value where there are few."""
    xs = [value for one in series for value in one.xs]
    ys = [value for one in series for value in [*one.ys, *(v for _, faint in one.faint for v in faint)]]
    x, y = axis(x_label, xs), axis(y_label, ys, log=log)
    x = Axis(x.label, min(xs), max(xs), whole=all(value == int(value) for value in xs)) if max(xs) > min(xs) else x
    place = _place(x, y)
    drawn = []
    for one in series:
        parts = [tag("title", one.name)]
        for faint_xs, faint_ys in one.faint:
            parts.append(tag("path", class_="faint", d=_path(place, faint_xs, faint_ys, log)))
        parts.append(tag("path", class_="line", d=_path(place, one.xs, one.ys, log)))
        if len(one.xs) <= 20:
            for a, b in zip(one.xs, one.ys, strict=True):
                if b > _SMALLEST or not log:
                    cx, cy = place(a, b)
                    parts.append(tag("circle", tag("title", f"{one.name}: {b:.4g} at {a:g}"), cx=cx, cy=cy, r=2.2))
        drawn.append(tag("g", *parts, class_=f"series {one.style}", data_series=one.name))
    return svg(alt, _frame(x, y), *drawn)


def _path(
    place: Callable[[float, float], tuple[float, float]], xs: Sequence[float], ys: Sequence[float], log: bool
) -> str:
    points = [place(a, b) for a, b in zip(xs, ys, strict=True) if b > _SMALLEST or not log]
    return "M" + "L".join(f"{a} {b}" for a, b in points) if points else "M0 0"


def scatter(alt: str, x_label: str, y_label: str, series: Sequence[Series], *, log: bool = False) -> Markup:
    """Points with error bars."""
    ends = [
        value
        for one in series
        for y, half in zip(one.ys, one.spread or [None] * len(one.ys), strict=True)
        for value in (y - (half or 0), y + (half or 0))
    ]
    x, y = axis(x_label, [value for one in series for value in one.xs], log=log), axis(y_label, ends)
    place = _place(x, y)
    drawn = []
    for one in series:
        parts = []
        for a, b, half in zip(one.xs, one.ys, one.spread or [None] * len(one.ys), strict=True):
            cx, cy = place(a, b)
            if half:
                _, top = place(a, b + half)
                _, low = place(a, b - half)
                parts.append(tag("path", class_="bar", d=f"M{cx} {top}V{low}M{cx - 4} {top}h8M{cx - 4} {low}h8"))
            told = f"{one.name}: {b:.2f} at {shown(a)}"
            parts.append(tag("circle", tag("title", told), cx=cx, cy=cy, r=5))
        drawn.append(tag("g", *parts, class_=f"series {one.style}", data_series=one.name))
    return svg(alt, _frame(x, y), *drawn)


def cloud(alt: str, points: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Markup:
    """Points [S,2] coloured by label, without axes: what t-SNE draws has no units."""
    side = 300
    low, high = points.min(0), points.max(0)
    placed = (points - low) / np.where(high > low, high - low, 1) * (side - 16) + 8
    groups = []
    for order, label in enumerate(dict.fromkeys(labels.tolist())):
        dots = [tag("circle", cx=round(float(a), 1), cy=round(float(b), 1), r=2.6) for a, b in placed[labels == label]]
        named = tag("title", names[label])
        groups.append(tag("g", named, *dots, class_=f"series s{order % COLOURS}", data_series=names[label]))
    return svg(alt, *groups, width=side, height=side)


def columns(alt: str, x_label: str, y_label: str, values: Sequence[float], names: Sequence[str]) -> Markup:
    """Sorted thin bars up and down from zero, one a class."""
    y = axis(y_label, [*values, 0.0])
    x = Axis(x_label, 0, max(len(values), 1))
    place = _place(x, y)
    bars = []
    for at, (value, name) in enumerate(zip(values, names, strict=True)):
        left, top = place(at, max(value, 0))
        right, low = place(at + 1, min(value, 0))
        told = tag("title", f"{name}: {value:+.2f}")
        wide = max(round(right - left - (0.6 if len(values) < 150 else 0), 2), 0.5)
        bars.append(
            tag(
                "rect",
                told,
                class_="up" if value >= 0 else "down",
                x=left,
                y=top,
                width=wide,
                height=max(low - top, 0.3),
            )
        )
    _, zero = place(0, 0)
    rule = tag("line", class_="zero", x1=_LEFT, x2=WIDTH - _RIGHT, y1=zero, y2=zero)
    return svg(alt, _frame(Axis(x_label, 0, len(values)), y), *bars, rule)


def bars(
    alt: str,
    x_label: str,
    entries: Sequence[tuple[str, float, float | None, str]],
    marks: Sequence[tuple[str, float]],
    *,
    zero: bool = False,
) -> Markup:
    """Horizontal bars: (name, value, standard deviation, style); `marks` are vertical lines to compare with.

    Without `zero` the axis begins near the smallest value, and says so.
    """
    values = [*(value for _, value, _, _ in entries), *(value for _, value in marks)]
    room = max(max(values) - min(values), 1.0)
    low, high = (0.0 if zero else max(0.0, min(values) - 0.5 * room)), max(values) + 0.15 * room
    row, top = 40, 24 if marks else 6
    height = top + row * len(entries) + 40
    left, wide = 8, WIDTH - 20
    x = Axis(x_label, low, high)

    def at(value: float) -> float:
        return round(left + wide * x.at(value), 1)

    parts = []
    for _, value in marks:
        parts.append(tag("line", class_="mark", x1=at(value), x2=at(value), y1=top, y2=height - 36))
    for value in x.ticks():
        parts.append(tag("line", class_="grid", x1=at(value), x2=at(value), y1=top, y2=height - 36))
        parts.append(tag("text", shown(value), x=at(value), y=height - 22, text_anchor="middle"))
    for number, (name, value, half, style) in enumerate(entries):
        y = top + row * number
        told = f"{value:.2f}" + ("" if half is None else f" ± {half:.2f}")
        parts.append(tag("text", f"{_short(name, 44)}: {told}", tag("title", name), class_="over", x=left, y=y + 14))
        parts.append(tag("rect", class_=f"flat {style}", x=left, y=y + 19, width=round(at(value) - left, 1), height=12))
        if half:
            parts.append(tag("path", class_="whisker", d=f"M{at(value - half)} {y + 25}H{at(value + half)}"))
    for number, (name, value) in enumerate(marks):
        near = "end" if x.at(value) > 0.5 else "start"
        parts.append(tag("text", name, class_="marked", x=at(value), y=12 + 11 * (number % 2), text_anchor=near))
    parts.append(
        tag(
            "text",
            f"{x_label} (axis begins at {shown(low)})" if low else x_label,
            class_="axis",
            x=WIDTH / 2,
            y=height - 5,
            text_anchor="middle",
        )
    )
    return svg(alt, *parts, height=height)


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def heat(alt: str, values: np.ndarray, high: float, y_label: str, x_label: str) -> Markup:
    """A matrix as a picture: the strength of one colour is the value, 0 to `high`; works on any background."""
    shade = (255 * np.clip(values / (high or 1), 0, 1)).round().astype(np.uint8)
    side, left = 260, 26
    picture = tag(
        "image",
        href=png(np.dstack([np.zeros((*shade.shape, 3), np.uint8), shade])),
        x=left,
        y=4,
        width=side,
        height=side,
        preserveAspectRatio="none",
        class_="heat",
    )
    frame = tag("rect", class_="frame", x=left, y=4, width=side, height=side)
    middle = left + side / 2
    below = tag("text", x_label, class_="axis", x=middle, y=side + 22, text_anchor="middle")
    turned = f"rotate(-90 14 {4 + side / 2})"
    beside = tag("text", y_label, class_="axis", x=14, y=4 + side / 2, text_anchor="middle", transform=turned)
    return svg(alt, picture, frame, below, beside, width=side + left + 6, height=side + 32)


def png(pixels: np.ndarray) -> str:
    """uint8 [H,W,3 or 4] as a data URI."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """Names with their styles; a click hides and shows a series in the figures of its section."""
    made = [
        tag("button", tag("span", class_=f"swatch {style}"), name, type="button", data_toggle=name, aria_pressed="true")
        for name, style in dict.fromkeys(entries)
    ]
    return tag("div", *made, class_="legend") if made else Markup("")


def figure(title: str, what_to_see: object, *content: object, wide: bool = False) -> Markup:
    """A figure: its title, the sentence that says what to see, then the pictures."""
    return tag(
        "figure",
        tag("figcaption", tag("h3", title), what_to_see),
        tag("div", *content, class_="pictures wide" if wide else "pictures"),
    )
