"""R13: hostile `.pth` files do nothing but fail; benign ones of the field come in."""

from __future__ import annotations

import argparse
import collections
import io
import os
import random
import struct
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import SEED, Trial, complaints, fresh, own_rss, stock, told, trial
from mutators import damaged
from test_importing import ALSO_HOSTILE, HOSTILE, prefixed
from torch._utils import _rebuild_tensor_v2

from kdcli.models import build

IMPORT = ["import", "x.pth", "--arch", "resnet8", "--out", "out.safetensors"]


def forked_reader() -> None:
    """Let `kd import` fork its reader instead of starting a Python: the same code with the same walls, in 0.1 s."""
    from kdcli.importing import child, conversion

    def start(_command: list[str], *, input: str, cwd: str, **_: Any) -> Any:  # noqa: A002 - subprocess.run's word
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            os.dup2(writing, 1)
            os.chdir(cwd)
            sys.stdin, sys.stdout = io.StringIO(input), os.fdopen(1, "w", closefd=False)
            child.main()
            sys.stdout.flush()
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            out = pipe.read().decode()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return types.SimpleNamespace(stdout=out, returncode=code)

    conversion.subprocess = types.SimpleNamespace(  # type: ignore[assignment]
        run=start, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
    )


def bring_in(folder: Path, *, forked: bool = True, before: Callable[[], None] | None = None) -> Trial:
    """`kd import` of `x.pth` in `folder`."""

    def both() -> None:
        if forked:
            forked_reader()
        if before is not None:
            before()

    return trial(IMPORT, folder, before=both, writable=["out.safetensors", "."], executes=not forked)


def wrong_with(found: Trial, folder: Path, codes: tuple[int, ...] = (3,)) -> list[str]:
    """What `complaints` finds, and every file that should not be there."""
    left = set(os.listdir(folder)) - {"x.pth", ".tmp", *(["out.safetensors"] if found.code == 0 else [])}
    return complaints(found, codes) + [f"left behind: {name}" for name in sorted(left)]


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def called(function: Any, argument: str) -> Callable[[Path, Path], None]:
    """A file whose pickle calls `function`; `CANARY` in the argument becomes the path of the canary."""

    def make(path: Path, canary: Path) -> None:
        torch.save({"a": torch.ones(1), "b": Calls(function, argument.replace("CANARY", str(canary)))}, path)

    return make


def raw(program: bytes, *, zipped: bool = True) -> Callable[[Path, Path], None]:
    """A file whose pickle is `program`."""

    def make(path: Path, canary: Path) -> None:
        body = program.replace(b"CANARY", str(canary).encode())
        if not zipped:
            path.write_bytes(body)
            return
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("x/data.pkl", body)
            archive.writestr("x/version", "3\n")
            archive.writestr("x/byteorder", "little")
            archive.writestr("x/data/0", bytes(64))

    return make


def renamed(name: str) -> Callable[[Path, Path], None]:
    """A sound file whose records have path-like names, or whose records are there twice."""

    def make(path: Path, canary: Path) -> None:
        plain = path.with_suffix(".plain")
        torch.save({"a": torch.zeros(4)}, plain)
        with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as odd:
            for member in source.infolist():
                content = source.read(member)
                odd.writestr(name.replace("CANARY", str(canary)) + os.path.basename(member.filename), content)
                if name == "twice/":
                    odd.writestr(member.filename, content)
        plain.unlink()

    return make


