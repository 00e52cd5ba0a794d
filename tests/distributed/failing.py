"""One of two processes of which the second fails in some way; prints what this one was told.

failing.py MODE SECONDS    with torchrun's environment; SECONDS is the group's time limit
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wdat.attacks import Context, build
from wdat.attacks.base import Attack, Moved
from wdat.distributed import current, distributed_errors, together
from wdat.errors import ConstraintError
from wdat.evaluation import ImageTensors, evaluate
from wdat.threat import ThreatModel

THREAT = ThreatModel(2, "linf", 0.1)


class Disturbed(nn.Module):
    """Does something else before its third pass on the second process."""

    def __init__(self, event: Callable[[], None]) -> None:
        super().__init__()
        self.inner, self.event, self.passes = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), event, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        if self.passes == 3 and dist.get_rank() == 1:
            self.event()
        logits: Tensor = self.inner(x)
        return logits


class TooFar(Attack):
    """Leaves its threat model on the second process."""

    name = "too_far"

    def _run(self, network: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, context: Context) -> Moved:
        far = 0.5 if context.processes.rank == 1 else 0.0
        return Moved((x - far).clamp(0, 1), torch.zeros(len(x)), threat.delta)


def attempt(work: Callable[[], object]) -> list[str]:
    """What became of the work: the name of its error and what that says."""
    try:
        work()
    except (ValueError, KeyError, RuntimeError) as error:
        return [type(error).__name__, str(error)]
    return ["none", ""]


def _raise(error: Exception) -> None:
    raise error


def summed_by_torch(network: nn.Module, x: Tensor) -> None:
    """Training whose gradients PyTorch sums over the processes, not we."""
    divided = nn.parallel.DistributedDataParallel(network)
    with distributed_errors(lambda: "go on with resume=RUN"):
        for _ in range(5):
            divided(x).sum().backward()


def main() -> None:
    """Join the other, fail, print."""
    mode, seconds = sys.argv[1], float(sys.argv[2])
    dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
    everyone = current(torch.device("cpu"))
    second = everyone.rank == 1
    torch.manual_seed(0)
    x, y = torch.rand(4, 3, 2, 2), torch.arange(4) % 3
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))

    def measure(network: nn.Module, images: ImageTensors, attacks: list[str | Attack]) -> object:
        return evaluate(network, images, THREAT, attacks, options={"wpgd": {"steps": 4}}, processes=everyone)

    def block(error: Exception) -> object:
        with together(everyone):
            if second:
                raise error
        return None

    def repeated() -> object:
        return measure(plain, ImageTensors(x, y, torch.arange(4) + 3 * everyone.rank), ["wpgd"])

    def outside() -> object:
        return measure(plain, ImageTensors(2 * x if second else x, y), ["wpgd"])

    found = []
    if mode == "agree":
        found = [
            attempt(outside),
            attempt(lambda: block(KeyError("gone"))),
            attempt(lambda: block(ConstraintError("too far"))),
            attempt(repeated),
            attempt(lambda: measure(plain, ImageTensors(x, y), [TooFar()])),
            attempt(lambda: measure(plain, ImageTensors(x[:0], y[:0]), ["wpgd"])),
            attempt(lambda: measure(plain, ImageTensors(x, y), [build("wpgd", steps=2), "pgd"])),
        ]
    elif mode == "die":
        network = Disturbed(lambda: sys.exit(3))
        found = [attempt(lambda: measure(network, ImageTensors(x, y), ["wpgd"]))]
    elif mode == "hang":
        network = Disturbed(lambda: time.sleep(4 * seconds))
        found = [attempt(lambda: measure(network, ImageTensors(x, y), ["wpgd"]))]
    elif mode == "ddp":
        found = [attempt(lambda: summed_by_torch(Disturbed(lambda: sys.exit(3)), x))]
    print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
