"""Augmentation against an independent, slow loop, and alike on one process and on many."""

import pytest
import torch
import torchvision.transforms.functional as reference

from wdat.data import Augment, ImageSet, TrainPlan, crop_and_flip
from wdat.seeding import generator

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


def images(n: int = 12, height: int = 7, width: int = 9) -> torch.Tensor:
    return torch.randint(256, (n, 3, height, width), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def slow(x, shifts, flips, padding):
    out = []
    for image, (top, left), flip in zip(x, shifts.tolist(), flips.tolist(), strict=True):
        image = reference.crop(reference.pad(image, [padding]), top, left, *image.shape[1:])
        out.append(reference.hflip(image) if flip else image)
    return torch.stack(out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [True, False])
def test_equals_a_slow_loop(padding, flip, device):
    x = images()
    draws = Augment(padding, flip).draw(len(x), generator(0, "augment", 5))
    fast = Augment(padding, flip)(x.to(device), draws)
    assert fast.device.type == device
    assert fast.dtype == torch.uint8
    assert fast.is_contiguous()
    assert torch.equal(fast.cpu(), slow(x, *draws, padding))


def test_draws_cover_their_range():
    shifts, flips = Augment(4, True).draw(2000, generator(0, "augment", 0))
    assert shifts.unique().tolist() == list(range(9))
    assert 0.45 < flips.float().mean() < 0.55
    assert not Augment(4, False).draw(50, generator(0, "augment", 0)).flips.any()


def test_a_shift_of_the_padding_changes_nothing():
    x = images()
    assert torch.equal(crop_and_flip(x, torch.full((12, 2), 4), torch.zeros(12, dtype=torch.bool), 4), x)


@pytest.mark.parametrize("device", DEVICES)
def test_two_processes_see_what_one_sees(device):
    x, y = images(48).to(device), torch.arange(48, device=device)
    data = ImageSet(x, y, Augment(), seed=0)
    plans = [TrainPlan(48, 8, 0), TrainPlan(48, 8, 0, 0, 2), TrainPlan(48, 8, 0, 1, 2)]
    for whole, *parts in zip(*plans, strict=True):
        one, many = data[whole], [data[part] for part in parts]
        for name in ("x", "y", "index", "position"):
            assert torch.equal(torch.cat([getattr(part, name) for part in many]), getattr(one, name))
        assert one.x.dtype == torch.uint8
        assert one.x.device.type == device
        assert torch.equal(one.y, one.index)
        finished = one.finished()
        assert finished.x.dtype == torch.float32
        assert torch.equal(finished.x, one.x.float() / 255)


def test_draws_depend_on_seed_and_step():
    x, y = images(8), torch.arange(8)
    plan = TrainPlan(8, 8, 0)
    (first,) = plan
    plan.set_epoch(1)
    (second,) = plan
    seen = ImageSet(x, y, Augment(), seed=0)[first].x
    assert torch.equal(seen, ImageSet(x, y, Augment(), seed=0)[first].x)
    assert not torch.equal(seen, ImageSet(x, y, Augment(), seed=1)[first].x)
    later = ImageSet(x, y, Augment(), seed=0)[second]
    assert not torch.equal(seen[first.index.argsort()], later.x[second.index.argsort()])


def test_without_augmentation_images_are_as_stored():
    x, y = images(8), torch.arange(8)
    (plan,) = TrainPlan(8, 8, 0)
    for augment in (None, Augment(0, False)):
        assert torch.equal(ImageSet(x, y, augment)[plan].x, x[plan.index])
