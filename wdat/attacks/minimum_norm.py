"""Nearest adversarial points: how far each image is from the nearest point where the network errs.

Every distance is that of a point found, stored in [0, 1] and verified by a forward pass, so it is never too small.
Stages follow each other: descents of the radius towards the nearest classes, a penalty descent, untargeted descents
from the nearest point so far and from random ones, FAB if wanted; `wdat.attacks.search` says which. After each stage
comes bisection towards the image, and the nearest point of all stages is kept.

Where budgets are named, an image whose distance is clearly beyond what they pay for leaves between two stages. What an
image finds depends on no other image, so a search that goes on later, for a larger budget, ends where one for that
budget would have ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wdat.attacks.descent import FAR, FINE, Best, descend, nearest_classes, towards
from wdat.attacks.fab import fab_points
from wdat.attacks.knapsack_allocation import solve
from wdat.attacks.passes import Counted
from wdat.attacks.penalty import penalise
from wdat.attacks.search import Effort, Search
from wdat.distributed import ALONE, Processes, together
from wdat.gradients import device_of, forward
from wdat.losses import correct, margin
from wdat.seeding import generator
from wdat.threat import ThreatModel, contract, image_norm, per_image

Report = Callable[[int, int], None]
Stage = Callable[[Best, Tensor], None]  # improves a chunk, whose images have the positions (N,) in the set

FIRST_SLACK, SLACK = 1.3, 1.15  # after the first stage, and later: images beyond this multiple of d* leave


@dataclass(frozen=True)
class NearestAdversarial:
    """The nearest misclassified points that were found.

    Attributes:
        x_adv: (N, ...), the points; the images themselves where no point was found.
        distances: (N,), in pixel units: 0 where the image is misclassified as it is, inf where no point was found.
        effort: After each stage of the search, forward and backward passes an attacked image so far, and the distances
            then, (N,).
        reach: Distances up to this one are those of a whole search; larger ones may come from a part of it. inf where
            the search was whole for all images.
        stages: (N,), how many stages each image has been through.
    """

    x_adv: Tensor
    distances: Tensor
    effort: list[tuple[float, Tensor]]
    reach: float
    stages: Tensor

    def serves(self, threat: ThreatModel, processes: Processes = ALONE) -> bool:
        """Whether the knapsack of this threat pays only for distances of a whole search; all processes call it."""
        return math.isinf(self.reach) or _needed(processes.gather(self.distances), [threat]) <= self.reach

    def served(self, p: float, processes: Processes = ALONE) -> float:
        """The largest budget of order p that is served, inf for all; all processes call it."""
        if math.isinf(self.reach) or math.isinf(p):
            return self.reach
        d = processes.gather(self.distances).double()
        paid = d[d <= self.reach]
        largest = float(paid.max()) if len(paid) else 0.0
        return largest * float(((paid / largest) ** p).sum() / len(d)) ** (1 / p) if largest else 0.0


def _needed(distances: Tensor, threats: Sequence[ThreatModel]) -> float:
    """The largest distance, of a whole set, that the knapsacks of these threats look at; inf for no threat."""
    if not threats:
        return math.inf
    return max(t.delta if t.is_pointwise else solve(distances, t).critical for t in threats)


class _Part:
    """This process's part of the set, while it is searched."""

    def __init__(
        self, network: Counted, x: Tensor, y: Tensor, norm: str, effort: Effort, search: Search, positions: Tensor
    ) -> None:
        self.network, self.x, self.y, self.norm, self.positions = network, x, y, norm, positions
        self.effort, self.search = effort, search
        self.points, self.distances = x.clone(), torch.zeros(len(x), dtype=x.dtype, device=x.device)
        self.plan = _stages(effort, search.seed, forward(network.network, x[:0]).shape[1])  # a blank image, not counted
        self.number = len(self.plan)
        self.stages = torch.full_like(y, self.number)  # misclassified images are through
        self.moved = torch.zeros_like(y, dtype=torch.bool)

    def begin(self, previous: NearestAdversarial | None) -> None:
        """Find what there is to search, or take up a search where it was left."""
        if previous is not None:
            self.points, self.distances = previous.x_adv.clone(), previous.distances.clone()
            self.stages = previous.stages.clone()
            return
        if not len(self.x):
            return
        right = correct(forward(self.network, self.x, self.search.batch_size), self.y)
        self.distances = torch.where(right, torch.inf, self.distances)
        self.stages = torch.where(right, 0, self.stages)

    def attacked(self) -> int:
        """Images that are classified correctly."""
        return int((self.distances > 0).sum())

    def active(self, stage: int, within: float) -> Tensor:
        """Rows of the images that go through this stage: none is known to be further than `within`."""
        near = (self.distances <= within) | self.distances.isinf()
        return ((self.stages == stage) & near & (self.distances > 0)).nonzero().squeeze(1)

    def advance(self, stage: int, rows: Tensor, report: Callable[[int], None]) -> None:
        """Take these images through a stage."""
        done = 0
        if not len(rows):
            return
        home, device = self.x.device, device_of(self.network, self.x)  # a set too large for the device is on the host
        for here in rows.split(self.search.batch_size):  # type: ignore[no-untyped-call]
            x, y, points, distances = (p[here].to(device) for p in (self.x, self.y, self.points, self.distances))
            best = Best(self.network, x, y, self.norm, points, distances)
            self.plan[stage](best, self.positions[here.cpu()])
            best.bisect(self.effort.bisections)
            self.points[here], self.distances[here] = best.points.to(home), best.distances.to(home)
            self.stages[here] = stage + 1
            self.moved[here] = True
            done += len(here)
            report(done)

    def settle(self) -> None:
        """Verify the points in other batches than those of the search; what fails is pushed outwards by a hair."""
        left = (self.moved & self.distances.isfinite()).nonzero().squeeze(1).flip(0)
        ends, half = None, self.search.batch_size // 2 + 1  # ends: the points of those left, from the second time on
        for push in (0.0, 1e-6, 1e-5, 1e-4, 1e-3):
            if not len(left):
                return
            failed = []
            for start in range(0, len(left), half):
                rows = left[start : start + half]
                points, origin = self.points[rows] if ends is None else ends[start : start + half], self.x[rows]
                outer = points if push == 0 else (points + push * (points - origin)).clamp(0, 1)
                wrong = ~correct(forward(self.network, outer, half), self.y[rows])
                settled = torch.where(per_image(wrong, outer).bool(), outer, origin)
                distances = image_norm(settled - origin, self.norm)
                self.points[rows], self.distances[rows] = settled, torch.where(wrong, distances, torch.inf)
                failed.append((rows[~wrong], points[~wrong]))
            left, ends = map(torch.cat, zip(*failed, strict=True))


