"""Nearest-flip distances: exact on linear networks, verified elsewhere, and never disturbing anything."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from wdat.attacks.minimum_norm import Search, nearest_adversarial
from wdat.errors import SettingError
from wdat.gradients import undisturbed
from wdat.threat import dual_norm, image_norm

SHORT = Search(steps=30)


def _linear(n=24, classes=5, dtype=torch.float32):
    """A linear network and images so far from the border of [0, 1] that clipping never binds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = nn.Sequential(nn.Flatten(), nn.Linear(48, classes)).to(dtype)
        with torch.no_grad():
            network[1].weight.mul_(4)
        x = 0.45 + 0.1 * torch.rand(n, 3, 4, 4, dtype=dtype)
        y = network(x).argmax(1)
        y[::6] = (y[::6] + 1) % classes
    return network, x, y


def _exact(network, x, y, norm):
    """min over classes of |margin| / dual norm of the difference of the weights; 0 where misclassified."""
    weight, logits = network[1].weight.detach(), network(x).detach()
    all_distances = []
    for i, label in enumerate(y.tolist()):
        others = [k for k in range(len(weight)) if k != label]
        distances = [
            (logits[i, label] - logits[i, k]).clamp_min(0) / dual_norm((weight[label] - weight[k])[None], norm)[0]
            for k in others
        ]
        all_distances.append(torch.stack(distances).min())
    return torch.stack(all_distances)


