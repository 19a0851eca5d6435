"""Further views of a batch: the same images first, then other crops and strongly augmented copies, each reproducible."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.io import write_png

from kdcli.data.dataset import Split
from kdcli.data.loader import Batch, Loader
from kdcli.data.strong import Strong, cut_out, operations
from kdcli.data.transforms import seeded
from kdcli.errors import UsageError

N, S = 10, 16


def images() -> Tensor:
    return torch.randint(0, 256, (N, 3, S, S), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def resident() -> Split:
    return Split.of(torch.arange(N) % 2, images=images())


@pytest.fixture
def filed(tmp_path: Any) -> Split:
    paths = []
    for number, image in enumerate(images()):
        paths.append(str(tmp_path / f"{number}.png"))
        write_png(image, paths[-1])
    return Split.of(torch.arange(N) % 2, paths=paths)


def loader(split: Split, **changes: Any) -> Loader:
    values: dict[str, Any] = {
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "image_size": S,
        "batch_size": 4,
        "seed": 3,
        "augment": "crop",
        "device": "cpu",
        "train": True,
    }
    return Loader(split, **(values | changes))


def batches(split: Split, start: int = 0, **changes: Any) -> list[Batch]:
    made = loader(split, **changes)
    try:
        return list(made.epoch(2, start))
    finally:
        made.close()


def same_extra(one: list[Batch], two: list[Batch]) -> bool:
    pairs = [(x, y) for a, b in zip(one, two, strict=True) for x, y in zip(a.extra, b.extra, strict=True)]
    return bool(pairs) and all(torch.equal(x, y) for x, y in pairs)


def bytes_of(x: Tensor) -> Tensor:
    """Normalised images as they were before normalisation."""
    return ((x * 0.25 + 0.5) * 255).round()


def is_crop_of(view: Tensor, image: Tensor, padding: int) -> list[bool]:
    """Whether `view` [3,S,S] is a crop of the padded `image`, unflipped and flipped."""
    found = []
    for flipped in (False, True):
        padded = torch.nn.functional.pad(image.flip(-1) if flipped else image, (padding,) * 4)
        offsets = range(2 * padding + 1)
        found.append(any(torch.equal(padded[:, i : i + S, j : j + S], view) for i in offsets for j in offsets))
    return found


@pytest.mark.parametrize("augment", ["crop", "flip", "none", "resized-crop", "rotation"])
def test_the_images_do_not_depend_on_the_further_views(augment: str):
    """Bit for bit what a loader without extras gives, so that methods are compared on the same batches."""
    alone = batches(resident(), augment=augment)
    more = batches(resident(), augment=augment, extra=("crop", "strong"))
    for a, b in zip(alone, more, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.index, b.index)
        assert a.extra == ()
        assert [x.shape for x in b.extra] == [b.images.shape] * 2


def test_files_too(filed: Split):
    alone = batches(filed)
    more = batches(filed, extra=("crop", "strong"))
    assert all(torch.equal(a.images, b.images) for a, b in zip(alone, more, strict=True))


@pytest.mark.parametrize("kind", ["resident", "files"])
def test_a_crop_has_the_same_flip_and_another_place(kind: str, filed: Split):
    """Each further crop is a crop of the padded image, flipped as the first one is; most are elsewhere, and differ."""
    split = resident() if kind == "resident" else filed
    moved = 0
    for batch in batches(split, extra=("crop", "crop")):
        first, *others = (bytes_of(x) for x in (batch.images, *batch.extra))
        for row, at in enumerate(batch.index.tolist()):
            original = images()[at].float()
            flip = is_crop_of(first[row], original, S // 8)
            assert flip.count(True) == 1
            for other in others:
                assert is_crop_of(other[row], original, S // 8) == flip
            moved += not torch.equal(others[0][row], others[1][row])
    assert moved > N // 2


@pytest.mark.parametrize("augment", ["flip", "none"])
def test_without_crops_a_further_crop_is_the_image(augment: str, filed: Split):
    for split in (resident(), filed):
        for batch in batches(split, augment=augment, extra=("crop",)):
            assert torch.equal(batch.extra[0], batch.images)


@pytest.mark.parametrize("kind", ["resident", "files"])
def test_strong_views_are_the_same_for_any_workers_and_start(kind: str, filed: Split):
    """A function of seed, epoch and sample: workers change nothing, nor does starting in the middle of the epoch."""
    split = resident() if kind == "resident" else filed
    extra = ("strong", "crop", "strong")
    whole = batches(split, extra=extra)
    for other in (batches(split, extra=extra, workers=1), batches(split, extra=extra)):
        assert same_extra(whole, other)
    later = batches(split, 1, extra=extra)
    assert same_extra(whole[1:], later)
    assert not torch.equal(whole[0].extra[0], whole[0].extra[2])  # each view draws its own


def test_ranks_share_the_views():
    """Concatenated in rank order, two ranks' views are one rank's."""
    extra = ("crop", "strong")
    whole = batches(resident(), extra=extra)
    parts = [batches(resident(), extra=extra, rank=rank, world=2) for rank in (0, 1)]
    for one, *two in zip(whole, *parts, strict=True):
        for number in range(2):
            assert torch.equal(one.extra[number], torch.cat([part.extra[number] for part in two]))


def test_evaluation_has_no_further_views():
    assert all(batch.extra == () for batch in batches(resident(), extra=("crop", "strong"), train=False))


def test_strong_augmentation_changes_most_images_and_keeps_the_global_generator():
    """uint8 of the same shape, different for different seeds; torch's own generator is where it was."""
    strong = Strong(lambda image: image)
    before = torch.get_rng_state()
    made = [seeded(strong, images()[0], 0, 0, seed, "x") for seed in range(20)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(x.dtype == torch.uint8 and x.shape == (3, S, S) for x in made)
    assert len({x.numpy().tobytes() for x in made}) > 15


def test_the_cut_out_covers_at_most_a_quarter_with_grey():
    """Sides are uniform in 0..S/2: the mean covered share of many draws lies near that of uncut squares, 1/12, or below."""
    blank = torch.zeros(3, 32, 32, dtype=torch.uint8)
    covered = []
    for seed in range(400):
        x = seeded(cut_out, blank, seed)
        assert set(x.unique().tolist()) <= {0, 128}
        covered.append((x[0] == 128).float().mean().item())
    assert max(covered) <= 0.25
    assert 0.04 < sum(covered) / 400 < 1 / 12


@pytest.mark.parametrize("augment", ["crop", "rotation"])
def test_an_unknown_kind_is_refused(augment: str):
    """Before an epoch begins, whether the images are resident or streamed, naming the nearest kind."""
    with pytest.raises(UsageError, match="'storng'") as caught:
        loader(resident(), augment=augment, extra=("storng",))
    assert "strong" in (caught.value.hint or "")


def test_the_operations_take_their_whole_range():
    """14 of them, at both ends of each range, on uint8 images; all but the identity change a picture."""
    image = torch.randint(40, 200, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert len(operations()) == 14
    for name, (operation, low, high) in operations().items():
        ends = [operation(image, at) for at in (low, high)]
        assert all(end.dtype == torch.uint8 and end.shape == image.shape for end in ends)
        assert any(not torch.equal(end, image) for end in ends) == (name != "identity"), name


def test_the_operations_do_what_they_are_called():
    """Exact shifts by shares of the side, a shear about the top left corner, and factors that only weaken."""
    image = torch.randint(1, 256, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def made(name: str, magnitude: float) -> Tensor:
        return operations()[name][0](image, magnitude)

    assert torch.equal(made("translate-x", 0.25)[..., 8:], image[..., :-8])
    assert not made("translate-x", 0.25)[..., :8].any()
    assert torch.equal(made("translate-y", -0.25)[:, :-8], image[:, 8:])
    assert torch.equal(made("shear-x", 0.3)[:, 0], image[:, 0])
    assert not torch.equal(made("shear-x", 0.3)[:, -1], image[:, -1])
    assert torch.equal(made("shear-y", 0.3)[..., 0], image[..., 0])
    assert (made("brightness", 0.5).int() - image.int() // 2).abs().max() <= 1
    assert torch.equal(made("posterize", 4.9), image & 0xF0)
    assert torch.equal(made("solarize", 128), torch.where(image >= 128, 255 - image, image))
