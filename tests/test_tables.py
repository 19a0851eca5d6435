"""The papers' tables: that they expand into valid runs, hold the printed numbers, and are carried out as planned."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import typer.main
from harness import environment

from kdcli import cli, methods, presets, teachers
from kdcli.engine import fit
from kdcli.errors import UsageError
from kdcli.request import Request, parse_tuple
from kdcli.specs import RunSpec, field_paths
from kdcli.sweep import carrying_out
from kdcli.sweep import file as sweepfile
from kdcli.sweep.planned import Planned
from kdcli.sweep.planning import expand, steps

TABLES = sorted(name for name in presets.sweeps() if name.startswith("tables/"))

# Typed from the papers' text, independently of the presets: (label, pair or column) → top-1.
PRINTED = {
    "tables/vsd-1": {
        ("SSKD", "wrn40_2→wrn40_1"): 76.04,
        ("SSKD", "wrn40_2→wrn16_2"): 76.13,
        ("SSKD + our framework", "wrn40_2→wrn16_2"): 77.54,
        ("SSKD + our framework", "resnet32x4→resnet8x4"): 80.21,
    },
    "tables/vsd-2": {
        ("Without KD", "resnet56→resnet20"): 69.63,
        ("KD", "wrn40_2→wrn16_2"): 74.92,
        ("AT", "wrn40_2→wrn40_1"): 74.45,
        ("RKD", "resnet56→resnet20"): 71.48,
        ("HSAKD", "vgg13→vgg8"): 75.93,
        ("HSAKD", "resnet32x4→resnet8x4"): 77.69,
        ("VSD", "wrn40_2→wrn16_2"): 81.82,
        ("VSD", "resnet32x4→resnet8x4"): 83.28,
    },
    "tables/vsd-3": {
        ("Without KD", "resnet50→mobilenetv2"): 65.79,
        ("FitNet", "resnet32x4→shufflenetv2"): 75.11,
        ("CRD", "resnet50→mobilenetv2"): 70.32,
        ("SSKD", "vgg13→mobilenetv2"): 71.53,
        ("HSAKD", "vgg13→mobilenetv2_s1"): 79.27,
        ("HSAKD", "resnet32x4→shufflenetv1"): 78.39,
        ("VSD", "vgg13→mobilenetv2"): 76.28,
        ("VSD", "wrn40_2→shufflenetv1"): 83.69,
    },
    "tables/vsd-4": {
        ("KD", "25 %"): 65.15,
        ("CRD", "50 %"): 69.91,
        ("SSKD", "75 %"): 70.18,
        ("HSAKD", "100 %"): 73.73,
        ("VSD", "25 %"): 70.50,
    },
    "tables/vsd-5": {
        ("KD", "stl10"): 73.25,
        ("CRD", "tinyimagenet"): 34.30,
        ("HSAKD", "stl10"): 75.62,
        ("VSD", "stl10"): 77.91,
        ("VSD", "tinyimagenet"): 47.22,
    },
    "tables/slkd-1": {
        ("Teacher", "resnet32x4→resnet8x4"): 79.42,
        ("Student", "resnet56→resnet8"): 59.98,
        ("AT", "vgg13→vgg11"): 73.63,
        ("SP", "wrn40_2→wrn40_1"): 72.65,
        ("RKD", "wrn40_2→wrn16_2"): 73.35,
        ("OFD", "resnet56→resnet8"): 57.42,
        ("CRD", "vgg13→vgg8"): 73.94,
        ("ReviewKD", "vgg13→vgg11"): 75.32,
        ("DKD", "resnet32x4→resnet8x4"): 76.32,
        ("KD", "wrn40_2→wrn40_1"): 73.54,
        ("SLKD", "vgg13→vgg8"): 75.01,
    },
    "tables/slkd-2": {
        ("Teacher", "resnet50→mobilenetv2"): 79.34,
        ("Student", "vgg13→mobilenetv2"): 64.60,
        ("AT", "resnet32x4→shufflenetv2"): 72.73,
        ("SP", "wrn40_2→shufflenetv1"): 75.94,
        ("OFD", "resnet32x4→shufflenetv1"): 75.98,
        ("DKD", "resnet50→mobilenetv2"): 70.35,
        ("SLKD", "resnet32x4→shufflenetv2"): 77.26,
    },
    "tables/slkd-5": {
        ("Teacher", "resnet110→resnet20"): 74.31,
        ("KD", "resnet32x4→resnet20"): 69.21,
        ("SLKD", "resnet110→resnet20"): 71.20,
        ("SLKD", "resnet56→resnet20"): 71.13,
    },
    "tables/slkd-6": {
        ("KD", "wrn40_2→wrn16_2"): 75.31,
        ("SLKD", "wrn40_2→wrn16_2"): 76.31,
        ("SLKD", "vgg13→wrn16_2"): 75.42,
    },
    "tables/slkd-7": {
        ("T", "resnet32x4→resnet8x4"): 73.33,
        ("SL-T", "vgg13→mobilenetv2"): 68.76,
        ("T + SL-T", "resnet32x4→resnet8x4"): 76.13,
    },
    "tables/slkd-8": {
        ("SLKD", "resnet56→resnet8"): 62.05,
        ("SLKD*", "resnet56→resnet8"): 61.99,
        ("SLKD*", "vgg13→vgg11"): 74.96,
    },
    "tables/slkd-9": {
        ("SLKD", "wrn40_2→shufflenetv1"): 76.72,
        ("SLKD*", "resnet50→mobilenetv2"): 68.29,
        ("SLKD*", "resnet32x4→shufflenetv2"): 76.12,
    },
    "tables/tas-cifar100-cnn": {
        ("Student", "timm:vit_small_patch16_224→timm:mobilenetv2_100"): 73.68,
        ("FitNet", "timm:vit_small_patch16_224→timm:resnet18"): 77.71,
        ("CRD", "timm:vit_small_patch16_224→timm:mobilenetv2_100"): 78.14,
        ("FBT (TAS)", "timm:swin_tiny_patch4_window7_224→timm:resnet18"): 81.61,
    },
    "tables/tas-cifar100-token": {
        ("CRD", "timm:convnext_tiny→timm:resmlp_12_224"): 63.35,
        ("FBT (TAS)", "timm:convnext_tiny→timm:deit_tiny_patch16_224"): 79.57,
    },
    "tables/tas-imagenet-cnn": {("FBT (TAS)", "timm:swin_tiny_patch4_window7_224→timm:mobilenetv2_100"): 72.54},
    "tables/tas-imagenet-token": {("OFA", "timm:resnet50→timm:swin_nano_patch4_window7_224"): 77.76},
}
FAMILIES = {"CRD", "SSKD", "HSAKD joint", "own", "none", "unknown"}


def numbers(runs: list[Planned]) -> dict[tuple[str, str], float]:
    return {(cell.label, cell.column): n.value for run in runs for cell in run.cells for n in cell.published}


def students(runs: list[Planned]) -> list[RunSpec]:
    return [run.spec for run in runs if run.spec is not None and run.stage == "student"]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# ------------------------------------------------------------------------------------------------------- the tables


def test_all_tables_are_there() -> None:
    """VSD's five tables and the figure, SLKD's nine, TAS's by the students' recipes, and one for the later methods."""
    papers = {f"tables/vsd-{n}" for n in (1, 2, 3, 4, 5, "fig4")} | {f"tables/slkd-{n}" for n in range(1, 10)}
    tas = {
        f"tables/tas-{part}-{family}" for part in ("cifar100", "imagenet", "ablation") for family in ("cnn", "token")
    }
    assert set(TABLES) == papers | tas | {"tables/tas-ablation-imagenet", "tables/later"}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_says_what_it_is(name: str) -> None:
    """Title, source, whose teachers, which epoch; the same for each of its rows."""
    table = sweepfile.load(name)
    assert table.about.title
    assert table.about.source
    assert table.about.kind == "table"
    for row in table.published:
        assert (row.teachers or table.about.teachers) in FAMILIES, row.label
        assert all(0 < value < 100 for value in row.values)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_expands_into_valid_runs(name: str) -> None:
    """Every run is resolved for good, no two are equal, and none waits for a method."""
    runs = expand(name)
    digests = []
    for run in runs:
        assert not run.needs
        assert (run.spec is None) == (run.stage == "paper")
        assert run.cells
        if run.spec is not None:
            again = run.spec if run.stage == "probe" else methods.resolve(run.spec)
            assert again.digest() == run.spec.digest()
            digests.append(run.spec.digest())
    assert digests
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("name", TABLES)
def test_every_published_number_has_its_place(name: str) -> None:
    """None is lost between the rows and the runs, and each row stands at its own label."""
    runs = expand(name)
    placed = [n.value for run in runs for cell in run.cells for n in cell.published]
    assert sorted(placed) == sorted(value for row in sweepfile.load(name).published for value in row.values)


@pytest.mark.parametrize("name", sorted(PRINTED))
def test_published_numbers_are_the_papers(name: str) -> None:
    """Against values typed from the papers' text."""
    found = numbers(expand(name))
    assert {place: found[place] for place in PRINTED[name]} == PRINTED[name]