def _nearest(network, x, y, norm, search=SHORT):
    with undisturbed(network):
        return nearest_adversarial(network, x, y, norm, search)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_on_a_linear_network_are_exact(norm, dtype):
    network, x, y = _linear(dtype=dtype)
    found, exact = _nearest(network, x, y, norm), _exact(network, x, y, norm)
    right = network(x).argmax(1) == y
    assert found.x_adv.dtype == found.distances.dtype == dtype
    assert (found.distances[~right] == 0).all()
    assert (found.x_adv[~right] == x[~right]).all()
    assert (found.distances[right] >= exact[right] * (1 - 1e-5)).all()
    assert_close(found.distances[right], exact[right], rtol=0.01, atol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_are_verified_by_others(problem, norm, dtype):
    network, x, y = problem(n=30, dtype=dtype)
    found = _nearest(network, x, y, norm)
    reached = found.distances.isfinite()
    assert reached.any()
    assert (found.x_adv >= 0).all()
    assert (found.x_adv <= 1).all()
    assert_close(image_norm(found.x_adv - x, norm)[reached], found.distances[reached], rtol=0, atol=0)
    for size in (1, 7, 30):
        for rows in torch.randperm(len(x), generator=torch.Generator().manual_seed(size)).split(size):
            wrong = network(found.x_adv[rows]).argmax(1) != y[rows]
            assert (wrong == reached[rows]).all()


def test_ties_go_to_the_first_class():
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    nn.init.zeros_(network[1].weight)
    nn.init.zeros_(network[1].bias)
    x, y = torch.rand(6, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    found = _nearest(network, x, y, "linf", Search(steps=5, fab=3, fab_targets=1))
    assert found.distances.tolist() == [torch.inf, 0, 0, torch.inf, 0, 0]
    assert_close(found.x_adv, x, rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_network_that_cannot_be_fooled_has_no_flips(norm):
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    with torch.no_grad():
        network[1].weight.mul_(1e-3)
        network[1].bias.copy_(torch.tensor([0.0, 100.0, 0.0]))
    x = torch.rand(5, 3, 4, 4)
    found = _nearest(network, x, torch.ones(5, dtype=torch.int64), norm, Search(steps=8, fab=5))
    assert found.distances.isinf().all()
    assert_close(found.x_adv, x, rtol=0, atol=0)


def test_points_that_give_no_numbers_are_refused():
    class Trap(nn.Module):
        def forward(self, x):
            z = x.flatten(1).mean(1, keepdim=True)
            logits = torch.cat([z, 1 - z], 1)
            return torch.where(z > 0.5, torch.nan, logits)

    x = torch.full((3, 3, 4, 4), 0.45)
    found = _nearest(Trap(), x, torch.ones(3, dtype=torch.int64), "linf", Search(steps=10, fab=5))
    assert found.distances.isinf().all()
    assert found.x_adv.isfinite().all()


def test_the_same_seed_gives_the_same_points_and_the_network_stays(problem):
    network, x, y = problem(n=16, dtype=torch.float32)
    network.train()
    before, generator = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    search = Search(steps=10, starts=3, fab=5, fab_targets=2, seed=3)
    first, second = _nearest(network, x, y, "l2", search), _nearest(network, x, y, "l2", search)
    assert_close(first.x_adv, second.x_adv, rtol=0, atol=0)
    assert_close(first.distances, second.distances, rtol=0, atol=0)
    assert network.training
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


def test_neither_the_batch_size_nor_the_other_images_matter(problem):
    """Random starts belong to an image's place in the set, so any part of the set finds what the whole set does."""
    network, x, y = problem(n=30)
    search = Search(steps=20, starts=3, seed=5)
    whole = _nearest(network, x, y, "l2", search)
    batches = _nearest(network, x, y, "l2", replace(search, batch_size=7))
    rows = torch.arange(1, 30, 3)
    with undisturbed(network):
        part = nearest_adversarial(network, x[rows], y[rows], "l2", search, rows=rows)
        elsewhere = nearest_adversarial(network, x[rows], y[rows], "l2", search)
    for found, wanted in ((batches, whole.distances), (part, whole.distances[rows])):
        assert_close(found.distances, wanted, rtol=1e-9, atol=0)
    assert [passes for passes, _ in batches.effort] == [passes for passes, _ in whole.effort]
    assert not torch.equal(elsewhere.distances, part.distances), "random starts that matter"


def test_the_effort_counts_every_image():
    """Also those of batches in which all are misclassified, and has the same stages for no image at all."""
    network, x, y = _linear(n=6)
    for search in (Search(steps=3, batch_size=1), Search(steps=3, fab=2), Search(steps=3, targets=0, fab=2, starts=1)):
        found, none = _nearest(network, x, y, "linf", search), _nearest(network, x[:0], y[:0], "linf", search)
        wrong = _nearest(network, x[:1], y[:1], "linf", search)
        assert [len(then) for _, then in found.effort] == [6] * len(found.effort)
        for _, then in found.effort:
            assert (then[network(x).argmax(1) != y] == 0).all()
        stages = [passes for passes, _ in found.effort]
        assert len(stages) == search.starts + search.targets + bool(search.fab)
        for other in (none, wrong):
            assert [passes for passes, _ in other.effort] == stages
        assert [len(then) for _, then in none.effort] == [0] * len(stages)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_later_stages_never_increase_distances(problem, norm):
    network, x, y = problem(n=20, dtype=torch.float32)
    without = _nearest(network, x, y, norm, Search(steps=10))
    found = _nearest(network, x, y, norm, Search(steps=10, fab=20, fab_targets=3))
    assert len(found.effort) == len(without.effort) + 1
    assert (found.distances <= without.distances * (1 + 1e-6)).all()
    passes = [taken for taken, _ in found.effort]
    assert passes == sorted(passes)
    for (_, earlier), (_, later) in zip(found.effort, found.effort[1:], strict=False):
        assert (later <= earlier).all()


def test_reports_its_progress(problem):
    network, x, y = problem(n=10)
    seen = []
    with undisturbed(network):
        nearest_adversarial(
            network, x, y, "linf", Search(steps=3, batch_size=4), lambda done, total: seen.append((done, total))
        )
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == 3 * 5


@pytest.mark.parametrize("setting", ["starts", "steps", "batch_size", "targets", "fab", "bisections", "seed"])
def test_impossible_settings_are_named(setting):
    with pytest.raises(SettingError, match=f"attack_options.knapsack.{setting}"):
        Search(**{setting: -1})