def _targeted(effort: Effort, number: int) -> Stage:
    """A descent from the images towards the class with the nearest linearised boundary, or a further one."""

    def run(best: Best, positions: Tensor) -> None:
        classes, first = nearest_classes(best, effort.candidates)
        target = towards(classes[:, number])
        descend(best, best.x, target, effort.steps, FAR, None if number else first)

    return run


def _untargeted(effort: Effort, number: int, seed: int) -> Stage:
    """A descent from the nearest points so far, or from random points at their distance."""

    def run(best: Best, positions: Tensor) -> None:
        if not number:
            descend(best, best.points, margin, effort.refine, FINE)
            return
        draws = [
            torch.rand(best.x.shape[1:], generator=generator(seed, "search", number, k)) for k in positions.tolist()
        ]
        noise = torch.stack(draws).to(best.x) * 2 - 1
        reach = best.distances.where(best.distances.isfinite(), best.distances.new_tensor(0.03))
        start = contract(best.x, best.x + per_image(reach, best.x) * noise, reach, best.norm).clamp_(0, 1)
        descend(best, start, margin, effort.steps, FAR)

    return run


def _penalty(effort: Effort) -> Stage:
    """A penalty descent from the images; in linf a descent of the radius follows, from the points it found."""

    def run(best: Best, positions: Tensor) -> None:
        points = penalise(best, best.x, effort.penalty)
        if best.norm == "linf":
            descend(best, points, margin, effort.refine, FINE)

    return run


