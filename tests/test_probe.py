"""Linear probes: what is previewed, what is refused, what is measured."""

from __future__ import annotations

import pytest
from harness import PER_EPOCH

from kdcli import checkpoint

DIGITS = ["--dataset", "digits", "--device", "cpu", "--threads", "1"]
FEW = [*DIGITS, "--train-fraction", "0.1", "--batch-size", "15", "--workers", "0"]


@pytest.mark.parametrize("cached", [False, True])
def test_a_preview_tells_what_is_frozen_and_what_is_trained(cached, kd, teachers, tmp_path):
    """The encoder with its cost, the layer, the steps and an estimate, a document for each data set; nothing is written."""
    words = ["linear-probe", teachers / "vsd", *FEW, "--dataset", "synthetic", *(["--cached"] if cached else [])]
    document = kd(*words, "--epochs", "4", "--dry-run", "--json").json
    assert document["dry_run"] is True
    assert [probe["data"]["name"] for probe in document["probes"]] == ["digits", "synthetic"]
    first = document["probes"][0]
    own = kd("inspect", teachers / "vsd", "--json").json
    assert first["encoder"] == {
        "arch": "resnet14",
        "digest": checkpoint.digest(checkpoint.locate(teachers / "vsd")),
        "input_size": 16,
        "features": 64,
        "params": own["params"],
        "macs": own["macs"],
    }
    assert first["trained_params"] == 65 * 10
    assert first["steps"] == {"per_epoch": PER_EPOCH, "total": 4 * PER_EPOCH}
    assert first["spec"]["probe"]["cached"] is cached
    assert first["estimate"]["memory_mib"] > 0
    text = kd(*words, "--dry-run").out
    for word in (
        "encoder resnet14",
        "16 pixels, frozen",
        "650 parameters, 10 classes of digits",
        "steps: ",
        "estimate: ",
    ):
        assert word in text
    assert not list(tmp_path.iterdir())


def test_a_cached_preview_counts_the_passes_it_makes(kd, teachers, monkeypatch):
    """Twice the training images and once the test images, whatever the epochs; a step is one of the layer alone."""
    from kdcli.probe import previewing

    seen = []

    def seconds_for(work, images, batch, device):
        seen.append((images, tuple(batch(3).images.shape)))
        work(batch(3))
        return 36.0

    monkeypatch.setattr(previewing, "seconds_for", seconds_for)
    words = ["linear-probe", teachers / "kd", *FEW, "--cached", "--dry-run", "--json"]
    (probe,) = kd(*words, "--epochs", "1").json["probes"]
    train = probe["data"]["train"]
    assert seen == [(250, (3, 3, 8, 8)), (15, (3, 64))]
    assert probe["estimate"]["seconds_per_step"] == 36
    assert probe["estimate"]["hours"] == pytest.approx(((2 * train + 360) / 250 + PER_EPOCH) / 100, abs=2e-3)


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["gone.safetensors", *DIGITS], 3, "gone.safetensors"),
        (["encoder", *DIGITS[2:], "--dataset", "cifar10", "--data-dir", "nowhere"], 3, "nowhere"),
        (["encoder", *DIGITS, "--cached", "--erasing", "0.5"], 2, "--erasing"),
    ],
    ids=["no encoder", "no images", "no effect"],
)
def test_a_preview_finds_what_would_stop_the_probe(words, code, named, kd, teachers):
    """With the exit code and the line of the probe itself."""
    words = ["linear-probe", *(teachers / "kd" if word == "encoder" else word for word in words)]
    previewed, run = kd(*words, "--dry-run"), kd(*words)
    assert previewed.code == run.code == code
    assert named in previewed.error
    assert previewed.error == run.error


@pytest.mark.parametrize("flags", [["--max-steps", "2"], ["--cached", "--epochs", "1"]], ids=["augmented", "cached"])
def test_images_held_out_are_measured_too(flags, kd, teachers):
    """`--val-fraction` gives a second split to choose by, and the layer does not see its images."""
    words = ["linear-probe", teachers / "kd", *DIGITS, "--batch-size", "64", "--workers", "0", *flags, "--json"]
    (run,) = kd(*words, "--val-fraction", "0.2").json["runs"]
    assert set(run["metrics"]) == {"val", "test"}
    expected = 287 if "--cached" in flags else 250  # of 1,437 images; a smoke run measures on no more than it may
    assert run["metrics"]["val"]["n"] in (expected, expected + 1)
    assert run["metrics"]["val"]["epoch"] == "last"
    (plain,) = kd(*words).json["runs"]
    assert set(plain["metrics"]) == {"test"}


def test_a_probe_leaves_its_encoder_alone(kd, teachers):
    """Neither a preview nor a probe changes a byte of the checkpoint."""
    file = checkpoint.locate(teachers / "kd")
    before = file.read_bytes()
    assert kd("linear-probe", teachers / "kd", *FEW, "--dry-run").code == 0
    assert kd("linear-probe", teachers / "kd", *FEW, "--max-steps", "2", "--batchnorm", "train").code == 0
    assert file.read_bytes() == before
