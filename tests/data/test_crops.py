"""Cuts against RobustBench's and torchvision's own."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from wdat.data import CenterCrop, RandomCrop
from wdat.data.crops import TRIALS, box
from wdat.errors import SettingError
from wdat.models import preprocessing, zoo
from wdat.seeding import generator

TIMM = "Tian2022Deeper_DeiT-S"
NETWORKS = ["Wong2020Fast", "Salman2020Do_R50", "Mo2022When_ViT-B", "Singh2023Revisiting_ViT-S-ConvStem", TIMM]


def photo(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", NETWORKS)
def test_cuts_as_robustbench_does_for_the_network(name):
    threat = "corruptions" if name == TIMM else "Linf"
    ours = preprocessing({"name": name, "dataset": "imagenet", "threat_model": threat})
    zoo.robustbench()
    theirs = importlib.import_module("robustbench.data").get_preprocessing(
        importlib.import_module("robustbench.model_zoo.enums").BenchmarkDataset.imagenet,
        importlib.import_module("robustbench.model_zoo.enums").ThreatModel(threat),
        name,
        None,
    )
    for size in ((300, 271), (225, 400), (100, 90)):
        crop = CenterCrop.named(ours)(photo(*size))
        assert crop.shape == (3, CenterCrop.named(ours).size, CenterCrop.named(ours).size)
        assert torch.equal(crop.float() / 255, theirs(photo(*size)))


@pytest.mark.parametrize("name", ["", "Res", "Crop0", "Bicubic", "res256crop224", "Crop224Res256", "Res256Crop224x"])
def test_names_that_say_nothing(name):
    with pytest.raises(SettingError, match=rf"data\.preprocessing={name} is unknown: write Res256Crop224"):
        CenterCrop.named(name)


def torchvisions_box(monkeypatch, image, low, areas, ratios, corner):
    """What `RandomResizedCrop` chooses when its random numbers are these."""
    uniform, whole = iter(np.stack([areas, ratios], 1).flatten()), iter(corner)
    module = importlib.import_module("torchvision.transforms.transforms")
    fake = SimpleNamespace(
        empty=lambda _: SimpleNamespace(uniform_=lambda a, b: torch.as_tensor(a + (b - a) * next(uniform))),
        randint=lambda a, b, size: torch.tensor(int(next(whole) * b)),
        log=torch.log,
        exp=torch.exp,
        tensor=lambda values: torch.tensor(values, dtype=torch.float64),
    )
    monkeypatch.setattr(module, "torch", fake)
    found = transforms.RandomResizedCrop.get_params(image, (low, 1.0), (3 / 4, 4 / 3))
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("size", [(300, 200), (64, 80), (900, 30), (20, 700)])
@pytest.mark.parametrize("low", [0.08, 0.6])
def test_boxes_are_those_of_random_resized_crop(monkeypatch, size, low):
    rng, image = np.random.default_rng(0), photo(*size)
    boxes = set()
    for _ in range(40):
        areas, ratios, corner = rng.random(TRIALS), rng.random(TRIALS), rng.random(2)
        ours = box(image.height, image.width, low, areas, ratios, corner)
        assert ours == torchvisions_box(monkeypatch, image, low, areas, ratios, corner)
        top, left, height, width = ours
        assert 0 <= top <= image.height - height
        assert 0 <= left <= image.width - width
        boxes.add(ours)
    assert len(boxes) > 20 or size in ((900, 30), (20, 700)), "only the central box fits there"


def test_a_random_cut_is_the_box_resized_and_flipped():
    image, crop = photo(90, 70), CenterCrop.named("BicubicRes40Crop32")
    augment = RandomCrop(crop)
    draws = augment.draw(30, generator(0, "augment", 3))
    assert 8 < int(draws.flips.sum()) < 22
    for place in range(30):
        one = draws.at(torch.tensor(place))
        part = box(70, 90, 0.08, one.areas.tolist(), one.ratios.tolist(), one.corners.tolist())
        top, left, height, width = part
        slow = image.crop((left, top, left + width, top + height)).resize((32, 32), Image.Resampling.BICUBIC)
        slow = slow.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if one.flips else slow
        assert torch.equal(augment(image, one), torch.from_numpy(np.array(slow)).permute(2, 0, 1))


def test_without_a_random_crop_the_cut_is_that_of_evaluation():
    image, crop = photo(90, 70), CenterCrop.named("Res40Crop32")
    augment = RandomCrop(crop, min_area=1, flip=False)
    assert torch.equal(augment(image, augment.draw(1, generator(0, "augment", 0)).at(torch.tensor(0))), crop(image))