def test_the_gain_that_vsd_claims_follows_from_its_tables() -> None:
    """The abstract's 2.12 points are the mean over ten pairs of VSD minus the best other, MobileNetV2's variant aside."""
    gains = []
    for name in ("tables/vsd-2", "tables/vsd-3"):
        rows: dict[str, dict[str, float]] = {}
        for (label, column), value in numbers(expand(name)).items():
            rows.setdefault(column.replace("_s1", ""), {})[label] = value
        gains += [row.pop("VSD") - max(row.values()) for row in rows.values()]
    assert len(gains) == 10
    assert round(sum(gains) / 10, 2) in (2.12, 2.13)


def test_rows_copied_from_elsewhere_say_so() -> None:
    """VSD's KD row is CRD's last epoch beside SSKD's best; a table is never of one kind by silence."""
    for name in ("tables/vsd-2", "tables/vsd-3"):
        found = {cell.label: cell.published[0] for run in expand(name) for cell in run.cells if cell.published}
        assert (found["KD"].epoch, found["KD"].teachers) == ("last", "CRD")
        assert (found["AT"].epoch, found["AT"].teachers) == ("best", "SSKD")
        assert (found["VSD"].epoch, found["VSD"].teachers) == ("unknown", "own")


def test_slkd_is_taught_as_its_ablation_says() -> None:
    """Table 7: KD, one self-learning teacher alone, one beside the teacher."""
    runs = [run for run in expand("tables/slkd-7") if run.spec is not None]
    found = {cell.label: run.spec.method for run in runs for cell in run.cells if run.spec is not None}
    assert found["T"]["name"] == "kd"
    for label, taught_by in (("SL-T", "self-learning"), ("T + SL-T", "both")):
        ours = found[label]
        assert (ours["name"], ours["self_teachers"], ours["taught_by"]) == ("slkd", 1, taught_by)


@pytest.mark.parametrize(("name", "pairs"), [("tables/slkd-8", 6), ("tables/slkd-9", 5)])
def test_slkd_in_sequence_differs_in_nothing_else(name: str, pairs: int) -> None:
    """Tables 8 and 9: SLKD is the run of Tables 1 and 2; SLKD* has its self-learning teachers made by KD beforehand."""
    together, after = (students(expand(name, [f"label={label}"])) for label in ("SLKD", "SLKD*"))
    assert len(together) == len(after) == pairs
    original = students(expand(name.replace("8", "1").replace("9", "2"), ["label=SLKD"]))
    assert [spec.digest() for spec in together] == [spec.digest() for spec in original]
    for one, other in zip(together, after, strict=True):
        assert {**one.method, "training": "sequential"} == other.method
        arch = other.teacher or ""
        made = teachers.prepared_for(other, arch)
        assert [(spec.seed, spec.student, spec.method["name"]) for spec in made] == [(i, arch, "kd") for i in (0, 1)]
        assert {spec.train.lr for spec in made} == {0.05}


