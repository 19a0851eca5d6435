"""Reading every layout, whole and damaged."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_layouts import write_cifar100_binary, write_cifar100_python, write_image, write_tree
from PIL import Image

from kdcli.data import download, load
from kdcli.data.names import preparation
from kdcli.errors import IncompatibleError, InputError, UsageError

# CIFAR ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "cifar-100-binary"])
def test_cifar100_binary(tmp_path, small_cifar, place):
    pixels = write_cifar100_binary(tmp_path / "d" / place)
    dataset = load("cifar100", tmp_path / "d")
    assert dataset.classes[:2] == ("c00", "c01")
    assert (len(dataset.train), len(dataset.test), dataset.image_size) == (400, 100, 32)
    assert dataset.train.labels[:3].tolist() == [0, 1, 2]
    assert torch.equal(dataset.train.images.view(400, -1), torch.from_numpy(pixels))


@pytest.mark.parametrize("place", ["", "cifar-100-python"])
def test_cifar100_python_equals_binary(tmp_path, small_cifar, place):
    write_cifar100_python(tmp_path / "p" / place)
    write_cifar100_binary(tmp_path / "b" / "cifar-100-binary")
    python, binary = load("cifar100", tmp_path / "p"), load("cifar100", tmp_path / "b")
    assert python.classes == binary.classes
    for a, b in ((python.train, binary.train), (python.test, binary.test)):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_cifar10_both_layouts(tmp_path, small_cifar):
    rng = np.random.default_rng(0)
    binary, python = tmp_path / "cifar-10-batches-bin", tmp_path / "cifar-10-batches-py"
    binary.mkdir()
    python.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        labels, pixels = np.arange(20) % 10, rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        (binary / f"{name}.bin").write_bytes(np.concatenate([labels[:, None], pixels], 1).astype(np.uint8).tobytes())
        (python / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels.tolist()}))
    names = list("abcdefghij")
    (binary / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    (python / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    a = load("cifar10", binary)
    b = load("cifar10", python)
    assert a.classes == b.classes == tuple(names)
    assert len(a.train) == 100
    assert torch.equal(a.train.images, b.train.images)
    assert torch.equal(a.test.labels, b.test.labels)


def test_truncated_cifar_names_both_sizes(tmp_path, small_cifar):
    write_cifar100_binary(tmp_path / "cifar-100-binary")
    path = tmp_path / "cifar-100-binary" / "train.bin"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(
        InputError, match=f"train.bin is truncated: expected {400 * 3074} bytes, found {400 * 3074 - 5}"
    ):
        load("cifar100", tmp_path)


def test_missing_data_say_what_where_and_how(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_DATA_DIR", str(tmp_path))
    for name in ("cifar100", "cifar10", "stl10", "tinyimagenet", "imagenet"):
        with pytest.raises(InputError) as caught:
            load(name)
        assert str(tmp_path) in caught.value.message
        assert "looked for" in caught.value.message
        assert "--data-dir" in caught.value.hint
        assert caught.value.code == 3


def test_label_out_of_range_and_missing_class(tmp_path, small_cifar):
    folder = tmp_path / "cifar-100-binary"
    write_cifar100_binary(folder)
    whole = (folder / "train.bin").read_bytes()
    rows = np.frombuffer(whole, np.uint8).reshape(400, -1).copy()
    rows[7, 1] = 100
    (folder / "train.bin").write_bytes(rows.tobytes())
    with pytest.raises(InputError, match="label 100 in the training split"):
        load("cifar100", tmp_path)
    rows[rows[:, 1] == 7, 1] = 8
    rows[rows[:, 1] == 100, 1] = 8
    (folder / "train.bin").write_bytes(rows.tobytes())
    with pytest.raises(InputError, match="1 classes have no training image: c07"):
        load("cifar100", tmp_path)


class Canary:
    """Pickles as a call of os.system that leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["train", "meta"])
