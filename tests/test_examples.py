"""Every example of the documents is run, as it is printed, on little data and for one step.

What differs from a user's shell stands in the tables below and nowhere else: words that are put behind a command's own to
make it small (`ADDED`), words for which others stand (`INSTEAD`), programs that are not here (`PROGRAMS`), and pages whose
examples another test runs (`RUN_BY`). A new example that none of them covers is simply run, and has to work.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import standins
from harness import ROOT, environment
from warm_kd import Warm

STEP = ["--max-steps", "1", "--batch-size", "6", "--threads", "1"]  # 6: no set here leaves a last batch of one image
SWEEP = ["--set", "train.max_steps=1", "--set", "train.batch_size=6", "--set", "system.threads=1"]
ADDED = {
    "pretrain-teacher": STEP,
    "distill": STEP,
    "fewshot": STEP,
    "linear-probe": STEP,
    "bench": ["--batch-size", "4", "--steps", "1", "--rounds", "1", "--threads", "1"],
    "sweep": SWEEP,
    # One thread: on a busy machine, threads that wait for each other cost ten times what they save.
    "report": ["--threads", "1"],
    "report tables/vsd-2": [*SWEEP, "--threads", "1"],
    "evaluate": ["--threads", "1"],
    "export": ["--threads", "1", "--images", "4"],
    "predict": ["--threads", "1"],
}
INSTEAD = {
    r"\bMETHOD\b": "kd",
    r"\bSEED\b": "1",
    r"\bTEACHER_RUN\b": "runs/cifar100/teacher",
    r"\bRUN\b": "runs/cifar100/kd-wrn40_2-wrn16_2-s0-1a2b3c4d",
    r"/archive\b": "archive",
    r"--min-top1 \d+": "--min-top1 0",  # one step teaches nothing
    r" --pretrained\b": " --no-pretrained --image-size 32 --accumulate 1",  # no network, and no time for 224 pixels
    r"--nproc 8\b": "--nproc 8 --dry-run",  # eight ranks on a small machine; ranks are tested in test_ranks.py
    r" --compile\b": "",  # half a minute before the first step; test_compile.py does it
    r"^python3 -m venv .*$": "true",
    r"^kd --install-completion$": "true",  # it writes to the home directory; test_completion.py asks as shells do
}
# Programs that are not here, or must not do here what they do elsewhere, and what stands for them.
PROGRAMS = {
    "pip": "exit 0",  # installing is what .ci/run does
    "pytest": "exit 0",  # we are it
    "torchrun": 'while [ "$1" != kdcli ]; do shift; done; shift; exec kd "$@" --dry-run',  # see test_ranks.py
    "sbatch": """  # the first task of the array, at once
        job='' parsable=''
        while [ $# -gt 0 ]; do
          case $1 in --wrap) job=$2; shift;; --parsable) parsable=1;; --*) ;; *) job="sh $1";; esac
          shift
        done
        SLURM_ARRAY_TASK_ID=1 sh -c "$job" >&2
        [ -z "$parsable" ] || echo 1234""",
    "srun": 'exec "$@"',
    "scontrol": "echo localhost",
}
# Stands for a program that may be missing.
SUBSTITUTES = {"parallel": "exec xargs -d '\\n' -n 1 -P 2 sh -c"}
NEEDED = ("jq", "make")
# Pages (or languages of a page) whose examples another test runs.
RUN_BY = {
    "docs/own-images.md": "tests/test_own_images.py",
    "docs/own-method.md python": "tests/test_own_method.py",
}
# What a page's other examples are written to, where its commands read them.
FILES = {
    "docs/own-method.md python": "mine.py",
    "docs/pipelines.md make": "Makefile",
}
# A page's TOML is a sweep, and is planned as it is.
PLANNED = "example.toml"
# In front of a page's Python.
BEFORE = {"README.md python": "import torch\nimages = torch.zeros(2, 3, 32, 32)\n"}
QUICK = {"README.md", "docs/first-run.md", "docs/own-network.md", "docs/own-method.md"}
VSD_RUN = "runs/cifar100/vsd-wrn40_2-wrn16_2-s0-1a2b3c4d"

PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced example: the page's path from the root, the language, the text."""

    page: str
    language: str
    text: str

    @property
    def key(self) -> str:
        """How the tables name it."""
        return f"{self.page} {self.language}"


def blocks() -> list[Block]:
    """All of them, in order."""
    found = []
    for page in PAGES:
        for language, text in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE):
            found.append(Block(page.relative_to(ROOT).as_posix(), language, text))
    return found


def runs_here(block: Block) -> bool:
    """Whether it is an example, and no other test runs it."""
    return bool(block.language) and block.page not in RUN_BY and block.key not in RUN_BY


