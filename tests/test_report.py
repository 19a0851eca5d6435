"""`kd report`: what its numbers are, what takes no part in them, and that no name of a run is ever taken for markup."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import TINY, Kd, snapshot

from kdcli import durable
from kdcli.__main__ import run
from kdcli.errors import InputError
from kdcli.output import Story
from kdcli.report import charts, formats, passes
from kdcli.report.command import notes_of
from kdcli.report.gathering import Gathered, gather
from kdcli.report.markup import tag, text
from kdcli.report.panels import panels_of
from kdcli.report.passing import Passer
from kdcli.report.records import Record, number, read
from kdcli.report.rows import Row, rows_of, stat
from kdcli.specs import SystemSpec, validate
from kdcli.sweep.file import Number

HOSTILE = "<script>alert('x')</script>|`&\"\\_{}$%\n\x1b[31m=1+1"
ENDLESS = {"img", "meta", "br", "hr", "input", "line", "path", "circle", "rect", "image"}


class Page(html.parser.HTMLParser):
    """What is on a page: its elements, ids, texts, and whether every element is closed."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "br", "hr", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs: a teacher, the student alone with two seeds, kd with two temperatures; one unfinished."""
    folder = tmp_path_factory.mktemp("report") / "runs"
    quiet = ["--quiet", *TINY, "--runs-dir", str(folder)]
    assert run(["pretrain-teacher", "--teacher", "resnet14", *quiet, "--out", str(folder / "teacher")]) == 0
    teacher = ["--teacher", str(folder / "teacher")]
    for seed in (0, 1):
        alone = ["distill", "--method", "none", "--student", "resnet8", *quiet, "--seed", str(seed)]
        assert run([*alone, "--out", str(folder / f"none-{seed}")]) == 0
    for heat in (2, 4):
        taught = ["distill", "--method", "kd", *teacher, "--student", "resnet8", *quiet]
        assert run([*taught, "--set", f"method.temperature={heat}", "--out", str(folder / f"kd-{heat}")]) == 0
    shutil.copytree(folder / "kd-4", folder / "kd-begun")
    (folder / "kd-begun" / "summary.json").unlink()
    return folder


def rows_by(document: dict[str, Any], label: str) -> list[dict[str, Any]]:
    return [row for row in document["rows"] if row["label"] == label]


# ---------------------------------------------------------------------------------------------------------- the numbers


def test_numbers_are_those_of_the_runs(kd: Kd, runs: Path) -> None:
    """Mean and sample deviation of the seeds at the last epoch; settings that differ stand apart; teachers are there."""
    document = kd("report", runs, "--no-page", "--json").json
    assert document["command"] == "report"
    alone = rows_by(document, "none")
    values = [json.loads((runs / f"none-{s}" / "summary.json").read_text())["metrics"]["test"]["top1"] for s in (0, 1)]
    assert len(alone) == 1
    assert alone[0]["top1"]["values"] == values
    assert alone[0]["top1"]["mean"] == pytest.approx(statistics.fmean(values), abs=1e-4)
    assert alone[0]["top1"]["std"] == pytest.approx(statistics.stdev(values), abs=1e-4)
    assert alone[0]["seeds"] == [0, 1]
    taught = rows_by(document, "kd")
    assert sorted(row["settings"]["method.temperature"] for row in taught) == ["2", "4"]
    teacher = json.loads((runs / "teacher" / "summary.json").read_text())["metrics"]["test"]["top1"]
    assert [row["top1"]["mean"] for row in rows_by(document, "teacher")] == [teacher]
    assert all(row["teacher_top1"]["mean"] == teacher for row in taught)


def test_unfinished_runs_take_part_in_no_number(kd: Kd, runs: Path) -> None:
    document = kd("report", runs, "--no-page", "--json").json
    assert [entry["run"] for entry in document["unfinished"]] == [str(runs / "kd-begun")]
    assert document["unfinished"][0]["note"] == "3 of 3 epochs"
    assert all(str(runs / "kd-begun") not in row["runs"] for row in document["rows"])
    told = kd("report", runs, "--no-page").out
    assert "1 (+1 unfinished)" in told
    assert "unfinished runs, which take part in no number: 1" in told


