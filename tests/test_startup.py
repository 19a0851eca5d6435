"""What a start costs: slow libraries are imported where something needs them, and not before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from harness import environment

PROGRAM = """
import sys
from kdcli.__main__ import main
code = 0
try:
    main()
except SystemExit as left:
    code = left.code
slow = {"torchvision", "timm", "sklearn", "torch", "matplotlib"}
print(code, *sorted(slow & set(sys.modules)), file=sys.stderr)
"""


def imported(directory: Path, *arguments: str) -> list[str]:
    """The exit code of a command, and the slow libraries that it imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        cwd=directory,
        check=True,
        env=environment(),
    )
    return done.stderr.splitlines()[-1].split()


def test_a_training_imports_neither_torchvision_nor_timm(tmp_path: Path) -> None:
    """Nor scikit-learn: a plain training on resident images needs none of them."""
    command = ["distill", "--method", "kd", "--teacher", "resnet14", "--student", "resnet8", "--dataset", "synthetic"]
    found = imported(tmp_path, *command, "--max-steps", "1", "--quiet", "--json")
    assert found == ["0", "torch"]


def test_help_and_lists_do_without_torch(tmp_path: Path) -> None:
    """They answer at once."""
    assert imported(tmp_path, "distill", "--help") == ["0"]
    assert imported(tmp_path, "--version") == ["0"]
