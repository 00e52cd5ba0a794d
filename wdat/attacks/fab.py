"""FAB, the Fast Adaptive Boundary attack (Croce & Hein 2020, arXiv 1907.02044), without a budget: minimum-norm points.

Here too is what every call of `pyautoattack` needs: a network it can handle, and a process left as it was found.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from wdat.threat import image_norm, per_image

NORM_NAMES = {"linf": "Linf", "l2": "L2"}  # ours → pyautoattack's


def plain(network: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The network as `pyautoattack` wants it: contiguous float32 in, fresh float32 logits out.

    Gradients come back contiguous too, also where the network works in channels_last: `pyautoattack` views them.
    Logits always have a graph, also those of a constant network.

    Args:
        network: Takes images of `dtype`, gives logits (N, K).
        dtype: Of the network's images.
    """

    def logits(images: Tensor) -> Tensor:
        z = images
        if torch.is_grad_enabled() and images.requires_grad:
            z = images.view_as(images)
            z.register_hook(torch.Tensor.contiguous)  # type: ignore[no-untyped-call]
        out: Tensor = network(z.to(dtype, copy=True))
        out = out.to(torch.float32, copy=True).contiguous()
        return out if out.requires_grad or z is images else out + 0 * z.flatten(1).sum(1, keepdim=True)

    return logits


@contextmanager
def as_found(device: torch.device) -> Iterator[None]:
    """Global random states (torch, numpy, Python) and the trace function as before, also after an error."""
    trace, numbers, state = sys.gettrace(), random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(state)
        if sys.gettrace() is not trace:
            sys.settrace(trace)


def fab_points(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: str,
    steps: int,
    restarts: int = 1,
    targets: int = 0,
    seed: int = 0,
    reach: float = 0.03,
) -> Tensor:
    """Candidates for the nearest misclassified point of each image; call it inside `wdat.gradients.undisturbed`.

    Args:
        network: Takes images in [0, 1], gives logits (N, K).
        x: Images (N, ...) in [0, 1].
        y: Labels (N,).
        norm: Ground norm.
        steps: Steps of each run. An untargeted step costs K backward passes, a targeted one a single one.
        restarts: Runs for each target class; the first starts from the images, the others from points around them.
        targets: Classes with the largest logits to run towards; 0 runs once towards the nearest linearised boundary.
        seed: Of the random starts.
        reach: Distance of the random starts.

    Returns:
        The nearest points found, (N, ...), in [0, 1]; the images themselves where FAB found none. They come from
        float32 arithmetic and aren't verified: check them with a forward pass.
    """
    from pyautoattack.fab_pt import FABAttack_PT

    if not len(x):
        return x.clone()
    small = x.detach().to(torch.float32, copy=True).contiguous()
    predict = plain(network, x.dtype)
    with torch.no_grad():
        classes = predict(small[:1]).shape[1]
    fab = FABAttack_PT(predict, norm=NORM_NAMES[norm], n_iter=steps, eps=2 * reach, device=x.device)
    best = torch.full((len(x),), torch.inf, device=x.device)
    points = small.clone()
    with as_found(x.device):
        torch.manual_seed(seed)
        for target in range(2, min(targets, classes - 1) + 2) if targets else (None,):
            for restart in range(restarts):
                fab.target_class = target  # counted from the largest logit, which is the label's own
                with torch.no_grad():
                    found = fab.attack_single_run(small, y, use_rand_start=restart > 0, is_targeted=target is not None)
                    moved = image_norm(found - small, norm)
                    nearer = found.flatten(1).isfinite().all(1) & (moved > 0) & (moved < best)
                best = torch.where(nearer, moved, best)
                points = torch.where(per_image(nearer, points).bool(), found, points)
    away = per_image(best.isfinite(), x).bool()
    return torch.where(away, points.to(x.dtype), x).clamp(0, 1)
