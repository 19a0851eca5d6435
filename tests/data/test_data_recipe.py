"""Mixup, cutmix, RandAugment, erasing and colours: timm's numbers, each a function of seed, epoch and image alone."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import write_png

from kdcli.data.dataset import Split
from kdcli.data.erasing import Erasing, erase
from kdcli.data.loader import Batch, Loader
from kdcli.data.mixing import Draw, Mixing, mixed_images, mixed_labels, partners
from kdcli.data.randomness import mix
from kdcli.data.recolour import RandAugment, further
from kdcli.data.transforms import seeded
from kdcli.losses import cross_entropy

N, S, K = 13, 16, 5
POLICY = "rand-m9-mstd0.5-inc1"
BOTH = Mixing(0.8, 1.0)


def images() -> Tensor:
    return torch.randint(0, 256, (N, 3, S, S), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def resident() -> Split:
    return Split.of(torch.arange(N) % K, images=images())


@pytest.fixture
def filed(tmp_path: Any) -> Split:
    paths = []
    for number, image in enumerate(images()):
        paths.append(str(tmp_path / f"{number}.png"))
        write_png(image, paths[-1])
    return Split.of(torch.arange(N) % K, paths=paths)


def loader(split: Split, **changes: Any) -> Loader:
    values: dict[str, Any] = {
        "mean": (0.5, 0.4, 0.3),
        "std": (0.25, 0.25, 0.25),
        "image_size": S,
        "batch_size": 4,
        "seed": 3,
        "augment": "crop",
        "device": "cpu",
        "train": True,
        "classes": K,
    }
    return Loader(split, **(values | changes))


def batches(split: Split, epoch: int = 2, start: int = 0, **changes: Any) -> list[Batch]:
    made = loader(split, **changes)
    try:
        return list(made.epoch(epoch, start))
    finally:
        made.close()


def equal(one: list[Batch], two: list[Batch]) -> bool:
    def tensors(batch: Batch) -> list[Tensor]:
        return [batch.images, batch.labels, batch.index, batch.targets, *batch.extra]

    return len(one) == len(two) and all(
        torch.equal(x, y) for a, b in zip(one, two, strict=True) for x, y in zip(tensors(a), tensors(b), strict=True)
    )


# ------------------------------------------------------------------------------------------------------------- mixing


@pytest.mark.parametrize("values", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0, 0.6, 0.3)])
def test_draws_are_timms(values: tuple[float, ...]) -> None:
    """From equal seeds, timm's Mixup mixes two images into the same two, with the same λ and box."""
    from timm.data.mixup import Mixup

    mixing = Mixing(*values)
    theirs = Mixup(*values[:2], None, *values[2:], label_smoothing=0.0, num_classes=2)
    labels = torch.tensor([0, 1])
    kinds = set()
    for step in range(60):
        drawn = mixing.draw(12, 20, 7, step)
        kinds.add((drawn.box is not None, drawn.share == 1))
        pair = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(step))
        before = np.random.get_state()
        np.random.seed(mix(7, step) % 2**32)
        expected, targets = theirs(pair.clone(), labels)
        np.random.set_state(before)
        assert torch.allclose(mixed_images(pair, drawn), expected, atol=1e-6)
        assert torch.allclose(mixed_labels(labels, 2, drawn)[1], targets, atol=1e-6)
    assert (True, False) in kinds or values[1] == 0
    assert (False, False) in kinds or values[0] == 0
    assert ((False, True) in kinds) is (len(values) > 2)


def test_partners_are_neighbours() -> None:
    """Everyone's partner has them for a partner; the last of an odd batch is alone."""
    assert partners(6, torch.device("cpu")).tolist() == [1, 0, 3, 2, 5, 4]
    assert partners(5, torch.device("cpu")).tolist() == [1, 0, 3, 2, 4]
    assert partners(1, torch.device("cpu")).tolist() == [0]


