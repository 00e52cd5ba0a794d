"""Plans: what makes up a batch depends on the seed and the epoch alone, and processes share it without loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wdat.data import ShardPlan, TrainPlan
from wdat.errors import SettingError


def epoch_order(seed: int, epoch: int, n: int = 40, batch_size: int = 8) -> list[int]:
    plan = TrainPlan(n, batch_size, seed)
    plan.set_epoch(epoch)
    return torch.cat([batch.index for batch in plan]).tolist()


def test_order_is_a_function_of_seed_and_epoch():
    orders = {(seed, epoch): epoch_order(seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1)}
    assert len({tuple(order) for order in orders.values()}) == 6
    assert all(sorted(order) == list(range(40)) for order in orders.values())
    assert orders[0, 1] == epoch_order(0, 1)


def test_order_ignores_the_global_stream():
    torch.manual_seed(1)
    first = epoch_order(0, 0)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert epoch_order(0, 0) == first
    assert torch.equal(torch.get_rng_state(), before)


def test_last_incomplete_batch_is_dropped_and_steps_go_on():
    plan = TrainPlan(11, 4, seed=0)
    assert len(plan) == 2
    first = list(plan)
    plan.set_epoch(1)
    assert [batch.step for batch in [*first, *plan]] == [0, 1, 2, 3]
    assert all(batch.size == 4 and batch.position.tolist() == [0, 1, 2, 3] for batch in first)
    assert len(set(torch.cat([batch.index for batch in first]).tolist())) == 8


def test_a_small_set_is_one_batch():
    plan = TrainPlan(5, 128, seed=0)
    (batch,) = plan
    assert len(plan) == 1
    assert batch.size == 5
    assert sorted(batch.index.tolist()) == list(range(5))


@given(n=st.integers(1, 60), per_process=st.integers(1, 9), world_size=st.integers(1, 4), epoch=st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_processes_share_each_global_batch(n, per_process, world_size, epoch):
    if n < world_size:
        return
    whole = TrainPlan(n, per_process * world_size, seed=3)
    parts = [TrainPlan(n, per_process * world_size, 3, rank, world_size) for rank in range(world_size)]
    for plan in (whole, *parts):
        plan.set_epoch(epoch)
    for batch, *shares in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([share.index for share in shares]), batch.index)
        assert torch.equal(torch.cat([share.position for share in shares]), batch.position)
        assert {(share.size, share.step, share.epoch) for share in shares} == {(batch.size, batch.step, epoch)}
        assert all(len(share.index) for share in shares)


def test_batch_size_must_divide_over_processes():
    with pytest.raises(SettingError, match=r"data\.batch_size=10 .* over 4: set data\.batch_size=12.*trainer\.devices"):
        TrainPlan(100, 10, 0, 0, 4)
    with pytest.raises(SettingError, match=r"3 training images for 4 processes.*trainer\.devices.*data\.limit_train"):
        TrainPlan(3, 4, 0, 0, 4)
    with pytest.raises(SettingError, match=r"data\.batch_size"):
        TrainPlan(3, 0, 0)


@pytest.mark.parametrize("taken", [0, 1, 3, 5])
def test_resume_inside_an_epoch(taken):
    plan = TrainPlan(40, 8, seed=0)
    plan.set_epoch(2)
    batches = list(plan)
    interrupted = TrainPlan(40, 8, seed=0)
    interrupted.set_epoch(2)
    stream = iter(interrupted)
    for _ in range(taken):
        next(stream)
    resumed = TrainPlan(40, 8, seed=0)
    resumed.load_state_dict(interrupted.state_dict())
    assert resumed.state_dict() == interrupted.state_dict()
    resumed.set_epoch(2)
    rest = list(resumed)
    assert [batch.step for batch in rest] == [batch.step for batch in batches[taken:]]
    assert all(torch.equal(a.index, b.index) for a, b in zip(rest, batches[taken:], strict=True))
    assert [batch.step for batch in resumed] == [10, 11, 12, 13, 14], "a second pass is a whole one"
    resumed.set_epoch(3)
    assert [batch.step for batch in resumed] == [15, 16, 17, 18, 19]


def test_a_restored_position_belongs_to_its_epoch():
    plan = TrainPlan(40, 8, seed=0)
    plan.load_state_dict({"epoch": 2, "drawn": 5})
    plan.set_epoch(3)
    assert [batch.step for batch in plan] == [15, 16, 17, 18, 19]


@given(n=st.integers(0, 50), batch_size=st.integers(1, 8), world_size=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_shards_hold_every_image_once_in_equally_many_batches(n, batch_size, world_size):
    rows, positions, lengths = [], [], set()
    for rank in range(world_size):
        plan = ShardPlan(n, batch_size, rank, world_size)
        batches = list(plan)
        lengths |= {len(batches), len(plan)}
        assert all(len(batch.index) <= batch_size and batch.step == 0 for batch in batches)
        assert all(0 <= position < batch.size for batch in batches for position in batch.position.tolist())
        rows += [row for batch in batches for row in batch.index.tolist()]
        positions += [(k, position) for k, batch in enumerate(batches) for position in batch.position.tolist()]
    assert sorted(rows) == list(range(n))
    assert len(set(positions)) == n
    assert len(lengths) == 1
    assert lengths == {0} or n > 0


def test_one_image_on_two_processes():
    assert [[batch.index.tolist() for batch in ShardPlan(1, 8, rank, 2)] for rank in (0, 1)] == [[[0]], [[]]]
    assert [[batch.index.tolist() for batch in ShardPlan(5, 2, rank, 2)] for rank in (0, 1)] == [
        [[0, 2], [4]],
        [[1, 3], []],
    ]
