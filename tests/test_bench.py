"""`kd bench`: its answer adds up, its counts are exact, both paths learn the same, and nonsense is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdcli import methods, presets
from kdcli.bench import agreement, bench, bench_table
from kdcli.bench.ceilings import Prober
from kdcli.bench.count import Traffic, counted, counted_step, least_bytes
from kdcli.bench.images import images_for
from kdcli.bench.ours import Ours
from kdcli.bench.parts import architectures, build
from kdcli.engine.device import Device
from kdcli.errors import InputError, UsageError
from kdcli.models.folding import count_folded
from kdcli.models.network import macs, stage_shapes
from kdcli.output import Story
from kdcli.request import Request
from kdcli.specs import RunSpec

CPU = Device(torch.device("cpu"), "fp32", 1)
QUIET = Story(quiet=True)
TINY = ["--dataset", "digits", "--image-size", "8", "--batch-size", "15", "--device", "cpu", "--threads", "1"]
PAIR = ["--teacher", "resnet14", "--student", "resnet8"]
FAST = ["--steps", "2", "--rounds", "2"]


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings of small products and copies: they take a second otherwise, and are not what is tested."""
    monkeypatch.setattr("kdcli.bench.ceilings._SIDES", {False: (64, 256), True: (64, 256)})
    monkeypatch.setattr("kdcli.bench.ceilings._COPY", {False: 2**21, True: 2**21})
    monkeypatch.setattr("kdcli.bench.ceilings._SECONDS", {False: 0.01, True: 0.01})


