"""Order, augmentation, resume, workers and ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from data_layouts import write_image

from kdcli.data.dataset import Split
from kdcli.data.loader import Loader
from kdcli.data.randomness import generator
from kdcli.data.resident import draw
from kdcli.errors import InputError, UsageError, WorkerError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def resident(count: int = 37, size: int = 16) -> Split:
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator(count), dtype=torch.uint8)
    return Split.of(torch.arange(count) % 3, images=images)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Split:
    root = tmp_path_factory.mktemp("images")
    paths = []
    for i in range(13):
        paths.append(str(root / f"{i}.png"))
        write_image(root / f"{i}.png", seed=i, size=(24 + i, 40))
    return Split.of(torch.arange(13) % 3, paths=paths)


def loader(split: Split, **options) -> Loader:
    defaults = {"mean": MEAN, "std": STD, "image_size": 16, "batch_size": 5, "seed": 7, "augment": "crop"}
    return Loader(split, **(defaults | {"device": "cpu", "train": True} | options))


def same(a, b) -> bool:
    a, b = list(a), list(b)
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images)
        and torch.equal(x.labels, y.labels)
        and torch.equal(x.index, y.index)
        and x.weight == y.weight
        for x, y in zip(a, b, strict=True)
    )


def reference(image: torch.Tensor, top: int, left: int, flip: bool, padding: int) -> torch.Tensor:
    """Pad, crop, flip, normalise, one pixel at a time."""
    _, height, width = image.shape
    out = torch.empty(3, height, width)
    for c in range(3):
        for y in range(height):
            for x in range(width):
                from_y, from_x = y + top - padding, (width - 1 - x if flip else x) + left - padding
                inside = 0 <= from_y < height and 0 <= from_x < width
                value = float(image[c, from_y, from_x]) if inside else 0.0
                out[c, y, x] = (value / 255 - MEAN[c]) / STD[c]
    return out


def test_crop_equals_a_slow_reference():
    split = resident(6)
    draws = draw(6, 2, 7, 3)
    assert draws.flip.any()
    assert not draws.flip.all()
    for batch in loader(split).epoch(3):
        for image, i in zip(batch.images, batch.index.tolist(), strict=True):
            top, left, flip = int(draws.top[i]), int(draws.left[i]), bool(draws.flip[i])
            assert torch.allclose(image, reference(split.images[i], top, left, flip, 2), atol=1e-5)


def test_flip_and_none_equal_the_images():
    split = resident(20)
    normal = (split.images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    flips = draw(20, 0, 7, 0).flip
    for augment in ("flip", "none"):
        for batch in loader(split, augment=augment).epoch(0):
            for image, i in zip(batch.images, batch.index.tolist(), strict=True):
                expected = normal[i].flip(-1) if augment == "flip" and flips[i] else normal[i]
                assert torch.allclose(image, expected, atol=1e-5)


def test_draws_cover_their_range_evenly():
    draws = draw(20_000, 4, 0, 0)
    for offsets in (draws.top, draws.left):
        counts = torch.bincount(offsets)
        assert len(counts) == 9
        assert (counts - 20_000 / 9).abs().max() < 250
    assert abs(draws.flip.float().mean() - 0.5) < 0.02
    assert not torch.equal(draws.top, draw(20_000, 4, 0, 1).top)
    assert not torch.equal(draws.top, draw(20_000, 4, 1, 0).top)


def test_padding_is_an_eighth_of_the_image():
    for size, padding in ((32, 4), (64, 8), (8, 1)):
        made = loader(resident(3, size), image_size=size)
        assert made._resident.padding == padding


@pytest.mark.parametrize("channels_last", [True, False])
def test_batches_have_their_format(channels_last, files):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for split in (resident(), files):
        batch = next(loader(split, channels_last=channels_last).epoch(0))
        assert batch.images.shape == (5, 3, 16, 16)
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=layout)
        assert torch.equal(batch.labels, split.labels[batch.index])


@pytest.mark.parametrize("count", [1, 4, 5, 6])
def test_the_last_partial_batch_is_kept(count):
    for train in (True, False):
        made = loader(resident(count), train=train)
        seen = torch.cat([batch.index for batch in made.epoch(0)])
        assert sorted(seen.tolist()) == list(range(count))
        assert made.steps == len(made) == -(-count // 5)
    assert seen.tolist() == list(range(count))


def test_usage_errors():
    with pytest.raises(UsageError, match="no samples"):
        loader(resident(3).subset([]))
    with pytest.raises(UsageError):
        loader(resident(3), batch_size=0)
    with pytest.raises(UsageError) as caught:
        loader(resident(3), augment="crops")
    assert "crop" in caught.value.hint
    with pytest.raises(UsageError):
        next(loader(resident(3)).epoch(0, start=2))


@pytest.mark.parametrize("augment", ["crop", "flip", "none", "resized-crop", "rotation"])
def test_an_epoch_is_a_pure_function(augment, files):
    for split in (resident(13), files):
        made = loader(split, augment=augment)
        whole = list(made.epoch(2))
        torch.manual_seed(123)
        list(made.epoch(0))
        for start in range(made.steps + 1):
            assert same(whole[start:], made.epoch(2, start=start))
        assert same(whole, loader(split, augment=augment).epoch(2))
        assert not torch.equal(whole[0].index, next(made.epoch(3)).index)
        other = next(loader(split, augment=augment, seed=8).epoch(2))
        assert not torch.equal(whole[0].index, other.index)


def test_streaming_leaves_the_global_generator_alone(files):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for workers in (0, 1):
        made = loader(files, augment="resized-crop", workers=workers)
        list(made.epoch(0))
        made.close()
        assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("augment", ["resized-crop", "rotation", "crop"])
def test_workers_change_nothing(augment, files):
    expected = [list(loader(files, augment=augment).epoch(epoch)) for epoch in range(2)]
    for workers in (1, 2):
        made = loader(files, augment=augment, workers=workers, timeout=60)
        try:
            for epoch in range(2):
                assert same(expected[epoch], made.epoch(epoch))
            abandoned = made.epoch(1)
            next(abandoned)
            abandoned.close()
            assert same(expected[0][1:], made.epoch(0, start=1))
        finally:
            made.close()


def test_resident_images_stream_the_same_with_workers():
    expected = list(loader(resident(9), augment="resized-crop").epoch(0))
    made = loader(resident(9), augment="resized-crop", workers=2, timeout=60)
    assert same(expected, made.epoch(0))
    made.close()


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("count", [1, 2, 11, 13])
def test_ranks_concatenate_to_the_global_batch(world, count):
    split = resident(count)
    single = list(loader(split, batch_size=4).epoch(1))
    ranks = [list(loader(split, batch_size=4, rank=rank, world=world).epoch(1)) for rank in range(world)]
    for step, batch in enumerate(single):
        parts = [rank[step] for rank in ranks]
        used = [part for part in parts if part.weight > 0]
        for name in ("images", "labels", "index"):
            assert torch.equal(torch.cat([getattr(part, name) for part in used]), getattr(batch, name))
        values = split.images.float().mean((1, 2, 3))
        mean = sum(part.weight * values[part.index].mean() for part in parts) / world
        assert torch.allclose(mean, values[batch.index].mean())
        assert all(len(part.index) > 0 for part in parts)


@pytest.mark.parametrize("count", [1, 2, 5, 13])
def test_evaluation_counts_each_sample_once(count, files):
    for split in (resident(count), files.subset(range(count))):
        seen = [
            i
            for rank in range(3)
            for batch in loader(split, train=False, batch_size=4, rank=rank, world=3).epoch(0)
            for i in batch.index.tolist()
        ]
        assert sorted(seen) == list(range(count))


def test_evaluation_takes_no_augmentation():
    split = resident(5)
    batch = next(loader(split, train=False, augment="crop").epoch(0))
    plain = next(loader(split, train=False, augment="none").epoch(4))
    assert torch.equal(batch.images, plain.images)


def test_evaluation_views_of_files(tmp_path):
    import numpy as np
    from PIL import Image

    picture = np.zeros((256, 256, 3), np.uint8)
    picture[16:240, 16:240] = 255
    Image.fromarray(picture).save(tmp_path / "x.png")
    split = Split.of([0], paths=[str(tmp_path / "x.png")])
    large = next(loader(split, train=False, image_size=224).epoch(0)).images
    assert large.min() > 0
    small = next(loader(split, train=False, image_size=112).epoch(0)).images
    assert small.min() < -0.9


def test_images_of_another_size_are_resized_in_the_batch():
    split = resident(5, 8)
    batch = next(loader(split, image_size=32, train=False).epoch(0))
    assert batch.images.shape == (5, 3, 32, 32)
    native = next(loader(split, image_size=8, train=False).epoch(0))
    assert torch.allclose(batch.images.mean((2, 3)), native.images.mean((2, 3)), atol=0.05)


def broken(split: Split, at: int, tmp_path) -> Split:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    paths = list(split.paths)
    paths[at] = str(bad)
    return Split.of(split.labels, paths=paths)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_file_is_an_input_error(files, tmp_path, workers):
    made = loader(broken(files, 3, tmp_path), train=False, workers=workers)
    with pytest.raises(InputError, match=r"bad\.png is not an image"):
        list(made.epoch(0))
    made.close()


@pytest.mark.parametrize(("how", "limit"), [(signal.SIGKILL, 4), (signal.SIGSTOP, 8)])
def test_dead_and_stuck_workers_are_worker_errors(files, how, limit):
    split = files.subset([i % 13 for i in range(600)])
    made = loader(split, workers=2, timeout=2)
    batches = made.epoch(0)
    next(batches)
    processes = made._stream._processes()
    assert len(processes) == 2
    before = signal.getsignal(signal.SIGCHLD)
    os.kill(processes[0].pid, how)
    started = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        list(batches)
    assert time.monotonic() - started < limit
    assert caught.value.code == 8
    assert signal.getsignal(signal.SIGCHLD) == before
    assert not any(process.is_alive() for process in processes)
    assert len(list(loader(files).epoch(0))) == 3


def test_workers_ignore_termination(files):
    made = loader(files.subset([i % 13 for i in range(100)]), workers=1, timeout=30)
    batches = made.epoch(0)
    next(batches)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(made._stream._processes()[0].pid, number)
    assert len(list(batches)) == made.steps - 1
    made.close()


def test_workers_do_not_outlive_a_killed_parent(files, tmp_path):
    code = f"""
import os, signal
from kdcli.data.dataset import Split
from kdcli.data.loader import Loader
made = Loader(Split.of([0] * 100, paths={files.paths[:1] * 100!r}), mean={MEAN}, std={STD}, image_size=16,
              batch_size=1, seed=0, augment="none", device="cpu", train=True, workers=1, timeout=60)
next(made.epoch(0))
batches = made.epoch(0)
next(batches)
print(made._stream._processes()[0].pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    pid = int(done.stdout)
    until = time.monotonic() + 10
    while time.monotonic() < until and _running(pid):
        time.sleep(0.1)
    assert not _running(pid)


def _running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
