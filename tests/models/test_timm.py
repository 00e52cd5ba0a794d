"""Networks of timm take images in [0, 1] and keep timm's names."""

from __future__ import annotations

import copy

import pytest
import torch

from wdat.errors import SettingError
from wdat.models import checkpoint_of, load_timm
from wdat.models.timm_zoo import library

NAME = "test_efficientnet"
X = torch.rand(2, 3, 32, 32)


def test_it_normalises_inside_by_timms_constants():
    network = load_timm(NAME, pretrained=False, seed=3)
    bare = library().create_model(NAME, num_classes=10).eval()
    bare.load_state_dict(network.state_dict())
    mean, std = (torch.tensor(bare.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(network(X), bare((X - mean) / std))
    torch.testing.assert_close(copy.deepcopy(network)(X), network(X))
    torch.testing.assert_close(network.double()(X.double()).float(), bare((X - mean) / std), rtol=1e-4, atol=1e-5)


def test_fresh_weights_are_those_of_the_seed():
    first, same, other = (load_timm(NAME, pretrained=False, seed=seed)(X) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_weights_from_a_file(tmp_path):
    trained = load_timm(NAME, pretrained=False, seed=5)
    torch.save(trained.state_dict(), tmp_path / "a.pt")
    assert torch.equal(load_timm(NAME, checkpoint=tmp_path / "a.pt")(X), trained(X))


def test_what_is_no_network_of_timm_is_refused():
    with pytest.raises(SettingError, match=r"model\.name.*resnet18"):
        load_timm("resnet_18", pretrained=False)
    with pytest.raises(SettingError, match=r"model\.checkpoint"):
        load_timm("resnet18.no_such_tag")


def test_records_say_whose_weights_they_are():
    settings = {"_target_": "wdat.models.load_timm", "name": NAME}
    assert checkpoint_of(settings) == "timm's weights"
    assert checkpoint_of({**settings, "pretrained": False, "seed": 2}) == "fresh weights (seed 2)"
