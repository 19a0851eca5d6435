"""R3: the order of writing, from a recorded run, and every state in which a power cut may leave the disk."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from branches import Tree, key_of, write_tree
from faultjobs import METHODS
from harness import command, environment
from outcomes import Reference, reference
from powercut import Disk, violations
from test_kills import Fresh, Whole, resume_all
from warmed import Warm

from kdcli import checkpoint
from kdcli.errors import KdError

SYSTEM = {"open()": open, "mkdir": os.mkdir, "unlink": os.unlink, "rmdir": os.rmdir}


def recorded(warm: Warm, wanted: Reference, fresh: Fresh, **plan: Any) -> Reference:
    """The same run with all that it writes."""
    return reference(warm, wanted.words, fresh(), data=True, **plan)


def promised(trace: list[dict[str, Any]]) -> dict[int, int]:
    """Call number → the step of the newest resume state that kd takes for saved by then; nothing before the first.

    That is so from the call on that follows the renaming: the sync of the directory, if all is well.
    """
    found, renamed = {}, None
    for event in trace:
        if renamed is not None:
            found[event["n"]] = renamed
        match = re.search(r"step-(\d+)\.safetensors$", event["path"])
        if event["call"] == "rename" and match:
            renamed = int(match[1])
    return found


def cut_everywhere(trace: list[dict[str, Any]], keep: Path) -> tuple[int, dict[str, int]]:
    """Keep every different directory that a power cut may leave; how many cuts that were, and key → call of the first."""
    disk, count, keys = Disk(), 0, {}
    for event in trace:
        disk.do(event)
        for tree in disk.cuts():
            count += 1
            key = key_of(tree)
            if key not in keys:
                keys[key] = event["n"]
                write_tree(keep / key, tree, SYSTEM)
    return count, keys


def not_loadable(keep: Path, keys: dict[str, int], wanted: Reference, trace: list[dict[str, Any]]) -> list[str]:
    """Directories in which what was saved for good is gone, or is not what was saved."""
    found, saved = [], promised(trace)
    done = _renamed(trace)  # from then on the states are no longer needed
    for key, at in keys.items():
        state = keep / key / "run/state"
        try:
            loaded = checkpoint.load_state(state)
        except KdError as problem:
            found.append(f"cut at call {at}: {problem.message}")
            continue
        if loaded is None:
            if at in saved and at <= done:
                found.append(f"cut at call {at}: no state, though that of step {saved[at]} was saved")
        elif loaded[1]["step"] < saved.get(at, 0) and at <= done:
            found.append(f"cut at call {at}: back at step {loaded[1]['step']}, not {saved[at]}")
        elif loaded[1]["digest"] != wanted.states[loaded[1]["step"]]["digest"]:
            found.append(f"cut at call {at}: the state of step {loaded[1]['step']} is not what was saved")
    return found


def _renamed(trace: list[dict[str, Any]]) -> int:
    return next(e["n"] for e in trace if e["call"] == "rename" and e["path"] == "run/summary.json")


def power_cuts(warm: Warm, wanted: Reference, fresh: Fresh, every: int) -> None:
    """R3 for one job: order, loadable states, and every `every`-th of the different directories resumed."""
    record, keep = recorded(warm, wanted, fresh), fresh()
    assert violations(record.trace) == []
    renames = sum(event["call"] == "rename" for event in record.trace)
    count, keys = cut_everywhere(record.trace, keep)
    assert not_loadable(keep, keys, wanted, record.trace) == []
    chosen = set(sorted(keys)[::every])
    assert resume_all(warm, wanted, fresh, wanted.words, keep, chosen) == {}
    print(f"R3: {renames} renames in order; {count} power cuts at {len(record.trace)} calls left {len(keys)} different")
    print(f"    directories, all loadable; {len(chosen)} of them resumed, all alike")


def test_power_cuts(warm: Warm, whole: Whole, fresh: Fresh) -> None:
    power_cuts(warm, whole("kd"), fresh, 12)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_all_power_cuts(method: str, warm: Warm, whole: Whole, fresh: Fresh) -> None:
    power_cuts(warm, whole(method), fresh, 1)


def test_the_model_of_the_disk() -> None:
    """A file synced under a temporary name and renamed is there only after its directory was synced, and then whole."""
    disk = Disk()
    events: list[dict[str, Any]] = [
        {"call": "mkdir", "path": "d"},
        {"call": "open", "path": "d/t", "truncates": False},
        {"call": "write", "path": "d/t", "offset": 0, "data": b"abcd".hex()},
        {"call": "rename", "path": "d/f", "source": "d/t"},
    ]
    for event in events:
        disk.do(event)
    trees = [tuple(sorted(tree.items())) for tree in disk.cuts()]
    found: set[tuple[tuple[str, bytes | None], ...]] = set(trees)
    empty: Tree = {"d": None}
    assert trees[0] == tuple(empty.items())
    # The name came before the content: a cut may leave it with nothing, or with half.
    assert {dict(tree).get("d/f") for tree in found} == {None, b"", b"ab", b"abcd"}
    disk.do({"call": "fsync", "path": "d/f"})
    assert {dict(tuple(sorted(tree.items()))).get("d/f") for tree in disk.cuts()} == {None, b"abcd"}
    disk.do({"call": "fsync", "path": "d"})
    assert list(disk.cuts()) == [{"d": None, "d/f": b"abcd"}] * 3


# ------------------------------------------------------------------------------------------- does the shim see everything?

KINDS = {"openat": "open", "creat": "open", "pwrite64": "pwrite", "renameat": "rename", "renameat2": "rename"}
KINDS |= {"unlinkat": "unlink", "mkdirat": "mkdir", "linkat": "link", "symlinkat": "symlink", "fdatasync": "fsync"}
TRACED = (
    "open,openat,creat,write,pwrite64,writev,pwritev,pwritev2,sendfile,copy_file_range,splice,fsync,fdatasync,"
    "sync_file_range,ftruncate,truncate,fallocate,rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,"
    "mkdir,mkdirat,rmdir,mknod,mknodat,mmap"
)


def seen_by_the_system(lines: list[str], root: Path) -> Counter[tuple[str, str]]:
    """What strace saw: call and path of all that changed something below `root`."""
    found: Counter[tuple[str, str]] = Counter()
    for line in lines:
        match = re.match(r"(?:\d+ +)?(\w+)\((.*)\) += (?!-1)", line)
        if match is None:
            continue
        call, arguments = KINDS.get(match[1], match[1]), match[2]
        texts = (
            re.findall(r'"([^"]*)"', arguments)
            if call in ("open", "unlink", "mkdir", "rename", "rmdir", "link")
            else []
        )
        held = re.match(r"\d+<([^>]*)>", arguments)
        # A descriptor that is no file (`pipe:[4711]`, stderr) has no path.
        paths = texts[-1:] or ([held[1]] if held and held[1].startswith("/") else [])
        if call == "open" and not re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_APPEND", arguments):
            continue
        if call == "mmap" and not ("PROT_WRITE" in arguments and "MAP_SHARED" in arguments and str(root) in arguments):
            continue
        if call == "unlink" and "AT_REMOVEDIR" in arguments:
            call = "rmdir"
        for path in paths:
            base = held[1] if held and texts else str(root)
            full = os.path.normpath(os.path.join(base, path))
            if full.startswith(f"{root}/"):
                found[call, _plain(os.path.relpath(full, root))] += 1
    return found


def _plain(path: str) -> str:
    return re.sub(r"\.[0-9a-f]{16}\.tmp", ".tmp", path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_the_shim_sees_every_call_that_the_system_sees(whole: Whole, fresh: Fresh) -> None:
    """A true process under strace makes the very calls, file by file, that the shim counts: nothing goes past it."""
    wanted, folder, log = whole("kd"), fresh(), fresh() / "log"
    words = ["strace", "-f", "-y", "-e", f"trace={TRACED}", "-o", str(log)]
    done = subprocess.run(
        [*words, *command(*wanted.words, "--out", "run")],
        cwd=folder,
        env=environment(),
        capture_output=True,
        timeout=900,
    )
    if done.returncode and "PTRACE" in done.stderr.decode():
        pytest.skip("this user may not trace")
    assert done.returncode == 0, done.stderr
    system = seen_by_the_system(log.read_text(errors="replace").splitlines(), folder)
    watched = [key for key in system if "progress.json" in key[1]]  # by the clock in the one, at each step in the other
    for key in watched:
        del system[key]
    ours = Counter(
        (KINDS.get(e["call"], e["call"]), _plain(e["path"])) for e in wanted.trace if "progress.json" not in e["path"]
    )
    assert system == ours
    print(f"R3: strace and the shim agree on {sum(ours.values())} calls")