def test_a_damaged_run_is_named_and_left_out(kd: Kd, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "none-0", tmp_path / "some" / "good")
    shutil.copytree(runs / "none-1", tmp_path / "some" / "bad")
    (tmp_path / "some" / "bad" / "summary.json").write_text("{")
    result = kd("report", "some", "--no-page", "--json")
    assert result.code == 0
    assert "left out: some/bad/summary.json" in result.err
    assert [row["n"] for row in rows_by(result.json, "none")] == [1]
    assert result.json["unfinished"][0]["status"] == "failed to read"


def test_a_run_named_twice_counts_once(kd: Kd, runs: Path) -> None:
    document = kd("report", runs / "none-0", runs / "none-0", runs / "none-0" / "spec.json", "--no-page", "--json").json
    assert [row["n"] for row in rows_by(document, "none")] == [1]


def test_the_teacher_is_in_the_table_without_its_run(kd: Kd, runs: Path) -> None:
    document = kd("report", runs / "kd-2", "--no-page", "--json").json
    teacher = json.loads((runs / "teacher" / "summary.json").read_text())["metrics"]["test"]["top1"]
    assert [row["top1"]["mean"] for row in rows_by(document, "teacher")] == [teacher]


def test_last_and_best_stand_apart(kd: Kd, runs: Path) -> None:
    """The best epoch has no place in a table that was not asked for it."""
    assert "best" not in kd("report", runs, "--no-page").out
    both = kd("report", runs, "--no-page", "--best").out.splitlines()[0]
    assert "top-1 (last epoch), %" in both
    assert "top-1 (best epoch on test), %" in both


def test_all_formats_say_the_same(kd: Kd, runs: Path) -> None:
    document = kd("report", runs, "--no-page", "--format", "json").json
    mean = rows_by(document, "none")[0]["top1"]["mean"]
    table = list(csv.DictReader(io.StringIO(kd("report", runs, "--no-page", "--format", "csv").out)))
    assert [float(row["top1_last_mean"]) for row in table if row["method"] == "none"] == [mean]
    assert [row["n"] for row in table if row["method"] == "none"] == ["2"]
    assert f"{mean:.2f} $\\pm$" in kd("report", runs, "--no-page", "--format", "latex").out
    assert f"| {mean:.2f} ± " in kd("report", runs, "--no-page").out


def test_nothing_is_written_into_the_runs(kd: Kd, runs: Path) -> None:
    before = snapshot(runs)
    assert kd("report", runs, "--fast", "--out", "made").code == 0
    assert kd("report", runs, "--limit", "40", "--threads", "1", "--out", "made").code == 0
    assert snapshot(runs) == before


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nowhere"], 3, "nowhere does not exist"),
        (["."], 3, ". holds no run"),
        (["tables/vsd-2", "runs"], 2, "is a sweep, which is reported on alone"),
        ([".", "--only", "method=kd"], 2, "goes with a sweep"),
        (["tables/vsd-2", "--only", "method=nothing"], 2, "passes the filters"),
        (["no.toml"], 2, "no.toml"),
        (["tables/vsd-2", "--set", "train.epochs=none"], 2, "train.epochs"),
    ],
)
def test_errors_are_one_line(kd: Kd, words: list[str], code: int, said: str) -> None:
    result = kd("report", *words, "--no-page")
    assert result.code == code
    assert said in result.error


# ------------------------------------------------------------------------------------------------------ published numbers


def record(label: str = "kd", seed: int = 0, top1: float = 70.0, best: float = 71.0, **more: Any) -> Record:
    summary = {"metrics": {"test": {"top1": top1, "n": 100}}, "best_on_test": {"top1": best}}
    summary["teacher"] = {"arch": "resnet20", "digest": "d", "checkpoint": "t", "top1": 75.0}
    base: dict[str, Any] = {"directory": f"{label}-{seed}", "teacher": "resnet20", "student": "resnet8"}
    base |= {"dataset": "cifar100", "seed": seed, "summary": summary}
    return Record("finished", "student", label, label, **(base | more))


def of(rows: list[Row], label: str) -> Row:
    return next(row for row in rows if row.label == label)


