"""Setting validation images aside."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wdat.data import hold_out
from wdat.data.splits import Splits, by_class, check_labels
from wdat.errors import SettingError
from wdat.seeding import generator


@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.data())
@settings(max_examples=60, deadline=None)
def test_every_class_gives_its_share(labels, data):
    y, count = torch.tensor(labels), data.draw(st.integers(0, len(labels)))
    kept, held = hold_out(y, count, generator(0, "split"))
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(len(labels)))
    assert len(held) == count
    for label in set(labels):
        share = labels.count(label) * count / len(labels)
        assert abs(int((y[held] == label).sum()) - share) < 1


def test_depends_on_the_seed_alone():
    y = torch.arange(100) % 10
    held = [hold_out(y, 20, generator(seed, "split"))[1].tolist() for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2]


def test_first_rows_are_a_fair_sample_of_sorted_classes():
    y = torch.arange(10).repeat_interleave(100)
    kept, held = hold_out(y, 200, generator(0, "split"))
    assert y[kept[:100]].unique().numel() == y[held[:100]].unique().numel() == 10


def test_what_is_held_out_is_the_first_of_each_class_in_a_shuffled_order():
    """Against a slow loop over the classes."""
    y = torch.randint(7, (300,), generator=torch.Generator().manual_seed(3))
    kept, held = hold_out(y, 41, generator(5, "split"))
    order, taken = torch.randperm(300, generator=generator(5, "split")), {}
    quotas = y[held].bincount().tolist()
    slow = [row for row in order.tolist() if taken.setdefault(int(y[row]), []).append(row) is None
            and len(taken[int(y[row])]) <= quotas[int(y[row])]]  # fmt: skip
    assert held.tolist() == slow
    assert kept.tolist() == [row for row in order.tolist() if row not in slow]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.integers(0, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_a_limit_takes_every_class_in_proportion(labels, seed, data):
    y, count = torch.tensor(labels), data.draw(st.integers(0, len(labels)))
    rows = by_class(y, count, generator(seed, "limit"))
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert len(rows) == count
    assert torch.equal(rows, by_class(y, count, generator(seed, "limit")))
    for label in set(labels):
        assert abs(int((y[rows] == label).sum()) - labels.count(label) * count / len(labels)) < 1


def test_a_limit_is_even_on_even_classes_and_lots_decide_the_rest():
    y = torch.arange(10).repeat_interleave(30)
    drawn = [by_class(y, 34, generator(seed, "limit")) for seed in range(20)]
    for rows in drawn:
        sizes = y[rows].bincount(minlength=10)
        assert sizes.min() == 3
        assert sizes.max() == 4
    extra = torch.stack([y[rows].bincount(minlength=10) == 4 for rows in drawn]).sum(0)
    assert (extra > 0).all(), "no class is always left out"
    assert len({tuple(rows.tolist()) for rows in drawn}) == 20


def test_every_row_is_as_likely_to_be_drawn():
    y = torch.tensor([0] * 6 + [1] * 2)
    counts = torch.zeros(8)
    for seed in range(400):
        counts[by_class(y, 4, generator(seed, "limit"))] += 1
    assert (counts - 200).abs().max() < 50  # five standard deviations of 400 draws of one half


@pytest.mark.parametrize(
    ("labels", "remedy"),
    [
        ([1, 2, 3], r"number the classes from 0, y_test - 1$"),
        ([0, 3], r"set data\.num_classes=4"),
        ([-1, 0], "from 0$"),
    ],
)
def test_labels_that_are_no_classes_are_told_how_to_number_them(labels, remedy):
    x = torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8)
    with pytest.raises(SettingError, match=remedy):
        check_labels(Splits(x[:0], torch.tensor(labels)[:0], x, torch.tensor(labels)), 3)
