"""What Lightning, the loader and the averaging of weights add to the time of a bare training step."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch

from benchmarks.common import spread, synchronize
from wdat.data import ImageDataModule
from wdat.data.sources import Where
from wdat.data.splits import Splits
from wdat.training.callbacks import ExponentialAveraging
from wdat.training.module import WDATModule

WARM = 4  # steps before the clock runs


class Clock(L.Callback):
    """Seconds of rounds of steps, from the end of one round to that of the next, whatever happens between.

    Args:
        steps: Of a round.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.seconds = steps, list[float]()
        self._last = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Note the time at the end of a round."""
        done = trainer.global_step - WARM
        if done < 0 or done % self.steps:
            return
        synchronize()
        now = time.perf_counter()
        if done:
            self.seconds.append((now - self._last) / self.steps)
        self._last = now


def random_images(count: int, seed: int) -> Callable[[Where], Splits]:
    """A source of `count` random images for training and one for validation, of CIFAR-10's shape."""

    def source(where: Where) -> Splits:
        drawn = torch.Generator().manual_seed(seed)
        x = torch.randint(256, (count + 1, 3, 32, 32), dtype=torch.uint8, generator=drawn)
        y = torch.randint(10, (count + 1,), generator=drawn)
        return Splits(x, y, x[:1], y[:1])

    return source


def loop(
    module: WDATModule, data: ImageDataModule, bare: Callable[[], float], rounds: int, steps: int, precision: str
) -> dict[str, Any]:
    """Seconds a step of whole training, beside those of the bare step before and after it.

    Args:
        module: What is trained, with an exponential average of its weights.
        data: What it is trained on.
        bare: Gives the seconds of one bare step, mean over a round.
        rounds: How often is measured.
        steps: Of a round.
        precision: As Lightning's `Trainer` has it.
    """
    clock, before = Clock(steps), [bare() for _ in range(rounds)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="auto", devices=1, precision=precision, max_steps=WARM + rounds * steps, logger=False,  # type: ignore[arg-type]
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
            num_sanity_val_steps=0, inference_mode=False, use_distributed_sampler=False,
            callbacks=[ExponentialAveraging(0.995), clock],
        )  # fmt: skip
        trainer.fit(module, data)
    after = [bare() for _ in range(rounds)]
    whole, alone = spread(clock.seconds), spread(before + after)
    return {"seconds": whole, "bare": alone, "ratio": whole["median"] / alone["median"]}