def test_a_published_number_is_compared_with_its_own_kind_of_epoch() -> None:
    published = (Number(72.0, "last", "CRD", ""), Number(73.0, "best", "own", ""), Number(60.0, "unknown", "none", ""))
    rows = rows_of(Gathered("", records=[record(published=published), record(seed=1, top1=71.0, published=published)]))
    last, best, unknown = of(rows, "kd").compared()
    assert (last["difference"], last["compared_with"], last["teacher_differs"]) == (-1.5, "last", True)
    assert (best["difference"], best["compared_with"], best["teacher_differs"]) == (-2.0, "best_on_test", True)
    assert (unknown["difference"], unknown["compared_with"], unknown["teacher_differs"]) == (10.5, "last", False)
    table = formats.markdown(rows, [], best=False)
    assert "72.00 †; 73.00 (best epoch) †; 60.00 (epoch not stated)" in table
    assert "-1.50; +10.50" in table
    assert "-2.00" not in table
    assert "-2.00" in formats.markdown(rows, [], best=True)


def test_a_reduced_recipe_is_said_beside_published_numbers() -> None:
    gathered = Gathered(
        "", rescaled=("train.epochs=2",), records=[record(published=(Number(72.0, "last", "none", ""),))]
    )
    notes = notes_of(gathered, rows_of(gathered))
    assert any("train.epochs=2" in note and "full recipe" in note for note in notes)


def test_different_recipes_are_said() -> None:
    gathered = Gathered(
        "", records=[record("kd", settings={"train.epochs": 2}), record("at", settings={"train.epochs": 3})]
    )
    assert "not like for like: train.epochs is 2, 3 in different runs" in notes_of(gathered, rows_of(gathered))


def test_a_sweep_has_its_published_numbers_and_what_was_not_run(kd: Kd, runs: Path, tmp_path: Path) -> None:
    """Planned runs find the directories that kd sweep would make; the rest is listed with its command."""
    sweep = tmp_path / "small.toml"
    settings = 'dataset = "digits"\nimage_size = 8\ntrain_fraction = 0.1\n[train]\nbatch_size = 15\nepochs = 3\n'
    settings += '[system]\ndevice = "cpu"\nthreads = 1\n'
    sweep.write_text(
        f'[about]\ntitle = "Small"\nteachers = "CRD"\nepoch = "last"\n[data]\n{settings}'
        '[sweep]\npairs = [["resnet14", "resnet8"]]\nmethods = ["none", "kd"]\nseeds = [0]\n'
        '[[published]]\nlabel = "kd"\nvalues = [50.0]\n[[published]]\nlabel = "Teacher"\nrun = false\nvalues = [60.0]\n'
    )
    before = kd("report", sweep, "--no-page", "--json").json
    assert [row["n"] for row in rows_by(before, "kd")] == [0]
    assert {entry["status"] for entry in before["unfinished"]} == {"not run"}
    assert any(entry["note"].startswith("kd distill --method kd") for entry in before["unfinished"])
    assert kd("sweep", sweep, "--only", "method=none", "--quiet").code == 0
    after = kd("report", sweep, "--no-page", "--json").json
    assert after["title"] == "Small"
    assert [row["n"] for row in rows_by(after, "none")] == [1]
    assert rows_by(after, "kd")[0]["published"][0]["value"] == 50.0
    assert rows_by(after, "Teacher")[0]["published"][0]["value"] == 60.0
    assert rows_by(after, "Teacher")[0]["n"] == 0


# ----------------------------------------------------------------------------------------------------------- the page


def test_the_page_holds_everything_by_itself(kd: Kd, runs: Path, tmp_path: Path) -> None:
    """Well formed, no address to load from, every picture with words for it, every link inside leading somewhere."""
    result = kd("report", runs, "--out", "made", "--threads", "1", "--data-dir", tmp_path)
    assert result.code == 0, result.err
    content = (tmp_path / "made" / "report.html").read_text("utf-8")
    page = Page(content)
    assert page.unbalanced == []
    assert page.open == []
    addresses = [
        value for _, attributes in page.elements for key, value in attributes.items() if key in ("src", "href")
    ]
    assert addresses
    assert all(value and value.startswith(("data:image/png;base64,", "#")) for value in addresses)
    assert "url(" not in content
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert {value[1:] for value in addresses if value and value.startswith("#")} <= ids
    assert all(picture.get("aria-label") and picture.get("role") == "img" for picture in page.all("svg"))
    assert all(picture.get("alt") for picture in page.all("img"))
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    titles = ("Accuracy against cost", "Ablations", "Training curves", "Loss terms", "Agreement with the teacher")
    titles += ("Gain by class", "Correlation of logits: student against teacher", "t-SNE of penultimate features")
    titles += ("Confusion", "Most confused pairs", "Sample images", "How these numbers were made", "Unfinished runs")
    for title in titles:
        assert f">{title}</" in content, title
    assert (tmp_path / "made" / "table.csv").read_text().startswith("method,")
    document = json.loads((tmp_path / "made" / "table.json").read_text())
    assert all(0 <= row["agreement"]["mean"] <= 100 for row in rows_by(document, "kd"))
    assert rows_by(document, "none")[0]["agreement"] is None


