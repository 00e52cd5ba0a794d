"""CutMix and random erasing against slow loops, and alike on one process and on many."""

from __future__ import annotations

import math

import pytest
import torch

from wdat.data import ImageDataModule
from wdat.data.batch import Batch
from wdat.data.patches import Patches, inside, pasted
from wdat.errors import SettingError
from wdat.seeding import generator


def slow_inside(window, height, width):
    found = torch.zeros(len(window), height, width, dtype=torch.bool)
    for k, (row, column, h, w) in enumerate(window.tolist()):
        for i in range(height):
            for j in range(width):
                found[k, i, j] = abs((i + 0.5) / height - row) < h / 2 and abs((j + 0.5) / width - column) < w / 2
    return found


def test_a_window_is_what_a_slow_loop_finds():
    drawn = Patches(cutmix=1, erasing=1).draw(20, 5, generator(0, "augment patches", 3))
    for window in (drawn.window, drawn.hole):
        found = inside(window, 7, 9)
        assert found.shape == (20, 1, 7, 9)
        assert torch.equal(found[:, 0], slow_inside(window, 7, 9))


def test_draws_have_the_sizes_of_their_sources():
    drawn = Patches(cutmix=0.3, erasing=0.6).draw(4000, 50, generator(0, "augment patches", 0))
    areas = drawn.window[:, 2] * drawn.window[:, 3]
    assert torch.allclose(drawn.window[:, 2], drawn.window[:, 3])
    assert abs(float(areas.mean()) - 0.5) < 0.03, "uniform in [0, 1]"
    holes = drawn.hole[:, 2] * drawn.hole[:, 3]
    assert 0.02 - 1e-6 <= float(holes.min()) < 0.03 < 0.32 < float(holes.max()) <= 0.33 + 1e-6
    ratios = drawn.hole[:, 2] / drawn.hole[:, 3]
    assert 0.3 - 1e-6 <= float(ratios.min()) < 0.35 < 3 < float(ratios.max()) <= 3.3 + 1e-5
    assert abs(float(drawn.pasted.float().mean()) - 0.3) < 0.03
    assert abs(float(drawn.erased.float().mean()) - 0.6) < 0.03
    assert drawn.partner.unique().tolist() == list(range(50))


def test_cutmix_by_hand():
    place = torch.arange(3)
    one = Batch(torch.zeros(3, 1, 2, 4), torch.tensor([1, 2, 3]), place, place, 3, 0)
    other = Batch(torch.ones(3, 1, 2, 4), torch.tensor([4, 5, 6]), place, place, 3, 0)
    window = torch.zeros(3, 1, 2, 4, dtype=torch.bool)
    window[0, 0, :, 0] = True  # a quarter
    window[1, 0, :, 1:] = True  # three quarters
    mixed = pasted(one, other, window)
    assert torch.equal(mixed.x, window.float())
    assert mixed.y.tolist() == [1, 5, 3]
    assert mixed.other.tolist() == [4, 2, 6]
    assert mixed.share.tolist() == [0.75, 0.75, 1.0]


def data(**augmentation):
    module = ImageDataModule(
        "digits", 10, batch_size=16, eval_batch_size=6, val_size=20, limit_train=50, seed=3, augmentation=augmentation
    )
    module.prepare_data()
    module.setup()
    return module


def test_batches_are_mixed_in_their_shares_and_the_rest_is_as_it_was():
    plain, mixed = (next(iter(data(**given).train_dataloader())) for given in ({}, {"cutmix": 0.5}))
    assert plain.share is plain.other is None
    whole = mixed.share == 1
    assert 0 < int(whole.sum()) < 16
    assert torch.equal(mixed.x[whole], plain.x[whole])
    assert torch.equal(mixed.y[whole], plain.y[whole])
    assert ((mixed.share >= 0.5) & (mixed.share <= 1)).all()
    own = (mixed.x == plain.x).all(1).flatten(1).float().mean(1)  # black pixels may agree by chance
    kept = mixed.y == plain.y
    assert (own[kept] >= mixed.share[kept] - 1e-6).all()
    assert ((mixed.y == plain.y) | (mixed.other == plain.y)).all()


def test_erased_pixels_are_black_and_the_labels_stay():
    plain, erased = (next(iter(data(**given).train_dataloader())) for given in ({}, {"erasing": 1.0}))
    changed = (plain.x != erased.x).any(1)
    assert changed.flatten(1).any(1).sum() > 8
    assert not erased.x.transpose(0, 1)[:, changed].any()
    assert torch.equal(plain.y, erased.y)
    assert erased.share is None


@pytest.mark.parametrize("given", [{"cutmix": 0.7}, {"cutmix": 0.5, "erasing": 0.5}])
def test_processes_and_passes_see_what_one_process_sees(given):
    images = data(**given)
    index = torch.arange(13)
    (whole,) = [torch.cat([b.x for b in images.train_batches(index, 4)])]
    order = torch.cat([b.position for b in images.train_batches(index, 4)])
    parts = [b for rank in (0, 1) for b in images.train_batches(index, 4, rank, 2)]
    position = torch.cat([b.position for b in parts])
    assert torch.equal(torch.cat([b.x for b in parts])[position.argsort()], whole[order.argsort()])
    shares = torch.cat([b.share for b in parts])
    assert 0 < int((shares < 1).sum()) < 13


@pytest.mark.parametrize("split", ["val", "test"])
def test_only_training_images_are_changed(split):
    plain, mixed = data(), data(cutmix=1.0, erasing=1.0)
    for one, other in zip(plain.evaluation_loader(split), mixed.evaluation_loader(split), strict=True):
        assert torch.equal(one.x, other.x)
        assert other.share is None


@pytest.mark.parametrize("given", [{"cutmix": 1.5}, {"erasing": -0.1}, {"cutmix": math.nan}])
def test_impossible_shares_are_named(given):
    (key,) = given
    with pytest.raises(SettingError, match=rf"data\.augmentation\.{key}.*\[0, 1\]"):
        ImageDataModule("digits", 10, augmentation=given)