def test_the_share_of_cutmix_is_the_area_exactly() -> None:
    """Where own images are black and partners white, λ is the share of black pixels, boxes at the border included."""
    pair = torch.stack([torch.zeros(3, S, S), torch.ones(3, S, S)])
    clipped = 0
    for step in range(200):
        drawn = Mixing(0, 1.0).draw(S, S, 1, step)
        made = mixed_images(pair, drawn)
        assert (made[0] == 0).float().mean().item() == pytest.approx(drawn.share, abs=1e-7)
        assert (made[1] == 1).float().mean().item() == pytest.approx(drawn.share, abs=1e-7)
        clipped += drawn.box is not None and (0 in drawn.box or S in drawn.box)
    assert clipped
    assert pair[0].max() == 0  # the arguments are left as they were


def test_a_mixed_batch_is_the_plain_batch_mixed() -> None:
    """Images, labels and shares of every batch of an epoch, the odd last one included; off leaves every bit alone."""
    plain = batches(resident())
    mixed = batches(resident(), mixing=BOTH)
    kept = []
    for step, (a, b) in enumerate(zip(plain, mixed, strict=True)):
        drawn = BOTH.draw(S, S, 3, 2, step, "mixing")
        other = torch.tensor([i ^ 1 if i ^ 1 < len(a.labels) else i for i in range(len(a.labels))])
        if drawn.box is None:
            expected = drawn.share * a.images + (1 - drawn.share) * a.images[other]
        else:
            top, bottom, left, right = drawn.box
            expected = a.images.clone()
            expected[:, :, top:bottom, left:right] = a.images[other][:, :, top:bottom, left:right]
        assert torch.allclose(b.images, expected, atol=1e-6)
        assert b.images.is_contiguous(memory_format=torch.channels_last)
        hot = torch.nn.functional.one_hot(a.labels, K).float()
        assert b.soft is not None
        assert b.soft.shape == (len(a.labels), K)
        assert torch.allclose(b.soft, drawn.share * hot + (1 - drawn.share) * hot[other], atol=1e-6)
        assert torch.allclose(b.soft.sum(1), torch.ones(len(a.labels)), atol=1e-6)
        assert torch.equal(b.labels, b.soft.argmax(1))
        assert torch.equal(b.index, a.index)
        assert b.targets is b.soft
        kept.append(drawn.share)
    assert min(kept) < 0.5 < max(kept)
    assert loader(resident(), mixing=BOTH)._resident is not None
    assert all(a.soft is None and a.targets is a.labels for a in plain)


def test_the_larger_share_names_the_class() -> None:
    """A partner that is more than half of the image gives its class; images of one class stay of that class."""
    labels = torch.tensor([0, 1, 2, 2, 3])
    assert mixed_labels(labels, K, Draw(0.4))[0].tolist() == [1, 0, 2, 2, 3]
    assert mixed_labels(labels, K, Draw(0.6))[0].tolist() == labels.tolist()
    assert mixed_labels(labels, K, Draw(0.4))[1][2].tolist() == pytest.approx([0, 0, 1, 0, 0])


def test_batches_are_mixed_with_their_probability() -> None:
    """0 never, 0.3 in 3 of 10 batches; an unmixed batch has its labels as shares."""
    assert {Mixing(0.8, 1.0, prob=0.0).draw(S, S, 0, i).share for i in range(50)} == {1.0}
    mixed = [Mixing(0.8, 1.0, prob=0.3).draw(S, S, 0, i).share < 1 for i in range(2000)]
    assert sum(mixed) / 2000 == pytest.approx(0.3, abs=0.04)
    cut = [Mixing(0.8, 1.0, switch=0.2).draw(S, S, 0, i).box is not None for i in range(2000)]
    assert sum(cut) / 2000 == pytest.approx(0.2, abs=0.04)
    for batch, plain in zip(batches(resident(), mixing=Mixing(0.8, 1.0, prob=1e-9)), batches(resident()), strict=True):
        assert torch.equal(batch.images, plain.images)
        assert torch.equal(batch.targets, torch.nn.functional.one_hot(plain.labels, K).float())