def lying_tensor(size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Callable[[Path, Path], None]:
    """A tensor whose shape, strides or offset do not lie in its storage."""

    def make(path: Path, canary: Path) -> None:
        class Tensor:
            def __reduce__(self) -> tuple[Any, ...]:
                storage = torch.zeros(4).untyped_storage()
                held = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
                return _rebuild_tensor_v2, (held, offset, size, stride, False, collections.OrderedDict())

        torch.save({"conv1.weight": Tensor()}, path)

    return make


def deep(path: Path, canary: Path) -> None:
    """A hundred thousand containers, one in the other."""
    raw(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")(path, canary)


SYSTEM = b"\x80\x02}X\x01\0\0\0a"
SHAPES: dict[str, Callable[[Path, Path], None]] = {
    **{make.__name__: make for make in (*HOSTILE, *ALSO_HOSTILE)},
    "os.system": called(os.system, "touch CANARY"),
    "eval": called(eval, "open('CANARY', 'w')"),
    "exec": called(exec, "open('CANARY', 'w')"),
    "getattr": called(getattr, "__class__"),
    "subprocess": called(subprocess.check_output, "touch CANARY"),
    "open": called(open, "CANARY"),
    "torch.load": called(torch.load, "CANARY"),
    "torch.hub": raw(SYSTEM + b"ctorch.hub\nload_state_dict_from_url\nX\x0f\0\0\0http://[::1]/a\x20\x85Rs."),
    "INST": raw(b"\x80\x02}X\x01\0\0\0a(X\x0c\0\0\0touch CANARYios\nsystem\ns."),
    "OBJ": raw(b"\x80\x02(cos\nsystem\nX\x05\0\0\0touchoq\0."),
    "NEWOBJ": raw(SYSTEM + b"csubprocess\nPopen\nX\x04\0\0\0true\x85\x81s."),
    "STACK_GLOBAL": raw(b"\x80\x04}\x8c\x01a\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85Rs."),
    "dotted name": raw(SYSTEM + b"ctorch\nserialization.os.system\nX\x04\0\0\0true\x85Rs."),
    "BUILD of a class": raw(SYSTEM + b"ccollections\nOrderedDict\n}X\x0a\0\0\0__reduce__K\x01sbs."),
    "a codec is a module": raw(SYSTEM + b"c_codecs\nencode\nX\x01\0\0\0aX\x04\0\0\0evil\x86Rs."),
    "extension": raw(b"\x80\x02}X\x01\0\0\0a\x82\x01s."),
    "persistent id": raw(
        SYSTEM + b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x0b\0\0\0../../0/0/0X\x03\0\0\0cpuK\x04tQs."
    ),
    "odd persistent id": raw(SYSTEM + b"K\x01Qs."),
    "memo bomb": raw(b"\x80\x02]r\xff\xff\xff\x7f."),
    "long bomb": raw(b"\x80\x02\x8b\xff\xff\xff\x7f."),
    "string bomb": raw(b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"."),
    "frame bomb": raw(b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"."),
    "legacy, no zip": raw(b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.", zipped=False),
    "deep": deep,
    "path-like records": renamed("../../"),
    "absolute records": renamed("CANARY/"),
    "records twice": renamed("twice/"),
    "records without a folder": renamed(""),
    "offset outside": lying_tensor((4,), (1,), 1000),
    "stride outside": lying_tensor((4,), (10**9,), 0),
    "negative size": lying_tensor((-4,), (1,), 0),
    "overflowing size": lying_tensor((2**40, 2**40), (0, 0), 0),
    "huge view": lying_tensor((10**9, 10**3), (0, 0), 0),
}
QUICK = ("os.system", "INST", "memo bomb", "stride outside", "path-like records", "zip_bomb")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TorchScript is on its way out of torch
@pytest.mark.parametrize("shape", [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in SHAPES])
def test_hostile_file(shape, tmp_path):
    """One line, exit 3 or 4; no canary, no socket, no program, no file."""
    stock()
    SHAPES[shape](tmp_path / "x.pth", tmp_path / "canary")
    found = bring_in(tmp_path)
    wrong = wrong_with(found, tmp_path, (3, 4))
    assert not wrong, told(found, wrong)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["os.system", "memo bomb", "zip_bomb", "legacy_storage_lie", "deep"])
def test_hostile_file_in_a_true_process(shape, tmp_path):
    """The same where the reader is a Python of its own, as it always is outside of these tests."""
    stock()
    SHAPES[shape](tmp_path / "x.pth", tmp_path / "canary")
    found = bring_in(tmp_path, forked=False)
    wrong = wrong_with(found, tmp_path, (3, 4))
    assert not wrong, told(found, wrong)


def benign() -> dict[str, Any]:
    """What RepDistiller and those after it publish."""
    torch.manual_seed(0)
    network = build("resnet8", 5)
    plain = network.state_dict()
    options = argparse.Namespace(lr=0.1, steps=[150, 180], nested=argparse.Namespace(a=1))
    return {
        "tensors": {"epoch": 240, "model": plain, "best_acc": torch.tensor(75.0)},
        "Namespace": {"opt": options, "model": plain},
        "numpy scalars": {"model": plain, "best_acc": np.float64(75.0), "n": np.int64(3), "f": np.float32(1)},
        "module.": {"model": prefixed("module.", network)},
    }


@pytest.mark.parametrize("kind", ["tensors", "Namespace", "numpy scalars", "module."])
def test_benign_file(kind, tmp_path):
    """4 of 4 load."""
    stock()
    torch.save(benign()[kind], tmp_path / "x.pth")
    found = bring_in(tmp_path)
    wrong = wrong_with(found, tmp_path, (0,))
    assert not wrong, told(found, wrong)
    assert trial(["verify", "out.safetensors"], tmp_path).code == 0


def mutation(number: int, folder: Path) -> tuple[Trial, list[str]]:
    """A benign file with damaged bytes."""
    draw = random.Random(f"{SEED} pth {number}")
    content = io.BytesIO()
    torch.save(draw.choice(list(benign().values())), content, _use_new_zipfile_serialization=draw.random() < 0.7)
    (fresh(folder / "trial") / "x.pth").write_bytes(damaged(content.getvalue(), draw))
    found = bring_in(folder / "trial")
    return found, wrong_with(found, folder / "trial", (0, 3, 4, 6))


def test_a_sample_of_mutated_pth(tmp_path):
    """A few of the 250."""
    stock()
    for number in range(5):
        found, wrong = mutation(number, tmp_path)
        assert not wrong, told(found, wrong)


@pytest.mark.slow
def test_mutated_pth(tmp_path):
    """R11: 250 mutations of `.pth` files; a flipped bit in the weights cannot be known there, and may be a NaN."""
    stock()
    assert own_rss()
    for number in range(250):
        found, wrong = mutation(number, tmp_path)
        assert not wrong, told(found, wrong)
    print(f"R11: seed '{SEED} pth': 250 mutations of .pth files, 0 failures")


def believing() -> None:
    """`kd import` with an ordinary `torch.load`, and without the wall behind it."""
    from kdcli.importing import child

    child.read = lambda source, size: torch.load(source, map_location="cpu", weights_only=False)
    child.confine = lambda directory: None


def test_these_checks_have_teeth(tmp_path):
    """With an ordinary reader the canary is there, and is found."""
    stock()
    SHAPES["os.system"](tmp_path / "x.pth", tmp_path / "canary")
    found = bring_in(tmp_path, before=believing)
    assert any("canary" in one for one in wrong_with(found, tmp_path, (3, 4)))