def test_slkd_has_the_hyper_parameters_of_its_paper() -> None:
    """Tables 10 and 11, by data set and student: epochs, batch, rate, decay, a and T."""
    wanted = {
        "tables/slkd-1": (240, 64, 0.05, 5e-4, (150, 180, 210), 0.1, 4.0),
        "tables/slkd-2": (240, 64, 0.01, 5e-4, (150, 180, 210), 0.1, 4.0),
        "tables/slkd-3": (100, 512, 0.2, 1e-4, (30, 60, 90), 0.5, 1.0),
        "tables/slkd-4": (100, 512, 0.2, 1e-4, (30, 60, 90), 0.5, 1.0),
    }
    for name, expected in wanted.items():
        for spec in students(expand(name, ["method=slkd"])):
            train, ours = spec.train, spec.method
            decays = tuple(round(share * train.epochs) for share in train.milestones)
            found = (train.epochs, train.batch_size, train.lr, train.weight_decay, decays)
            assert (*found, ours["ce_share"], ours["temperature"]) == expected, name


def test_tas_loses_a_part_in_each_row_of_its_ablation() -> None:
    """Rows A to G by the setting that differs from the whole method; C collapses on CIFAR-100 and hardly on ImageNet."""
    for name, without_tf in (("cnn", 25.57), ("token", 50.46), ("imagenet", 71.34)):
        runs = [run for run in expand(f"tables/tas-ablation-{name}") if run.spec is not None and run.stage == "student"]
        by_label = {cell.label: run.spec.method for run in runs for cell in run.cells if run.spec is not None}
        whole = by_label["full"]
        found = {
            label[0]: {key: value for key, value in method.items() if value != whole[key]}
            for label, method in by_label.items()
            if label not in ("KD", "full")
        }
        assert found == {
            "A": {"assistant": "conv"},
            "B": {"assistant": "conv+attention"},
            "C": {"pairs": ["ts", "fs"]},
            "D": {"pairs": ["ts", "tf"]},
            "E": {"pairs": ["tf", "fs"]},
            "F": {"feature_loss": "none"},
            "G": {"logit_loss": "none"},
        }
        values = {cell.label: cell.published[0].value for run in runs for cell in run.cells if cell.published}
        assert values["C: without teacher to assistant"] == without_tf
        assert not {"D: without assistant to student", "E: without teacher to student"} & set(values)


@pytest.mark.parametrize(
    ("table", "recipe"),
    [
        ("cifar100-cnn", "cnn"),
        ("cifar100-token", "token"),
        ("imagenet-cnn", "imagenet-cnn"),
        ("imagenet-token", "imagenet-token"),
        ("ablation-cnn", "cnn"),
        ("ablation-token", "token"),
        ("ablation-imagenet", "imagenet-cnn"),
    ],
)
def test_tas_is_trained_by_ofas_recipe(table: str, recipe: str) -> None:
    """What each table writes out is the recipe of its students, and only the teachers start from the library's weights."""
    common = sweepfile.load(f"tables/tas-{table}").common
    assert common == presets.read(f"recipes/ofa-{recipe}") | {"teacher_pretrained": True}


def test_settings_named_like_an_entrys_own_stand_apart(tmp_path: Path) -> None:
    """`pairs` of an entry are networks; TAS's setting of that name is given under `settings`."""
    text = "[sweep]\nmethods = [{name='tas', settings={pairs=['ts']}, pairs=[['resnet20', 'resnet8']], gamma=2}]\n"
    (entry,) = sweepfile.load(write(tmp_path / "s.toml", text)).axes.methods
    assert entry.settings == {"pairs": ["ts"], "gamma": 2}
    assert entry.pairs == (("resnet20", "resnet8"),)
    with pytest.raises(UsageError, match="a table of settings"):
        sweepfile.load(write(tmp_path / "s.toml", "[sweep]\nmethods = [{name='tas', settings=3}]\n"))


def test_tables_without_numbers_have_none() -> None:
    """ImageNet's tables are lost in our text, the figure never had any."""
    for name in ("tables/slkd-3", "tables/slkd-4", "tables/vsd-fig4"):
        assert numbers(expand(name)) == {}


def test_sskd_in_the_framework_of_vsd_sees_larger_images() -> None:
    """Table 1's second row is SSKD with a teacher at scale 2."""
    scales = {spec.method["teacher_scale"] for spec in students(expand("tables/vsd-1", ["label=SSKD + our framework"]))}
    assert scales == {2}


def test_equal_runs_are_done_once() -> None:
    """A student alone has one run, whatever the teachers of its columns; two bars of the figure are the method itself."""
    alone = [run for run in expand("tables/vsd-3") if run.method == "none"]
    assert len(alone) == 3
    twice = [run for run in alone if len(run.cells) == 2]
    assert {cell.column for cell in twice[0].cells} == {"vgg13→mobilenetv2", "resnet50→mobilenetv2"}
    figure = expand("tables/vsd-fig4")
    assert len(figure) == 10
    same = next(run for run in figure if len(run.cells) == 2)
    assert {cell.label for cell in same.cells} == {"vsd/fig4a-rot-2x", "vsd/fig4b-kd1-kd2-agg1"}


