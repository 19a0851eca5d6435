"""The spec: documented fields, flags, digests, presets, and the teacher's spec that follows from a student's."""

from __future__ import annotations

import json
import shlex
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import typer.main
from pydantic import BaseModel

from kdcli import cli, methods, presets, teachers
from kdcli.commandline import command_line
from kdcli.errors import UsageError
from kdcli.request import Request, parse_tuple
from kdcli.specs import RunSpec, Section, field_at, field_paths, validate

METHODS = list(methods.SHIPPED)
# What does not change the numbers a run computes: written out here, so that adding to it is a decision.
ASIDE = {
    "baseline",
    "data.data_dir",
    "data.download",
    "data.resident_mib",
    "system.device",
    "system.threads",
    "system.workers",
    "system.data_timeout",
    "system.cuda_graphs",
    "system.nproc",
    "system.rank_timeout",
    "system.out",
    "system.runs_dir",
    "system.overwrite",
    "system.checkpoint_every",
    "system.max_minutes",
    "system.requeue",
    "system.tensorboard",
    "system.wandb",
}


def request(*names: str, sets: tuple[str, ...] = (), **flags: Any) -> Request:
    """What a command line with these presets, `--set`s and flags (by leaf name) asks for."""
    paths = field_paths()
    given = {paths[leaf]: value for leaf, value in flags.items()}
    return Request(given, list(names), list(sets), dry_run=False, json=False, quiet=True)


def resolved(command: str, *names: str, sets: tuple[str, ...] = (), **flags: Any) -> RunSpec:
    return methods.resolve(presets.resolve(command, request(*names, sets=sets, **flags)))


def sections(model: type[BaseModel] = RunSpec) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = [model]
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found += sections(field.annotation)
    return found


# -------------------------------------------------------------------------------------------------- fields and flags


@pytest.mark.parametrize("model", sections(), ids=lambda model: model.__name__)
def test_every_setting_of_a_run_is_documented(model: type[BaseModel]) -> None:
    """The docstring under a field is its help text: a sentence that ends."""
    assert model.__doc__
    for name, field in model.model_fields.items():
        assert field.description, name
        assert field.description.rstrip().endswith((".", ":")), name


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_a_method_is_documented(name: str) -> None:
    """The same for methods, whose Spec carries the method's own name as default."""
    spec = methods.method_class(name).Spec
    assert spec.__doc__
    for key, field in spec.model_fields.items():
        assert field.description, key
        assert field.description.rstrip().endswith("."), key
    assert spec.model_fields["name"].default == name


def test_leaf_names_are_unique() -> None:
    """A flag is a field's last name, so no two sections may share one."""

    def leaves(model: type[BaseModel]) -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            nested = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
            found += leaves(field.annotation) if nested else [name]
        return found

    names = [name for name in leaves(RunSpec) if name != "command"]
    assert len(names) == len(set(names))
    assert set(field_paths()) == set(names)


def test_every_setting_has_a_flag_with_its_help() -> None:
    """Each field is an option of at least one training command (the encoder is an argument), help text included."""
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    options: dict[str, str] = {}
    for name in ("pretrain-teacher", "distill", "fewshot", "linear-probe"):
        for parameter in commands[name].params:
            for spelling in parameter.opts:
                options[spelling] = getattr(parameter, "help", None) or ""
    for leaf, path in field_paths().items():
        if leaf in ("encoder", "ratio"):
            continue
        flag = f"--{leaf.replace('_', '-')}"
        assert flag in options, flag
        if leaf != "dataset":  # linear-probe's own is repeatable
            assert options[flag].startswith(" ".join((field_at(path).description or "").split())), flag


