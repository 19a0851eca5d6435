"""docs/cli.md is what the commands say about themselves."""

from __future__ import annotations

from pathlib import Path

import typer

from kdcli.cli import app
from kdcli.pages import cli

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"


def test_the_page_is_up_to_date() -> None:
    """Made anew it is the same: `python -m kdcli.pages.cli > docs/cli.md`."""
    assert PAGE.read_text("utf-8") == cli.text()


def test_every_command_and_flag_is_on_it() -> None:
    """As the parser knows them."""
    page = PAGE.read_text("utf-8")
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        section = page.split(f"\n## kd {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            for flag in [*parameter.opts, *parameter.secondary_opts]:
                if flag.startswith("--") and flag != "--help":
                    assert f"`{flag}`" in section, f"{name} {flag}"


def test_options_say_what_may_stand_behind_them() -> None:
    """Choices, numbers, lists."""
    section = cli.text().split("\n## kd distill\n")[1].split("\n## ")[0]
    assert "| `--precision` `fp32`, `bf16` |" in section
    assert "| `--lr` a number |" in section
    assert "| `--compile`, `--no-compile` |" in section
    assert "| `--set` text, repeatable" in section