def test_the_probe_table_probes_the_students_it_trains() -> None:
    """Two probes name the directory of the student's run, which the probe requires."""
    runs = expand("tables/vsd-5", ["method=vsd"])
    assert [run.command for run in runs] == ["distill", "linear-probe", "linear-probe"]
    student, *probes = runs
    assert student.directory.startswith("runs/cifar100/vsd-wrn40_2-shufflenetv1-s0-")
    for probe, dataset in zip(probes, ("stl10", "tinyimagenet"), strict=True):
        assert probe.spec is not None
        assert (probe.spec.encoder, probe.spec.data.dataset) == (student.directory, dataset)
        assert probe.requires == (student.directory,)
        assert probe.spec.train.weight_decay == 0


def test_few_shot_runs_are_the_ratios() -> None:
    """A run a ratio, and the one of all images is that of Table 2."""
    runs = expand("tables/vsd-4", ["method=vsd"])
    assert [spec.data.ratio for spec in students(runs)] == [0.25, 0.5, 0.75, 1.0]
    whole = expand("tables/vsd-2", ["method=vsd", "pair=resnet56:resnet20"])
    assert students(runs)[-1].digest() == students(whole)[0].digest()


def test_published_rows_of_a_method_without_torch() -> None:
    """What the methods' page is made of; a variant's row is not the method's."""
    program = (
        "import sys\nfrom kdcli.sweep import file\n"
        "print(sum(len(row.values) for _, row in file.published('sskd')))\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 3 + 5 + 5 + 4 + 2


# ------------------------------------------------------------------------------------------------------------ the plan


def typed(line: str) -> tuple[str, RunSpec]:
    """The command of a line, and the spec that the command line makes of it."""
    kd, name, *arguments = shlex.split(line)
    assert kd == "kd"
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    params = command.make_context(name, arguments).params
    paths = field_paths()
    flags = {paths[leaf]: value for leaf, value in params.items() if leaf in paths and value not in (None, [], ())}
    if name == "linear-probe":
        flags |= {"encoder": params["network"], "data.dataset": params["dataset"][0]}
    if name == "fewshot":
        flags["data.ratio"] = params["ratio"][0]
    if "train.milestones" in flags:
        flags["train.milestones"] = parse_tuple(",".join(flags["train.milestones"]))
    request = Request(flags, params["preset"] or [], params["set_"] or [], False, False, True)
    kind = "distill" if name == "fewshot" else name
    spec = presets.resolve(kind, request)
    return name, spec if name == "linear-probe" else methods.resolve(spec)


@pytest.mark.parametrize("name", TABLES)
def test_the_lines_of_a_plan_are_its_runs(name: str) -> None:
    """Each, typed into a shell, is the planned spec."""
    for run in steps(name):
        if run.spec is not None:
            command, spec = typed(run.line)
            assert command == run.command
            assert spec == run.spec, run.line


def test_lines_carry_every_setting(tmp_path: Path) -> None:
    """Lists, booleans, nulls, text that looks like a number, tables of settings, and what is no part of the identity."""
    file = write(
        tmp_path / "s.toml",
        "teacher = 'wrn40_2'\nstudent = 'wrn16_2'\n[train]\nmilestones = [3, 5.5]\n[system]\nruns_dir = '7'\n"
        "[probe]\ncached = true\n[data]\ntrain_fraction = 0.5\n"
        "[sweep]\nmethods = [{name='lskd', inner={name='dkd', beta=3}}, {name='takd', teacher_scale=1}]\n"
        "probes = ['digits']\nseeds = [0, 3]\n'train.nesterov' = [true]\n'train.clip_grad' = [1.5]\n",
    )
    runs = steps(file, sets=["data.data_dir=some where", "train.max_steps=2", "train.ema=null", "train.base_lr=0.3"])
    assert len(runs) == 1 + 4 + 4  # two runs of two methods share a teacher
    for run in runs:
        assert run.spec is not None
        command, spec = typed(run.line)
        assert (command, spec) == (run.command, run.spec), run.line
        assert spec.data.data_dir == "some where"
        assert spec.train.max_steps == 2
        assert spec.probe.cached is (run.stage == "probe")
        assert (spec.data.train_fraction == 0.5) is (run.stage != "probe")


def test_teachers_come_first_and_once() -> None:
    """Before their students, and what they build on before them; each stage can be run in parallel."""
    runs = steps("tables/vsd-2", ["pair=wrn40_2:wrn16_2,wrn40_2:wrn40_1", "method=kd,at,sskd,vsd"])
    stages = [run.stage for run in runs]
    assert stages == ["backbone", "teacher", "teacher", *["student"] * 8]
    plain, *others = runs[:3]
    assert plain.method == "none"
    assert {run.method for run in others} == {"sskd", "vsd"}
    made: set[str] = set()
    for run in runs:
        assert set(run.requires) <= made
        made.add(run.directory)
    for stage in ("backbone", "teacher", "student"):
        part = steps(
            "tables/vsd-2", ["pair=wrn40_2:wrn16_2,wrn40_2:wrn40_1", "method=kd,at,sskd,vsd", f"stage={stage}"]
        )
        assert [run.directory for run in part] == [run.directory for run in runs if run.stage == stage]
        assert not {path for run in part for path in run.requires} & {run.directory for run in part}


def test_those_who_are_taught_to_teach_come_between_teachers_and_students() -> None:
    """SLKD*'s self-learning teachers, shared by two students, are runs of their own that only need the teacher."""
    runs = steps("tables/slkd-8", ["pair=wrn40_2:wrn16_2,wrn40_2:wrn40_1", "label=SLKD*"])
    assert [run.stage for run in runs] == ["teacher", "assistant", "assistant", "student", "student"]
    teacher, *prepared = (run.directory for run in runs[:3])
    assert [run.requires for run in runs[1:3]] == [(teacher,), (teacher,)]
    assert all(run.requires == (teacher, *prepared) or set(prepared) < set(run.requires) for run in runs[3:])
    assert [run.spec.seed for run in runs[1:3] if run.spec is not None] == [0, 1]


def test_a_sweep_makes_the_chain_of_assistants_once(kd, tmp_path: Path) -> None:
    """Each link after the one before it; TAKD's student and DGKD's are taught by runs that the sweep has made."""
    write(
        tmp_path / "s.toml",
        "assistant = ['resnet20', 'resnet14']\n" + TINY + "[sweep]\npairs = [['resnet26', 'resnet8']]\n"
        "methods = ['takd', 'dgkd']\n",
    )
    lines = kd("sweep", "s.toml", "--plan").out.splitlines()
    students = [line.split("--student ")[1].split()[0] for line in lines[1:]]
    assert students == ["resnet20", "resnet14", "resnet20", "resnet14", "resnet8", "resnet8"]
    result = kd("sweep", "s.toml", "--json")
    assert result.code == 0, result.err
    assert [run["stage"] for run in result.json["runs"]] == ["teacher", *["assistant"] * 4, "student", "student"]
    assert "distilling it first" not in result.err
    assert "found, training it first" not in result.err


def test_a_method_is_available_when_it_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`needs` is asked for at the time of the plan; until then the row is listed and keeps its number."""
    text = (
        "teacher = 'wrn40_2'\nstudent = 'wrn16_2'\n[sweep]\nmethods = ['kd', {name='vsd', label='later', needs='soon'}]\n"
        "[[published]]\nlabel = 'later'\nvalues = [81.0]\n"
    )
    file = write(tmp_path / "s.toml", text)
    later = next(run for run in expand(file) if run.method == "vsd")
    assert (later.spec, later.needs, later.line, later.cells[0].published[0].value) == (None, "soon", "", 81.0)
    monkeypatch.setitem(methods.SHIPPED, "soon", "now it is there")
    later = next(run for run in expand(file) if run.method == "vsd")
    assert later.needs == ""
    assert later.spec is not None
    assert numbers([later]) == {("later", "wrn40_2→wrn16_2"): 81.0}


# ---------------------------------------------------------------------------------------------------- filters and sets


@pytest.mark.parametrize(
    ("only", "count"),
    [
        (["method=vsd,kd"], 10),
        (["method=vsd,kd", "pair=wrn40_2:wrn16_2"], 2),
        (["method=VSD"], 5),
        (["pair=WRN-40-2:wrn_16_2"], 9),
        (["label=Without KD"], 5),
        (["teacher=wrn40_2", "student=wrn40_1,vgg8"], 9),
        (["method=vsd,kd", "method=kd,at"], 5),
        (["stage=student"], 45),
    ],
)
def test_filters_keep_what_passes_all_of_them(only: list[str], count: int) -> None:
    """By method or label, pair, teacher, student; values are alternatives, filters are not."""
    assert len(expand("tables/vsd-2", only)) == count


def test_filters_of_other_axes(tmp_path: Path) -> None:
    """Ratios, probes, seeds and swept settings; numbers without a run pass like others."""
    assert [spec.data.ratio for spec in students(expand("tables/vsd-4", ["ratio=.25", "method=kd"]))] == [0.25]
    runs = expand("tables/vsd-5", ["probe=STL-10", "method=at"])
    assert [run.command for run in runs] == ["distill", "linear-probe"]
    for only in (["probe=stl10,digits"], ["probe=stl10", "probe=tinyimagenet"]):
        with pytest.raises(UsageError, match="has no probe") as caught:
            expand("tables/vsd-5", only)
        assert "its probes: stl10, tinyimagenet" in caught.value.line()
    assert {run.cells[0].label for run in expand("tables/slkd-5", ["label=Teacher"])} == {"Teacher"}
    file = write(tmp_path / "s.toml", "student = 'resnet8'\n[sweep]\nseeds = [0, 1]\n'train.batch_size' = [16, 32]\n")
    assert len(expand(file)) == 4
    (spec,) = students(expand(file, ["seed=1", "train.batch_size=32"]))
    assert (spec.seed, spec.train.batch_size) == (1, 32)
    text = Path(file).read_text() + "[[published]]\nlabel = 'Paper'\nvalues = [70]\nrun = false\n"
    runs = expand(write(tmp_path / "paper.toml", text), ["train.batch_size=32"])  # a paper's row has no such setting
    assert [run.stage for run in runs] == ["student", "student"]


@pytest.mark.parametrize(
    ("only", "sets", "field", "says"),
    [
        (["method"], [], "--only", "KEY=VALUE"),
        (["methd=kd"], [], "--only", "method"),
        (["method=slowkd"], [], "--only", "methods: none, kd"),
        (["stage=pupil"], [], "--only", "student"),
        (["ratio=much"], [], "--only", "ratio"),
        (["pair=resnet56:resnet20", "probe=stl10"], [], "--only", "tables/vsd-2 has no probe stl10"),
        ([], ["system.out=x"], "system.out", "several runs"),
        ([], ["student=vgg8"], "student", "axis"),
        ([], ["method=kd"], "method", "axis"),
        ([], ["train.epoch=3"], "train.epoch", "epochs"),
        ([], ["train.epochs"], "--set", "KEY=VALUE"),
    ],
)
def test_bad_filters_and_settings_are_named(only: list[str], sets: list[str], field: str, says: str) -> None:
    """A usage error with the flag or field, and a way out."""
    with pytest.raises(UsageError) as problem:
        expand("tables/vsd-2", only, sets)
    assert problem.value.field == field
    assert says in problem.value.line()


@pytest.mark.parametrize(("given", "seeds"), [("0,1,2", [0, 1, 2]), ("1..3", [1, 2, 3]), ("2", [2])])
def test_seeds_are_set_for_a_whole_table(given: str, seeds: list[int]) -> None:
    """Every run once with each, by one teacher; the runs of a seed are those that it has alone."""
    only = ["method=kd,vsd", "pair=wrn40_2:wrn16_2"]
    runs = [run for run in steps("tables/vsd-2", only, [f"seed={given}"]) if run.stage == "student"]
    assert sorted(run.spec.seed for run in runs if run.spec) == sorted(2 * seeds)
    assert len({run.cells for run in runs}) == 2
    alone = [run.directory for seed in seeds for run in steps("tables/vsd-2", only, [f"seed={seed}"])]
    assert {run.directory for run in steps("tables/vsd-2", only, [f"seed={given}"])} == set(alone)


@pytest.mark.parametrize("given", ["0,x", "3..", "-1,2", "4..2", "0..99999999999"])
def test_what_is_no_list_of_seeds_is_said(given: str) -> None:
    with pytest.raises(UsageError, match="no list of seeds") as caught:
        steps("tables/vsd-2", [], [f"seed={given}"])
    assert caught.value.field == "seed"


def test_a_setting_holds_for_every_run() -> None:
    """`--set` reaches students, teachers and probes, each as far as it is about them."""
    runs = steps("tables/vsd-5", ["method=kd"], ["train.epochs=3", "probe.cached=true", "method.temperature=2"])
    plain = steps("tables/vsd-5", ["method=kd"], ["train.epochs=3", "method.temperature=2"])
    for run, other in zip(runs, plain, strict=True):
        assert run.spec is not None
        assert run.spec.train.epochs == 3
        assert run.spec.probe.cached is (run.stage == "probe")
        if run.stage != "probe":  # a student is the same, however it is probed
            assert run.directory == other.directory


ROW = "[sweep]\nmethods = ['kd']\npairs = [['wrn40_2', 'wrn16_2']]\n[[published]]\n"


@pytest.mark.parametrize(
    ("text", "field", "says"),
    [
        ("student = 'resnet8'", None, "[sweep]"),
        ("[sweep]\nmethods = ['kd']\npairs = [['wrn40_2', 'wrn17_2']]", "--student", "no network"),
        ("[sweep]\nmethods = ['kdd']\npairs = [['wrn40_2', 'wrn16_2']]", "method", "did you mean"),
        (
            "[sweep]\nmethods = [{name='kd', temprature=3}]\npairs = [['wrn40_2', 'wrn16_2']]",
            "method.temprature",
            "temperature",
        ),
        ("[sweep]\nmethod = ['kd']", "sweep.method", "write methods"),
        ("[sweep]\n'train.epoch' = [1]", "sweep.train.epoch", "train.epochs"),
        ("[sweep]\nseeds = 3", "sweep.seeds", ""),
        ("[sweep]\n'train.epochs' = 3", "sweep.train.epochs", "list"),
        ("[sweep]\npresets = ['quickstart']\nmethods = ['kd']", "sweep.presets", "presets bring"),
        ("sweep = 3", "sweep", "table"),
        ("[system]\nout = 'x'\n" + ROW + "label = 'kd'\nvalues = [1]", "system.out", "s.toml names one directory"),
        ("student = 'resnet8'\n[sweep]\n'system.out' = ['x']", "system.out", "s.toml names one directory"),
        ("method = {temprature = 3}\n" + ROW + "label = 'kd'\nvalues = [1]", "method.temprature", "temperature"),
        (
            "[sweep]\ndatasets = ['digits', 'stl10']\n[[published]]\nlabel = 'x'\nvalues = [1]",
            "sweep.datasets",
            "which data",
        ),
        (
            ROW + "label = 'kd'\nvalues = [1, 2]",
            "published.values",
            "2 values for 1 places",
        ),
        (
            ROW + "label = 'KD'\nvalues = [1]",
            "published.label",
            "run = false",
        ),
        (
            ROW + "label = 'kd'\nvalues = [1]\nrun = false",
            "published.run",
            "run = false",
        ),
        (
            ROW + "label = 'kd'\nvalues = [1]\npairs = [['vgg13', 'vgg8']]",
            "published.pairs",
            "vgg13",
        ),
    ],
)
def test_what_is_wrong_in_a_sweep_is_named(text: str, field: str | None, says: str, tmp_path: Path) -> None:
    """Exit code 2 before anything is trained."""
    with pytest.raises(UsageError) as problem:
        expand(write(tmp_path / "s.toml", text + "\n"))
    assert problem.value.field == field
    assert says in problem.value.line()


def test_the_example_of_the_page_is_a_sweep(tmp_path: Path) -> None:
    """docs/guide.md's TOML, as it stands: two methods, three seeds, two batch sizes."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "guide.md").read_text("utf-8")
    runs = expand(write(tmp_path / "s.toml", page.split("```toml\n")[1].split("```")[0]))
    assert len(runs) == 2 * 3 * 2
    assert {spec.method["teacher_scale"] for spec in students(runs)} == {1, 4}
    assert {cell.column for run in runs for cell in run.cells} == {
        "resnet56→resnet20, batch_size 64",
        "resnet56→resnet20, batch_size 128",
    }


def test_spellings_of_a_pair_are_one(tmp_path: Path) -> None:
    """A published row finds its run, however either spells the networks."""
    text = (
        "[sweep]\nmethods = ['kd']\npairs = [['WRN-40-2', 'wrn_16_2'], ['vgg13', 'vgg8']]\n"
        "[[published]]\nlabel = 'kd'\npairs = [['wrn_40_2', 'WRN-16-2']]\nvalues = [74.92]\n"
    )
    assert numbers(expand(write(tmp_path / "s.toml", text))) == {("kd", "wrn40_2→wrn16_2"): 74.92}


def test_a_method_of_the_common_settings_keeps_them_where_it_is_swept(tmp_path: Path) -> None:
    """As presets are merged: the same method adds to its settings, another one leaves them behind."""
    text = (
        "teacher = 'wrn40_2'\nstudent = 'wrn16_2'\n[method]\ntemperature = 2.0\nname = 'kd'\n"
        "[sweep]\nmethods = [{name='kd', kd_weight=0.5}, 'dkd']\n"
    )
    one, other = students(expand(write(tmp_path / "s.toml", text)))
    assert (one.method["temperature"], one.method["kd_weight"]) == (2.0, 0.5)
    assert other.method["temperature"] == 4.0


# ------------------------------------------------------------------------------------------------------ the command line


def test_a_table_is_no_preset_of_one_run(kd) -> None:
    """`--preset tables/x` names the command that is meant, and tables are listed with their titles."""
    result = kd("distill", "--preset", "tables/vsd-2")
    assert result.code == 2
    assert "kd sweep tables/vsd-2 --plan" in result.error
    listed = {row["name"]: row["about"] for row in kd("list", "presets", "--json").json["presets"]}
    assert set(TABLES) <= set(listed)
    assert all(listed.values())


def test_an_unknown_sweep_suggests_the_nearest(kd) -> None:
    """Like a preset's name; a preset of one run is named as such."""
    result = kd("sweep", "tables/vsd2", "--plan")
    assert result.code == 2
    assert "did you mean tables/vsd-2?" in result.error
    assert "kd distill --preset quickstart" in kd("sweep", "quickstart", "--plan").error


def test_a_plan_is_lines_of_commands_and_nothing_else(kd) -> None:
    """For xargs: what has no command is told on stderr; --json has the specs and the published numbers."""
    words = ["sweep", "tables/slkd-1", "--plan", "--only", "pair=vgg13:vgg8", "--only", "method=kd,slkd"]
    result = kd(*words)
    assert result.code == 0
    assert result.out.splitlines() == [
        "kd pretrain-teacher --method none --teacher vgg13 --dataset cifar100",
        "kd distill --method kd --teacher vgg13 --student vgg8 --dataset cifar100",
        "kd distill --method slkd --teacher vgg13 --student vgg8 --dataset cifar100",
    ]
    document = kd(*words, "--json").json
    teacher, student, *rest = document["runs"]
    assert (teacher["stage"], student["stage"]) == ("teacher", "student")
    assert student["command"] == result.out.splitlines()[1]
    assert student["spec"]["student"] == "vgg8"
    (number,) = student["cells"][0]["published"]
    assert number == {"value": 72.98, "epoch": "last", "teachers": "CRD", "source": "CRD's table"}
    assert "not available" not in result.err
    assert [(run["needs"], run["command"]) for run in rest] == [(None, result.out.splitlines()[2])]


def test_a_plan_of_nothing_but_missing_methods_is_empty(kd, tmp_path: Path) -> None:
    """No line on stdout, and what is waited for on stderr and in the document."""
    text = "[sweep]\npairs = [['resnet14', 'resnet8']]\nmethods = [{name='vsd', label='Later', needs='soon'}]\n"
    file = write(tmp_path / "s.toml", text)
    result = kd("sweep", file, "--plan")
    assert (result.code, result.out) == (0, "")
    assert "not available yet: Later (1 place) needs soon" in result.err
    (run,) = kd("sweep", file, "--plan", "--json").json["runs"]
    assert (run["needs"], run["command"], run["spec"]) == ("soon", "", None)


METHOD = """
from typing import Any, ClassVar
from kdcli.errors import IncompatibleError
from kdcli.losses import cross_entropy
from kdcli.methods.base import Method, MethodSpec

class MineSpec(MethodSpec):
    '''Settings.'''
    name: str = 'mine'
    '''Name.'''

class Mine(Method):
    '''A method that fails.'''
    Spec: ClassVar[Any] = MineSpec
    needs_teacher: ClassVar[bool] = {teacher}

    def __init__(self, *given):
        super().__init__(*given)
        {init}

    def loss(self, batch, student, teacher, progress):
        raise RuntimeError('no such luck')
"""

TINY = """
[data]
dataset = "digits"
image_size = 8
train_fraction = 0.1

[train]
epochs = 1
max_steps = 2
batch_size = 15

[system]
device = "cpu"
threads = 1
"""


def test_a_sweep_is_carried_out_and_a_failing_run_stops_no_other(kd, tmp_path: Path) -> None:
    """One run that does not fit and one with a bug: the others are done, all is reported, the first failure's code is the
    exit code; again, the finished ones are not repeated."""
    refuse = "raise IncompatibleError('it never fits')"
    write(tmp_path / "unfit.py", METHOD.format(teacher=False, init=refuse))
    write(tmp_path / "buggy.py", METHOD.format(teacher=False, init="pass"))
    write(
        tmp_path / "s.toml",
        "[about]\ntitle = 'Three of four'\nteachers = 'CRD'\nepoch = 'best'\n" + TINY + "[sweep]\nseeds = [0, 1]\n"
        "pairs = [['resnet14', 'resnet8']]\n"
        "methods = [{name='unfit.py', label='Unfit'}, 'buggy.py', {name='kd', label='KD'}, {name='vsd', needs='soon'}]\n"
        "[[published]]\nlabel = 'KD'\nvalues = [74.92]\n[[published]]\nlabel = 'Paper'\nvalues = [79.5]\nrun = false\n",
    )
    result = kd("sweep", "s.toml", "--json")
    assert result.code == 4
    document = result.json
    assert (document["ok"], document["error"]["kind"]) == (False, "incompatible")
    by_status: dict[str, list[dict]] = {}
    for run in document["runs"]:
        by_status.setdefault(run["status"], []).append(run)
    assert {status: len(runs) for status, runs in by_status.items()} == {
        "done": 3,  # the teacher, and KD with two seeds
        "failed": 4,
        "not available": 1,
        "paper": 1,
    }
    assert [run["exit_code"] for run in by_status["failed"]] == [4, 4, 3, 3]
    done = [run for run in by_status["done"] if run["stage"] == "student"]
    for run in done:
        summary = json.loads((tmp_path / run["run"] / "summary.json").read_text())
        assert run["top1"]["single"] == summary["metrics"]["test"]["top1"]
        assert run["top1"]["epoch"] == "last"
        assert run["top1"]["best_on_test"] == summary["best_on_test"]["top1"]

    again = kd("sweep", "s.toml")
    assert again.code == 4
    assert again.err.count("is finished already") == 3
    lines = {line.split("  ")[0]: line for line in again.out.splitlines()}
    mean = sum(run["top1"]["single"] for run in done) / 2
    assert again.out.startswith("Three of four\ntop-1 on the test images, %, last epoch; in brackets as published\n")
    assert f"{mean:.2f} ± " in lines["KD"]
    assert "n 2 (74.92)" in lines["KD"]
    assert lines["KD"].endswith("best (CRD)")
    assert "failed" in lines["Unfit"]
    assert "- (79.50)" in lines["Paper"]
    assert "it never fits" in again.out
    assert "not available yet: vsd (1 place) needs soon" in again.out


def test_a_sweep_is_read_once(kd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From stdin, or from a file that is edited, or gone, before the last run ends."""
    text = "student = 'resnet8'\n" + TINY + "[about]\ntitle = 'As begun'\n[sweep]\nseeds = [0]\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert kd("sweep", "-", "--plan", "--json").json["about"]["title"] == "As begun"
    file = Path(write(tmp_path / "s.toml", text))
    original = carrying_out._one_by_one

    def losing(*given):
        file.unlink()
        return original(*given)

    monkeypatch.setattr(carrying_out, "_one_by_one", losing)
    result = kd("sweep", "s.toml", "--json")
    assert result.code == 0, result.err
    assert result.json["about"]["title"] == "As begun"


def test_no_run_of_a_sweep_keeps_its_networks(kd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it ended well or failed, its training is gone when the next run trains."""
    trainings: list[weakref.ref] = []
    alive: list[int] = []
    original = fit.Training.run

    def run(self):
        alive.append(sum(ref() is not None for ref in trainings))
        trainings.append(weakref.ref(self))
        return original(self)

    monkeypatch.setattr(fit.Training, "run", run)
    write(tmp_path / "buggy.py", METHOD.format(teacher=False, init="pass"))
    methods_ = "[sweep]\nmethods = ['buggy.py', 'none']\nseeds = [0, 1]\n"
    write(tmp_path / "s.toml", "student = 'resnet8'\n" + TINY + methods_)
    assert kd("sweep", "s.toml").code == 3
    assert alive == [0, 0, 0, 0]


def test_what_needs_a_failed_run_is_not_begun(kd, tmp_path: Path) -> None:
    """A student that failed is not probed, and only the cause is counted as a failure."""
    write(tmp_path / "buggy.py", METHOD.format(teacher=False, init="pass"))
    write(
        tmp_path / "s.toml",
        "student = 'resnet8'\n" + TINY + "[sweep]\nmethods = ['buggy.py', 'none']\nprobes = ['digits']\n",
    )
    result = kd("sweep", "s.toml", "--set", "probe.cached=true", "--json")
    assert result.code == 3
    status = {(run["stage"], run["method"]): run["status"] for run in result.json["runs"]}
    assert status == {
        ("student", "buggy.py"): "failed",
        ("probe", "buggy.py"): "not run",
        ("student", "none"): "done",
        ("probe", "none"): "done",
    }
    probed = result.json["runs"][-1]
    assert json.loads((tmp_path / probed["run"] / "spec.json").read_text())["command"] == "linear-probe"
    table = kd("sweep", "s.toml", "--set", "probe.cached=true", "--only", "method=none")
    assert table.code == 0
    assert table.out.splitlines()[2].split("  ")[-3:-1] == ["student, digits", "digits"]
    assert f"  {probed['top1']['single']:.2f}" in table.out.splitlines()[4]


def test_the_time_of_a_sweep_is_that_of_all_its_runs(kd, tmp_path: Path) -> None:
    """`system.max_minutes` stops the sweep with 75, and the same command goes on."""
    write(tmp_path / "s.toml", "student = 'resnet8'\n" + TINY + "[sweep]\nseeds = [0, 1]\n")
    stopped = kd("sweep", "s.toml", "--set", "system.max_minutes=0.00001")
    assert stopped.code == 75
    assert "same command again" in stopped.error
    assert kd("sweep", "s.toml").code == 0


def test_a_sweep_runs_in_one_process(kd, tmp_path: Path) -> None:
    """Ranks belong to the runs: the plan hands them on, the sweep itself refuses."""
    write(tmp_path / "s.toml", "student = 'resnet8'\n" + TINY + "[sweep]\nseeds = [0]\n")
    result = kd("sweep", "s.toml", "--set", "system.nproc=2")
    assert result.code == 2
    assert "--plan" in result.error
    assert "--nproc 2" in kd("sweep", "s.toml", "--set", "system.nproc=2", "--plan").out


def test_views_averaged_have_a_row_of_their_own(kd, tmp_path: Path) -> None:
    """A joint head's aggregate is never mixed with the single pass that is compared."""
    write(tmp_path / "s.toml", TINY + "[sweep]\npairs = [['resnet14', 'resnet8']]\nmethods = ['vsd']\n")
    result = kd("sweep", "s.toml", "--json")
    assert result.code == 0, result.err
    top1 = result.json["runs"][-1]["top1"]
    assert {"single", "marginal", "aggregate"} <= set(top1)
    lines = {line.split("  ")[0]: line for line in kd("sweep", "s.toml").out.splitlines()}
    assert f" {top1['single']:.2f} " in lines["vsd"]
    assert f" {top1['aggregate']:.2f} " in lines["vsd, aggregate"]