def test_distill_has_every_flag_that_concerns_it() -> None:
    """The main command lacks only the linear probe's settings."""
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    there = {spelling for parameter in commands["distill"].params for spelling in parameter.opts}
    missing = {leaf for leaf in field_paths() if f"--{leaf.replace('_', '-')}" not in there}
    assert missing == {"normalization", "batchnorm", "cached", "encoder"}


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("assignment", "field", "hint"),
    [
        ("train.epoch=3", "train.epoch", "epochs"),
        ("data.dataste=digits", "data.dataste", "dataset"),
        ("system.thread=1", "system.thread", "threads"),
        ("trian.epochs=3", "trian", "train"),
        ("epochs=3", "epochs", "train.epochs"),
        ("data.batch_size=3", "data.batch_size", "train.batch_size"),
        ("method.lamda4=1", "method.lamda4", "lambda4"),
        ("method.teacher_scales=2", "method.teacher_scales", "teacher_scale"),
    ],
)
def test_an_unknown_setting_suggests_the_nearest(assignment: str, field: str, hint: str) -> None:
    """The dotted name that was wrong, and the one that was probably meant; exit code 2."""
    with pytest.raises(UsageError) as problem:
        resolved("distill", method="vsd", teacher="wrn40_2", student="wrn16_2", sets=(assignment,))
    assert problem.value.field == field
    assert hint in (problem.value.hint or "")
    assert problem.value.code == 2


@pytest.mark.parametrize(
    ("assignment", "field"),
    [
        ("train.epochs=0", "train.epochs"),
        ("train.lr=-1", "train.lr"),
        ("train.lr=NaN", "train.lr"),
        ("train.milestones=[0.9,0.5]", "train.milestones"),
        ("train.optimizer=adam", "train.optimizer"),
        ("seed=-1", "seed"),
        ("data.ratio=0", "data.ratio"),
        ("method.lambda1=-1", "method.lambda1"),
        ("method.teacher_scale=3", "method.teacher_scale"),
        ("method.transform=rot5", "method.transform"),
        ("method.teacher_transform=perm4", "method.teacher_transform"),
        ("method.tau_kd=0", "method.tau_kd"),
        ("method.stages=0", "method.stages"),
    ],
)
def test_a_value_out_of_range_names_its_setting(assignment: str, field: str) -> None:
    """One usage error with the dotted name, whether the setting is the run's or the method's."""
    with pytest.raises(UsageError) as problem:
        resolved("distill", method="vsd", teacher="wrn40_2", student="wrn16_2", sets=(assignment,))
    assert problem.value.field == field


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ({"method": "kd", "student": "wrn16_2"}, "--teacher"),
        ({"method": "vsd", "student": "wrn16_2"}, "--teacher"),
        ({"method": "none", "teacher": "wrn40_2", "student": "wrn16_2"}, "--teacher"),
        ({"method": "kd", "teacher": "wrn40_2"}, "--student"),
        ({"method": "kdd", "teacher": "wrn40_2", "student": "wrn16_2"}, "method"),
        ({"method": "kd", "teacher": "wrn40_2", "student": "squeezenet"}, "--student"),
    ],
)
def test_networks_and_methods_that_do_not_go_together(flags: dict[str, Any], field: str) -> None:
    """A missing or superfluous teacher, a missing student, an unknown method or network."""
    with pytest.raises(UsageError) as problem:
        resolved("distill", **flags)
    assert problem.value.field == field


# ------------------------------------------------------------------------------------------------------------- digest

BASE = {"method": {"name": "vsd"}, "teacher": "wrn40_2", "student": "wrn16_2"}
# Values for the fields whose type does not say what else they could be.
OTHER = {
    "method": {"name": "vsd", "lambda4": 1.0},
    "teacher": "resnet32x4",
    "student": "resnet8x4",
    "assistant": ["resnet8x4"],
    "teacher_taps": ["a", "b"],
    "student_taps": ["a", "b"],
    "encoder": "runs/x",
    "data.dataset": "digits",
    "data.data_dir": "elsewhere",
    "data.image_size": 64,
    "data.train_fraction": 0.5,
    "data.ratio": 0.5,
    "data.val_fraction": 0.1,
    "data.rand_augment": "rand-m9-mstd0.5-inc1",
    "data.erasing": 0.25,
    "data.mix_prob": 0.5,
    "data.mix_switch": 0.25,
    "train.momentum": 0.5,
    "train.gamma": 0.5,
    "train.label_smoothing": 0.1,
    "train.milestones": [0.5, 0.75],
    "train.ema": 0.9,
    "system.device": "cpu",
    "system.out": "elsewhere",
    "system.runs_dir": "elsewhere",
    "system.wandb": "project",
}