def test_a_second_report_passes_nothing_again(kd: Kd, runs: Path, tmp_path: Path) -> None:
    words = ("report", runs, "--out", "made", "--threads", "1", "--limit", "60")
    assert "60 test images" in kd(*words).err
    first = (tmp_path / "made" / "report.html").read_bytes()
    again = kd(*words)
    assert "test images" not in again.err
    assert (tmp_path / "made" / "report.html").read_bytes() == first
    for kept in (tmp_path / "made" / "cache").glob("*.npz"):  # damaged, it is made again
        kept.write_bytes(kept.read_bytes()[:50])
    assert "60 test images" in kd(*words).err
    assert (tmp_path / "made" / "table.csv").exists()


def test_images_and_passes_can_be_left_out(kd: Kd, runs: Path, tmp_path: Path) -> None:
    kd("report", runs, "--out", "private", "--threads", "1", "--limit", "60", "--no-images")
    private = (tmp_path / "private" / "report.html").read_text("utf-8")
    assert Page(private).all("img") == []
    assert "Sample images" not in private
    fast = kd("report", runs, "--out", "fast", "--fast")
    assert "test images" not in fast.err
    told = (tmp_path / "fast" / "report.html").read_text("utf-8")
    assert "Left out by --fast" in told
    assert "Training curves" in told
    assert not (tmp_path / "fast" / "cache").exists()


def test_without_the_data_set_the_page_says_so(kd: Kd, runs: Path, tmp_path: Path, monkeypatch) -> None:
    def gone(*_: Any) -> None:
        raise InputError("digits is not there")

    monkeypatch.setattr(passes, "test_images", gone)
    result = kd("report", runs, "--out", "made")
    assert result.code == 0
    page = (tmp_path / "made" / "report.html").read_text("utf-8")
    assert "Left out, because the test images are not there: digits is not there." in page
    assert "Confusion" not in page


def test_a_missing_checkpoint_leaves_its_part_out(kd: Kd, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "kd-2", tmp_path / "some" / "kd-2")
    shutil.copytree(runs / "none-0", tmp_path / "some" / "none-0")
    (tmp_path / "some" / "kd-2" / "student.safetensors").unlink()
    assert kd("report", "some", "--out", "made", "--threads", "1").code == 0
    page = (tmp_path / "made" / "report.html").read_text("utf-8")
    assert "some/kd-2/student.safetensors cannot be read" in page
    assert "student alone" in page


def test_a_folder_that_cannot_be_written_is_exit_5(kd: Kd, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "made").write_text("a file")
    result = kd("report", runs, "--fast", "--out", "made")
    assert result.code == 5
    assert "made" in result.error
    assert (tmp_path / "made").read_text() == "a file"


# ------------------------------------------------------------------------------------------------------- hostile names


def test_markup_escapes_whatever_it_is_given() -> None:
    made = tag("p", HOSTILE, title=HOSTILE)
    assert "<script" not in made
    assert "\x1b" not in made
    assert Page(made).elements == [("p", {"title": HOSTILE.replace("\n", "\\x0a").replace("\x1b", "\\x1b")})]
    assert text("‮") == "\\x202e"  # an override of the direction of writing


