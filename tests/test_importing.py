"""`kd import`: the layouts of the field come in whole, hostile files do nothing at all."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from kdcli import checkpoint
from kdcli.errors import IncompatibleError, InputError, NotFiniteError, UsageError, WriteError
from kdcli.importing import child, conversion
from kdcli.models import build
from kdcli.models.heads import build_heads

ARCH = "resnet8"
CLASSES = tuple(f"name {i}" for i in range(5))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build(ARCH, 5)


@pytest.fixture
def inline(monkeypatch):
    """Read files in this process: half a second instead of three, for tests that are not about the child."""

    def read(source, size):
        return {k: v.detach().clone() for k, v in child.weights(child.read(str(source), size)).items()}

    monkeypatch.setattr(conversion, "read_foreign", read)


def prefixed(prefix: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


def bring_in(tmp_path: Path, content: object, name: str = "x.pth", **options):
    torch.save(content, tmp_path / name)
    return conversion.import_checkpoint(tmp_path / name, out=tmp_path / "out.safetensors", arch=ARCH, **options)


def assert_same(tmp_path: Path, module: torch.nn.Module) -> dict:
    tensors, metadata = checkpoint.load(tmp_path / "out.safetensors")
    expected = module.state_dict()
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith("heads.")}
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], expected[name]) for name in expected)
    return metadata


def test_whole_way_through_the_child(tmp_path, network):
    """RepDistiller's `*_last.pth`: a Namespace and numpy scalars beside the weights."""
    options = argparse.Namespace(lr=0.1, steps=[150, 180], nested=argparse.Namespace(a=1))
    content = {"model": prefixed("module.", network), "opt": options, "best": np.float64(74.5), "n": np.int64(3)}
    normalization = {"mean": [0.5] * 3, "std": [0.25] * 3}
    report = bring_in(tmp_path, content, classes=CLASSES, dataset="toy", normalization=normalization)
    metadata = assert_same(tmp_path, network)
    assert report["digest"] == metadata["digest"]
    assert (report["outputs"], report["heads"], report["notices"]) == (5, None, [])
    assert metadata["role"] == "teacher"
    assert metadata["arch"]["name"] == ARCH
    assert metadata["classes"] == list(CLASSES)
    assert (metadata["normalization"], metadata["dataset"]) == (normalization, "toy")
    assert metadata["imported_from"]["name"] == "x.pth"
    assert sorted(os.listdir(tmp_path)) == ["out.safetensors", "x.pth"]


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda sd: sd, ""),  # ReviewKD
        (lambda sd: sd, "module."),
        (lambda sd: {"model": sd, "epoch": 240, "best_acc": torch.tensor(75.0), "optimizer": {"state": {}}}, "module."),
        (lambda sd: {"state_dict": sd, "epoch": 3}, ""),  # SSKD's teachers' backbones
        (lambda sd: {"state_dict": sd}, "module.backbone."),
        (lambda sd: {"net": sd, "acc": np.float32(3)}, "backbone."),  # HSAKD
        (lambda sd: {"model": {"state_dict": sd}}, "module.module."),
    ],
)
def test_containers_of_the_field(tmp_path, network, inline, wrap, prefix):
    report = bring_in(tmp_path, wrap(prefixed(prefix, network)))
    metadata = assert_same(tmp_path, network)
    assert metadata["classes"] == [f"class {i}" for i in range(5)]
    assert "normalization" in report["notices"][0]


