"""`kd doctor`: a line a finding, a fix for each that needs one, the fitting exit code, and nothing left behind."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
import tomllib
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT, command, environment, finish, spawn

from kdcli import data
from kdcli.data import cifar, stl10
from kdcli.doctor import datasets, devices, machine, software, storage
from kdcli.doctor.finding import Finding, size
from kdcli.errors import BusyError, InputError


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("KD_DATA_DIR", raising=False)


def checks(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in document["checks"]}


def hole(path: Path, count: int) -> Path:
    """A file of `count` bytes that takes no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(count)
    return path


# ------------------------------------------------------------------------------------------------------- the command


def test_a_machine_in_order(kd, tmp_path):
    """Everything is named, in lines and in JSON; exit 0; the trial of the disk leaves nothing and makes no folder."""
    result = kd("doctor", "--json")
    assert result.code == 0, result.err
    found = checks(result.json)
    assert {"kd", "torch", "torchvision", "timm", "numpy", "cpu", "cores", "memory", "shared memory"} <= set(found)
    assert {"open files", "temporary", "clock", "terminal", "write", "disk", "file size", "data"} <= set(found)
    assert found["torch"]["facts"]["version"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["cpu"]["facts"]["precisions"] == ["fp32", "bf16"]
    assert found["disk"]["facts"]["free"] > 0
    assert all((check["level"] == "ok") or check["hint"] for check in result.json["checks"])
    lines = kd("doctor").out.splitlines()
    assert len(lines) == len(result.json["checks"])
    assert sum(" gpu " in line or " cuda:" in line for line in lines) >= 1
    assert list(tmp_path.iterdir()) == []
    quiet = kd("doctor", "--quiet").out.splitlines()
    assert all(line.split()[0] in ("warning", "problem") for line in quiet)


def test_a_real_process_is_quick_and_uses_no_network(tmp_path):
    """Ten seconds of processor time at most; a socket would be an error."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "def watch(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname'):\n"
        "        raise SystemExit(77)\n"
        "sys.addaudithook(watch)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    before = os.times()
    done = subprocess.run(
        command("doctor"), cwd=tmp_path, env={**environment(), "PYTHONPATH": path}, capture_output=True, check=False
    )
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert after.children_user + after.children_system - before.children_user - before.children_system < 10


@pytest.mark.parametrize(("level", "code", "exit_code"), [("warning", 3, 0), ("problem", 3, 3), ("problem", 5, 5)])
def test_only_problems_have_an_exit_code(level, code, exit_code, kd, monkeypatch):
    """A warning is 0; a problem leaves with its code, and one line that names it and the fix."""
    monkeypatch.setattr(
        devices, "devices", lambda: [Finding("thing", "is off\x1b[2J", level, "switch it on", code=code)]
    )
    result = kd("doctor")
    assert result.code == exit_code
    assert any(line.startswith(f"{level}") and "switch it on" in line for line in result.out.splitlines())
    assert "\x1b" not in result.out + result.err
    if exit_code:
        assert "thing: is off" in result.error
        assert "switch it on" in result.error
        assert kd("doctor", "--json").json["ok"] is False


def test_several_problems_are_counted(kd, monkeypatch):
    """The error line is about the first; the lines name all."""
    bad = [Finding("a", "is bad", "problem", "mend a", code=5), Finding("b", "is bad", "problem", "mend b", code=3)]
    monkeypatch.setattr(devices, "devices", lambda: bad)
    result = kd("doctor", "--quiet")
    assert result.code == 5
    assert "2 problems" in result.error
    assert "mend a" in result.error
    assert sum(line.startswith("problem") for line in result.out.splitlines()) == 2


# ---------------------------------------------------------------------------------------------------------- software


def test_the_floors_are_those_of_the_package():
    """Declared in pyproject.toml; repeated here because an installed package has none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    floors = dict(word.split(",")[0].split(">=") for word in project["dependencies"])
    assert floors.items() >= software.FLOORS.items()
    assert project["requires-python"] == f">={'.'.join(map(str, software.PYTHON))}"


@pytest.mark.parametrize(
    ("installed", "level", "part"),
    [
        ({"torch": "2.10.0+cu128", "torchvision": "0.25.0"}, "ok", "2.10.0"),
        ({"torch": "2.9.1"}, "problem", "too old"),
        ({"torch": "10.0"}, "ok", "10.0"),
        ({}, "problem", "not installed"),
    ],
)
def test_versions(installed, level, part, monkeypatch):
    """Compared as numbers; what is missing or too old is named with the command that mends it."""

    def version(name: str) -> str:
        if name in installed:
            return installed[name]
        raise software.PackageNotFoundError(name)

    monkeypatch.setattr(software, "version", version)
    monkeypatch.setattr(software, "requires", lambda name: ["torch==2.10.0", "numpy"])
    found = {finding.name: finding for finding in software.software()}
    assert found["torch"].level == level
    assert part in found["torch"].text
    assert found["timm"].level == "warning"


def test_torch_and_torchvision_that_do_not_belong_together(monkeypatch):
    """The usual accident of an upgrade: torchvision was built for another torch."""
    monkeypatch.setattr(software, "version", lambda name: {"torch": "2.11.0", "torchvision": "0.25.0"}.get(name, "99"))
    monkeypatch.setattr(software, "requires", lambda name: ["numpy", "torch (==2.10.0)"])
    found = {finding.name: finding for finding in software.software()}
    assert found["torchvision"].level == "problem"
    assert "made for torch 2.10.0" in found["torchvision"].text


# ----------------------------------------------------------------------------------------------------------- devices

Properties = namedtuple("Properties", "name major minor")


def test_gpus_are_tried(monkeypatch):
    """Each is named with memory and precisions; one that is full is a warning, one that cannot compute a problem."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties("A GPU", 9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ([70 << 30, 1 << 20, 70 << 30][index], 80 << 30))
    original = devices._precisions

    def precisions(device: torch.device) -> tuple[list[str], str]:
        if device.type == "cpu":
            return original(device)
        return ([], "fp32 does not work: no kernel image") if device.index == 2 else (["fp32", "bf16"], "")

    def memory(index: int) -> tuple[int, int]:
        if index == 3:
            raise RuntimeError("CUDA error: out of memory\nmore words")
        return [70 << 30, 1 << 20, 70 << 30][index], 80 << 30

    monkeypatch.setattr(devices, "_precisions", precisions)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    found = {finding.name: finding for finding in devices.devices()}
    assert [found[f"cuda:{i}"].level for i in range(4)] == ["ok", "warning", "problem", "problem"]
    assert "70.0 GiB of 80.0 GiB free, fp32 and bf16" in found["cuda:0"].text
    assert "no kernel image" in found["cuda:2"].text
    assert "out of memory" in found["cuda:3"].text
    assert all("\n" not in finding.line for finding in found.values())


def test_without_a_gpu_it_is_one_line(monkeypatch, tmp_path):
    """Fine in itself; a driver without a torch that can use it is a warning, unless the user hid the GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "version")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def gpus() -> list[Finding]:
        return [finding for finding in devices.devices() if finding.name != "cpu"]

    assert [(finding.name, finding.level) for finding in gpus()] == [("gpu", "ok")]
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.10  Thu\nGCC version: 12\n"
    )
    assert [(finding.level, "570.86.10" in finding.text) for finding in gpus()] == [("warning", True)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [finding.level for finding in gpus()] == ["ok"]


def test_a_torch_that_cannot_be_imported(monkeypatch):
    """A broken library is a problem with a line, not a traceback."""
    monkeypatch.setitem(sys.modules, "torch", None)
    found = devices.devices()
    assert [(finding.name, finding.level) for finding in found] == [("torch", "problem")]


# ----------------------------------------------------------------------------------------------------------- machine


def test_a_containers_share_of_the_processor(monkeypatch, tmp_path):
    """A quota below the cores is a warning that names the number of threads."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert machine.cores().level == "ok"
    for text, level in (("150000 100000", "warning"), ("max 100000", "ok"), ("6400000 100000", "ok"), ("junk", "ok")):
        (tmp_path / "cpu.max").write_text(f"{text}\n")
        assert machine.cores().level == level, text
    (tmp_path / "cpu.max").write_text("250000 100000")
    assert machine.cores().hint == "--threads 2"
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("100000")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert machine.cores().facts["quota"] == 1


def test_limits_of_memory(monkeypatch, tmp_path):
    """A container's limit counts, less what it uses already."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    before = machine.memory()
    (tmp_path / "memory.max").write_text("max")
    assert machine.memory().facts["limit"] is before.facts["limit"]
    (tmp_path / "memory.max").write_text(str(1 << 30))
    (tmp_path / "memory.current").write_text(str(1 << 29))
    found = machine.memory()
    assert (found.level, found.facts["limit"]) == ("warning", 1 << 29)


@pytest.mark.parametrize("version", [1, 2])
def test_copies_of_files_are_no_used_memory(monkeypatch, tmp_path, version):
    """A container that has read a data set has its limit full of pages which the system gives back at once."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    folder = tmp_path if version == 2 else tmp_path / "memory"
    folder.mkdir(exist_ok=True)
    limit, used, cached = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        limit, used, cached = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / limit).write_text(str(1 << 30))
    (folder / used).write_text(str(7 << 27))
    (folder / "memory.stat").write_text(f"anon 5\n{cached} {3 << 28}\nactive_file 7\n")
    assert machine.memory().facts["limit"] == (1 << 30) - (1 << 27)
    for text in ("", "junk", f"{cached} x", f"{cached} {1 << 31}"):
        (folder / "memory.stat").write_text(text)
        assert machine.memory().facts["limit"] in ((1 << 30) - (7 << 27), 1 << 30)


def test_limits_of_the_process(monkeypatch, tmp_path):
    """Shared memory of a container, open files, temporary files, and each with its fix."""
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(64 << 20, 0, 64 << 20))
    assert "shm-size" in (machine.shared_memory().hint or "")
    monkeypatch.setattr(machine, "SHARED", tmp_path / "none")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: os.stat(path))
    assert "--workers 0" in (machine.shared_memory().hint or "")
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (64, 64))
    assert "ulimit -n" in (machine.open_files().hint or "")
    monkeypatch.setattr(machine.tempfile, "TemporaryFile", (tmp_path / "none" / "file").open)
    found = machine.temporary()
    assert (found.level, found.code) == ("problem", 5)
    assert "TMPDIR" in (found.hint or "")


@pytest.mark.parametrize(("now", "level"), [(time.time(), "ok"), (0, "warning"), (-5e9, "warning"), (1e11, "warning")])
def test_the_clock(now, level, monkeypatch):
    """A date before kd was installed, or in another century, is a warning and nothing worse."""
    monkeypatch.setattr(machine.time, "time", lambda: now)
    assert machine.clock().level == level


# ----------------------------------------------------------------------------------------------------------- storage


def test_where_nothing_can_be_written(kd, tmp_path, monkeypatch):
    """A file in the way, a full disk, a read-only one: exit 5, and the reason in the system's words."""
    (tmp_path / "file").write_text("mine")
    for runs_dir in ("file", "file/runs"):
        result = kd("doctor", "--runs-dir", runs_dir)
        assert result.code == 5
        assert "--runs-dir" in result.error
    assert (tmp_path / "file").read_text() == "mine"
    before = sorted(tmp_path.iterdir())
    for number, word in ((28, "No space left"), (30, "Read-only"), (122, "quota")):

        def refuse(*_: Any, number: int = number) -> int:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(storage.durable.os, "write", refuse)
            found = storage.storage("runs")[0]
        assert (found.level, found.code) == ("problem", 5)
        assert word in found.text
    assert sorted(tmp_path.iterdir()) == before


def test_locks_that_do_not_hold(tmp_path, monkeypatch):
    """On some network disks a lock is granted twice: two runs could share a directory."""
    monkeypatch.setattr(storage.hold.__wrapped__.__globals__["fcntl"], "flock", lambda *_: None)
    found = storage.storage(str(tmp_path))[0]
    assert (found.level, found.code) == ("problem", 5)
    assert "locks" in found.text
    monkeypatch.undo()
    assert storage.storage(str(tmp_path))[0].level == "ok"
    with storage.hold(tmp_path), pytest.raises(BusyError), storage.hold(tmp_path):
        pass


Space = namedtuple("Space", "f_bavail f_frsize f_blocks f_files f_favail")


@pytest.mark.parametrize(
    ("free", "files", "level"),
    [
        (100 << 30, 10**6, "ok"),
        (1 << 30, 10**6, "warning"),
        (1 << 20, 10**6, "problem"),
        (100 << 30, 500, "warning"),
        (100 << 30, 0, "problem"),
        (100 << 30, None, "ok"),
    ],
)
def test_free_space_and_files(free, files, level, tmp_path, monkeypatch):
    """Bytes and inodes both run out; some file systems do not count the latter."""
    about = Space(free, 1, 1 << 40, 0 if files is None else 10**7, files or 0)
    monkeypatch.setattr(storage.os, "statvfs", lambda path: about)
    found = storage.storage(str(tmp_path))[1]
    assert (found.name, found.level) == ("disk", level)
    assert (found.hint is None) == (level == "ok")


def test_a_real_file_size_limit(tmp_path):
    """Under `ulimit -f` the trial fails like a run would: exit 5, with the fix."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    result = finish(spawn("doctor", cwd=tmp_path, preexec_fn=limit))
    assert result.code == 5
    assert "File too large" in result.error
    assert any(line.startswith("problem") and "file size" in line for line in result.out.splitlines())
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------------- data


def layouts(root: Path) -> None:
    """All four sets, whole as far as names and sizes go."""
    for layout in cifar.LAYOUTS.values():
        record = layout.label_bytes + cifar.PIXELS
        for name in layout.train:
            hole(root / layout.binary / name, layout.train_records * record)
        hole(root / layout.binary / layout.test, layout.test_records * record)
        (root / layout.binary / layout.names).write_text("names\n")
    for which, count in (("train", 5000), ("test", 8000)):
        hole(root / stl10.FOLDER / f"{which}_X.bin", count * stl10.PIXELS)
        hole(root / stl10.FOLDER / f"{which}_y.bin", count)
    (root / stl10.FOLDER / "class_names.txt").write_text("names\n")
    for wnid in ("n00000001", "n00000002"):
        hole(root / "tiny-imagenet-200" / "train" / wnid / "images" / f"{wnid}_0.JPEG", 9)
        for split in ("train", "val"):
            hole(root / "imagenet" / split / wnid / f"{split}_0.JPEG", 9)
    hole(root / "tiny-imagenet-200" / "val" / "images" / "val_0.JPEG", 9)
    (root / "tiny-imagenet-200" / "wnids.txt").write_text("n00000001\nn00000002\n")


def levels(root: Path) -> dict[str, str]:
    return {finding.name: finding.level for finding in datasets.datasets(str(root))}


def test_whole_data_sets_are_named(kd, tmp_path):
    """Each with its counts; subsets are said to be subsets."""
    layouts(tmp_path / "data")
    result = kd("doctor", "--data-dir", "data", "--json")
    assert result.code == 0, result.err
    found = checks(result.json)
    assert "50,000 + 10,000 images, binary layout" in found["cifar100"]["text"]
    assert found["cifar10"]["level"] == found["stl10"]["level"] == "ok"
    assert "5,000 + 8,000" in found["stl10"]["text"]
    for name in ("tinyimagenet", "imagenet"):
        assert found[name]["level"] == "warning"
        assert "subset" in found[name]["hint"]


@pytest.mark.parametrize(
    ("name", "path", "cut"),
    [
        ("cifar100", "cifar-100-binary/train.bin", True),
        ("cifar100", "cifar-100-binary/test.bin", False),
        ("cifar100", "cifar-100-binary/fine_label_names.txt", False),
        ("cifar10", "cifar-10-batches-bin/data_batch_4.bin", True),
        ("cifar10", "cifar-10-batches-bin/data_batch_1.bin", False),
        ("stl10", "stl10_binary/test_X.bin", True),
        ("stl10", "stl10_binary/train_y.bin", False),
        ("tinyimagenet", "tiny-imagenet-200/train/n00000002/images/n00000002_0.JPEG", False),
        ("imagenet", "imagenet/train/n00000001/train_0.JPEG", False),
    ],
)
def test_what_is_missing_or_cut_off_is_a_problem(name, path, cut, tmp_path):
    """The set is named, with exit code 3; the others stay as they were."""
    layouts(tmp_path)
    before = levels(tmp_path)
    if cut:
        os.truncate(tmp_path / path, (tmp_path / path).stat().st_size - 1)
    else:
        (tmp_path / path).unlink()
    assert levels(tmp_path) == {**before, name: "problem"}
    found = next(finding for finding in datasets.datasets(str(tmp_path)) if finding.name == name)
    assert found.code == 3
    assert found.hint


def test_the_python_layout_and_archives(tmp_path):
    """Pickles are judged by their size, and not opened; an archive is unpacked at the first use, where that can be."""
    layout = cifar.LAYOUTS["cifar100"]
    (tmp_path / layout.archives[1]).write_bytes(b"x")
    found = datasets.datasets(str(tmp_path))
    assert [(finding.name, finding.level) for finding in found] == [("cifar100", "ok")]
    assert "first use" in found[0].text
    hole(tmp_path / layout.python / "train", 155_000_000)
    hole(tmp_path / layout.python / "test", 31_000_000)
    assert levels(tmp_path) == {"cifar100": "problem"}
    hole(tmp_path / layout.python / "meta", 1500)
    assert levels(tmp_path) == {"cifar100": "ok"}
    os.truncate(tmp_path / layout.python / "test", 1000)
    assert levels(tmp_path) == {"cifar100": "problem"}


def test_data_folders(kd, tmp_path, monkeypatch):
    """None is fine as long as nobody named one; a named one has to be there; an empty one is worth a warning."""
    assert checks(kd("doctor", "--json").json)["data"]["level"] == "ok"
    result = kd("doctor", "--data-dir", "nowhere")
    assert result.code == 3
    assert "nowhere" in result.error
    (tmp_path / "empty").mkdir()
    assert checks(kd("doctor", "--data-dir", "empty", "--json").json)["data"]["level"] == "warning"
    monkeypatch.setenv("KD_DATA_DIR", "elsewhere")
    assert "elsewhere" in kd("doctor").error


@pytest.mark.parametrize("name", ["val", "test"])
def test_test_images_without_class_folders(name, tmp_path):
    """ImageNet as it comes: read as one set, it would have two classes, `train` and `val`."""
    for wnid in ("n00000001", "n00000002"):
        hole(tmp_path / "imagenet" / "train" / wnid / "0.JPEG", 9)
    hole(tmp_path / "imagenet" / name / "ILSVRC2012_val_00000001.JPEG", 9)
    assert levels(tmp_path) == {"imagenet": "problem"}
    for set_, root in (("imagenet", tmp_path), (f"folder:{tmp_path / 'imagenet'}", tmp_path)):
        with pytest.raises(InputError, match="no class folders"):
            data.load(set_, root)


def test_sizes_for_people():
    shown = [size(count) for count in (0, 1023, 1536, 200 << 20, 5 << 30, 3 << 40, 1 << 60)]
    assert shown == ["0 B", "1023 B", "1.5 KiB", "200 MiB", "5.0 GiB", "3.0 TiB", "1,048,576.0 TiB"]