def test_hostile_names_stay_names(kd: Kd, runs: Path, tmp_path: Path) -> None:
    """Labels, paths, architectures, commands and class names of runs that want to be markup."""
    bad = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(runs / "kd-2", bad)
    summary = json.loads((bad / "summary.json").read_text())
    summary["network"] = HOSTILE
    summary["teacher"]["arch"] = HOSTILE
    durable.write_json(bad / "summary.json", summary)
    durable.write_json(bad / "env.json", {"argv": ["distill", HOSTILE], "versions": {HOSTILE: HOSTILE}})
    lines = [{"epoch": 1, "train": {"loss": 1.0}, "terms": {HOSTILE: 1.0}, "followed": {HOSTILE: 2.0}}]
    lines += [{"epoch": 2, "train": {"loss": float("nan")}, "terms": {HOSTILE: 0.5}, "followed": "no"}, [1], "x"]
    for epoch, value in enumerate((1e308, -1e308, 5e-324, 10**400, 1e18, -1e18, 0, "1", None, [], True)):
        lines.append({"epoch": 3 + epoch, "lr": value, "terms": {"a": value}, "followed": {"kl_a": value, "b": value}})
        lines.append({"epoch": value, "train": {"top1": value, "loss": value}, "test": {"single": value}})
    (bad / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{torn")
    result = kd("report", bad, runs / "none-0", "--out", "made", "--threads", "1", "--limit", "60")
    assert result.code == 0, result.err
    content = (tmp_path / "made" / "report.html").read_text("utf-8")
    page = Page(content)
    assert page.unbalanced == []
    assert len(page.all("script")) == 1
    assert all(picture["src"].startswith("data:") for picture in page.all("img") if picture["src"])
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert "\x1b" not in content + result.out + result.err
    assert "<script" not in (tmp_path / "made" / "table.md").read_text().replace("\\<script", "")
    json.loads((tmp_path / "made" / "table.json").read_text())


def test_tables_of_hostile_names() -> None:
    rows = [Row("student", HOSTILE, "=kd", "a|b", "__c__", "=SUM(A1)", 1.0, "", {})]
    table = formats.markdown(rows, [HOSTILE], best=False)
    assert len(table.splitlines()) == 5
    assert all(line.replace("\\|", "").count("|") == 4 for line in table.splitlines()[:3])
    latex = formats.latex(rows, [HOSTILE], best=False)
    assert "\\textbackslash{}" in latex
    assert "\x1b" not in latex
    cells = list(csv.reader(io.StringIO(formats.as_csv(rows, best=False))))
    assert len(cells) == 2
    assert cells[1][4] == "'=SUM(A1)"


# ----------------------------------------------------------------------------------------------------------- the parts


def test_statistics() -> None:
    found = stat([1.0, None, 3.0])
    assert found is not None
    assert (found.mean, found.std, found.n) == (2.0, pytest.approx(2**0.5), 2)
    assert stat([None]) is None
    one = stat([5.0])
    assert one is not None
    assert one.std is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "1", None, [1]])
def test_what_is_no_number_is_none(value: object) -> None:
    assert number({"a": {"b": value}}, "a", "b") is None
    assert number({"a": value}, "a", "b") is None


def test_the_correlation_is_that_of_numpy() -> None:
    logits = np.random.default_rng(0).normal(size=(200, 7)) + 3
    ours = passes._correlation(logits.sum(0), logits.T @ logits, len(logits))
    assert np.allclose(ours, np.corrcoef(logits.T), atol=1e-6)
    constant = np.ones((5, 2))
    assert (passes._correlation(constant.sum(0), constant.T @ constant, 5) == 0).all()


def test_the_sample_is_stratified_and_fixed() -> None:
    labels = torch.arange(30).repeat(100)
    chosen = passes._sample(labels)
    counts = torch.bincount(labels[chosen], minlength=30)
    assert sorted(counts[counts > 0].tolist()) == [passes.EMBEDDED_IMAGES] * passes.EMBEDDED_CLASSES
    assert (labels[chosen].diff() >= 0).all()
    assert torch.equal(chosen, passes._sample(labels))


def test_a_pass_agrees_with_the_evaluation(kd: Kd, runs: Path, tmp_path: Path) -> None:
    """What the page counts is what the run reported."""
    assert kd("report", runs / "kd-2", "--out", "made", "--threads", "1").code == 0
    images = passes.test_images("digits", None, 8, None)
    kept = next((tmp_path / "made" / "cache").glob(f"{read(runs / 'kd-2').digest[:24]}-*.npz"))
    found = passes._kept(kept)
    assert found is not None
    right = 100 * (found.predicted == images.split.labels.numpy()).mean()
    assert right == pytest.approx(read(runs / "kd-2").test("top1"), abs=1e-3)
    assert found.features.shape[0] == len(images.sample)
    assert found.latency_ms > 0