def test_old_file_format_and_safetensors(tmp_path, network, inline):
    torch.save({"model": network.state_dict()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "new.bin")
    for name in ("old.pth", "new.bin"):
        conversion.import_checkpoint(tmp_path / name, out=tmp_path / "out.safetensors", arch="ResNet-8")
        assert_same(tmp_path, network)


def test_files_without_batch_counters_and_in_half_precision(tmp_path, network, inline):
    tensors = {k: v.double() for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    report = bring_in(tmp_path, tensors)
    assert_same(tmp_path, network)
    assert "counters" in report["notices"][0]
    assert "float64" in report["notices"][1]


def test_heads_of_hsakd(tmp_path, network, inline):
    heads = build_heads(network, 20)
    foreign = prefixed("backbone.", network)
    for name, tensor in heads.state_dict().items():
        j, layer, rest = name.split(".", 2)
        h = int(j) + 1
        if layer.startswith("layer"):
            name = f"block_extractor{h}.{int(layer[5:]) - min(h + 1, 3)}.{rest}"
        else:
            name = f"{layer}{h}.{rest}"
        foreign[f"auxiliary_classifier.{name}"] = tensor
    report = bring_in(tmp_path, {"net": foreign})
    metadata = assert_same(tmp_path, network)
    assert report["heads"] == metadata["heads"] == {"outputs": 20, "count": 3}
    tensors, _ = checkpoint.load(tmp_path / "out.safetensors")
    assert all(torch.equal(tensors[f"heads.{name}"], tensor) for name, tensor in heads.state_dict().items())
    del foreign["auxiliary_classifier.fc2.bias"]
    with pytest.raises(IncompatibleError, match=r"missing heads\.1\.fc\.bias"):
        bring_in(tmp_path, {"net": foreign})


def test_whole_distiller_and_parts(tmp_path, network, inline):
    teacher = build(ARCH, 5)
    both = {"model": prefixed("module.student.", network) | prefixed("module.teacher.", teacher)}
    both["model"]["module.conv_reg.weight"] = torch.ones(2)
    report = bring_in(tmp_path, both)
    assert_same(tmp_path, network)
    assert "took the student; left out" in report["notices"][0]
    bring_in(tmp_path, both, part="teacher")
    assert_same(tmp_path, teacher)
    report = bring_in(tmp_path, both, part="student")
    assert_same(tmp_path, network)
    assert "left out" in report["notices"][0]
    bring_in(tmp_path, {"student": network.state_dict(), "teacher": teacher.state_dict()}, part="teacher")
    assert_same(tmp_path, teacher)
    with pytest.raises(IncompatibleError, match="no teacher"):
        bring_in(tmp_path, prefixed("student.", network), part="teacher")
    with pytest.raises(UsageError) as caught:
        bring_in(tmp_path, both, part="king")
    assert caught.value.field == "--part"


def test_without_part_it_takes_what_there_is(tmp_path, network, inline, kd):
    """An ordinary file without a word about parts, and a file that holds a teacher only."""
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    torch.save(prefixed("teacher.", network), tmp_path / "teacher.pth")
    for name in ("plain", "teacher"):
        result = kd("import", f"{name}.pth", "--arch", ARCH, "--out", "out.safetensors")
        assert result.code == 0, result.err
        assert "part" not in result.out + result.err
        assert_same(tmp_path, network)
    assert "--part student had no effect" in str(
        kd("import", "plain.pth", "--arch", ARCH, "--out", "out.safetensors", "--part", "student")
    )


def test_the_size_of_its_images_can_be_said(tmp_path, inline, kd):
    """Networks of the libraries are built by it; of a data set's images it is the size they are shown in."""
    torch.save(build(ARCH, 10).state_dict(), tmp_path / "x.pth")
    words = ("import", "x.pth", "--arch", ARCH, "--out", "out.safetensors")
    for more, size in (((), 32), (("--dataset", "digits"), 32), (("--image-size", 48), 48)):
        assert kd(*words, *more).code == 0
        assert checkpoint.read_metadata(tmp_path / "out.safetensors")["image_size"] == size
    assert kd(*words, "--image-size", 16, "--dataset", "digits").code == 0
    metadata = checkpoint.read_metadata(tmp_path / "out.safetensors")
    assert (metadata["image_size"], metadata["arch"]["image_size"]) == (16, 16)
    assert kd(*words, "--image-size", 2).code == 2


def test_projection_head_of_sskd_is_dropped_aloud(tmp_path, network, inline):
    foreign = prefixed("backbone.", network) | {"proj_head.0.weight": torch.ones(2, 2)}
    report = bring_in(tmp_path, {"state_dict": foreign})
    assert_same(tmp_path, network)
    assert "proj_head.0.weight" in report["notices"][0]


def test_what_does_not_fit(tmp_path, network, inline):
    good = network.state_dict()
    missing = {k: v for k, v in good.items() if not k.startswith("layer2")}
    with pytest.raises(IncompatibleError, match=r"missing layer2.*and \d+ more"):
        bring_in(tmp_path, missing)
    with pytest.raises(IncompatibleError, match=r"unexpected extra\.weight"):
        bring_in(tmp_path, good | {"extra.weight": torch.ones(1)})
    with pytest.raises(IncompatibleError, match=r"conv1\.weight is float32 16x3x5x5, not float32 16x3x3x3"):
        bring_in(tmp_path, good | {"conv1.weight": torch.ones(16, 3, 5, 5)})
    with pytest.raises(IncompatibleError, match="int64"):
        bring_in(tmp_path, good | {"conv1.weight": torch.ones(16, 3, 3, 3, dtype=torch.int64)})
    with pytest.raises(IncompatibleError, match="fc"):
        bring_in(tmp_path, {k: v for k, v in good.items() if not k.startswith("fc.")})
    with pytest.raises(IncompatibleError, match="5 outputs, but there are 3 classes"):
        bring_in(tmp_path, good, classes=("a", "b", "c"))
    with pytest.raises(NotFiniteError, match=r"bn1\.running_var"):
        bring_in(tmp_path, good | {"bn1.running_var": torch.full((16,), float("inf"))})
    with pytest.raises(UsageError, match="resnet9"):
        conversion.import_checkpoint(tmp_path / "x.pth", arch="resnet9", out=tmp_path / "out.safetensors")
    torch.save(good, tmp_path / "x.pth")
    with pytest.raises(WriteError):
        conversion.import_checkpoint(tmp_path / "x.pth", arch=ARCH, out=tmp_path)
    assert not (tmp_path / "out.safetensors").exists()


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("missing", "fifo", "empty", ""):
        with pytest.raises(InputError):
            conversion.import_checkpoint(tmp_path / name, arch=ARCH, out=tmp_path / "out")


# -------------------------------------------------------------------------------------------------------- hostile files


class Canary:
    """Creates a file when it is unpickled without restraint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def hostile_zip(path: Path, canary: Path) -> None:
    torch.save({"model": {"a": torch.ones(1), "b": Canary(canary)}}, path)


def hostile_legacy(path: Path, canary: Path) -> None:
    torch.save({"a": torch.ones(1), "b": Canary(canary)}, path, _use_new_zipfile_serialization=False)


def bare_pickle(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps(Canary(canary), protocol=2))


def legacy_tar(path: Path, canary: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("pickle", "tensors", "storages"):
            content = pickle.dumps(Canary(canary), protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def torch_script(path: Path, canary: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)


def whole_module(path: Path, canary: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), path)


def zip_bomb(path: Path, canary: Path) -> None:
    plain = path.with_suffix(".plain")
    torch.save({"a": torch.zeros(8_000_000)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for member in source.infolist():
            bomb.writestr(member.filename, source.read(member))
    plain.unlink()


def expanded(path: Path, canary: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(10**12)}, path)


def storage_lie(path: Path, canary: Path) -> None:
    """The pickle announces 2^40 elements, the file holds four."""
    plain = path.with_suffix(".plain")
    torch.save({"a": torch.zeros(4), "n": 1234567}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as lie:
        for member in source.infolist():
            content = source.read(member)
            if member.filename.endswith("data.pkl"):
                size = b"K\x04"  # BININT1 4: the storage's count and the tensor's shape
                assert content.count(size) == 2
                content = content.replace(size, b"\x8a\x06" + (2**40).to_bytes(6, "little"))
            lie.writestr(member.filename, content)
    plain.unlink()


def endless_memory(path: Path, canary: Path) -> None:
    """A list that doubles itself: small to write down, endless to build."""
    laughs = b"\x80\x02(" + b"X\x04\x00\x00\x00aaaa" + b"t"
    for i in range(60):
        laughs += b"q" + bytes([i]) + b"(" + (b"h" + bytes([i])) * 10 + b"t"
    path.write_bytes(laughs + b".")


def legacy_storage_lie(path: Path, canary: Path) -> None:
    """The oldest layout names the size of a storage before its bytes, and torch believes it."""
    torch.save({"a": torch.zeros(4), "n": 1234567}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert content.count(b"K\x04") >= 2
    path.write_bytes(content.replace(b"K\x04", b"\x8a\x06" + (2**40).to_bytes(6, "little")))


def noise(path: Path, canary: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + bytes(range(256)) * 20)


# Through the child, two seconds each; the others are refused by the same reader, which is called here directly.
HOSTILE = [hostile_zip, hostile_legacy, torch_script, zip_bomb, expanded, storage_lie, legacy_storage_lie]
ALSO_HOSTILE = [bare_pickle, legacy_tar, whole_module, endless_memory, noise]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TorchScript is on its way out of torch
@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_hostile_file_is_one_line_and_nothing_else(tmp_path, make):
    path, canary = tmp_path / "x.pth", tmp_path / "canary"
    make(path, canary)
    start = time.monotonic()
    with pytest.raises(InputError, match=r"x\.pth") as caught:
        conversion.import_checkpoint(path, arch=ARCH, out=tmp_path / "out.safetensors")
    assert caught.value.code == 3
    assert "\n" not in caught.value.line()
    assert time.monotonic() - start < 30
    assert os.listdir(tmp_path) == ["x.pth"]


@pytest.mark.parametrize("make", ALSO_HOSTILE, ids=lambda make: make.__name__)
def test_reader_refuses(tmp_path, make):
    make(tmp_path / "x.pth", tmp_path / "canary")
    with pytest.raises(child.Refused):
        child.read(str(tmp_path / "x.pth"), (tmp_path / "x.pth").stat().st_size)
    assert os.listdir(tmp_path) == ["x.pth"]


def test_harmless_files_without_named_tensors(tmp_path):
    for content in (torch.ones(3), [torch.ones(3)], {}, {"epoch": 3}, {1: torch.ones(2)}, {"model": {"x": 1}}, None):
        torch.save(content, tmp_path / "x.pth")
        assert child.weights(child.read(str(tmp_path / "x.pth"), 10**4)) == {}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_messages_say_what_is_wrong(tmp_path):
    for make, text in [(hostile_zip, "system"), (torch_script, "TorchScript"), (legacy_tar, "tar"), (zip_bomb, "bomb")]:
        make(tmp_path / "x.pth", tmp_path / "canary")
        with pytest.raises(child.Refused, match=text):
            child.read(str(tmp_path / "x.pth"), (tmp_path / "x.pth").stat().st_size)


@pytest.mark.parametrize(
    ("greed", "ending"),
    [
        ("bytearray(2**30)", "MemoryError"),
        ("while True: pass", ""),
        ("open(sys.argv[1], 'wb').write(bytes(2**25))", "File too large"),
    ],
)
def test_limits_of_the_child(tmp_path, greed, ending):
    script = f"import sys; from kdcli.importing import child as c; c.SPARE_SECONDS = 1; c.limit(1000)\n{greed}"
    command = [sys.executable, "-c", script, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ending in done.stderr if ending else done.returncode in (-signal.SIGXCPU, -signal.SIGKILL)


def test_the_second_wall_holds(tmp_path):
    """Code that got past the reader could not start programs, connect, or write outside its directory."""
    script = f"""
import os, socket, subprocess, sys
from kdcli.importing import child
inside, outside = {str(tmp_path / "in")!r}, {str(tmp_path / "out")!r}
os.mkdir(inside)
child.confine(inside)
attempts = [
    lambda: os.system("touch " + outside),
    lambda: subprocess.run(["touch", outside]),
    lambda: os.fork(),
    lambda: os.execv("/bin/true", ["true"]),
    lambda: socket.socket(),
    lambda: open(outside, "w"),
    lambda: os.open(outside, os.O_WRONLY | os.O_CREAT),
    lambda: open(inside + "/../out", "w"),
    lambda: os.mkdir(outside),
    lambda: os.rename(inside, outside),
    lambda: os.symlink("/etc", inside + "/link"),
]
for attempt in attempts:
    try:
        attempt()
    except child.Refused:
        print("refused")
open(inside + "/fine", "w").close()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.stdout == "refused\n" * 11, done.stderr
    assert os.listdir(tmp_path) == ["in"]
    assert os.listdir(tmp_path / "in") == ["fine"]
