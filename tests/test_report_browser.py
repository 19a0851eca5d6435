"""The report's page in a real browser: nothing is asked of a network, nothing complains, and it can be read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from browser import Tab
from test_report import HOSTILE, runs

from kdcli import durable
from kdcli.__main__ import run

__all__ = ["runs"]  # a fixture is found by its name in the module

pytestmark = pytest.mark.skipif(browser.PROGRAM is None, reason="there is no Chromium here")

WIDTHS_AND_SCHEMES = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]

# The contrast (1 to 21, WCAG) between an element's colour and the page's.
CONTRAST = """(selector) => {
  const part = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = (text) => { const [r, g, b] = text.match(/[\\d.]+/g).map(Number);
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b); };
  const style = getComputedStyle(document.querySelector(selector));
  const front = document.querySelector(selector).closest("svg") ? style.fill : style.color;
  const [a, b] = [light(front), light(getComputedStyle(document.body).backgroundColor)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


@pytest.fixture(scope="module")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every kind of figure, one of its runs full of hostile names."""
    bad = runs / "<img src=x onerror=alert(1)>"
    if not bad.exists():
        bad.mkdir()
        for file in (runs / "kd-2").iterdir():
            if file.is_file():
                (bad / file.name).write_bytes(file.read_bytes())
        summary = json.loads((bad / "summary.json").read_text())
        summary["teacher"]["arch"] = HOSTILE
        durable.write_json(bad / "summary.json", summary)
        durable.write_json(bad / "env.json", {"argv": ["distill", HOSTILE], "versions": {HOSTILE: HOSTILE}})
    out = tmp_path_factory.mktemp("page") / "report"
    assert run(["report", str(runs), "--out", str(out), "--threads", "1", "--limit", "100", "--quiet"]) == 0
    return out / "report.html"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser.tab(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def test_a_page_that_does_wrong_is_found_out(tab: Tab, tmp_path: Path) -> None:
    """Otherwise the silence of the others would prove nothing."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<img src='missing.png'><script>console.error('no'); nothing.there()</script><p style='width: 2000px'>wide</p>"
    )
    tab.complaints.clear()
    tab.requests.clear()
    tab.open(bad, 1280, "light")
    assert len(tab.complaints) >= 2
    assert any(address.endswith("missing.png") for address in tab.requests)
    assert tab.ask("document.documentElement.scrollWidth") > 1280


@pytest.mark.parametrize(("width", "scheme"), WIDTHS_AND_SCHEMES)
def test_it_is_readable_and_quiet(tab: Tab, page: Path, width: int, scheme: str) -> None:
    """No complaint, no request but for itself, nothing wider than the screen, letters that stand out from the page."""
    tab.complaints.clear()
    tab.requests.clear()
    tab.open(page, width, scheme)
    assert tab.complaints == []
    assert tab.requests == [page.resolve().as_uri()]
    inner, taken = tab.ask("[innerWidth, document.documentElement.scrollWidth]")
    assert inner == width
    assert taken <= width
    assert tab.ask(f"({CONTRAST})('td')") > 7
    for selector in ("figcaption", "svg text", "a", ".right", ".wrong"):
        assert tab.ask(f"({CONTRAST})('{selector}')") > 4.5, selector
    dark = tab.ask("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((c) => c < 60)")
    assert dark == (scheme == "dark")
    smallest = "Math.min(...[...document.querySelectorAll('svg text')].map((t) => t.getBoundingClientRect().height))"
    assert tab.ask(smallest) > 8


def test_the_table_sorts(tab: Tab, page: Path) -> None:
    """By a click: numbers by value and not by letter, down and then up."""
    tab.open(page, 1280, "light")
    column = "[...document.querySelectorAll('#part-0 th')].findIndex((t) => t.textContent.startsWith('top-1 (last'))"
    values = f"[...document.querySelectorAll('#part-0 tbody tr')].map((r) => parseFloat(r.cells[{column}].textContent))"
    click = f"document.querySelectorAll('#part-0 th button')[{column}].click()"
    tab.ask(click)
    falling = [value for value in tab.ask(values) if value is not None]
    tab.ask(click)
    rising = [value for value in tab.ask(values) if value is not None]
    assert len(set(falling)) > 1
    assert falling == sorted(falling, reverse=True)
    assert rising == sorted(rising)


def test_a_legend_hides_and_shows(tab: Tab, page: Path) -> None:
    tab.open(page, 1280, "light")
    hidden = "document.querySelectorAll('.series.hidden').length"
    assert tab.ask(hidden) == 0
    tab.ask("document.querySelector('.legend button').click()")
    assert tab.ask(hidden) > 0
    assert tab.ask("document.querySelector('.legend button').getAttribute('aria-pressed')") == "false"
    tab.ask("document.querySelector('.legend button').click()")
    assert tab.ask(hidden) == 0