def test_each_network_is_passed_at_its_own_size(kd: Kd, runs: Path, tmp_path: Path) -> None:
    """Runs at 8 and at 16 pixels: every pass counts what its run reported, and nobody is compared across sizes."""
    larger = ["distill", *TINY, "--image-size", "16", "--student", "resnet8", "--quiet"]
    assert kd(*larger, "--method", "none", "--out", "some/none-16").code == 0
    assert kd(*larger, "--method", "kd", "--teacher", runs / "teacher", "--out", "some/kd-16").code == 0
    gathered = gather([str(runs / "none-0"), str(runs / "kd-2"), "some"])
    panels = panels_of(rows_of(gathered))
    assert [panel.name for panel in panels] == [
        "resnet14 → resnet8, digits at 8 pixels",
        "resnet14 → resnet8, digits at 16 pixels",
    ]
    system = validate(SystemSpec, {"device": "cpu", "threads": 1, "workers": 0})
    passer = Passer(gathered.records, system, None, None, tmp_path, Story(quiet=True))
    for panel in panels:
        seen = passer.panel(panel)
        assert seen.images is not None
        assert {row.method for row in panel.rows} == {"none", "kd"}
        labels = seen.images.split.labels.numpy()
        for record in (record for row in panel.rows for record in row.runs):
            right = 100 * (seen.students[record.digest].predicted == labels).mean()
            assert right == pytest.approx(record.test("top1"), abs=1e-3)
    told = kd("evaluate", "some/kd-16", "--teacher", runs / "teacher", "--threads", "1", "--json").json
    taught = next(row for row in panels[1].rows if row.method == "kd")
    assert taught.agreement is not None
    assert taught.agreement.mean == pytest.approx(told["metrics"]["test"]["agreement"], abs=1e-3)


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_replaced_file_has_another_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Streamed images are not read for the print, so their files must tell: no pass of the old ones is taken."""
    from kdcli.data.dataset import DataSet, Split

    files = [str(tmp_path / f"{number}.png") for number in range(2)]
    for name in files:
        Path(name).write_bytes(b"12345")
        os.utime(name, ns=(10**18, 10**18))
    split = Split.of([0, 1], paths=files)
    dataset = DataSet("folder:x", ("a", "b"), 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), split, split)
    monkeypatch.setattr(passes.data, "load", lambda *_, **__: dataset)
    before = passes.test_images("folder:x", None, 8, None).print
    assert passes.test_images("folder:x", None, 8, None).print == before
    Path(files[1]).write_bytes(b"123456" if change == "size" else b"54321")
    os.utime(files[1], ns=(10**18, 10**18 + (change == "time")))
    assert passes.test_images("folder:x", None, 8, None).print != before


def test_the_test_images_are_looked_for_wherever_a_run_had_them(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered = gather([str(runs / "none-0"), str(runs / "none-1")])
    places = iter(("gone", "there"))
    for record in gathered.records:
        assert record.spec is not None
        data = record.spec.data.model_copy(update={"data_dir": next(places)})
        object.__setattr__(record, "spec", record.spec.model_copy(update={"data": data}))
    original = passes.test_images

    def only_there(name: str, data_dir: str | None, *more: Any) -> passes.Images:
        if data_dir == "gone":
            raise InputError("gone holds no digits")
        return original(name, data_dir, *more)

    monkeypatch.setattr(passes, "test_images", only_there)
    system = validate(SystemSpec, {"device": "cpu", "threads": 1, "workers": 0})
    seen = Passer(gathered.records, system, None, 20, tmp_path, Story(quiet=True)).panel(
        panels_of(rows_of(gathered))[0]
    )
    assert len(seen.students) == 2


def test_epochs_have_whole_ticks() -> None:
    """Three epochs are 1, 2, 3 and not 1, 1.5, 2 …; many still have few."""
    assert charts.Axis("epoch", 1, 3, whole=True).ticks() == [1, 2, 3]
    assert charts.Axis("epoch", 1, 240, whole=True).ticks() == [50, 100, 150, 200]
    drawn = str(charts.lines("", "epoch", "loss", [charts.Series("kd", "s0", [1.0, 2.0, 3.0], [30.0, 20.0, 10.0])]))
    assert ">2<" in drawn
    assert ">2.5<" not in drawn


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0, 1, False), (61.2, 61.9, False), (12e6, 41e6, True), (1e-4, 10, True)]
)
def test_ticks_are_few_round_and_inside(low: float, high: float, log: bool) -> None:
    ticks = charts.Axis("", low, high, log).ticks()
    assert 2 <= len(ticks) <= 12
    assert all(low <= tick <= high for tick in ticks)
    assert all(0 <= charts.Axis("", low, high, log).at(tick) <= 1 for tick in ticks)