def script(block: Block) -> str:
    """What bash runs of a block."""
    text = block.text
    if block.language == "yaml":
        import yaml

        jobs = yaml.safe_load(text)["jobs"].values()
        text = "\n".join(step["run"] for job in jobs for step in job["steps"] if "run" in step)
    for pattern, instead in INSTEAD.items():
        text = re.sub(pattern, instead, text, flags=re.MULTILINE)
    return text


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the PATH: `kd`, and what stands for programs that are not here."""
    folder = tmp_path_factory.mktemp("programs")
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(standins.SITE)
    lacking = {name: text for name, text in SUBSTITUTES.items() if shutil.which(name) is None}
    for name, text in {**PROGRAMS, **lacking}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    warm = Warm(folder, {**ADDED, f"sweep {PLANNED}": []}, site)
    yield folder
    warm.close()


def shell(text: str, folder: Path, programs: Path, limit: float = 1200) -> subprocess.CompletedProcess[str]:
    """A script as a careful user's shell runs it."""
    settings = {**environment(), "PATH": f"{programs}:{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"}
    settings |= {"HOME": str(folder), "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "1", "SLURM_JOB_NODELIST": "n"}
    for name in ("KD_DATA_DIR", "RANK"):
        settings.pop(name, None)
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env=settings,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=limit,
    )


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, programs: Path) -> Path:
    """What examples find in their directory: data, runs, files of others, photographs."""
    folder = tmp_path_factory.mktemp("stock")
    standins.data_sets(folder / "data")
    for number, name in enumerate(("photo.jpg", "holidays/a.jpg", "holidays/b c.jpg")):
        standins.image(folder / name, number)
    made = shell(
        """
        kd pretrain-teacher --teacher wrn40_2 --out runs/cifar100/teacher
        kd distill --method kd --teacher wrn40_2 --student wrn16_2 --out runs/cifar100/kd-wrn40_2-wrn16_2-s0-1a2b3c4d
        cp runs/cifar100/kd-*/student.safetensors student.safetensors
        cp runs/cifar100/teacher/teacher.safetensors teacher.safetensors
        mkdir -p archive runs/a runs/b
        cp student.safetensors archive; cp student.safetensors runs/a; cp student.safetensors runs/b
        mkdir wrn_40_2_vanilla
        python - <<'END'
import torch
from kdcli.models import build
torch.save({"epoch": 240, "model": build("wrn40_2", 100).state_dict()}, "wrn_40_2_vanilla/ckpt_epoch_240.pth")
END
        """,
        folder,
        programs,
    )
    assert made.returncode == 0, made.stderr
    return folder


def _pages() -> list[object]:
    names = dict.fromkeys(block.page for block in blocks() if runs_here(block))
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow], id=name) for name in names]


@pytest.mark.parametrize("page", _pages())
def test_the_examples_run(page: str, stock: Path, programs: Path, tmp_path: Path) -> None:
    """Every block of the page in turn, in one directory, each in a bash that stops at the first failure."""
    folder = tmp_path / "here"
    shutil.copytree(stock, folder, ignore=shutil.ignore_patterns("data"))
    (folder / "data").symlink_to(stock / "data")
    mine = [block for block in blocks() if block.page == page]
    if any(VSD_RUN in block.text for block in mine):
        made = shell(f"kd distill --method vsd --teacher wrn40_2 --student wrn16_2 --out {VSD_RUN}", folder, programs)
        assert made.returncode == 0, made.stderr
    for block in mine:
        if block.key in FILES:
            (folder / FILES[block.key]).write_text(block.text, "utf-8")
        if block.text.startswith("#!"):
            (folder / "array.sh").write_text(script(block), "utf-8")
    if page == "docs/pipelines.md":
        (folder / "mine.py").write_text(_example_method(), "utf-8")
    ran = 0
    for block in mine:
        if not runs_here(block) or block.key in FILES or _lacks(block):
            continue
        if block.language == "python":
            (folder / "example.py").write_text(BEFORE.get(block.key, "") + block.text, "utf-8")
            text = "python example.py"
        elif block.language == "toml":
            (folder / PLANNED).write_text(block.text, "utf-8")
            text = f"kd sweep {PLANNED} --plan"
        else:
            text = script(block)
        done = shell(text, folder, programs)
        assert done.returncode == 0, (
            f"{page}:\n{text}\nleft with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
        assert "Traceback" not in done.stderr
        ran += 1
    assert ran


def _lacks(block: Block) -> bool:
    """Whether it needs a program that is not installed here."""
    return any(re.search(rf"\b{name}\b", block.text) and shutil.which(name) is None for name in NEEDED)


def _example_method() -> str:
    return next(block.text for block in blocks() if block.key == "docs/own-method.md python")


def test_every_language_is_known() -> None:
    """A fence without a language is output and not an example; a new kind of example needs a way to be run."""
    assert {block.language for block in blocks()} == {"", "sh", "python", "toml", "make", "yaml"}


def test_no_entry_of_a_table_is_idle() -> None:
    """Each is needed by an example that is there."""
    text = "\n".join(block.text for block in blocks())
    for pattern in INSTEAD:
        assert re.search(pattern, text, re.MULTILINE), pattern
    for name in [*PROGRAMS, *SUBSTITUTES, *NEEDED]:
        assert re.search(rf"\b{name}\b", text), name
    keys = {block.key for block in blocks()} | {block.page for block in blocks()}
    assert {*RUN_BY, *FILES, *BEFORE, *QUICK} <= keys
    for command in ADDED:
        assert f"kd {command}" in text, command


def test_other_tests_run_what_they_are_said_to() -> None:
    """They name the page they read."""
    for key, test in RUN_BY.items():
        assert Path(key.split()[0]).name in (ROOT / test).read_text("utf-8")


def test_shell_examples_are_bash() -> None:
    """`bash -n` reads each, also those that another test runs."""
    for block in blocks():
        if block.language == "sh":
            read = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, check=False)
            assert read.returncode == 0, block.text + read.stderr
