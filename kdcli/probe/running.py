"""A linear probe as a run: through the engine's loop, or on cached features."""

from __future__ import annotations

import contextlib
from typing import Any

from kdcli import checkpoint
from kdcli.building import evaluation_loaders, make_loader
from kdcli.data.loader import Loader
from kdcli.engine.device import Device, guarded
from kdcli.engine.fit import Job, fit
from kdcli.engine.signals import StopFlag
from kdcli.inference import Use
from kdcli.output import Story, envelope
from kdcli.probe import cached
from kdcli.probe.layer import ProbeStep
from kdcli.probe.measured import Measured
from kdcli.probe.parts import Parts, build
from kdcli.runs.directory import Run, open_run
from kdcli.specs import RunSpec
from kdcli.training import open_recorded_device


def probe(spec: RunSpec, story: Story, stop: StopFlag) -> dict[str, Any]:
    """Probe the encoder that `spec` (a `linear-probe` spec) names; the summary of the run.

    Raises:
        KdError: the encoder or the images cannot be read, or the training cannot go on; what `fit` raises.
    """
    assert spec.encoder is not None
    file = checkpoint.locate(spec.encoder)
    with guarded(), open_run(spec, {str(spec.encoder): checkpoint.digest(file)}) as run:
        if run.status == "finished":
            story.note(f"{run.directory} is finished already")
            return run.summary()
        device = open_recorded_device(spec, run)
        parts = build(spec, device, story)
        loaded, dataset = parts.loaded, parts.dataset
        story.note(f"probing {loaded.backbone.arch} on {dataset.name}: {len(dataset.train)} training images")
        tests = evaluation_loaders(spec, dataset, device)
        if spec.probe.cached:
            measured = cached.train(spec, parts, tests, device, story, stop)
        else:
            measured = _augmented(run, parts, tests, device, story, stop)
        summary = envelope(
            "linear-probe",
            run=str(run.directory),
            checkpoint=str(file),
            spec_digest=run.digest,
            encoder={"arch": loaded.backbone.arch, "digest": loaded.digest},
            dataset=dataset.name,
            metrics={split: {**values, "epoch": "last"} for split, values in measured.metrics.items()},
            best_on_test={
                **(measured.best or {}),
                "note": "chosen on the test set: papers print it, do not select by it",
            },
            cost={"seconds": round(measured.seconds, 2), "peak_mib": device.peak_mib()},
            seed=spec.seed,
        )
        run.finish(summary)
        return summary


def _augmented(
    run: Run, parts: Parts, tests: dict[str, Loader], device: Device, story: Story, stop: StopFlag
) -> Measured:
    """Train through the engine's loop: every image augmented anew in every epoch, resumable."""
    spec, dataset = run.spec, parts.dataset
    train = make_loader(spec, dataset, dataset.train, device, train=True)
    step = ProbeStep(parts.module, spec.train.label_smoothing)
    facts = {"encoder": parts.loaded.digest}  # which a resumed run must find as it was
    job = Job(run, step, Use(), device, train, tests, spec.train, story, stop, f"probe on {dataset.name}", facts)
    with contextlib.closing(train):
        fitted = fit(job)
    metrics = {split: modes["single"] for split, modes in fitted.metrics.items()}
    return Measured(metrics, fitted.best, fitted.seconds)
