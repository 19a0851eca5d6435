"""R14: hostile archives and data folders: nothing is written, read or followed outside their root."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzzing import Trial, complaints, stock, told, trial
from PIL import Image
from test_fuzz_data import small_cifar, sound, words

TAR, ZIP = "cifar-10-python.tar.gz", "tiny-imagenet-200.zip"
INSIDE = "cifar-10-batches-py"

Shape = Callable[[Path], object]


def tar(*members: tuple[str, bytes, dict[str, Any]], genuine: bool = True) -> Shape:
    """An archive with these members, `(name, content, attributes)`, in front of the genuine ones."""

    def make(folder: Path) -> None:
        with tarfile.open(folder / "d" / TAR, "w:gz", compresslevel=1) as archive:
            for name, content, attributes in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                for key, value in attributes.items():
                    setattr(info, key, value)
                archive.addfile(info, io.BytesIO(content))
            if genuine:
                archive.add(sound("python") / INSIDE, INSIDE)

    return make


def link(kind: bytes, target: str, then: bool = True) -> Shape:
    """A link out of the folder, and a file behind it."""
    more = [(f"{INSIDE}/data_batch_1", b"evil", {})] if then else []
    return tar((f"{INSIDE}/data_batch_1", b"", {"type": kind, "linkname": target}), *more)


def zipped(name: str, content: bytes = b"evil", mode: int = 0o100644) -> Shape:
    """Tiny-ImageNet's archive with one more member."""

    def make(folder: Path) -> None:
        with zipfile.ZipFile(folder / "d" / ZIP, "w", zipfile.ZIP_DEFLATED) as archive:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, content)
            for path in sorted(sound("tiny").rglob("*")):
                if path.is_file():
                    archive.write(path, path.relative_to(sound("tiny")))

    return make


def sparse(folder: Path) -> None:
    """A member in GNU's sparse form that claims a terabyte."""
    tar((f"{INSIDE}/data_batch_1", b"x", {"type": tarfile.GNUTYPE_SPARSE}))(folder)


def bomb(folder: Path) -> None:
    """A member that unpacks to more than such a file ever has."""
    content = bytes(300 << 20)
    tar((f"{INSIDE}/data_batch_1", content, {}), genuine=False)(folder)


def tree(change: Callable[[Path], object]) -> Shape:
    """A folder of class folders, changed."""

    def make(folder: Path) -> None:
        shutil.copytree(sound("folders"), folder / "d", dirs_exist_ok=True)
        change(folder / "d")

    return make


def loops(root: Path) -> None:
    """Links to enclosing folders, at several depths."""
    for path in (root / "ant/loop", root / "bee/a/loop"):
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(root)


def elsewhere(root: Path) -> None:
    """A class folder that is a link to a folder of sound images, but outside."""
    outside = root.parent / ".tmp/outside"
    shutil.copytree(sound("folders") / "ant", outside)
    (root / "dog").symlink_to(outside)


def names_of_evil(root: Path) -> None:
    """Class and file names with escapes, newlines and bytes that are no text."""
    for name in (b"ev\x1b[31mil", b"two\nerror: lines", b"\xff\xfe", b"-rf", b"con", "\u202egnp".encode()):
        folder = os.path.join(os.fsencode(root), name)
        os.mkdir(folder)
        for i in (b"\x1b]0;x\x07", b"\nerror: fake", b"\xff"):
            with open(os.path.join(folder, i + b".png"), "wb") as file:
                Image.new("RGB", (8, 8)).save(file, "PNG")


def broken_name(root: Path) -> None:
    """A file that is no image under a name that draws on the terminal."""
    (root / "ant" / "\x1b[2J\nerror: fake.png").write_bytes(b"no image")


