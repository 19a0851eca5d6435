"""The documents name what there is: every command, method, exit code and file they link to."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from kdcli import errors, presets
from kdcli.cli import app
from kdcli.methods import SHIPPED

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_examples_use_options_that_exist(page: Path):
    commands = _commands()
    for block in re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if not words or words[0] != "kd":
                    continue
                assert words[1] in commands, line
                for word in words[2:]:
                    if word.startswith("--"):
                        assert word.partition("=")[0] in commands[words[1]], f"{page.name}: {word} in {line}"
                if "--preset" in words:
                    assert words[words.index("--preset") + 1] in presets.names(), line


def test_every_preset_says_what_it_is():
    for name in presets.names():
        about = presets.about(name)
        assert about.get("title"), name
