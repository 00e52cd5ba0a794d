"""How many tensors as large as the whole set an evaluation holds at a time: what fits on a GPU depends on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from sampled import sampled
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wdat import ThreatModel
from wdat.attacks import build
from wdat.evaluation import ImageTensors
from wdat.evaluation.evaluator import Evaluator

IMAGES, BATCH = 1280, 64
PIXELS = (3, 4, 4)


class Sets(TorchDispatchMode):
    """Counts the tensors of at least so many bytes that are alive at a time."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.most, self.alive = size, 0, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, result)):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() >= self.size:
                self.alive[tensor.untyped_storage()._cdata] = StorageWeakRef(tensor.untyped_storage())
        self.alive = {key: reference for key, reference in self.alive.items() if not reference.expired()}
        self.most = max(self.most, len(self.alive))
        return result


@contextmanager
def counted(x: Tensor) -> Iterator[Sets]:
    with Sets(x.numel() * x.element_size()) as sets:
        yield sets


@pytest.fixture
def evaluator():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4)).eval()
    x, y = torch.rand(IMAGES, *PIXELS), torch.randint(4, (IMAGES,))
    return Evaluator(network, ImageTensors(x, y), batch_size=BATCH)


def test_the_counter_counts():
    x = torch.rand(64, 8)
    with counted(x) as sets:
        y = x + 1
        z = y * 2
        del y
        z = z - 1
    assert sets.most == 3
    assert z.shape == x.shape


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_clean_accuracy_keeps_norms_and_no_gradients(evaluator, norm):
    with counted(evaluator.images.x) as sets:
        evaluator.clean(ThreatModel(2, norm, 0.1), "ce")
    assert sets.most == 1, "the images themselves"


@pytest.mark.filterwarnings("ignore:knapsack")  # the network is no robust one, and some images have no point
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("attack", "options", "most"),
    sampled([("wpgd", {"steps": 4}, 4), ("pgd", {"steps": 4}, 4), ("knapsack", {"effort": "quick"}, 3)], 2),
)
def test_attacks_hold_few_sets(evaluator, norm, attack, options, most):
    """The images, the best iterate, the last with its gradient or the next; of a search images and points."""
    attack = build(attack, **options, batch_size=BATCH)
    with counted(evaluator.images.x) as sets:
        evaluator.attacked(attack, ThreatModel(2, norm, 0.1))
    assert 1 < sets.most <= most
