"""Nearest adversarial points: exact on linear networks, verified elsewhere, and never disturbing anything."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from sampled import product
from torch import nn
from torch.testing import assert_close

from wdat.attacks.descent import Best, nearest_classes, towards
from wdat.attacks.knapsack_allocation import solve
from wdat.attacks.minimum_norm import nearest_adversarial
from wdat.attacks.penalty import penalise, penalty_slope
from wdat.attacks.search import EFFORTS, OVERRIDES, Search
from wdat.errors import SettingError
from wdat.gradients import input_gradients, undisturbed
from wdat.threat import ThreatModel, dual_norm, image_norm

SHORT = Search(steps=30)
NORMS = ["linf", "l2"]


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


def _nearest(network, x, y, norm, search=SHORT, **options):
    with undisturbed(network):
        return nearest_adversarial(network, x, y, norm, search, **options)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("effort", EFFORTS)
def test_distances_on_a_linear_network_are_exact(norm, dtype, effort):
    network, x, y = _linear(dtype=dtype)
    found, exact = _nearest(network, x, y, norm, Search(effort)), _exact(network, x, y, norm)
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
    assert found.x_adv.isfinite().all()
    beyond = found.x_adv.flatten(1).mean(1) > 0.5
    assert bool(beyond[found.distances.isfinite()].all()), "a point without numbers is a misclassified one"
    assert bool((found.distances >= 0.05 * (1 - 1e-6)).all())


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
    search = Search(steps=20, starts=3, penalty=0, seed=5)
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


def test_the_effort_has_the_same_stages_for_any_images():
    """Also for batches in which all are misclassified, and for no image at all."""
    network, x, y = _linear(n=6)
    for search, stages in (
        (Search("quick", batch_size=1), 1), (Search(steps=3, fab=2), 3), (Search(steps=3, targets=0, fab=2), 2),
        (Search("thorough", steps=3, penalty=3), 6),
    ):  # fmt: skip
        found, none = _nearest(network, x, y, "linf", search), _nearest(network, x[:0], y[:0], "linf", search)
        wrong = _nearest(network, x[:1], y[:1], "linf", search)
        assert [len(then) for _, then in found.effort] == [6] * stages
        for _, then in found.effort:
            assert (then[network(x).argmax(1) != y] == 0).all()
        assert len(none.effort) == len(wrong.effort) == stages
        assert [len(then) for _, then in none.effort] == [0] * stages
        assert wrong.distances.tolist() == [0]


class Counter:
    """Counts the images that go through a network, by hooks on it and on what it returns."""

    def __init__(self, network):
        self.images, self.network = 0, network

    def __enter__(self):
        self.handle = self.network.register_forward_hook(self.forward)
        return self

    def __exit__(self, *_):
        self.handle.remove()

    def forward(self, _, inputs, logits):
        self.images += len(inputs[0])
        if logits.requires_grad:
            logits.register_hook(self.backward)

    def backward(self, gradient):
        self.images += len(gradient)


PROMISED = {("quick", "linf"): 30, ("quick", "l2"): 30, ("default", "linf"): 110, ("default", "l2"): 320}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("effort", EFFORTS)
def test_a_search_takes_no_more_passes_than_it_promises(problem, effort, norm):
    """Even where no image leaves early; what it says of its passes is what hooks count."""
    network, x, y = problem(n=40, dtype=torch.float32, classes=8)
    right = int((network(x).argmax(1) == y).sum())
    with Counter(network) as counter:
        found = _nearest(network, x, y, norm, Search(effort, batch_size=16))
    assert found.effort[-1][0] == pytest.approx((counter.images - 1) / right)  # a blank image told the classes
    if (effort, norm) in PROMISED:
        assert counter.images / right <= PROMISED[effort, norm]
    else:
        assert counter.images / right > 567, "at least the breadth of five descents of 50 steps"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("p", [1, 2, torch.inf])
def test_images_that_leave_early_never_change_the_knapsack(problem, norm, p):
    network, x, y = problem(n=40)
    whole = _nearest(network, x, y, norm, SEARCH)
    delta = float(whole.distances[whole.distances > 0].quantile(0.25)) * (1 if p == torch.inf else 0.5)
    threat = ThreatModel(p, norm, delta)
    found = _nearest(network, x, y, norm, SEARCH, threats=[threat])
    assert found.effort[-1][0] < whole.effort[-1][0]
    assert found.reach < torch.inf
    near = whole.distances <= found.reach * (1 + 1e-9)  # the reach is one of the distances, found in other batches
    assert_close(found.distances[near], whole.distances[near], rtol=1e-9, atol=0)
    assert (found.distances[~near] > found.reach).all()
    assert (found.distances >= whole.distances * (1 - 1e-9)).all()
    assert found.served(p) >= delta * (1 - 1e-9)
    for share in (0.1, 0.5, 1):
        smaller = ThreatModel(p, norm, share * delta)
        assert found.serves(smaller)
        accuracies = [solve(n.distances, smaller).accuracy for n in (found, whole)]
        assert accuracies[0] == pytest.approx(accuracies[1], abs=1e-9)
    assert not found.serves(ThreatModel(p, norm, 3 * delta))
    assert whole.serves(ThreatModel(p, norm, 0.9))
    assert whole.served(p) == torch.inf


SEARCH = Search(starts=2, steps=12, penalty=0, batch_size=7)


@pytest.mark.parametrize("norm", NORMS)
def test_a_larger_budget_searches_only_the_images_that_it_concerns(problem, norm):
    network, x, y = problem(n=40)
    typical = float(_nearest(network, x, y, norm, SEARCH).distances.median())
    small, large = (ThreatModel(2, norm, share * typical) for share in (0.3, 0.6))
    first = _nearest(network, x, y, norm, SEARCH, threats=[small])
    direct = _nearest(network, x, y, norm, SEARCH, threats=[large])
    number = int(first.stages.max())
    with Counter(network) as counter:
        then = _nearest(network, x, y, norm, SEARCH, threats=[large], previous=first)
    concerned = (first.stages < number) & (then.stages > first.stages)
    assert 0 < int(concerned.sum()) < int((first.stages < number).sum()), "some, but not all that had left"
    assert torch.equal(then.distances[~concerned], first.distances[~concerned])
    assert torch.equal(then.x_adv[~concerned], first.x_adv[~concerned])
    most = 2 * (2 * 12 + 1 + 3) + 1  # two descents of 12 steps, their bisections, and the last verification
    assert counter.images <= most * int(concerned.sum()) + 1
    assert then.serves(large)
    assert_close(then.distances[then.distances <= then.reach], direct.distances[direct.distances <= direct.reach],
                 rtol=1e-9, atol=0)  # fmt: skip
    with Counter(network) as counter:
        again = _nearest(network, x, y, norm, SEARCH, threats=[small], previous=then)
    assert counter.images <= 1, "nothing is left to do; one image tells the number of classes"
    assert torch.equal(again.distances, then.distances)


@pytest.mark.parametrize(("norm", "sizes"), product(NORMS, [(25, 15), (40, 0), (0, 3, 37)], every=2))
def test_processes_that_share_a_set_are_one(together, problem, norm, sizes):
    """Also where one has no image, which ones leave is decided over all of them."""
    network, x, y = problem(n=40)
    threat = ThreatModel(2, norm, 0.3 * float(_nearest(network, x, y, norm, SEARCH).distances.median()))
    alone = _nearest(network, x, y, norm, SEARCH, threats=[threat])
    rows = torch.arange(40).split(list(sizes))
    copies = [copy.deepcopy(network) for _ in sizes]

    def own(processes):
        mine = rows[processes.rank]
        options = {"rows": mine, "threats": [threat], "processes": processes}
        return _nearest(copies[processes.rank], x[mine], y[mine], norm, SEARCH, **options)

    parts = together(len(sizes), own)
    assert_close(torch.cat([part.distances for part in parts]), alone.distances, rtol=1e-9, atol=0)
    assert torch.equal(torch.cat([part.stages for part in parts]), alone.stages)
    for part in parts:
        assert part.reach == pytest.approx(alone.reach)
        assert [passes for passes, _ in part.effort] == pytest.approx([passes for passes, _ in alone.effort])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("effort", EFFORTS)
def test_nothing_to_attack_and_nothing_to_find(norm, effort):
    network, x, _ = _linear(n=6)
    wrong = (network(x).argmax(1) + 1) % 5
    found = _nearest(network, x, wrong, norm, Search(effort), threats=[ThreatModel(2, norm, 0.1)])
    assert found.distances.tolist() == [0] * 6
    assert torch.equal(found.x_adv, x)
    assert found.serves(ThreatModel(2, norm, 0.9))

    class Constant(nn.Module):
        def forward(self, images):
            return 0 * images.flatten(1)[:, :3] + torch.tensor([1.0, 0.0, 0.0])

    labels = torch.zeros(6, dtype=torch.int64)
    found = _nearest(Constant(), x, labels, norm, Search(effort), threats=[ThreatModel(2, norm, 0.1)])
    assert found.distances.isinf().all()
    assert torch.equal(found.x_adv, x)


@pytest.mark.parametrize("norm", NORMS)
def test_all_candidates_come_from_one_forward_pass(problem, norm):
    network, x, _ = problem(n=12, classes=6)
    y = network(x).argmax(1)
    with undisturbed(network):
        with Counter(network) as counter:
            best = Best(network, x, y, norm, x, torch.full((12,), torch.inf, dtype=x.dtype))
            classes, first = nearest_classes(best, 4)
        assert counter.images == 12 * (1 + 4)
        assert classes.shape == (12, 4)
        linear = []
        for target in classes.unbind(1):
            g = input_gradients(network, x, y, towards(target))
            linear.append(-g.loss / dual_norm(g.gradient, norm))
        expected = input_gradients(network, x, y, towards(classes[:, 0]))
    assert (torch.stack(linear, 1).diff(dim=1) >= -1e-12).all()
    assert (classes != y[:, None]).all()
    assert_close(first.gradient, expected.gradient)
    assert_close(first.loss, expected.loss)


def test_the_slope_of_the_penalty():
    """Of P2 in Rony et al. 2021, by autograd."""
    mu, rho = torch.tensor(0.7, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    c = torch.linspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    above, below = mu * c + mu * rho * c**2 + rho**2 * c**3 / 6, mu * c / (1 - rho * c.clamp(max=0))
    (slope,) = torch.autograd.grad(torch.where(c >= 0, above, below).sum(), c)
    assert_close(penalty_slope(c.detach(), mu, rho), slope)


def test_the_penalty_descent_walks_along_the_boundary(problem):
    """From the images it ends as near as a descent of the radius, within a few per cent, and says where."""
    network, x, _ = problem(n=12)
    y = network(x).argmax(1)
    with undisturbed(network):
        wanted = _nearest(network, x, y, "l2", Search("thorough"))
        best = Best(network, x, y, "l2", x, torch.full((12,), torch.inf, dtype=x.dtype))
        points = penalise(best, x, 200)
    assert torch.equal(points, best.points)
    assert (network(points).argmax(1) != y).all()
    assert (best.distances <= 1.1 * wanted.distances).double().mean() > 0.7


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
    assert seen[-1][0] == seen[-1][1] == 10 * 2


@pytest.mark.parametrize("setting", [*OVERRIDES, "batch_size", "seed"])
def test_impossible_settings_are_named(setting):
    with pytest.raises(SettingError, match=f"attack_options.knapsack.{setting}"):
        Search(**{setting: -1})


def test_efforts_have_names():
    with pytest.raises(SettingError, match=r"(?s)quik.*attack_options.knapsack.effort.*quick"):
        Search("quik")
    with pytest.raises(SettingError, match="leaves nothing to search with"):
        Search("quick", targets=0)
    own = Search("default", steps=7, targets=2).within("l2")
    assert (own.steps, own.refine, own.targets) == (7, 7, 2)
    assert own.penalty == EFFORTS["default"]["l2"].penalty
    assert Search("thorough").within("linf") == EFFORTS["thorough"]["linf"]