def test_ranks_draw_alike_and_make_the_batches_of_one_process() -> None:
    """Two ranks of two images each: the halves of the one process's batches; with parts of odd size λ is still shared."""
    whole = batches(resident(), mixing=BOTH)
    halves = [batches(resident(), mixing=BOTH, rank=rank, world=2) for rank in (0, 1)]
    for one, two, both in list(zip(*halves, whole, strict=True))[:3]:  # the fourth is a single image
        assert torch.equal(torch.cat([one.images, two.images]), both.images)
        assert torch.equal(torch.cat([one.targets, two.targets]), both.targets)
    odd = [batches(resident(), mixing=BOTH, rank=rank, world=2, batch_size=6) for rank in (0, 1)]
    for step, pair in enumerate(list(zip(*odd, strict=True))[:2]):
        share = BOTH.draw(S, S, 3, 2, step, "mixing").share
        for batch in pair:
            shares = {round(x, 5) for x in batch.targets.unique().tolist()}
            assert shares <= {0.0, 1.0, round(share, 5), round(1 - share, 5)}
            assert round(share, 5) in shares


def test_further_views_are_mixed_like_the_first() -> None:
    """λ, box and partners are the same in every view of a batch."""
    extra = ("crop", "strong")
    plain = batches(resident(), extra=extra)
    mixed = batches(resident(), extra=extra, mixing=BOTH)
    for step, (a, b) in enumerate(zip(plain, mixed, strict=True)):
        drawn = BOTH.draw(S, S, 3, 2, step, "mixing")
        for before, after in zip((a.images, *a.extra), (b.images, *b.extra), strict=True):
            assert torch.equal(mixed_images(before, drawn), after)


def test_smoothing_of_shares_is_timms() -> None:
    """timm smooths one-hot labels and mixes them, we mix and smooth: the same targets, and the same loss."""
    from timm.data.mixup import mixup_target
    from timm.loss import SoftTargetCrossEntropy

    labels, logits = torch.tensor([0, 3]), torch.randn(2, K, dtype=torch.float64)
    expected = SoftTargetCrossEntropy()(logits, mixup_target(labels, K, 0.3, smoothing=0.1).double())
    ours = cross_entropy(logits, mixed_labels(labels, K, Draw(0.3))[1].double(), smoothing=0.1)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    # Of unmixed images they are those of the loss on labels.
    sure = cross_entropy(logits, mixed_labels(labels, K, Draw(1.0))[1], 0.1)
    assert sure.item() == pytest.approx(cross_entropy(logits, labels, 0.1).item(), rel=1e-9)


# ------------------------------------------------------------------------------------------------------------ erasing


def test_erased_areas_are_timms() -> None:
    """Share erased, mean area and mean logarithm of the ratio of 20,000 boxes, against as many of timm's own."""
    from timm.data.random_erasing import RandomErasing

    size, count = 32, 20_000
    top, left, height, width = Erasing(0.25).draw(count, size, 0).unbind(1)
    some = height > 0
    assert ((top >= 0) & (top + height <= size) & (left >= 0) & (left + width <= size)).all()
    random.seed(0)
    theirs = RandomErasing(0.25, mode="const", device="cpu")
    areas, ratios = [], []
    for _ in range(count):
        image = theirs(torch.ones(1, size, size))[0]
        if (gone := image == 0).any():
            high, wide = int(gone.any(1).sum()), int(gone.any(0).sum())
            areas.append(high * wide)
            ratios.append(np.log(high / wide))
    area = (height * width)[some].double()
    assert some.double().mean().item() == pytest.approx(len(areas) / count, abs=0.015)
    assert area.mean().item() == pytest.approx(float(np.mean(areas)), rel=0.03)
    assert area.std().item() == pytest.approx(float(np.std(areas)), rel=0.05)
    ratio = (height[some] / width[some]).log()
    assert ratio.std().item() == pytest.approx(float(np.std(ratios)), rel=0.05)
    assert (Erasing(1.0).draw(1000, size, 0)[:, 2] > 0).all()
    for offset, side in ((top, height), (left, width)):  # as often at one end as at the other
        assert (offset[some] / (size - side[some])).double().mean().item() == pytest.approx(0.5, abs=0.03)


