"""docs/methods.md is what the methods say about themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcli import methods
from kdcli.pages import methods as methods_page

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"


def test_the_page_is_up_to_date() -> None:
    """Made anew it is the same: `python -m kdcli.pages.methods > docs/methods.md`."""
    assert PAGE.read_text("utf-8") == methods_page.text()


@pytest.mark.parametrize("name", list(methods.SHIPPED))
def test_every_method_says_what_it_is(name: str) -> None:
    """Phrase, equation, source, tensors and cost; and every setting has a help text."""
    page = methods_page.page_of(name)
    assert page.phrase
    assert all(page.labelled[label] for label in ("Equation", "Source", "Tensors", "Cost"))
    for field, described in methods.method_class(name).Spec.model_fields.items():
        assert described.description, field


def test_a_docstring_is_taken_apart() -> None:
    """Phrase, paragraphs, labels with continuation lines; anything else is an error."""
    text = "x: a phrase.\n\nA paragraph\nof two lines.\n\nEquation: a\n    b\nSource: c\nTensors: d\nCost: e\n"
    page = methods_page.read(text)
    assert page.phrase == "a phrase."
    assert page.paragraphs == ["A paragraph of two lines."]
    assert page.labelled == {"Equation": "a b", "Source": "c", "Tensors": "d", "Cost": "e"}
    with pytest.raises(ValueError, match="Source"):
        methods_page.read("x: a phrase.\n\nEquation: a\nTensors: d\nCost: e\n")
    with pytest.raises(ValueError, match="belongs to no label"):
        methods_page.read(text + "stray\n")
