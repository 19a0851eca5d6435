"""The documents name what there is: every command, method, exit code and file they link to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from kdcli import errors, presets
from kdcli.cli import app
from kdcli.methods import SHIPPED

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text("utf-8")


def _commands() -> dict[str, set[str]]:
    """Command name → its options, as Typer sees them."""
    group = typer.main.get_command(app)
    return {
        name: {flag for parameter in command.params for flag in [*parameter.opts, *parameter.secondary_opts]}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }


def test_every_command_is_in_the_readme():
    text = (ROOT / "README.md").read_text("utf-8")
    for name in _commands():
        assert f"kd {name}" in text, name


def test_every_method_has_its_section():
    text = (ROOT / "docs" / "methods.md").read_text("utf-8")
    for name in SHIPPED:
        assert f"\n## {name}\n" in text, name


def test_the_table_of_methods_in_the_readme():
    """A row each: name, kind, source, line; the last two are those of `kd list methods`."""
    rows = re.findall(
        r"^\| \[`(\w+)`\]\(docs/methods\.md#(\w+)\) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", README, re.MULTILINE
    )
    assert sorted(row[0] for row in rows) == sorted(SHIPPED)
    page = (ROOT / "docs" / "methods.md").read_text("utf-8")
    for name, anchor, _, source, line in rows:
        assert anchor == name
        if SHIPPED[name].endswith(")"):
            assert SHIPPED[name] == f"{line} ({source})"
        else:  # it names no source: the method's own page does
            assert SHIPPED[name] == line
            (whole,) = re.findall(r"\| Source \| (.*) \|", page.split(f"\n## {name}\n")[1].split("\n## ")[0])
            assert source in whole, name


def test_every_page_can_be_found():
    """From the README, or from the guide."""
    guide = (ROOT / "docs" / "guide.md").read_text("utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name})" in README or f"]({page.name})" in guide, page.name


def test_every_exit_code_is_documented():
    text = (ROOT / "docs" / "guide.md").read_text("utf-8")
    codes = {
        cls.code
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, errors.KdError) and isinstance(cls.code, int)
    }
    for code in codes:
        assert f"\n| {code} |" in text, code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} → {target}"


def _printed(text: str) -> list[str]:
    """The `kd` commands of a page: lines of its shell examples, and of its sentences what is set as code."""
    shell = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in shell for line in re.sub(r"\\\n", " ", block).splitlines()]
    parts = [part for line in lines for part in re.split(r"&&|\|\||[|;]", line)]
    prose = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [" ".join(part.split()) for part in [*parts, *prose] if re.match(r"\s*kd [a-z]", part)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_use_options_that_exist(page: Path):
    """In examples and in sentences; what the examples do is tried in test_examples.py."""
    commands = _commands()
    for line in _printed(page.read_text("utf-8")):
        words = re.sub(r"[\[\]\"'$()]", " ", line).split()
        assert words[1] in commands, line
        for word in words[2:]:
            if word.startswith("--") and word not in ("--", "--help"):
                assert word.partition("=")[0] in commands[words[1]], f"{page.name}: {word} in {line}"
        if "--preset" in words[:-1]:
            named = words[words.index("--preset") + 1]
            assert named in presets.names() or not re.fullmatch(r"[a-z0-9/-]+", named), line


def test_every_preset_says_what_it_is():
    for name in presets.names():
        about = presets.about(name)
        assert about.get("title"), name
