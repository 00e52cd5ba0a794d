"""The pretended accelerator itself: it raises where devices mix, and counts what makes the host wait."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.pretended import CUDA, accelerator, device_tensor, lend
from wdat.distributed import current


def test_devices_do_not_mix():
    x = device_tensor(torch.rand(3))
    with accelerator():
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.rand(3)
        with pytest.raises(RuntimeError, match="same device"):
            torch.rand(3)[torch.where(x > 2, 0, 1)]
        assert (x + torch.tensor(1.0)).device == CUDA, "a number on the host may meet any tensor"
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()


WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 2).any()),
    "float": lambda x: float(x[0]),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "mask": lambda x: x[x > 0.5],
    "nonzero": lambda x: x.nonzero(),
    "tensor": lambda x: torch.tensor([1.0], device=CUDA),
    "to device": lambda x: torch.rand(3).to(CUDA),
    "index on the host": lambda x: x[torch.tensor([0, 1])],
    "if": lambda x: 1 if x[0] > 2 else 0,
}
FREE = {
    "arithmetic": lambda x: torch.where(x > 0.5, x, 0.0) / x.sum(),
    "factory": lambda x: torch.zeros(3, device=CUDA) + x,
    "index on the device": lambda x: x[torch.arange(2, device=CUDA)],
    "shape": lambda x: len(x) + x.numel(),
    "not waited for": lambda x: torch.rand(3).to(CUDA, non_blocking=True),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits_are_counted(name):
    x = device_tensor(torch.rand(3))
    with accelerator() as counts:
        WAITS[name](x)
        assert counts.waits.total() == 1, dict(counts.waits)


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_wait_is_not_counted(name):
    x = device_tensor(torch.rand(3))
    with accelerator() as counts:
        FREE[name](x)
        assert counts.waits.total() == 0, dict(counts.waits)


def test_autograd_goes_through_it():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 4)).double()
    x, y = torch.rand(5, 1, 8, 8, dtype=torch.float64), torch.arange(5) % 4
    plain = network(x.requires_grad_(True))
    F.cross_entropy(plain, y).backward()
    wanted = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    with accelerator() as counts:
        lent = lend(network.train())
        F.cross_entropy(lent(device_tensor(x)), device_tensor(y)).backward()
        assert all(p.grad.device == CUDA for p in lent.parameters())
        assert counts.kernels.total() > 4
    for parameter, gradient in zip(network.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad.raw, gradient)


def test_the_other_process_is_empty_and_refuses_the_host():
    with accelerator(2) as counts:
        processes = current(CUDA)
        assert processes.world_size == 2
        assert processes.sum([1.0, 2.0]) == [1.0, 2.0]
        assert processes.gather(device_tensor(torch.rand(3))).shape == (3,)
        assert counts.collectives.total() >= 2
        with pytest.raises(RuntimeError, match="no backend"):
            current(torch.device("cpu")).sum([1.0])
    assert current(CUDA).world_size == 1, "the library's own is back"