HOSTILE: dict[str, tuple[str, Shape]] = {
    "../ in a name": ("cifar10", tar((f"{INSIDE}/../../evil", b"evil", {}))),
    "../ in the middle": ("cifar10", tar((f"{INSIDE}/a/../../../evil", b"evil", {}))),
    "an absolute name": ("cifar10", tar(("/tmp/kd-evil", b"evil", {}))),
    "a symlink, then a file": ("cifar10", link(tarfile.SYMTYPE, "../../evil")),
    "a hard link out": ("cifar10", link(tarfile.LNKTYPE, "../../../../etc/hostname", then=False)),
    "a device": ("cifar10", link(tarfile.CHRTYPE, "", then=False)),
    "a FIFO": ("cifar10", link(tarfile.FIFOTYPE, "", then=False)),
    "a name twice": ("cifar10", tar((f"{INSIDE}/data_batch_1", b"evil", {}))),
    "a sparse member": ("cifar10", sparse),
    "a bomb": ("cifar10", bomb),
    "a backslash": ("tinyimagenet", zipped("..\\..\\evil")),
    "../ in a zip": ("tinyimagenet", zipped("../../evil")),
    "a symlink in a zip": ("tinyimagenet", zipped("tiny-imagenet-200/wnids.txt", b"/etc/passwd", 0o120777)),
    "a zip bomb": ("tinyimagenet", zipped("tiny-imagenet-200/words.txt", bytes(50 << 20))),
    "a link to a file outside": ("folder:d", tree(lambda root: (root / "ant/x.png").symlink_to("/etc/hostname"))),
    "a link to a folder outside": ("folder:d", tree(elsewhere)),
    "a broken link": ("folder:d", tree(lambda root: (root / "ant/x.png").symlink_to("nowhere"))),
    "a FIFO as an image": ("folder:d", tree(lambda root: os.mkfifo(root / "ant/x.png"))),
    "a name that draws": ("folder:d", tree(broken_name)),
}
HARMLESS: dict[str, tuple[str, Shape]] = {
    "loops of links": ("folder:d", tree(loops)),
    "names with escapes": ("folder:d", tree(names_of_evil)),
    "cases that collide": ("folder:d", tree(lambda root: shutil.copytree(root / "ant", root / "ANT"))),
    "a name that is not wanted": ("cifar10", tar((f"{INSIDE}/evil\nerror: x\x1b[31m", b"evil", {}))),
    "a folder that is a link": ("cifar10", tar((INSIDE, b"", {"type": tarfile.SYMTYPE, "linkname": "/tmp"}))),
    "a huge member that is not wanted": ("cifar10", tar(("other", bytes(1 << 20), {}))),
}


def attempt(shape: str, folder: Path, before: Callable[[], None] | None = None) -> tuple[Trial, list[str]]:
    """A training on hostile data; what is wrong with how it ended."""
    stock()
    dataset, make = {**HOSTILE, **HARMLESS}[shape]
    (folder / "d").mkdir()
    outside = set(os.listdir("/tmp"))
    make(folder)

    def both() -> None:
        small_cifar()
        if before is not None:
            before()

    found = trial(words(dataset), folder, before=both, writable=["run", "d"])
    wrong = complaints(found, [3] if shape in HOSTILE else [0])
    left = {name for name in os.listdir("/tmp") if "evil" in name} - outside
    left |= {name for name in os.listdir(folder) if name not in ("d", "run", ".tmp")}
    left |= {name for name in os.listdir(folder / "d") if name.startswith(".") or ("evil" in name and shape in HOSTILE)}
    return found, wrong + [f"left behind: {name!r}" for name in sorted(left)]


QUICK = ("../ in a name", "an absolute name", "a hard link out", "../ in a zip", "a link to a folder outside")
QUICK += ("a FIFO as an image", "loops of links", "names with escapes")


@pytest.mark.parametrize(
    "shape", [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in (*HOSTILE, *HARMLESS)]
)
def test_shape(shape, tmp_path):
    """Exit 3 with one line, or a training as if nothing was; and no file, link or folder anywhere else."""
    found, wrong = attempt(shape, tmp_path)
    assert not wrong, told(found, wrong)


def extracting() -> None:
    """`kd` as it would be with `extractall`."""
    from kdcli.data import cifar

    def extract(archive: Path, folder: Path, *_: Any) -> None:
        with tarfile.open(archive) as file:
            file.extractall(folder.parent, filter="fully_trusted")

    cifar.extract = extract


def following() -> None:
    """`kd` that follows links wherever they lead."""
    from kdcli.data.classfolders import Walk

    Walk._confine = lambda *_: None  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("shape", "broken"),
    [("../ in a name", extracting), ("a symlink, then a file", extracting), ("a link to a folder outside", following)],
)
def test_these_checks_have_teeth(shape, broken, tmp_path):
    """With `extractall`, or links followed, the same shapes are found out."""
    _, wrong = attempt(shape, tmp_path, before=broken)
    assert wrong