def test_a_box_is_filled_with_noise_and_nothing_else_changes() -> None:
    """Standard normal noise after normalisation, other for each image; images without a box are the plain ones."""
    plain, erased = batches(resident()), batches(resident(), erasing=0.6)
    boxes = Erasing(0.6).draw(N, S, 3, 2, "erasing", 0)
    values, hit = [], 0
    for a, b in zip(plain, erased, strict=True):
        for x, y, i in zip(a.images, b.images, a.index.tolist(), strict=True):
            top, left, height, width = boxes[i].tolist()
            inside = torch.zeros(S, S, dtype=torch.bool)
            inside[top : top + height, left : left + width] = height > 0
            assert torch.equal(x[:, ~inside], y[:, ~inside])
            values.append(y[:, inside].flatten())
            hit += height > 0
    noise = torch.cat(values)
    assert 0 < hit < N
    assert len(noise.unique()) == len(noise)
    assert noise.mean().abs() < 0.2
    assert noise.std() == pytest.approx(1.0, abs=0.15)
    blank = torch.zeros(1, 3, S, S)
    assert torch.equal(erase(blank.clone(), [[0, 0, 0, 0]], [(0,)]), blank)


def test_erasing_keeps_images_on_the_device_and_strong_views_as_they_are() -> None:
    """A further crop is erased elsewhere than the first view."""
    assert loader(resident(), erasing=0.5)._resident is not None
    extra = ("crop", "strong")
    plain, erased = batches(resident(), extra=extra), batches(resident(), extra=extra, erasing=1.0)
    for a, b in zip(plain, erased, strict=True):
        assert torch.equal(a.extra[1], b.extra[1])
        changed = [(x != y).any(1) for x, y in ((a.images, b.images), (a.extra[0], b.extra[0]))]
        assert all(mask.flatten(1).any(1).all() for mask in changed)
        assert not torch.equal(*changed)


# --------------------------------------------------------------------------------------------- RandAugment and colours


def test_rand_augment_is_timms() -> None:
    """Seeded alike, timm's transform on PIL images gives the same bytes; the global generators are left alone."""
    from timm.data.auto_augment import rand_augment_transform

    made = RandAugment(POLICY, S, (0.5, 0.4, 0.3))
    theirs = rand_augment_transform(POLICY, {"translate_const": int(S * 0.45), "img_mean": (128, 102, 76)})
    changed = 0
    for number, image in enumerate(images()):
        before, numpys = random.getstate(), np.random.get_state(legacy=False)
        ours = seeded(made, image, number)
        assert random.getstate() == before
        assert str(np.random.get_state(legacy=False)) == str(numpys)
        seed = int(torch.randint(2**32, (), generator=torch.Generator().manual_seed(mix(number))))
        random.seed(seed)
        np.random.seed(seed)
        expected = theirs(Image.fromarray(image.permute(1, 2, 0).numpy()))
        assert torch.equal(ours, torch.from_numpy(np.array(expected)).permute(2, 0, 1))
        changed += not torch.equal(ours, image)
    assert changed > N // 2


def test_posterizing_to_no_bits_gives_black_as_it_did() -> None:
    """timm asks for it at magnitude 10, and newer versions of Pillow refuse; other numbers of bits are Pillow's."""
    made = RandAugment("rand-m10-p1-inc1", S, (0.5, 0.5, 0.5))
    (op,) = [op for op in made.function.ops if op.name == "PosterizeIncreasing"]
    image = Image.fromarray(images()[0].permute(1, 2, 0).numpy())
    assert not np.array(op(image)).any()
    for bits in range(1, 9):
        assert (np.array(op.aug_fn(image, bits)) == np.array(ImageOps.posterize(image, bits))).all()


