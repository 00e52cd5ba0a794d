"""Υ of originals and a pool of synthetic images, against Υ of all of them with their weights."""

from __future__ import annotations

import math

import pytest
import torch

from wdat.attacks.allocation import capped_radii
from wdat.attacks.knapsack_allocation import critical_distance
from wdat.distributed import ALONE
from wdat.sensitivity import Batch, Ema, Estimator, Exact, Mixture, Sample, Subsample, Table, with_pool
from wdat.threat import ThreatModel

N, POOL, SHARE = 200, 600, 0.7
RANDOM = torch.Generator().manual_seed(0)
NORMS = torch.rand(N, dtype=torch.float64, generator=RANDOM) ** 4 * 10
LABELS = torch.randint(5, (POOL,), generator=RANDOM)
DRAWN = torch.rand(POOL, dtype=torch.float64, generator=RANDOM) * (1 + 4 * LABELS)  # classes differ


class Small:
    """A pool whose labels are at hand; a stratified sample takes every class's first rows."""

    class_sizes = torch.bincount(LABELS, minlength=6)  # the sixth class has none

    def __len__(self):
        return POOL

    def labels(self, rows):
        return LABELS[rows]

    def stratified(self, size, generator):
        order = torch.randperm(POOL, generator=generator)
        parts = [order[LABELS[order] == c][: math.ceil(size * int(self.class_sizes[c]) / POOL)] for c in range(5)]
        return torch.cat(parts).sort().values


def mixture(originals: Estimator, q: float = 2.0, size: int = POOL, every: int | None = None, seed: int = 0) -> Mixture:
    made = Mixture(originals, Small(), SHARE, size, every)
    made.begin(N, q, seed, ALONE)
    return made


def norms_of(index):
    return torch.cat([NORMS, DRAWN])[index]


def measured(made, step=0):
    index = made.wanted(step)
    made.measured(index, norms_of(index))
    return made


def exact(q):
    return float(((1 - SHARE) * (NORMS**q).mean() + SHARE * (DRAWN**q).mean()) ** (1 / q))


@pytest.mark.parametrize("make", [Exact, Table, lambda: Subsample(N)])
@pytest.mark.parametrize("q", [1.0, 2.0, 3.0])
def test_upsilon_is_that_of_all_images_with_their_weights(make, q):
    made = measured(mixture(make(), q))
    assert made.upsilon() == pytest.approx(exact(q), rel=1e-9 if make is not Table else 1e-6)
    values, weights = made.sample()
    assert float(weights.sum()) == pytest.approx(1)
    assert float((weights * values**q).sum() ** (1 / q)) == pytest.approx(made.upsilon())
    assert abs(made.upsilon() / exact(q) - 1) < 0.01 < abs(made.originals.upsilon() / exact(q) - 1)


def test_at_order_infinity_it_is_the_largest():
    assert measured(mixture(Exact(), math.inf)).upsilon() == float(torch.cat([NORMS, DRAWN]).max())


def test_one_pass_asks_for_originals_and_a_sample_of_the_pool():
    made = mixture(Table(), size=50)
    index = made.wanted(0)
    assert index[:N].tolist() == list(range(N))
    assert 50 <= len(index) - N <= 54
    assert index[N:].min() >= N
    made.measured(index, norms_of(index))
    assert made.wanted(1) is None


def test_passes_every_few_steps_are_fresh_and_batches_tell_nothing():
    made = measured(mixture(Table(), size=50, every=3))
    before = made.upsilon()
    made.originals.take = lambda rows, norms: None
    made.observe(torch.tensor([0, N + 1]), torch.tensor([1.0, 1e6]))
    assert made.upsilon() == before
    assert [made.wanted(step) is None for step in (1, 2, 3)] == [True, True, False]
    assert made.wanted(3).min() >= N, "the table asks for nothing more"
    assert made.wanted(3).tolist() == made.wanted(3).tolist() != made.wanted(6).tolist()
    measured(made, 3)
    assert made.upsilon() != before


def test_the_originals_are_told_of_originals_alone():
    made = measured(mixture(Table()))
    told = []
    made.originals.take = lambda rows, norms: told.append((rows.tolist(), norms.tolist()))
    made.observe(torch.tensor([N + 3, 7, N, 2]), torch.tensor([3.0, 0.7, 0.0, 0.2]))
    assert told == [([7, 2], pytest.approx([0.7, 0.2]))]
    with pytest.raises(RuntimeError, match="index"):
        made.observe(None, torch.ones(3))


def test_batches_take_the_place_of_the_oldest():
    made = measured(mixture(Exact(), size=40))
    for step in range(30):
        rows = torch.randint(POOL, (20,), generator=torch.Generator().manual_seed(step))
        made.observe(N + rows, 2 * DRAWN[rows])  # the network has changed
    last = torch.cat([torch.randint(POOL, (20,), generator=torch.Generator().manual_seed(s)) for s in (28, 29)])
    values, weights = made.sample()
    assert torch.equal(values[N:], 2 * DRAWN[last])
    by_class = torch.zeros(6, dtype=torch.float64).index_add_(0, LABELS[last], weights[N:])
    wanted = SHARE * Small.class_sizes / POOL
    torch.testing.assert_close(by_class, wanted.double())


