"""What the optimiser is given: peak rates, and the groups with and without weight decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wdat import models
from wdat.errors import SettingError
from wdat.models import zoo
from wdat.training.optimizers import decay_groups, is_norm, peak_rate

NORMS = [
    nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.InstanceNorm2d(4, affine=True), nn.LayerNorm(4),
    nn.GroupNorm(2, 4), nn.RMSNorm(4),
]  # fmt: skip


def names(network, groups):
    """The parameters of each group by name, and each group's own weight decay."""
    known = {parameter: name for name, parameter in network.named_parameters()}
    return [([known[p] for p in group["params"]], group.get("weight_decay")) for group in groups]


@pytest.mark.parametrize(("batch_size", "rate"), [(1024, 0.4), (512, 0.2), (256, 0.1), (300, 0.1171875), (64, 0.1)])
def test_the_peak_rate_follows_the_batch_size(batch_size, rate):
    """0.1·max(B/256, 1), as `experiment.py` of Rebuffi et al. 2021 has it."""
    assert peak_rate(0.1, batch_size, 256) == pytest.approx(rate)
    assert peak_rate(0.1, batch_size, None) == 0.1


def test_an_impossible_batch_is_named():
    with pytest.raises(SettingError, match=r"optimizer\.per_batch"):
        peak_rate(0.1, 128, 0)


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_norms_are_known_by_their_type(norm):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Linear(4, 2))
    assert is_norm(norm)
    mine = [f"1.{name}" for name, _ in norm.named_parameters()]
    found = names(network, decay_groups(network, ["norm"]))
    assert found == [(["0.weight", "0.bias", "2.weight", "2.bias"], None), (mine, 0.0)]


def test_norms_of_the_zoo_are_known_by_their_type():
    zoo.robustbench()
    from robustbench.model_zoo.architectures import convstem_models
    from timm.layers import BatchNormAct2d, LayerNorm2d, RmsNorm

    for norm in (BatchNormAct2d(4), LayerNorm2d(4), RmsNorm(4), convstem_models.LayerNorm(4)):
        (group,) = decay_groups(nn.Sequential(norm), ["norm"])
        assert group == {"params": list(norm.parameters()), "weight_decay": 0.0}, type(norm)


class NormActivationConv(nn.Sequential):
    """Named after a norm, as in RobustBench, but holds one."""


class NormedLinear(nn.Linear):
    """A linear layer with weights of unit length, as in robust classifiers: its weight decays."""


@pytest.mark.parametrize("module", [nn.Linear(4, 4), nn.Conv2d(4, 4, 1), NormedLinear(4, 4), nn.PReLU()], ids=str)
def test_other_layers_are_no_norms(module):
    assert not is_norm(module)
    network = NormActivationConv(nn.BatchNorm2d(4), module)
    (decayed, _), (exempt, _) = names(network, decay_groups(network, ["norm"]))
    assert decayed == [f"1.{name}" for name, _ in module.named_parameters()]
    assert exempt == ["0.weight", "0.bias"]


def test_a_parameter_named_after_a_norm_decays():
    """The originals go by the name, and exempt what is only called so."""
    network = nn.ModuleDict({"batchnorm_like": nn.Linear(3, 3), "layer": nn.BatchNorm1d(3)})
    (decayed, _), (exempt, _) = names(network, decay_groups(network, ["norm"]))
    assert decayed == ["batchnorm_like.weight", "batchnorm_like.bias"]
    assert exempt == ["layer.weight", "layer.bias"]


@pytest.mark.parametrize(
    ("exempt", "wanted"),
    [
        ([], [(["0.weight", "0.bias", "1.weight", "1.bias", "2.in_proj_weight", "2.in_proj_bias",
                "2.out_proj.weight", "2.out_proj.bias"], None)]),
        (["bias"], [(["0.weight", "1.weight", "2.in_proj_weight", "2.out_proj.weight"], None),
                    (["0.bias", "1.bias", "2.in_proj_bias", "2.out_proj.bias"], 0.0)]),
        (["norm", "bias"], [(["0.weight", "2.in_proj_weight", "2.out_proj.weight"], None),
                            (["0.bias", "1.weight", "1.bias", "2.in_proj_bias", "2.out_proj.bias"], 0.0)]),
    ],
    ids=str,
)  # fmt: skip
def test_norms_and_biases_each_have_a_switch(exempt, wanted):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.MultiheadAttention(4, 2))
    assert names(network, decay_groups(network, exempt)) == wanted


def test_an_unknown_kind_is_named():
    with pytest.raises(SettingError, match=r"optimizer\.exempt.*norm"):
        decay_groups(nn.Linear(2, 2), ["norms"])


def test_shared_parameters_are_listed_once():
    network = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5), nn.LayerNorm(5), nn.LayerNorm(5))
    network[1].weight = network[0].weight
    network[3].weight, network[3].bias = network[2].weight, network[2].bias
    found = names(network, decay_groups(network, ["norm"]))
    assert found == [(["0.weight", "1.bias"], None), (["2.weight", "2.bias"], 0.0)]
    torch.optim.SGD(decay_groups(network, ["norm"]), lr=0.1)  # torch refuses or warns of duplicates


@pytest.mark.parametrize("first", [True, False])
def test_what_a_norm_shares_with_another_layer_decays(first):
    layers = [nn.LayerNorm(4), nn.Linear(4, 1)]
    layers[1].bias = None
    layers[1].weight = nn.Parameter(torch.ones(4))
    layers[0].weight = layers[1].weight
    network = nn.ModuleList(layers if first else layers[::-1])
    (decayed, _), (exempt, _) = names(network, decay_groups(network, ["norm"]))
    assert [name.split(".")[1] for name in decayed] == ["weight"]
    assert [name.split(".")[1] for name in exempt] == ["bias"]


def test_frozen_parameters_are_left_out():
    network = models.load_network("preact_resnet18")
    models.prepare(network, "head")
    ((decayed, _),) = names(network, decay_groups(network, ["norm"]))
    assert len(decayed) == 2, "weight and bias of the head; no empty group"
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    assert decay_groups(network, ["norm"]) == []


def test_all_parameters_of_a_network_in_its_order():
    network = models.load_network("preact_resnet18")
    groups = decay_groups(network, ["norm"])
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
    order = list(network.parameters())
    for group in groups:
        places = [next(i for i, p in enumerate(order) if p is q) for q in group["params"]]
        assert places == sorted(places)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for m in norms for p in m.parameters()}
    assert len(groups[1]["params"]) == 2 * len(norms) > 0


def test_only_the_first_group_decays():
    """One step of a loss without gradients moves a parameter by its weight decay alone."""
    network = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    before = [p.detach().clone() for p in network.parameters()]
    optimizer = torch.optim.SGD(decay_groups(network, ["norm", "bias"]), lr=0.1, weight_decay=0.5)
    (0 * network(torch.ones(1, 3)).sum()).backward()
    optimizer.step()
    for old, new, kept in zip(before, network.parameters(), (0.95, 1, 1, 1), strict=True):
        torch.testing.assert_close(new.detach(), kept * old)
