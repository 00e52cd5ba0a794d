"""Setting validation images aside."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wdat.data import hold_out
from wdat.data.splits import first_of_each
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


@given(st.lists(st.integers(0, 3), min_size=12, max_size=80), st.data())
@settings(max_examples=60, deadline=None)
def test_a_balanced_subset_has_the_first_of_each_class(labels, data):
    y = torch.tensor([0, 1, 2, 3, *labels])
    sizes = y.bincount()
    count = data.draw(st.integers(1, 4 * int(sizes.min())))
    rows = first_of_each(y, count, 4, "data.limit_test").tolist()
    assert len(rows) == count
    assert rows == sorted(rows)
    kept = y[rows].bincount(minlength=4)
    assert kept.max() - kept.min() <= 1
    for label in range(4):
        first = (y == label).nonzero().flatten()[: int(kept[label])]
        assert first.tolist() == [row for row in rows if y[row] == label]


@pytest.mark.parametrize(
    ("labels", "classes", "count", "message"),
    [
        (
            [0, 0, 0, 1],
            2,
            4,
            r"data\.limit_val=4 .* takes 2 of class 1, which has 1 images: set data\.limit_val=2 or less",
        ),
        ([0, 0, 1, 1], 3, 3, r"takes 1 of class 2, which has 0 images: add some, or data\.balanced=false"),
    ],
)
def test_a_class_without_enough_images(labels, classes, count, message):
    with pytest.raises(SettingError, match=message):
        first_of_each(torch.tensor(labels), count, classes, "data.limit_val")