def spec(method: str = "kd", **changes: Any) -> RunSpec:
    """A resolved spec: resnet14 teaching resnet8 on the digits at 8 pixels."""
    flags = {
        "method": method,
        "teacher": "resnet14",
        "student": "resnet8",
        "data.dataset": "digits",
        "data.image_size": 8,
        "train.batch_size": 15,
        "system.device": "cpu",
        "system.threads": 1,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    given = {key: value for key, value in flags.items() if value is not None}
    return methods.resolve(presets.resolve("distill", Request(given, [], [], False, False, True)))


def ours(of: RunSpec) -> Ours:
    """The fast path of a spec, ready to step."""
    dataset, _ = images_for(of, QUIET)
    return Ours(of, dataset, build(of, dataset, CPU, fold=True), CPU, lambda text: None)


# ---------------------------------------------------------------------------------------------------------- the answer


def consistent(document: dict[str, Any]) -> None:
    """Whatever was timed: the parts add up, quotients are those of their numbers, fractions are fractions."""
    assert document["command"] == "bench"
    assert document["ok"]
    mine, work, ceilings = document["ours"], document["work"], document["ceilings"]
    times = mine["ms_per_step"]
    assert 0 < times["min"] <= times["median"] <= times["max"]
    assert mine["images_per_second"] == pytest.approx(
        1e3 * document["configuration"]["batch_size"] / times["median"], rel=1e-3
    )
    assert sum(mine["split_ms"].values()) == pytest.approx(mine["split_step_ms"], abs=1e-3)
    assert set(mine["split_ms"]) == {"data", "teacher", "student", "method", "optimiser", "loop"}
    assert all(mine["split_ms"][name] > 0 for name in ("data", "student", "optimiser", "loop"))
    assert times["min"] <= mine["split_step_ms"] <= times["max"]
    assert mine["peak_mib"] > 0
    assert work["least_bytes"] > 0
    floor, reached = document["floor"], document["reached"]
    assert floor["ms"] == max(floor["arithmetic_ms"], floor["memory_ms"]) > 0
    assert floor["arithmetic_ms"] == pytest.approx(1e3 * work["macs"] / ceilings["macs_per_second"], abs=1e-3)
    assert floor["memory_ms"] == pytest.approx(1e3 * work["least_bytes"] / ceilings["bytes_per_second"], abs=1e-3)
    assert floor["fraction"] == pytest.approx(floor["ms"] / times["median"], abs=1e-3)
    assert 0 < floor["fraction"] < 1.5
    assert 0 < reached["arithmetic"] < 1.5
    assert 0 < reached["bandwidth"] < 1.5


def test_the_answer_of_both_paths(kd, tmp_path: Path):
    """One JSON document on stdout, a line a round on stderr, and nothing on disk."""
    result = kd("bench", "--method", "kd", *PAIR, *TINY, *FAST, "--against", "naive", "--json")
    assert result.code == 0, result.err
    document = result.json
    consistent(document)
    assert document["schema"] == 1
    assert document["rounds"] == 2
    assert document["configuration"]["made_up"] is False
    assert (document["configuration"]["teacher"], document["configuration"]["student"]) == ("resnet14", "resnet8")
    assert document["ours"]["steps_per_round"] == document["naive"]["steps_per_round"] == 2
    theirs, ratio = document["naive"]["ms_per_step"], document["ratio"]
    assert 0 < theirs["min"] <= theirs["median"] <= theirs["max"]
    assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    assert theirs["min"] / document["ours"]["ms_per_step"]["max"] <= ratio["min"] + 1e-3
    assert [line.split(":")[0] for line in result.err.splitlines() if line.startswith("round")] == [
        "round 1 of 2",
        "round 2 of 2",
    ]
    assert list(tmp_path.iterdir()) == []
    text = bench_table(document)
    for word in ("ours", "naive", "times as fast", "teacher", "method", "loop", "floor", "resnet14 → resnet8"):
        assert word in text


def test_the_table_is_the_answer_without_json(kd):
    """A student alone: no teacher is timed, and the number of steps is found by itself."""
    result = kd("bench", "--method", "none", "--student", "resnet8", *TINY, "--steps", 1, "--rounds", 1, "--quiet")
    assert result.code == 0, result.err
    assert result.out.startswith("none, resnet8, digits at 8 pixels, batches of 15, fp32, CPU")
    assert "naive" not in result.out
    assert result.err == ""


def test_the_round_is_about_two_seconds_long_unless_asked(monkeypatch: pytest.MonkeyPatch):
    """And never shorter than three steps."""
    monkeypatch.setattr("kdcli.bench.measure._SECONDS", 1e-9)
    assert bench(spec(), QUIET, rounds=1)["ours"]["steps_per_round"] == 3
    monkeypatch.setattr("kdcli.bench.measure._SECONDS", 0.1)
    assert bench(spec(), QUIET, rounds=1)["ours"]["steps_per_round"] >= 3


@pytest.mark.parametrize(
    ("method", "changes", "against"),
    [
        ("vsd", {}, None),  # a teacher with heads, at another scale
        ("mlkd", {"data__image_size": 16}, "naive"),  # further views, one of them from workers of its own
        ("ofd", {"method__teacher_bn": "batch"}, None),  # a teacher that must not be folded
        ("dgkd", {"assistant": ("resnet8",)}, None),  # several teachers
        ("dml", {"teacher": None}, None),  # none
        ("kd", {"system__precision": "bf16", "train__optimizer": "adamw"}, "naive"),
    ],
)
def test_methods_of_every_kind(method: str, changes: dict[str, Any], against: str | None):
    """They run, and what they answer is consistent."""
    document = bench(spec(method, **changes), QUIET, against=against, steps=2, rounds=1)
    consistent(document)
    assert ("ratio" in document) == (against is not None)
    assert (document["ours"]["split_ms"]["teacher"] == 0) == (method == "dml")


def test_images_are_made_up_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In the shape of the data set, and it is said."""
    monkeypatch.setattr("kdcli.bench.images._MOST", 2**20)
    told: list[str] = []
    story = Story(quiet=True)
    monkeypatch.setattr(story, "note", told.append)
    of = spec(data__dataset="cifar100", data__data_dir=str(tmp_path), data__image_size=16)
    dataset, made_up = images_for(of, story)
    assert made_up
    assert len(dataset.classes) == 100
    assert dataset.train.images is not None
    assert dataset.train.images.shape[1:] == (3, 16, 16)
    assert dataset.train.images.nbytes <= 2**20
    assert len(told) == 1
    assert "noise of the shape of cifar100" in told[0]
    with pytest.raises(InputError):
        images_for(spec(data__dataset=f"folder:{tmp_path / 'none'}"), story)


# ---------------------------------------------------------------------------------------------------------- the counts


def test_multiply_accumulates_of_a_step():
    """KD's: the teacher's once, the student's three times, but for the gradient of the images, which nobody asks for."""
    fast = ours(spec())
    fast.warm_up()
    counts, _ = counted_step(fast)
    student, teacher = fast.parts.student, fast.parts.teacher
    assert isinstance(teacher, nn.Module)
    stem = next(module for module in student.modules() if isinstance(module, nn.Conv2d))
    first = stem.weight.numel() * 8 * 8
    assert counts == 15 * (3 * macs(student, 8) - first + macs(teacher, 8))
    fast.close()


def test_grouped_convolutions_are_counted_once_a_gradient():
    """torch's own formula takes the weight's gradient of a depthwise convolution for that of a full one."""
    layer = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    images = torch.randn(2, 8, 4, 4, requires_grad=True)
    one = 2 * 8 * 9 * 4 * 4
    assert counted(lambda: layer(images))[0] == one
    assert counted(lambda: layer(images).sum().backward())[0] == 3 * one


def test_bytes_of_operations_made_by_hand():
    """Inputs read, outputs written, what changes in place both; views and empty memory move nothing."""
    a, b = torch.randn(100, 10), torch.randn(100, 10)
    row = torch.randn(1, 10).expand(100, 10)

    def moved(function: Any) -> int:
        with Traffic() as traffic:
            function()
        return traffic.bytes

    whole = 4 * 1000
    assert moved(lambda: a + b) == 3 * whole
    assert moved(lambda: a.add_(b)) == 3 * whole
    assert moved(lambda: torch.add(a, b, out=torch.empty(100, 10))) == 4 * whole  # the target counts as read too
    assert moved(lambda: a.zero_()) == 2 * whole
    assert moved(lambda: a.t().reshape(-1)[2:].unsqueeze(0)) == 2 * whole  # columns in a row are a copy
    assert moved(lambda: a.view(10, 100).permute(1, 0).detach().expand(2, 100, 10)) == 0
    assert moved(lambda: torch.empty_like(a)) == 0
    assert moved(lambda: a + row) == 2 * whole + 40
    assert moved(lambda: a.sum()) == whole + 4


def test_the_least_bytes_of_a_step():
    """Typed out for KD: weights, gradients and momenta twice, the images of both, and all maps."""
    fast = ours(spec())
    fast.warm_up()
    student, teacher = fast.parts.student, fast.parts.teacher
    assert isinstance(teacher, nn.Module)
    learned = sum(p.numel() for p in student.parameters())
    known = sum(p.numel() for name, p in teacher.named_parameters() if "bn" not in name and "downsample.1" not in name)
    assert count_folded(teacher)[0] == count_folded(teacher)[1]  # so no BatchNorm is read
    images = 15 * 3 * 8 * 8
    maps = [15 * sum(c * h * w for c, h, w in stage_shapes(n, 8)) for n in (student, teacher)]  # type: ignore[arg-type]
    assert least_bytes(fast) == 4 * (2 * 3 * learned + known + 2 * images + 4 * maps[0] + 2 * maps[1])
    assert least_bytes(fast) < counted_step(fast)[1]
    fast.close()


def test_ceilings_only_rise():
    """The best of all measurements counts."""
    prober = Prober(CPU)
    first = prober.probe()
    seen = (first.macs, first.bytes)
    again = prober.probe()
    assert again.macs >= seen[0] > 0
    assert again.bytes >= seen[1] > 0
    assert again.side in (64, 256)


# ----------------------------------------------------------------------------------------------------- what is compared


def test_both_paths_learn_the_same():
    """Twenty steps at the recipe's own rate on the same batches: losses equal to fp32 rounding, and they fall."""
    of = spec(data__dataset="synthetic", data__image_size=16, train__batch_size=32)
    pairs = agreement(of)
    assert len(pairs) == 20
    for mine, theirs in pairs:
        assert mine == pytest.approx(theirs, rel=3e-5)
    assert pairs[-1][0] < 0.9 * pairs[0][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("kd", {"system__compile": True}),
        ("vsd", {"system__compile": True}),
        ("tas", {"system__compile": True}),
        ("vsd", {}),
        ("hsakd", {}),
        ("sskd", {}),
        ("crd", {}),
        ("reviewkd", {"method__warmup": 1, "train__lr": 0.004}),
        ("slkd", {}),
        ("tas", {}),
        ("rekd", {"method__warmup": 1}),
    ],
)
def test_both_paths_learn_the_same_by_every_kind_of_method(method: str, settings: dict[str, Any]):
    """At a rate at which the networks move without multiplying every rounding: the recipe's 0.05 makes 1e-3 of 1e-7."""
    images = {"data__dataset": "synthetic", "data__image_size": 16, "train__batch_size": 32}
    pairs = agreement(spec(method, **{"train__lr": 0.002, **images, **settings}))
    assert len(pairs) == 20
    for mine, theirs in pairs:
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert abs(pairs[-1][0] - pairs[0][0]) > 1e-2 * pairs[0][0]