def test_colours_are_jittered_where_timm_does() -> None:
    """Alone, or beside RandAugment's set 3a; with another policy they are left to it."""
    mean = (0.5, 0.5, 0.5)
    assert further(None, 0.0, S, mean) is None
    assert isinstance(further(POLICY, 0.4, S, mean), RandAugment)
    assert "ColorJitter" in repr(further("rand-m9-t3a", 0.4, S, mean))
    alone = further(None, 0.4, S, mean)
    assert alone is not None
    grey = torch.full((3, S, S), 100, dtype=torch.uint8)
    levels = torch.tensor([float(seeded(alone, grey, i).float().mean()) for i in range(400)])
    assert levels.min() >= 57  # only brightness changes a grey image, by 0.6 to 1.4, and each step rounds down
    assert levels.max() <= 141
    assert levels.min() < 65
    assert levels.max() > 135


# ------------------------------------------------------------------------------------------------------- determinism


ALL: dict[str, Any] = {"rand_augment": POLICY, "erasing": 0.5, "mixing": BOTH}
RECIPES: list[dict[str, Any]] = [ALL, {"color_jitter": 0.4}, {"erasing": 0.5, "mixing": BOTH}]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("extra", [(), ("crop", "strong")])
def test_workers_do_not_matter(recipe: dict[str, Any], extra: tuple[str, ...], filed: Split) -> None:
    """None or two of them, images in files or in memory that have to stream."""
    for split in (filed, resident()):
        assert equal(batches(split, extra=extra, **recipe), batches(split, extra=extra, workers=2, **recipe))


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_epoch_goes_on_where_it_stopped(recipe: dict[str, Any], filed: Split) -> None:
    """The batches from the third on; other epochs and seeds have others."""
    for split in (filed, resident()):
        whole = batches(split, **recipe)
        assert equal(whole[2:], batches(split, start=2, **recipe))
        assert equal(whole, batches(split, **recipe))
        assert not equal(whole, batches(split, epoch=3, **recipe))
        assert not equal(whole, batches(split, seed=4, **recipe))


@pytest.mark.parametrize("augment", ["crop", "flip", "none", "resized-crop", "rotation"])
def test_rand_augment_follows_every_augmentation(augment: str) -> None:
    """The streamed batch is timm's transform of the plain one, image by image, from the generator of that image."""
    plain = batches(resident(), augment=augment, rand_augment="rand-m0-n1-p0")  # streams, and changes nothing
    made = batches(resident(), augment=augment, rand_augment=POLICY)
    function = RandAugment(POLICY, S, (0.5, 0.4, 0.3))
    mean = torch.tensor((0.5, 0.4, 0.3)).view(3, 1, 1)
    for a, b in zip(plain, made, strict=True):
        for x, y, i in zip(a.images, b.images, a.index.tolist(), strict=True):
            raw = ((x * 0.25 + mean) * 255).round().to(torch.uint8)
            expected = seeded(function, raw, 3, 2, i, "further").float()
            assert torch.allclose((y * 0.25 + mean) * 255, expected, atol=1e-3)


def test_evaluation_is_left_alone() -> None:
    """None of it touches a loader that does not train."""
    assert equal(batches(resident(), train=False), batches(resident(), train=False, **ALL))


def test_crops_of_a_view_have_colours_of_their_own() -> None:
    """A further crop is augmented with other draws than the first view; a strong one as it always is."""
    extra = ("crop", "strong")
    made = batches(resident(), augment="none", extra=extra, rand_augment="rand-m9-p1")
    plain = batches(resident(), augment="none", extra=extra, rand_augment="rand-p0")
    assert all(torch.equal(a.extra[1], b.extra[1]) for a, b in zip(made, plain, strict=True))
    same = [torch.equal(x, y) for b in made for x, y in zip(b.images, b.extra[0], strict=True)]
    assert not all(same)
    assert all(a.shape == b.shape for a, b in pairwise((made[0].images, *made[0].extra)))
