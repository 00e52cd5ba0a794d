"""Setting validation images aside."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wdat.data import hold_out
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