def test_the_fast_path_is_that_of_a_run(monkeypatch: pytest.MonkeyPatch):
    """A folded teacher, channels-last networks, the middle of the training, and no directory."""
    fast = ours(spec())
    at = fast.training.at
    assert at == fast.training.total // 2
    fast.warm_up()
    assert fast.training.at > at
    teacher = fast.parts.teacher
    assert isinstance(teacher, nn.Module)
    assert count_folded(teacher)[0] > 0
    weights = [p for p in fast.parts.student.parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    backward = torch.Tensor.backward
    parts = fast.round(3)
    assert torch.Tensor.backward is backward
    assert sum(parts.parts.values()) < parts.whole
    assert not os.path.exists(fast.training.job.run.directory)
    fast.training.at = fast.training.total - 1
    fast.step(fast.batch())  # it goes back to the middle instead of past the end
    assert fast.training.at == at + 1
    fast.close()


def test_a_checkpoint_stands_for_its_architecture(teachers: Path):
    """Its weights make no difference to speed, so none are read."""
    assert architectures(spec(teacher=str(teachers / "kd"))).teacher == "resnet14"


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--steps", "0"], 2, "--steps"),
        (["--rounds", "0"], 2, "--rounds"),
        (["--against", "mine"], 2, "naive"),
        (["--nproc", "2"], 2, "--nproc"),
        (["--against", "naive", "--ema", "0.9"], 2, "--ema"),
        (["--against", "naive", "--accumulate", "2"], 2, "--accumulate"),
        (["--against", "naive", "--mixup", "0.8"], 2, "--mixup"),
        (["--batch-size", "1"], 2, "--batch-size"),
        (["--batch-size", "5000"], 2, "--batch-size"),
        (["--teacher", "resnet41"], 2, "resnet44"),
        (["--teacher", "gone/teacher.safetensors"], 3, "gone"),
        (["--dataset", "folder:gone"], 3, "gone"),
    ],
)
def test_nonsense_is_refused(words: list[str], code: int, told: str, kd):
    """In one line, before anything is timed."""
    result = kd("bench", "--method", "kd", *PAIR, *TINY, *words)
    assert result.code == code
    assert told in result.error
    assert "round 1" not in result.err


def test_a_naive_loop_without_its_parts_is_not_timed():
    """The check is made from Python too."""
    with pytest.raises(UsageError, match="naive"):
        bench(spec(train__clip_grad=1.0), QUIET, against="naive")
