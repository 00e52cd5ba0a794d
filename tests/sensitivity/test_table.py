"""The table against exact passes, in worlds whose Υ is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wdat.attacks import capped_radii
from wdat.attacks.knapsack_allocation import critical_distance, solve
from wdat.distributed import ALONE
from wdat.sensitivity import Sample, Table
from wdat.sensitivity.histogram import BINS
from wdat.threat import ThreatModel, power_mean

IMAGES, BATCH = 4000, 128
EPOCH = IMAGES // BATCH


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _lognormal(n, sigma=0.7, seed=0):
    return torch.exp(sigma * torch.randn(n, dtype=torch.float64, generator=_generator(seed)))


NORMS = _lognormal(IMAGES)


def _filled(norms=NORMS, q=2.0, distances=False, **settings):
    table = Table(**settings)
    table.begin(len(norms), q, 0, ALONE, distances)
    table.measured(table.wanted(0), norms)
    return table


def _log_gain(table):
    return table.state_dict()["log_gain"]


def _batches(steps, seed=0, n=IMAGES, size=BATCH):
    """The rows of shuffled epochs, the last incomplete batch dropped."""
    generator = _generator(seed)
    for step in range(steps):
        k = step % (n // size)
        if k == 0:
            order = torch.randperm(n, generator=generator)
        yield order[k * size : (k + 1) * size]


def _errors(rho, q=2.0, seed=0, epochs=2, noise=0.3, **settings):
    """Relative errors of Υ after the first epoch, where n_i(t) = a_i exp(ρt) ξ with lognormal ξ."""
    generator = _generator(1000 + seed)
    level = _lognormal(IMAGES, seed=seed)

    def measure(rows, step):
        xi = torch.exp(noise * torch.randn(len(rows), dtype=torch.float64, generator=generator))
        return level[rows] * xi * math.exp(rho * step)

    truth = power_mean(level, q) * math.exp(q * noise**2 / 2)
    table, errors = _filled(measure(torch.arange(IMAGES), 0), q, **settings), []
    for step, rows in enumerate(_batches(epochs * EPOCH, seed)):
        table.observe(rows, measure(rows, step))
        errors.append(table.upsilon() / (truth * math.exp(rho * step)) - 1)
    return torch.tensor(errors[EPOCH:])


def _all_errors(rho, **settings):
    return torch.stack([_errors(rho, seed=seed, **settings) for seed in range(3)])


# What it asks for and what it gives back.


def test_it_wants_all_images_once():
    table = Table()
    table.begin(50, 2.0, 0, ALONE)
    for step in (7, 8):  # also where it begins later
        assert_close(table.wanted(step), torch.arange(50))
    table.measured(table.wanted(8), torch.ones(50))
    assert [table.wanted(step) for step in range(200)] == [None] * 200


def test_it_wants_all_images_again_every_k_steps():
    table = _filled(every=4)
    assert [table.wanted(step) is None for step in range(9)] == [False, True, True, True] * 2 + [False]
    assert_close(table.wanted(8), torch.arange(IMAGES))


@pytest.mark.parametrize("q", [1.5, 2.0, 3.0])
def test_after_a_pass_it_gives_what_the_pass_gives(q):
    order = torch.randperm(IMAGES, generator=_generator(3))
    table = Table()
    table.begin(IMAGES, q, 0, ALONE)
    table.measured(order, NORMS[order])
    assert table.upsilon() == pytest.approx(power_mean(NORMS, q), rel=1e-6)
    values, counts = table.sample()
    assert power_mean(values, q, counts=counts) == table.upsilon()
    assert float(counts.sum()) == IMAGES
    assert_close(values.repeat_interleave(counts.long()), NORMS.sort().values, rtol=1 / 64, atol=0)


def test_a_further_pass_forgets_the_table_and_the_gain():
    table = _filled()
    for rows in _batches(40):
        table.observe(rows, NORMS[rows] / 2)
    table.measured(torch.arange(IMAGES), 3 * NORMS)
    assert _log_gain(table) == 0
    assert table.upsilon() == _filled(3 * NORMS).upsilon()


def test_without_a_correction_it_is_the_last_norms():
    table, last = _filled(window=None), NORMS.clone()
    for step, rows in enumerate(_batches(40)):
        last[rows] *= math.exp(-0.01 * step)
        table.observe(rows, last[rows])
        assert table.upsilon() == pytest.approx(power_mean(last, 2.0), rel=1e-6)
    assert_close(table.state_dict()["stored"], last.float())
    assert _log_gain(table) == 0


def test_upsilon_is_that_of_the_stored_values_and_the_gain():
    table = _filled()
    for rows in _batches(70):
        table.observe(rows, NORMS[rows] / 2)
        expected = power_mean(table.state_dict()["stored"], 2.0) * math.exp(_log_gain(table))
        assert table.upsilon() == pytest.approx(expected, rel=1e-10)
    assert _log_gain(table) < -0.1


def test_upsilon_of_infinite_order_is_the_largest_to_the_width_of_a_bin():
    assert _filled(q=math.inf).upsilon() == pytest.approx(float(NORMS.max()), rel=1 / 64)


def test_gradients_do_not_stay_attached():
    norms = NORMS.clone().requires_grad_(True)
    table = _filled(norms)
    table.observe(torch.arange(5), norms[:5])
    assert not table.sample().values.requires_grad
    assert isinstance(table.upsilon(), float)


# What the allocations make of its sample.


@pytest.mark.parametrize("cap", [1.5, 4.0])
@pytest.mark.parametrize("p", [1.5, 2.0, 3.0])
def test_capped_radii_agree_with_those_of_the_norms(p, cap):
    threat, norms = ThreatModel(p, "linf", 0.03), _lognormal(IMAGES, sigma=2.0)
    found = capped_radii(norms, _filled(norms, threat.q).sample(), threat, cap * 0.03)
    assert_close(found, capped_radii(norms, Sample(norms), threat, cap * 0.03), rtol=0.01, atol=0)
    assert threat.length(found) == pytest.approx(0.03, rel=0.01)
    assert 0 < float((found == cap * 0.03).double().mean()) < 1


def _distances():
    """A seventh misclassified."""
    d = torch.empty(IMAGES, dtype=torch.float64).exponential_(30, generator=_generator(0))
    d[::7] = 0.0
    return d


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_the_critical_distance_agrees_with_that_of_the_distances(p):
    d = _distances()
    values, counts = _filled(d, p, distances=True).sample()
    for delta in (1e-3, 0.003, 0.01, 0.03, 1.0):
        threat = ThreatModel(p, "linf", delta)
        assert critical_distance(values, counts, threat) == pytest.approx(solve(d, threat).critical, rel=0.016)


def test_distances_are_kept_without_a_gain():
    d = _distances()
    table = _filled(d, distances=True)
    for rows in _batches(40):
        d[rows] = d[rows].roll(1) / 2
        table.observe(rows, d[rows])
    assert _log_gain(table) == 0
    assert_close(table.state_dict()["stored"], d.float())
    assert table.upsilon() == pytest.approx(power_mean(d, 2.0), rel=1e-6)
    values, counts = table.sample()
    assert float(values[0]) == 0
    assert float(counts[0]) == float((d == 0).sum())


def test_infinite_distances_stay_infinite():
    d = _distances()
    d[1::7] = math.inf
    table = _filled(d, distances=True)
    table.observe(torch.arange(128), d[:128])
    assert_close(table.state_dict()["stored"], d.float())
    values, counts = table.sample()
    assert float(counts[values.isinf()].sum()) == float(d.isinf().sum())


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("delta", [0.003, 1.0])
def test_infinite_distances_are_never_paid_for(p, delta):
    d = _distances()
    d[1::7] = math.inf
    threat = ThreatModel(p, "linf", delta)
    found = critical_distance(*_filled(d, p, distances=True).sample(), threat)
    assert found == pytest.approx(solve(d, threat).critical, rel=0.016)


# The gain, where all norms drift together.


def test_the_gain_takes_up_one_part_in_w_and_w_grows():
    table, w = _filled(window=12, clip=1), []
    for rows in _batches(40, size=8):
        before = _log_gain(table)
        predicted = table.state_dict()["stored"][rows].double() * math.exp(before)
        table.observe(rows, predicted / 2)  # every batch says the same: half of what was predicted
        w.append(math.log(0.5) / (_log_gain(table) - before))
    assert w == pytest.approx([10] * 4 + [11] * 5 + [12] * 31)


@pytest.mark.parametrize("q", [1.5, 2.0, 3.0])
def test_the_first_batch_says_the_quotient_of_its_sums(q):
    table, rows = _filled(q=q, clip=1), torch.arange(50)
    fresh = NORMS[100:150]
    table.observe(rows, fresh)
    expected = math.log(power_mean(fresh, q) / power_mean(NORMS[rows].float(), q)) / 10
    assert _log_gain(table) == pytest.approx(expected, rel=1e-6)


def test_later_batches_say_the_quotient_of_the_pooled_sums():
    table, log_gain = _filled(clip=1), 0.0
    above = below = 0.0
    for rows, factor in zip(torch.arange(32).split(8), (1.0, 5.0, 0.2, 1.0), strict=True):
        fresh, stored = NORMS[rows] * factor, NORMS[rows]
        above += float(((fresh / math.exp(log_gain)) ** 2).sum())
        below += float((stored**2).sum())
        log_gain += math.log(above / below) / 2 / 10
        table.observe(rows, fresh)
        assert _log_gain(table) == pytest.approx(log_gain, abs=1e-6)


@pytest.mark.parametrize("q", [1.5, 2.0, 3.0])
def test_most_of_a_drifts_bias_is_gone_in_the_second_epoch(q):
    plain, table = _all_errors(-0.01, q=q, window=None), _all_errors(-0.01, q=q)
    assert float(plain.mean()) > 0.15  # stale norms are too large where norms shrink
    assert float(table.abs().mean()) < 0.4 * float(plain.abs().mean())
    assert abs(float(table.mean())) < 0.4 * float(plain.mean())


def test_a_slow_drift_leaves_less_than_two_percent():
    plain, table = _all_errors(-0.002, window=None), _all_errors(-0.002)
    assert float(plain.abs().mean()) > 0.03
    assert float(table.abs().mean()) < 0.02
    assert float(table.abs().mean()) < 0.4 * float(plain.abs().mean())


def test_in_the_long_run_a_drift_leaves_the_share_that_the_model_says():
    last = slice(-2 * EPOCH, None)
    plain, table = _errors(-0.005, epochs=9, window=None)[last], _errors(-0.005, epochs=9)[last]
    assert float(table.mean()) == pytest.approx(30 / (EPOCH + 30) * float(plain.mean()), rel=0.2)


def test_it_does_not_overshoot_as_taking_every_correction_whole_does():
    table, whole = _all_errors(-0.01), _all_errors(-0.01, window=1)
    assert float(table.min()) > 0
    assert float(whole.min()) < -0.05
    assert float(table.std()) < 0.5 * float(whole.std())


def test_norms_that_grow_are_followed_too():
    plain, table = _all_errors(0.005, window=None), _all_errors(0.005)
    assert float(plain.mean()) < -0.06
    assert float(plain.mean()) * 0.6 < float(table.mean()) < 0


def test_without_a_drift_the_gain_does_no_harm():
    plain, table = _all_errors(0.0, window=None), _all_errors(0.0)
    assert float(table.abs().mean()) < 0.012
    assert float(table.abs().mean()) < float(plain.abs().mean()) + 0.003
    assert abs(float(table.mean())) < 0.006


# Near ties.


def _moved_by_a_near_tie(at, **settings):
    """How the log gain differs from what it would be without one, over two epochs."""

    def log_gains(factor):
        table, gains, generator = _filled(**settings), [], _generator(1)
        for step, rows in enumerate(_batches(2 * EPOCH)):
            fresh = NORMS[rows] * torch.exp(0.3 * torch.randn(BATCH, dtype=torch.float64, generator=generator))
            if step == at:
                fresh[3] *= factor
            table.observe(rows, fresh)
            gains.append(_log_gain(table))
        return torch.tensor(gains)

    return float((log_gains(1e6) - log_gains(1.0)).abs().max())


@pytest.mark.parametrize("at", [0, 5, 30])
def test_one_near_tie_hardly_moves_the_gain(at):
    assert 0 < _moved_by_a_near_tie(at, clip=0.99) < math.log(1.05)


@pytest.mark.parametrize("at", [0, 5])
def test_unclipped_one_near_tie_moves_the_gain_of_all_images(at):
    assert _moved_by_a_near_tie(at, clip=1) > math.log(2)


# Processes, checkpoints, degenerate values, cost.


def test_a_batchs_order_and_its_division_over_processes_do_not_matter(together):
    cuts = [(0, 5, 5), (0, 0, 128), (60, 100, 128), (128, 128, 128)]

    def run(processes, shuffle=False):
        table = Table()
        table.begin(IMAGES, 3.0, 0, processes)
        table.measured(torch.arange(IMAGES), NORMS)
        found = []
        for step, rows in enumerate(_batches(40)):
            if shuffle:
                rows = rows[torch.randperm(BATCH, generator=_generator(step))]
            first, second, _ = cuts[step % 4]
            own = rows.tensor_split((first, second))[processes.rank] if processes.world_size > 1 else rows
            table.observe(own, NORMS[own] * math.exp(-0.02 * step))
            found.append([table.upsilon(), _log_gain(table)])
        return torch.tensor(found, dtype=torch.float64), table.state_dict()["stored"]

    expected, stored = run(ALONE)
    for found, values in (*together(3, run), run(ALONE, shuffle=True)):
        assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert_close(values, stored, rtol=1e-12, atol=0)


def _go_on(table, steps, seed):
    found = []
    for step, rows in enumerate(_batches(steps, seed)):
        table.observe(rows, NORMS[rows] * math.exp(-0.01 * step))
        found.append(table.upsilon())
    return found


@pytest.mark.parametrize("first", ["begin", "load"])
def test_a_resumed_table_goes_on_as_if_nothing_had_been(first, tmp_path):
    table = _filled()
    _go_on(table, 45, seed=0)
    torch.save(table.state_dict(), tmp_path / "state.pt")
    other = Table()
    if first == "begin":
        other.begin(IMAGES, 2.0, 0, ALONE)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    if first == "load":
        other.begin(IMAGES, 2.0, 0, ALONE)
    assert other.wanted(45) is None
    assert other.upsilon() == table.upsilon()
    assert _go_on(other, 45, seed=1) == _go_on(table, 45, seed=1)
    assert _log_gain(other) == _log_gain(table)
    assert torch.equal(other.state_dict()["stored"], table.state_dict()["stored"])


def test_a_state_handed_over_in_memory_is_no_longer_the_others():
    table, other = _filled(), Table()
    other.load_state_dict(table.state_dict())
    other.begin(IMAGES, 2.0, 0, ALONE)
    _go_on(other, 3, seed=0)
    assert_close(table.state_dict()["stored"], NORMS.float())


def test_another_set_asks_for_a_pass_of_its_own():
    table = _filled()
    _go_on(table, 5, seed=0)
    table.begin(50, 2.0, 0, ALONE)
    assert_close(table.wanted(5), torch.arange(50))
    assert table.sample() is None
    with pytest.raises(RuntimeError, match="measured"):
        table.upsilon()
    table.measured(torch.arange(50), NORMS[:50])
    assert table.upsilon() == pytest.approx(power_mean(NORMS[:50], 2.0), rel=1e-6)


def test_another_order_is_read_off_the_same_table():
    table = _filled()
    _go_on(table, 40, seed=0)
    table.begin(IMAGES, 3.0, 0, ALONE)
    assert table.wanted(40) is None
    expected = power_mean(table.state_dict()["stored"], 3.0) * math.exp(_log_gain(table))
    assert table.upsilon() == pytest.approx(expected, rel=1e-10)


def test_observing_needs_a_pass_before_and_the_images_rows():
    table = Table()
    table.begin(IMAGES, 2.0, 0, ALONE)
    with pytest.raises(RuntimeError, match=r"measured.*index"):
        table.observe(torch.arange(3), torch.ones(3))
    with pytest.raises(RuntimeError, match=r"measured.*index"):
        _filled().observe(None, torch.ones(3))


@pytest.mark.parametrize("clip", [0.99, 1])
def test_batches_of_zeros_do_not_break_it(clip):
    table, zeros = _filled(NORMS[:64], clip=clip), torch.zeros(8)
    for rows in torch.arange(64).split(8):
        table.observe(rows, zeros)
        assert math.isfinite(_log_gain(table))
        expected = power_mean(table.state_dict()["stored"], 2.0) * math.exp(_log_gain(table))
        assert table.upsilon() == pytest.approx(expected, rel=1e-10)
    assert table.upsilon() == 0.0


@pytest.mark.parametrize("clip", [0.99, 1])
def test_a_table_of_zeros_is_zero_and_can_be_refilled(clip):
    table = _filled(torch.zeros(64), clip=clip)
    table.observe(torch.arange(8), torch.zeros(8))
    assert table.upsilon() == 0.0
    assert_close(table.sample(), Sample(torch.zeros(1).double(), torch.full((1,), 64.0).double()))
    for rows in torch.arange(64).split(8):
        table.observe(rows, NORMS[rows])
    assert table.upsilon() == pytest.approx(power_mean(NORMS[:64], 2.0), rel=1e-6)


@pytest.mark.parametrize("clip", [0.99, 1])
def test_an_infinite_norm_leaves_a_finite_gain(clip):
    table, fresh = _filled(clip=clip), NORMS[:8].clone()
    fresh[3] = math.inf
    for norms in (fresh, NORMS[:8]):
        table.observe(torch.arange(8), norms)
        assert table.upsilon() > 0
        assert math.isfinite(_log_gain(table))
        assert clip == 1 or abs(_log_gain(table)) < 0.1


class _Work(TorchDispatchMode):
    """The length of the longest tensor made, and the names of the operations that were given one of `n` entries."""

    def __init__(self, n):
        super().__init__()
        self.n, self.longest, self.on_the_whole = n, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        if any(v.numel() >= self.n for v in given):
            self.on_the_whole.add(func.overloadpacket.__name__)
        made = func(*args, **(kwargs or {}))
        places = {v.data_ptr() for v in given}
        fresh = [v.numel() for v in tree_leaves(made) if isinstance(v, torch.Tensor) and v.data_ptr() not in places]
        self.longest = max([self.longest, *fresh])
        return made


def test_a_step_never_passes_over_the_table():
    n = 10**6
    table, norms = _filled(_lognormal(n)), NORMS[:BATCH]
    for step in range(2):
        with _Work(n) as work:
            table.observe(torch.arange(step, n, n // BATCH)[:BATCH], norms)
            table.upsilon()
        assert work.on_the_whole == {"index", "index_put_"}  # the batch's rows, read and written
        assert BATCH < work.longest <= BINS
    with _Work(n) as work:
        table.measured(torch.arange(n), torch.ones(n))
    assert work.longest >= n