def test_hostile_pickles_run_nothing(tmp_path, small_cifar, name):
    write_cifar100_python(tmp_path / "cifar-100-python")
    canary = tmp_path / "canary"
    (tmp_path / "cifar-100-python" / name).write_bytes(pickle.dumps({"data": Canary(canary)}))
    with pytest.raises(InputError, match=r"hostile.*posix\.system"):
        load("cifar100", tmp_path)
    assert not canary.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02}",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"c_codecs\nencode\n(S'a'\nS'zlib'\ntR.",
        b"S'only a string'\n.",
        b"P1\n.",
        b"<html>",
    ],
)
def test_damaged_or_odd_pickles_are_refused(tmp_path, small_cifar, content):
    write_cifar100_python(tmp_path / "cifar-100-python")
    (tmp_path / "cifar-100-python" / "train").write_bytes(content)
    with pytest.raises(InputError, match="train"):
        load("cifar100", tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"data": np.zeros((3, 3072), np.uint8)},
        {"data": np.zeros((400, 3072), np.int32)},
        {"data": [1, 2]},
        {"fine_labels": [0] * 3},
        {"fine_labels": [100] * 400},
        {"fine_labels": ["0"] * 400},
    ],
)
def test_wrong_contents_of_a_pickle(tmp_path, small_cifar, change):
    write_cifar100_python(tmp_path / "cifar-100-python")
    path = tmp_path / "cifar-100-python" / "train"
    good = {"data": np.zeros((400, 3072), np.uint8), "fine_labels": [i % 100 for i in range(400)]}
    path.write_bytes(pickle.dumps(good | change))
    with pytest.raises(InputError, match="train"):
        load("cifar100", tmp_path)


# Archives ------------------------------------------------------------------------------------------------------------