def _fab(effort: Effort, seed: int) -> Stage:
    def run(best: Best, positions: Tensor) -> None:
        found = fab_points(best.network, best.x, best.y, best.norm, effort.fab, targets=effort.fab_targets, seed=seed)
        best.offer(found, forward(best.network, found, len(found)))

    return run


def _stages(effort: Effort, seed: int, classes: int) -> list[Stage]:
    """What an image goes through, in order."""
    stages = [_targeted(effort, number) for number in range(min(effort.targets, effort.candidates, classes - 1))]
    if effort.penalty:
        stages.append(_penalty(effort))
    stages += [_untargeted(effort, number, seed) for number in range(effort.starts)]
    if effort.fab:
        stages.append(_fab(effort, seed))
    return stages


def _rounds(part: _Part, threats: Sequence[ThreatModel], processes: Processes) -> Iterator[tuple[int, Tensor, bool]]:
    """Which images go through which stage next, until all that a budget may pay for are through.

    Yields:
        The stage, the rows of this process's images, and whether it is the first round.
    """
    first = some = True
    while some:
        some = False
        for stage in range(part.number):
            within = (FIRST_SLACK if stage == 1 else SLACK) * _needed(processes.gather(part.distances), threats)
            rows = part.active(stage, within if stage and part.effort.leave else math.inf)
            wanted = bool(processes.sum([float(len(rows))])[0])
            some |= wanted
            if first or wanted:
                yield stage, rows, first
        first = False


def nearest_adversarial(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: str,
    search: Search,
    report: Report | None = None,
    rows: Tensor | None = None,
    threats: Sequence[ThreatModel] = (),
    previous: NearestAdversarial | None = None,
    processes: Processes = ALONE,
) -> NearestAdversarial:
    """Search the nearest misclassified point of each image; call it inside `wdat.gradients.undisturbed`.

    All processes that share the set make the same call, also one without images.

    Args:
        network: Takes images in [0, 1], gives logits (N, K).
        x: Images (N, C, H, W) in [0, 1], this process's part of the set.
        y: Labels (N,).
        norm: Ground norm.
        search: How hard to look.
        report: Called with image stages done and to be done in all.
        rows: (N,), the images' positions in the set, by which random starts are drawn; None for 0 to N − 1.
        threats: Budgets that the distances are to serve; none serves all of them.
        previous: What the same search found for smaller budgets; only images that these left out are searched.
        processes: Hold the other parts of the set.

    Returns:
        Points and distances, and up to which distance they serve.
    """
    positions = torch.arange(len(x)) if rows is None else rows.cpu()
    counted = Counted(network).eval()
    with together(processes):
        part = _Part(counted, x, y, norm, search.within(norm), search, positions)
        part.begin(previous)
    effort = list(previous.effort) if previous else []
    spent = effort[-1][0] if effort else 0.0

    def state() -> tuple[float, Tensor]:
        passes, attacked = processes.sum([float(counted.passes.total), float(part.attacked())])
        return spent + passes / max(attacked, 1.0), part.distances.clone()

    for stage, active, first in _rounds(part, threats, processes):

        def progress(done: int, stage: int = stage, first: bool = first) -> None:
            if report and first and len(x):
                report(stage * len(x) + done, part.number * len(x))

        with together(processes):
            part.advance(stage, active, progress)
            progress(len(x))
        effort.append(state())
    with together(processes):
        part.settle()
    if effort:
        effort[-1] = state()
    unfinished = processes.max(float(bool((part.stages < part.number).any())))
    reach = _needed(processes.gather(part.distances), threats) if unfinished else math.inf
    return NearestAdversarial(part.points, part.distances, effort, reach, part.stages)