def test_it_is_unbiased_for_the_power():
    powers = []
    for step in range(400):
        rows = torch.randint(POOL, (100,), generator=torch.Generator().manual_seed(step))
        made = measured(mixture(Exact(), size=100))
        made.observe(N + rows, DRAWN[rows])
        powers.append(made.upsilon() ** 2)
    powers = torch.tensor(powers, dtype=torch.float64)
    assert abs(float(powers.mean()) - exact(2) ** 2) < 4 * float(powers.std()) / 20
    plain = torch.stack([
        (DRAWN[torch.randint(POOL, (100,), generator=torch.Generator().manual_seed(s))] ** 2).mean() for s in range(400)
    ])  # fmt: skip
    assert float(powers.std()) < 0.9 * SHARE * float(plain.std()), "weighting by class takes their differences out"


@pytest.mark.parametrize("p", [1.5, 2.0, 4.0])
def test_capped_radii_spend_the_budget_of_the_mixture(p):
    threat = ThreatModel(p, "linf", 0.1)
    made = measured(mixture(Exact(), threat.q))
    everyone = torch.cat([NORMS, DRAWN])
    weights = torch.cat([torch.full((N,), (1 - SHARE) / N), torch.full((POOL,), SHARE / POOL)]).double()
    radii = capped_radii(everyone, made.sample(), threat, 0.15)
    assert float((weights * radii**p).sum() ** (1 / p)) == pytest.approx(0.1)
    assert float(radii.max()) == pytest.approx(0.15)
    # 0.3/200 to 0.7/600 is 9 to 7: the same set with whole counts
    repeated = Sample(torch.cat([NORMS.repeat(9), DRAWN.repeat(7)]))
    torch.testing.assert_close(radii, capped_radii(everyone, repeated, threat, 0.15))


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_the_critical_distance_is_that_of_the_mixture(p):
    threat = ThreatModel(p, "l2", 1.5)
    made = measured(mixture(Exact(), p))
    repeated = torch.cat([NORMS.repeat(9), DRAWN.repeat(7)])
    found = critical_distance(*made.sample(), threat)
    assert found == critical_distance(repeated, None, threat)
    assert 0 < found < float(repeated.max()) or p == 1.0


@pytest.mark.parametrize("estimator", [Batch(), Ema()])
def test_what_goes_by_the_batches_needs_nothing_more(estimator):
    assert with_pool(estimator, Small(), SHARE, 50, None) is estimator


def test_a_second_fit_mixes_once():
    table = Table()
    first = with_pool(table, Small(), SHARE, 50, None)
    second = with_pool(first, Small(), 0.2, 60, 3)
    assert isinstance(first, Mixture)
    assert second.originals is table
    assert (second.share, second.size, second.every) == (0.2, 60, 3)


def test_values_that_are_not_kept_are_not_made_up():
    made = measured(mixture(Exact()))
    made.originals.sample = lambda: None
    assert made.sample() is None
    assert made.upsilon() == pytest.approx(exact(2))


def test_asking_before_observing_says_so():
    with pytest.raises(RuntimeError, match="observe"):
        mixture(Exact()).upsilon()
    assert mixture(Exact()).sample() is None


@pytest.mark.parametrize("make", [Table, Exact, lambda: Subsample(20)])
def test_state_survives_a_checkpoint(make, tmp_path):
    made = measured(mixture(make(), size=50))
    made.observe(torch.tensor([3, N + 9, N + 10]), torch.tensor([1.0, 2.0, 3.0]))
    torch.save(made.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = mixture(make(), size=50)
    other.load_state_dict(state)
    for same in (made, other):
        same.observe(torch.tensor([5, N + 90]), torch.tensor([1.5, 2.5]))
    assert other.upsilon() == made.upsilon()
    assert all(torch.equal(a, b) for a, b in zip(other.sample(), made.sample(), strict=True) if a is not None)


def test_the_state_of_another_pool_or_estimator_is_left_out():
    state = measured(mixture(Table(), size=50)).state_dict()
    other = mixture(Exact(), size=50)
    other.load_state_dict({**state, "pool": POOL + 1})
    assert len(other.wanted(1)) >= N + 50, "all is measured anew"


def test_processes_agree(together):
    index = torch.tensor([3, N + 9, 4, N + 10, 8, N + 11])
    parts = [index[:2], index[2:3], index[3:]]  # the second has nothing of the pool

    def observed(processes):
        made = mixture(Table(), size=50)
        made.begin(N, 2.0, 0, processes)
        measured(made)
        part = parts[processes.rank] if processes.world_size > 1 else index
        made.observe(part, 2 * norms_of(part))
        return made.upsilon(), made.sample().values.tolist()

    alone = observed(ALONE)
    assert together(3, observed) == [alone] * 3