def tar_of(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(path, "w:gz") as file:
        for info, data in members:
            info.size = len(data) if info.type == tarfile.REGTYPE else 0
            file.addfile(info, io.BytesIO(data))


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def official(tmp_path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    write_cifar100_binary(tmp_path / "source")
    files = sorted((tmp_path / "source").iterdir())
    return [(member(f"cifar-100-binary/{file.name}"), file.read_bytes()) for file in files]


def test_an_archive_in_the_data_directory_is_unpacked(tmp_path, small_cifar):
    root = tmp_path / "d"
    root.mkdir()
    extra = (member("cifar-100-binary/README.html"), b"not needed")
    tar_of(root / "cifar-100-binary.tar.gz", [*official(tmp_path), extra])
    assert len(load("cifar100", root).train) == 400
    assert sorted(p.name for p in root.iterdir()) == ["cifar-100-binary", "cifar-100-binary.tar.gz"]
    assert not (root / "cifar-100-binary" / "README.html").exists()


@pytest.mark.parametrize(
    "odd",
    [
        (member("../escaped"), b"x"),
        (member("cifar-100-binary/../../escaped"), b"x"),
        (member("cifar-100-binary/train.bin", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (member("cifar-100-binary/train.bin", tarfile.LNKTYPE, "cifar-100-binary/test.bin"), b""),
        (member("cifar-100-binary/train.bin", tarfile.FIFOTYPE), b""),
        (member("cifar-100-binary/train.bin", tarfile.CHRTYPE), b""),
        (member("cifar-100-binary/train.bin"), b"x" * (400 * 3074 + 1)),
        (member("./cifar-100-binary/test.bin"), b"a second one"),
        (member("cifar-100-binary/..\\..\\escaped"), b"x"),
    ],
)
def test_hostile_archives_leave_nothing(tmp_path, small_cifar, odd):
    root = tmp_path / "d"
    root.mkdir()
    kept = [m for m in official(tmp_path) if m[0].name != odd[0].name]
    tar_of(root / "cifar-100-binary.tar.gz", [*kept, odd])
    with pytest.raises(InputError):
        load("cifar100", root)
    assert [p.name for p in root.iterdir()] == ["cifar-100-binary.tar.gz"]
    assert not (tmp_path / "escaped").exists()


def test_absolute_names_are_hostile(tmp_path, small_cifar):
    root = tmp_path / "d"
    root.mkdir()
    tar_of(root / "cifar-100-binary.tar.gz", [*official(tmp_path), (member(f"{tmp_path}/escaped"), b"x")])
    with pytest.raises(InputError, match="hostile"):
        load("cifar100", root)
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize("how", ["cut", "text", "empty", "incomplete"])
def test_damaged_archives(tmp_path, small_cifar, how):
    root = tmp_path / "d"
    root.mkdir()
    path = root / "cifar-100-binary.tar.gz"
    members = official(tmp_path)
    tar_of(path, members[:-1] if how == "incomplete" else members)
    whole = path.read_bytes()
    if how != "incomplete":
        path.write_bytes({"cut": whole[: len(whole) // 2], "text": gzip.compress(b"hello" * 999), "empty": b""}[how])
    with pytest.raises(InputError, match=r"cifar-100-binary\.tar\.gz"):
        load("cifar100", root)
    assert [p.name for p in root.iterdir()] == [path.name]


def test_download_without_a_network_is_one_line(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError("<urlopen error [Errno -2] Name or service not known>\nmore")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", refused)
    for name in ("cifar100", "cifar10", "stl10", "tinyimagenet"):
        with pytest.raises(InputError, match="could not be fetched") as caught:
            load(name, tmp_path / "new", download=True)
        assert "\n" not in caught.value.line()
    assert download.fetch  # the name the readers bind


# STL-10 --------------------------------------------------------------------------------------------------------------


def write_stl10(folder: Path, count: int = 20) -> np.ndarray:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    upright = rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
    for which in ("train", "test"):
        (folder / f"{which}_X.bin").write_bytes(upright.transpose(0, 1, 3, 2).tobytes())
        (folder / f"{which}_y.bin").write_bytes(bytes(i % 10 + 1 for i in range(count)))
    (folder / "class_names.txt").write_text("\n".join(f"k{i}" for i in range(10)))
    return upright


def test_stl10_planes_are_column_major(tmp_path):
    upright = write_stl10(tmp_path / "stl10_binary")
    dataset = load("stl10", tmp_path)
    assert torch.equal(dataset.train.images, torch.from_numpy(upright))
    assert dataset.train.labels[:11].tolist() == [*range(10), 0]
    assert load("stl10", tmp_path / "stl10_binary", image_size=32).test.images.shape == (20, 3, 32, 32)


def test_stl10_bad_input(tmp_path):
    folder = tmp_path / "stl10_binary"
    write_stl10(folder)
    whole = (folder / "train_X.bin").read_bytes()
    (folder / "train_X.bin").write_bytes(whole[:-1])
    with pytest.raises(InputError, match=f"expected {len(whole)} bytes .* found {len(whole) - 1}"):
        load("stl10", tmp_path)
    (folder / "train_X.bin").write_bytes(whole)
    (folder / "test_y.bin").write_bytes(bytes([0] * 20))
    with pytest.raises(InputError, match=r"outside 1\.\.10"):
        load("stl10", tmp_path)
    (folder / "test_y.bin").unlink()
    with pytest.raises(InputError, match=r"test_y\.bin"):
        load("stl10", tmp_path)


# Tiny-ImageNet -------------------------------------------------------------------------------------------------------

WNIDS = ["n01443537", "n00000001"]


def write_tiny(root: Path) -> None:
    for label, name in enumerate(WNIDS):
        for i in range(4):
            write_image(root / "train" / name / "images" / f"{name}_{i}.JPEG", seed=10 * label + i, size=(64, 64))
        (root / "train" / name / f"{name}_boxes.txt").write_text("")
    for i in range(4):
        write_image(root / "val" / "images" / f"val_{i}.JPEG", seed=50 + i, size=(64, 64))
    lines = [f"val_{i}.JPEG\t{WNIDS[i % 2]}\t0\t0\t1\t1" for i in range(4)]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (root / "words.txt").write_text("n00000001\ta thing\nn01443537\tgoldfish, Carassius auratus\n")


@pytest.mark.parametrize("place", ["", "tiny-imagenet-200"])
def test_tinyimagenet(tmp_path, place):
    write_tiny(tmp_path / "d" / place)
    dataset = load("tinyimagenet", tmp_path / "d")
    assert dataset.classes == ("n00000001", "n01443537")
    assert dataset.readable["n01443537"].startswith("goldfish")
    assert dataset.train.images.shape == (8, 3, 64, 64)
    assert dataset.test.labels.tolist() == [1, 0, 1, 0]
    assert dataset.notes == ()
    streamed = load("tinyimagenet", tmp_path / "d", resident_mib=0)
    assert streamed.train.images is None
    assert streamed.test.labels.tolist() == [1, 0, 1, 0]
    assert streamed.test.paths[2].endswith("val_2.JPEG")
    assert load("tinyimagenet", tmp_path / "d", image_size=32).test.images.shape == (4, 3, 32, 32)


def test_tinyimagenet_from_its_archive(tmp_path):
    write_tiny(tmp_path / "tiny-imagenet-200")
    root = tmp_path / "d"
    root.mkdir()
    with zipfile.ZipFile(root / "tiny-imagenet-200.zip", "w") as file:
        for path in sorted((tmp_path / "tiny-imagenet-200").rglob("*")):
            file.write(path, path.relative_to(tmp_path))
    assert len(load("tinyimagenet", root).train) == 8
    hostile = tmp_path / "e"
    hostile.mkdir()
    with zipfile.ZipFile(hostile / "tiny-imagenet-200.zip", "w") as file:
        file.writestr("../escaped", "x")
    with pytest.raises(InputError, match="hostile"):
        load("tinyimagenet", hostile)
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("val_0.JPEG\tn09999999\t0", "names no class"),
        ("../../secret.JPEG\tn00000001\t0", "is not in"),
        ("val_9.JPEG\tn00000001", "is not in"),
        ("val_0.JPEG", "names no class"),
    ],
)
def test_tinyimagenet_bad_annotations(tmp_path, line, message):
    write_tiny(tmp_path)
    (tmp_path / "val" / "val_annotations.txt").write_text(line + "\n")
    with pytest.raises(InputError, match=f"line 1: .*{message}"):
        load("tinyimagenet", tmp_path)


def test_tinyimagenet_bad_images_and_folders(tmp_path):
    write_tiny(tmp_path)
    (tmp_path / "train" / WNIDS[0] / "images" / "bad.JPEG").write_bytes(b"<html>")
    (tmp_path / "val" / "images" / "val_1.JPEG").write_bytes(b"")
    for mib in (2048, 0):
        with pytest.raises(InputError, match=r"2 of 13 images.*bad\.JPEG.*val_1\.JPEG"):
            load("tinyimagenet", tmp_path, resident_mib=mib)
    (tmp_path / "wnids.txt").write_text(WNIDS[0])
    with pytest.raises(InputError, match=r"differ in n00000001"):
        load("tinyimagenet", tmp_path)


@pytest.mark.skipif("KD_DATA_DIR" not in os.environ, reason="needs real data in KD_DATA_DIR")
def test_real_cifar100():
    try:
        dataset = load("cifar100")
    except InputError:
        pytest.skip("no CIFAR-100 in KD_DATA_DIR")
    assert (len(dataset.train), len(dataset.test), len(dataset.classes)) == (50_000, 10_000, 100)
    measured = dataset.train.images.double().mean((0, 2, 3)) / 255
    assert torch.allclose(measured, torch.tensor(dataset.mean, dtype=torch.float64), atol=5e-4)


# Class folders -------------------------------------------------------------------------------------------------------


def test_folder_with_train_and_val(tmp_path):
    write_tree(tmp_path / "train", ["1", "10", "2"], 3)
    write_tree(tmp_path / "val", ["1", "10", "2"], 1)
    dataset = load(f"folder:{tmp_path}", image_size=16)
    assert dataset.classes == ("1", "10", "2")
    assert dataset.train.images.shape == (9, 3, 16, 16)
    assert dataset.train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert dataset.val is None
    large = load(f"folder:{tmp_path}")
    assert large.train.images is None
    assert len(large.test.paths) == 3
    write_tree(tmp_path / "test", ["1", "10", "2"], 2)
    three = load(f"folder:{tmp_path}", image_size=16)
    assert (len(three.val), len(three.test)) == (3, 6)


@pytest.mark.parametrize("place", ["", "imagenet"])
def test_imagenet_streams(tmp_path, place):
    write_tree(tmp_path / place / "train", ["n01", "n02"], 2)
    write_tree(tmp_path / place / "val", ["n01", "n02"], 1)
    (tmp_path / place / "test").mkdir()
    dataset = load("imagenet", tmp_path, image_size=16)
    assert dataset.train.images is None
    assert len(dataset.test) == 2


def test_one_tree_is_split_by_class_and_stays_split(tmp_path):
    write_tree(tmp_path, ["a", "b"], 10)
    write_tree(tmp_path, ["c"], 2)
    dataset = load(f"folder:{tmp_path}")
    assert torch.bincount(dataset.test.labels).tolist() == [2, 2, 1]
    assert not set(dataset.train.paths) & set(dataset.test.paths)
    assert "fixed fifth" in dataset.notes[0]
    again = load(f"folder:{tmp_path}")
    assert again.test.paths == dataset.test.paths
    write_tree(tmp_path, ["aa"], 5)
    grown = load(f"folder:{tmp_path}")
    assert set(dataset.test.paths) <= set(grown.test.paths)


def test_aspect_is_kept_by_a_centre_crop(tmp_path):
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 200
    for name in "ab":
        for i in range(2):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(wide).save(tmp_path / name / f"{i}.png")
    assert (load(f"folder:{tmp_path}", image_size=16).train.images == 200).all()


def test_empty_class_folders_are_named(tmp_path):
    write_tree(tmp_path, ["a", "b"], 2)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "readme.txt").write_text("")
    with pytest.raises(InputError, match="1 class folders have no image: c"):
        load(f"folder:{tmp_path}")


def test_folder_errors(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        load(f"folder:{tmp_path / 'absent'}")
    (tmp_path / "one").mkdir()
    with pytest.raises(InputError, match="1 class folders"):
        load(f"folder:{tmp_path}")
    write_tree(tmp_path / "s" / "train", ["a", "b"], 1)
    write_tree(tmp_path / "s" / "val", ["a", "z"], 1)
    with pytest.raises(InputError, match="training split lacks: z"):
        load(f"folder:{tmp_path / 's'}")


def test_dot_names_are_ignored_and_counted(tmp_path):
    write_tree(tmp_path, ["a", "b"], 2)
    write_tree(tmp_path, [".ipynb_checkpoints"], 1)
    (tmp_path / "a" / "._0.png").write_bytes(b"mac")
    dataset = load(f"folder:{tmp_path}")
    assert dataset.classes == ("a", "b")
    assert "2 dot-names ignored" in dataset.notes


def test_links_loop_repeat_and_never_leave(tmp_path):
    root = tmp_path / "root"
    write_tree(root, ["a", "b"], 3)
    (root / "a" / "loop").symlink_to("..")
    (root / "a" / "self").symlink_to(".")
    (root / "a" / "z.png").symlink_to("../b/0.png")
    (root / "a" / "hard.png").hardlink_to(root / "a" / "0.png")
    dataset = load(f"folder:{root}")
    paths = dataset.train.paths + dataset.test.paths
    labels = dataset.train.labels.tolist() + dataset.test.labels.tolist()
    assert len(paths) == 6
    assert {os.path.realpath(p) for p, label in zip(paths, labels, strict=True) if label == 1} == {
        os.path.realpath(root / "b" / f"{i}.png") for i in range(3)
    }
    assert any("listed already" in note for note in dataset.notes)
    write_image(tmp_path / "secret" / "x.png")
    for target, link in (("../../secret", "a/out"), ("../../secret/x.png", "a/out.png"), ("../secret", "c")):
        (root / link).symlink_to(target)
        with pytest.raises(InputError, match="leaves"):
            load(f"folder:{root}")
        (root / link).unlink()
    (root / "a" / "broken.png").symlink_to("nowhere.png")
    with pytest.raises(InputError, match="not a file"):
        load(f"folder:{root}")


def test_unlistable_folder_is_one_sentence(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may list anything")
    write_tree(tmp_path, ["a", "b"], 2)
    (tmp_path / "a").chmod(0)
    with pytest.raises(InputError):
        load(f"folder:{tmp_path}")


# Built in ------------------------------------------------------------------------------------------------------------


def test_digits():
    native, dataset = load("digits", image_size=8), load("digits")
    assert (len(dataset.train), len(dataset.test)) == (1437, 360)
    assert dataset.train.images.shape == (1437, 3, 32, 32)
    assert native.train.images.shape == (1437, 3, 8, 8)
    assert int(native.train.images.max()) == 255
    values = dataset.train.images.double() / 255
    assert abs(values.mean() - dataset.mean[0]) < 1e-4
    assert abs(values.std() - dataset.std[0]) < 1e-4
    assert torch.bincount(dataset.test.labels).min() >= 35


def test_synthetic_is_fixed_and_learnable():
    a, b = load("synthetic", image_size=16), load("synthetic", image_size=16)
    assert torch.equal(a.train.images, b.train.images)
    assert (len(a.train), len(a.test), len(a.classes)) == (2000, 500, 10)
    x, y = a.train.images.flatten(1).float(), a.train.labels
    centres = torch.stack([x[y == k].mean(0) for k in range(10)])
    guess = torch.cdist(a.test.images.flatten(1).float(), centres).argmin(1)
    assert (guess == a.test.labels).float().mean() > 0.9
    seven = load("synthetic:7", image_size=8)
    assert len(seven.classes) == 7
    assert len(set(seven.classes)) == 7


def test_image_size_is_checked_and_large_sizes_stay_native():
    with pytest.raises(UsageError):
        load("digits", image_size=3)
    kept = load("digits", image_size=224, resident_mib=16)
    assert kept.train.images.shape[-1] == 8
    assert kept.image_size == 224


@pytest.mark.parametrize("size", [8, 32, 64])
def test_room_that_prepares_images_alike_is_known_beforehand(size):
    """What identifies a run is what the reader does: the border lies where the images just fit."""
    usual = load("digits", image_size=size).train.images
    for mib in (0, 5, 6, 21, 22):  # 32x32: 5.3 MiB, 64x64: 21.06 MiB
        alike = preparation("digits", size, mib) == preparation("digits", size, 2048)
        found = load("digits", image_size=size, resident_mib=mib).train.images
        assert (found.shape == usual.shape and torch.equal(found, usual)) is alike, mib


def test_class_names_renumber_or_refuse(tmp_path):
    write_tree(tmp_path, ["1", "10", "2"], 2)
    plain = load(f"folder:{tmp_path}", image_size=8)
    natural = load(f"folder:{tmp_path}", image_size=8, class_names=["1", "2", "10"])
    assert natural.classes == ("1", "2", "10")
    for a, b in zip(plain.train.labels.tolist(), natural.train.labels.tolist(), strict=True):
        assert plain.classes[a] == natural.classes[b]
    with pytest.raises(IncompatibleError, match="3 classes, 2 were expected"):
        load(f"folder:{tmp_path}", image_size=8, class_names=["1", "2"])