def other_value(path: str) -> Any:
    """A valid value of the field that is not the one it has in BASE."""
    if path in OTHER:
        return OTHER[path]
    field = field_at(path)
    kind = field.annotation
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(a for a in typing.get_args(kind) if a is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        return next(choice for choice in typing.get_args(kind) if choice != field.default)
    if kind is bool:
        return not field.default
    assert kind in (int, float), f"{path}: say in OTHER what else it could be"
    return (field.default or 1) + 1


@pytest.mark.parametrize("path", sorted(field_paths().values()))
def test_the_digest_reacts_to_what_is_computed_and_to_nothing_else(path: str) -> None:
    """Every field changes the digest, except paths, threads, workers, devices, checkpoints and the like."""
    base = validate(RunSpec, BASE)
    changed = validate(RunSpec, presets.put(BASE, path, other_value(path)))
    assert changed != base
    assert (changed.digest() == base.digest()) is (path in ASIDE)


@pytest.mark.parametrize(
    ("dataset", "size", "mib", "another"),
    [
        ("cifar100", None, 0, False),  # always held as they are
        ("cifar100", 64, 1024, False),  # 586 MiB
        ("cifar100", 64, 500, True),
        ("cifar100", 224, 512, True),  # the training images do not fit in any case, the test images by default
        ("cifar100", 224, 8192, True),
        ("digits", 8, 0, False),
        ("digits", None, 0, True),  # their own side is 8 and not 32
        ("stl10", None, 0, False),
        ("stl10", 64, 0, True),
        ("tinyimagenet", None, 0, True),
        ("folder:x", 32, 0, True),
        ("folder:x", 224, 0, False),  # always streamed
        ("imagenet", 64, 0, False),
        ("synthetic", 64, 0, False),
    ],
)
def test_room_for_images_counts_where_it_changes_them(dataset: str, size: int | None, mib: int, another: bool) -> None:
    """A set whose images come out alike is the same run, however many are held."""
    data = {"dataset": dataset, "image_size": size}
    base = validate(RunSpec, {**BASE, "data": data})
    changed = validate(RunSpec, {**BASE, "data": {**data, "resident_mib": mib}})
    assert "resident_mib" not in base.identity()["data"]
    assert (changed.digest() != base.digest()) is another


@pytest.mark.parametrize("name", METHODS)
def test_the_digest_reacts_to_every_setting_of_the_method(name: str) -> None:
    """Resolved settings are in the identity one by one, defaults included."""
    teacher = {"teacher": "wrn40_2"} if methods.method_class(name).needs_teacher else {}
    spec = resolved("distill", method=name, student="wrn16_2", **teacher)
    assert set(spec.identity()["method"]) == set(methods.method_class(name).Spec.model_fields)
    for key in spec.method:
        changed = spec.model_copy(update={"method": {**spec.method, key: "other"}})
        assert changed.digest() != spec.digest(), key


def test_the_command_is_part_of_the_identity() -> None:
    """A teacher's run and a student's never share a directory."""
    assert validate(RunSpec, BASE).digest() != validate(RunSpec, {**BASE, "command": "pretrain-teacher"}).digest()


def test_spellings_of_a_network_are_one_run() -> None:
    """WRN-40-2, wrn_40_2 and wrn40_2 have one digest, as teacher and as student."""
    digests = {
        resolved("distill", method="kd", teacher=teacher, student=student).digest()
        for teacher, student in [("wrn40_2", "wrn16_2"), ("WRN-40-2", "wrn_16_2"), ("wrn_40_2", "WRN-16-2")]
    }
    assert len(digests) == 1


def test_resolving_shows_every_default_and_changes_nothing_twice() -> None:
    """After `resolve` nothing is left open: rates and nesterov have values; resolving again changes nothing."""
    for command in ("distill", "pretrain-teacher"):
        for name in METHODS:
            given = {"method": name, "student": "mobilenetv2"}
            if command == "pretrain-teacher" or methods.method_class(name).needs_teacher:
                given["teacher"] = "wrn40_2"
            spec = resolved(command, **given)
            assert spec.train.lr is not None
            assert spec.train.nesterov is not None
            assert methods.resolve(spec).identity() == spec.identity()


@pytest.mark.parametrize(
    ("student", "flags", "lr", "teacher_lr"),
    [
        ("wrn16_2", {}, 0.05, 0.05),
        ("mobilenetv2", {}, 0.01, 0.05),
        ("shufflenetv2", {"teacher": "mobilenetv2"}, 0.01, 0.01),
        ("mobilenetv2", {"lr": 0.2}, 0.2, 0.2),
        ("mobilenetv2", {"lr": 0.2, "teacher_lr": 0.1}, 0.2, 0.1),
        ("mobilenetv2", {"base_lr": 0.3}, 0.01, 0.3),
    ],
)
def test_learning_rates_follow_the_network(student: str, flags: dict[str, Any], lr: float, teacher_lr: float) -> None:
    """0.05, and 0.01 for light networks, each network by its own kind; an explicit rate wins for both."""
    spec = resolved("distill", student=student, **{"method": "kd", "teacher": "wrn40_2", **flags})
    assert (spec.train.lr, spec.train.teacher_lr) == (lr, teacher_lr)
    assert teachers.spec_for(spec).train.lr == teacher_lr


@pytest.mark.parametrize(("name", "nesterov"), [("none", False), ("kd", False), ("vsd", True)])
def test_nesterov_follows_the_method(name: str, nesterov: bool) -> None:
    """Off in the CRD code base's recipe, on in HSAKD's; an explicit choice wins."""
    teacher = {} if name == "none" else {"teacher": "wrn40_2"}
    given = {"method": name, "student": "wrn16_2", **teacher}
    assert resolved("distill", **given).train.nesterov is nesterov
    assert resolved("distill", nesterov=not nesterov, **given).train.nesterov is not nesterov


@pytest.mark.parametrize(("dataset", "nesterov"), [("cifar100", True), ("imagenet", False)])
@pytest.mark.parametrize("command", ["distill", "pretrain-teacher"])
def test_hsakd_has_nesterov_momentum_where_its_scripts_have(command: str, dataset: str, nesterov: bool) -> None:
    student = {"student": "wrn16_2"} if command == "distill" else {}
    found = resolved(command, method="hsakd", teacher="wrn40_2", dataset=dataset, **student)
    assert found.train.nesterov is nesterov
    if student:
        assert teachers.spec_for(found).train.nesterov is nesterov


# ------------------------------------------------------------------------------------------------------------ presets


def commands_of(name: str) -> dict[str, Any]:
    """The command a preset is for, and the networks to add where it leaves them open."""
    values = presets.read(name)
    if name == "recipes/probe" or values.get("command") == "linear-probe":
        return {"command": "linear-probe", "encoder": values.get("encoder", "runs/x")}
    flags: dict[str, Any] = {"command": "distill"}
    if "student" not in values:
        flags["student"] = "resnet8"
    return flags


def test_there_are_presets() -> None:
    """The recipes, the quickstart, and at least one preset of the method that is ours."""
    names = presets.names()
    assert {"quickstart", "recipes/cifar", "recipes/probe"} <= set(names)
    assert any(name.startswith("vsd/") for name in names)


@pytest.mark.parametrize("name", sorted(presets.names()))
def test_every_shipped_preset_resolves(name: str) -> None:
    """It is valid, its method's settings included, says what it is, and resolving it again changes nothing."""
    flags = commands_of(name)
    command = flags.pop("command")
    spec = presets.resolve(command, request(name, **flags))
    assert presets.about(name).get("title")
    if command != "linear-probe":
        spec = methods.resolve(spec)
        assert methods.resolve(spec).digest() == spec.digest()
    for key, value in presets.read(name).get("train", {}).items():
        found = getattr(spec.train, key)
        assert (list(found) if isinstance(found, tuple) else found) == value, key


@pytest.mark.parametrize("name", sorted(n for n in presets.names() if presets.read(n).get("teacher")))
def test_the_teacher_of_a_preset_is_found_again(name: str) -> None:
    """`kd pretrain-teacher --preset P` trains the teacher that `kd distill --preset P` looks for."""
    student = resolved("distill", name, **({} if presets.read(name).get("student") else {"student": "resnet8"}))
    assert teachers.spec_for(student).identity() == resolved("pretrain-teacher", name).identity()


def test_every_data_set_has_a_recipe() -> None:
    """Bare `kd distill --dataset D` uses the standard recipe of D."""
    epochs = {"cifar100": 240, "cifar10": 240, "tinyimagenet": 200, "imagenet": 100, "digits": 30, "folder:x": 100}
    for dataset, expected in epochs.items():
        spec = resolved("distill", dataset=dataset, student="resnet8")
        assert spec.train.epochs == expected
        assert presets.recipe_for(dataset) in {n.removeprefix("recipes/") for n in presets.names()}


def test_later_sources_win(tmp_path: Path) -> None:
    """defaults < recipe < presets in order < flags < `--set`; another method's name drops the first one's settings."""
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text(
        "[method]\nname = 'vsd'\nlambda4 = 1\n[train]\nepochs = 3\ngamma = 0.5\nbatch_size = 16\nmin_lr = 0.5\n"
    )
    two.write_text("[train]\nepochs = 4\ngamma = 0.25\nbatch_size = 32\n")
    names = (str(one), str(two))
    spec = presets.resolve(
        "distill", request(*names, student="resnet8", gamma=0.75, batch_size=8, sets=("train.batch_size=4",))
    )
    train = spec.train
    assert (train.min_lr, train.epochs, train.gamma, train.batch_size) == (0.5, 4, 0.75, 4)
    assert spec.method == {"name": "vsd", "lambda4": 1}
    other = presets.resolve("distill", request(*names, student="resnet8", method="kd"))
    assert other.method == {"name": "kd"}


# ---------------------------------------------------------------------------------------------------------- teachers

VARIANTS = [
    {},
    {"lr": 0.1},
    {"epochs": 7, "batch_size": 32},
    {"max_steps": 5},
    {"nesterov": True},
    {"nesterov": False},
    {"dataset": "digits"},
    {"train_fraction": 0.5, "val_fraction": 0.1},
    {"label_smoothing": 0.1, "schedule": "cosine"},
    {"pretrained": True, "precision": "bf16"},
    {"rand_augment": "rand-m9", "erasing": 0.25, "decay": "weights", "warmup_lr": 1e-6},
]


@pytest.mark.parametrize("student", ["wrn16_2", "mobilenetv2", "shufflenetv1"])
@pytest.mark.parametrize("teacher", ["wrn40_2", "WRN-40-2", "mobilenetv2"])
@pytest.mark.parametrize("name", ["kd", "vsd"])
def test_a_distillation_looks_for_what_pretrain_teacher_makes(name: str, teacher: str, student: str) -> None:
    """Equal identities under the same flags, light networks included, whatever the student, its seed and its ratio."""
    for flags in VARIANTS:
        distilled = resolved("distill", method=name, teacher=teacher, student=student, seed=3, ratio=0.25, **flags)
        trained = resolved("pretrain-teacher", method=name, teacher=teacher, **flags)
        assert teachers.spec_for(distilled).identity() == trained.identity(), flags


@pytest.mark.parametrize(
    "sets",
    [
        ("method.transform=rot2",),
        ("method.teacher_transform=perm6",),
        ("method.teacher_scale=4", "method.main_head=class", "method.tau_ce=2"),
        ("method.teacher_heads=false", "method.lambda1=0"),
        ("method.teacher_heads=false", "method.kd1_target=flat"),
        ("method.lambda4=1", "method.tau_kd=4", "method.rescale=tile", "method.stages=1"),
    ],
)
def test_the_methods_settings_reach_its_teacher(sets: tuple[str, ...]) -> None:
    """VSD's teacher under the same `--set`s; the student's own settings make no difference."""
    distilled = resolved("distill", method="vsd", teacher="wrn40_2", student="mobilenetv2", sets=sets)
    trained = resolved("pretrain-teacher", method="vsd", teacher="wrn40_2", sets=sets)
    assert teachers.spec_for(distilled).identity() == trained.identity()
    default = resolved("pretrain-teacher", method="vsd", teacher="wrn40_2")
    assert (trained.identity() == default.identity()) is (sets[0] == "method.lambda4=1")


def test_methods_with_plain_teachers_share_them() -> None:
    """The teacher of KD is that of no method at all, since both are plain cross-entropy."""
    distilled = resolved("distill", method="kd", teacher="wrn40_2", student="mobilenetv2")
    plain = resolved("pretrain-teacher", method="none", teacher="wrn40_2")
    assert teachers.spec_for(distilled).identity() == plain.identity()
    assert plain.method == {"name": "none", "teacher_scale": 1, "scale_mode": "bilinear"}
    vsd = resolved("pretrain-teacher", method="vsd", teacher="wrn40_2")
    assert vsd.identity() != plain.identity()


def test_a_teacher_lr_is_the_teachers_lr() -> None:
    """`distill --teacher-lr X` looks for `pretrain-teacher --lr X`."""
    distilled = resolved("distill", method="vsd", teacher="wrn40_2", student="wrn16_2", lr=0.1, teacher_lr=0.02)
    trained = resolved("pretrain-teacher", method="vsd", teacher="wrn40_2", lr=0.02)
    assert teachers.spec_for(distilled).identity() == trained.identity()


@pytest.mark.parametrize(
    ("flags", "sets"),
    [
        ({}, ()),
        ({"student": "mobilenetv2", "teacher": "shufflenetv2"}, ()),
        ({"lr": 0.1, "teacher_lr": 0.02, "batch_size": 32}, ("method.transform=rot2",)),
        ({"method": "kd", "epochs": 7, "max_steps": 5, "nesterov": True, "milestones": [3.0, 5.0]}, ()),
        ({"dataset": "digits", "train_fraction": 0.5, "seed": 3, "ratio": 0.25}, ("method.teacher_transform=perm6",)),
        ({"label_smoothing": 0.1, "augment": "flip"}, ("method.teacher_heads=false", "method.lambda1=0")),
        ({"runs_dir": "some where/runs", "precision": "bf16", "clip_grad": 1.5}, ("method.lambda4=1",)),
        ({"baseline": True}, ()),
        ({"method": "hsakd", "baseline": True}, ()),
    ],
)
def test_the_command_that_makes_the_teacher_makes_it(flags: dict[str, Any], sets: tuple[str, ...]) -> None:
    """The line printed for a missing teacher, typed into a shell, trains the very teacher that is looked for."""
    given = {"method": "vsd", "teacher": "wrn40_2", "student": "wrn16_2", **flags}
    wanted = teachers.spec_for(resolved("distill", sets=sets, **given))
    kd, name, *arguments = shlex.split(command_line(wanted.command, wanted))
    assert (kd, name) == ("kd", "pretrain-teacher")
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    typed = command.make_context(name, arguments).params
    values = {leaf: value for leaf, value in typed.items() if leaf in field_paths() and value not in (None, [], ())}
    if "milestones" in values:
        values["milestones"] = parse_tuple(",".join(values["milestones"]))
    made = resolved(name, *(typed["preset"] or []), sets=tuple(typed["set_"] or []), **values)
    assert made.identity() == wanted.identity()
    assert made.system.runs_dir == wanted.system.runs_dir


def test_lists_are_said_as_flags() -> None:
    """Assistants and milestones as one would type them; a path with a comma in it needs the other way."""
    spec = resolved("distill", method="takd", teacher="resnet20", student="resnet8", assistant=["resnet14"])
    assert "--assistant resnet14" in command_line("distill", spec)
    several = resolved("distill", method="none", student="resnet8", milestones=[0.5, 0.75])
    assert "--milestones 0.5,0.75" in command_line("distill", several)
    strange = spec.model_copy(update={"assistant": ("a,b.safetensors",)})
    assert "--set 'assistant=[\"a,b.safetensors\"]'" in command_line("distill", strange)


@pytest.mark.parametrize("name", ["distill", "fewshot"])
def test_a_baseline_is_asked_for_as_the_command_can(name: str) -> None:
    """`fewshot` has no flag for it, and takes it by `--set`."""
    spec = resolved("distill", method="kd", teacher="wrn40_2", student="wrn16_2", ratio=0.25, baseline=True)
    arguments = shlex.split(command_line(name, spec))[2:]
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    typed = command.make_context(name, arguments).params
    assert (typed.get("baseline"), [*typed["set_"]]) == ((True, []) if name == "distill" else (None, ["baseline=true"]))
    made = resolved("distill", sets=("baseline=true",), method="kd", teacher="wrn40_2", student="wrn16_2", ratio=0.25)
    assert made == spec


def test_a_pretrained_teacher_of_a_fresh_student_is_the_pretrained_one() -> None:
    """`distill --teacher-pretrained` looks for `pretrain-teacher --pretrained`, and `--pretrained` for the same."""
    pair = {"method": "kd", "teacher": "torchvision:resnet50", "student": "resnet8"}
    trained = resolved("pretrain-teacher", method="kd", teacher="torchvision:resnet50", pretrained=True).identity()
    for flags in ({"teacher_pretrained": True}, {"pretrained": True}, {"teacher_pretrained": True, "pretrained": True}):
        assert teachers.spec_for(resolved("distill", **pair, **flags)).identity() == trained
    assert teachers.spec_for(resolved("distill", **pair)).identity() != trained
    assert not resolved("distill", **pair, teacher_pretrained=True).pretrained


# -------------------------------------------------------------------------------------------- mixing, RandAugment, OFA


@pytest.mark.parametrize(
    "policy",
    [
        "rand-m9-mstd0.5-inc1",
        "rand",
        "rand-m9-n3-mstd0.5",
        "rand-mstd1-tweights",
        "rand-m15-mmax30-p0.25-inc1",
        "rand-t3aw",
    ],
)
def test_policies_are_those_that_timm_reads(policy: str) -> None:
    """The spec takes it, and so does timm, with the magnitude, number and probability that it names."""
    from timm.data.auto_augment import rand_augment_transform

    assert resolved("distill", student="resnet8", rand_augment=policy).data.rand_augment == policy
    made = rand_augment_transform(policy, {"img_mean": (0, 0, 0)})
    assert made.num_layers == (3 if "n3" in policy else 2)
    assert made.ops[0].prob == (0.25 if "p0.25" in policy else 0.5)


@pytest.mark.parametrize(
    "policy",
    [
        "",
        "m9",
        "augmix-m3",
        "rand-",
        "rand-m",
        "rand-q9",
        "rand-m9-m3",
        "rand-p2",
        "rand-n0",
        "rand-tfoo",
        "Rand-m9",
        "rand-m9\n",
    ],
)
def test_other_policies_are_refused(policy: str) -> None:
    """Before anything is loaded, by the name of the setting (timm would ignore some of them, or stop at an assertion)."""
    with pytest.raises(UsageError, match="RandAugment") as told:
        resolved("distill", student="resnet8", rand_augment=policy)
    assert told.value.field == "data.rand_augment"


@pytest.mark.parametrize(
    ("leaf", "value"),
    [("mixup", -0.1), ("cutmix", -1), ("mix_prob", 1.5), ("mix_switch", -0.5), ("erasing", 1.1), ("color_jitter", -1)],
)
def test_shares_and_probabilities_are_checked(leaf: str, value: float) -> None:
    """Out of range: told by the dotted name."""
    with pytest.raises(UsageError) as told:
        resolved("distill", student="resnet8", **{leaf: value})
    assert told.value.field == f"data.{leaf}"


@pytest.mark.parametrize("name", ["crd", "sskd", "vsd", "hsakd"])
@pytest.mark.parametrize(
    ("flags", "field"), [({"mixup": 0.8, "cutmix": 1.0}, "--mixup"), ({"cutmix": 1.0}, "--cutmix")]
)
def test_methods_that_cannot_use_mixed_images_refuse_them(name: str, flags: dict[str, float], field: str) -> None:
    """Exit code 2 when the spec is resolved, for the student and for a teacher with joint labels or heads of its own."""
    pair = {"method": name, "teacher": "wrn40_2", "student": "wrn16_2"}
    with pytest.raises(UsageError, match="mixed images") as told:
        resolved("distill", **pair, **flags)
    assert (told.value.field, told.value.code) == (field, 2)
    resolved("distill", **pair, **flags, mix_prob=0.0)  # nothing is mixed
    if name == "crd":  # its teacher is a plain one
        resolved("pretrain-teacher", method=name, teacher="wrn40_2", **flags)
    else:
        with pytest.raises(UsageError, match="mixed images"):
            resolved("pretrain-teacher", method=name, teacher="wrn40_2", **flags)


OFA = [("ofa-cnn", 224), ("ofa-token", 224), ("ofa-cnn-32", None), ("ofa-token-32", None)]


@pytest.mark.parametrize(("name", "size"), [*OFA, ("ofa-imagenet-cnn", 224), ("ofa-imagenet-token", 224)])
def test_the_recipes_of_ofa(name: str, size: int | None) -> None:
    """Data set, size and crops; light students have no other rate; mixing and AdamW for tokens only."""
    spec = resolved(
        "distill", f"recipes/{name}", method="ofa", teacher="timm:vit_tiny_patch16_224", student="mobilenetv2"
    )
    data, train = spec.data, spec.train
    assert data.dataset == ("imagenet" if "imagenet" in name else "cifar100")
    assert (data.image_size, data.augment) == ((224, "resized-crop") if size else (None, "auto"))
    token = "token" in name
    assert data.mixes is token
    assert (data.rand_augment, data.mixup, data.cutmix) == (
        ("rand-m9-mstd0.5-inc1", 0.8, 1.0) if token else (None, 0, 0)
    )
    assert (train.optimizer, train.lr) == (("adamw", 5e-4) if token else ("sgd", 0.1 if "imagenet" in name else 0.05))
    assert train.batch_size // train.accumulate == (64 if name == "ofa-imagenet-cnn" else 128)
    assert train.ema == (0.99996 if name == "ofa-imagenet-token" else None)
    assert (train.decay, train.label_smoothing) == ("weights", 0.1)


@pytest.mark.parametrize("kind", ["cnn", "token"])
def test_the_recipe_at_32_is_that_at_224_but_for_the_data(kind: str) -> None:
    """Only data set, size and crop are left to the data set."""
    large, small = (presets.read(f"recipes/ofa-{kind}{end}") for end in ("", "-32"))
    assert large["train"] == small["train"]
    left = {key: value for key, value in large["data"].items() if key not in ("dataset", "image_size", "augment")}
    assert left == small.get("data", {})


# --------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("distill", {"method": "none", "student": "resnet8"}),
        ("distill", {"method": "kd", "teacher": "wrn40_2", "student": "mobilenetv2", "seed": 4, "ratio": 0.25}),
        ("distill", {"method": "vsd", "teacher": "some/teacher.safetensors", "student": "timm:vit_tiny_patch16_224"}),
        (
            "distill",
            {"method": "vsd", "teacher": "wrn40_2", "student": "resnet8", "student_taps": ["layer1", "layer2"]},
        ),
        ("distill", {"student": "resnet8", "milestones": [30, 60.5, 90], "dataset": "folder:some/där"}),
        ("pretrain-teacher", {"method": "kd", "teacher": "WRN-40-2"}),
        ("pretrain-teacher", {"method": "vsd", "teacher": "shufflenetv2", "lr": 0.1 + 0.2, "max_steps": 3}),
    ],
)
def test_a_runs_spec_file_is_the_run_again(command: str, flags: dict[str, Any], tmp_path: Path) -> None:
    """spec.json read as it is, and given to `--preset`, has the identity of the run that wrote it."""
    spec = resolved(command, **flags)
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(spec.model_dump(mode="json")))
    assert validate(RunSpec, json.loads(file.read_text())).identity() == spec.identity()
    again = resolved(command, str(file))
    assert again.identity() == spec.identity()
    assert again.digest() == spec.digest()


def test_a_probes_spec_file_is_the_probe_again(tmp_path: Path) -> None:
    """The same for `kd linear-probe`."""
    spec = presets.resolve("linear-probe", request(encoder="runs/x", dataset="stl10", batchnorm="train"))
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(spec.model_dump(mode="json")))
    assert presets.resolve("linear-probe", request(str(file))).digest() == spec.digest()
