"""What every attack shares: the guard around the network, the verification of what it returns, the verdict."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wdat.distributed import ALONE, Processes, together
from wdat.errors import ConstraintError, SettingError, check_whole
from wdat.gradients import forward, ordinary, undisturbed
from wdat.inputs import classes_of
from wdat.losses import correct, nonfinite
from wdat.precision import float32
from wdat.sensitivity import Sensitivity
from wdat.threat import ThreatModel


@dataclass(frozen=True)
class Context:
    """What surrounds one call of an attack. The defaults are those of evaluation: these images are the whole set.

    Attributes:
        processes: The processes that share the set's budget.
        sensitivity: Υ of the training set; None where the images at hand are the whole set.
        index: (N,), rows of the images in the training set, wanted by estimators that keep one value an image; in
            evaluation their places in the whole set, wanted by attacks that draw random numbers for each image.
        noise: Draws (N, ...), the start offset of uniform radii, as TRADES has it; None starts at the images.
        uniform: Draws (N,) in [0, 1), one number for each image, where radii are drawn.
        log_clean: (N, K), clean log-probabilities in eval mode, where the caller already has them.
        most: The most images that any process has in this call, where that is known.
        clean_pass: The images with `requires_grad` and the logits in eval mode that the network made of them, where
            the caller has a graph from which the gradient at the clean images can be taken; it is retained.
        tf32: Whether an evaluation's products may use TF32.
        training: Return the last iterate without looking back: no verdict, no best iterate.
        deferred: In training, leave the verification to the caller, who asks `AttackResult.verification` of the device
            together with what else it wants to know, before any update.
        progress: Called after each step with the number of steps done and of all steps.
    """

    processes: Processes = ALONE
    sensitivity: Sensitivity | None = None
    index: Tensor | None = None
    noise: Callable[[], Tensor] | None = None
    uniform: Callable[[], Tensor] | None = None
    log_clean: Tensor | None = None
    most: int | None = None
    clean_pass: tuple[Tensor, Tensor] | None = None
    tf32: bool = False
    training: bool = False
    deferred: bool = False
    progress: Callable[[int, int], None] | None = None


@dataclass
class Moved:
    """What an attack's `_run` hands to the base class, which verifies it.

    Attributes:
        x_adv: (N, ...).
        radii: (N,), the radii that bound each image; None where only the set's length is bounded.
        length: Bound on the W_p length of these images (over all processes); None where the radii bound them alone.
        loss_mean: Largest mean loss on the trajectory, None in training.
        norms: (N,), dual norms at the clean images; None where no clean gradient was taken.
        dropped: Images of this process without a finite gradient, a number or a tensor ().
        details: What only this attack knows, for records; keys as in `wdat.evaluation.details`.
    """

    x_adv: Tensor
    radii: Tensor | None = None
    length: float | None = None
    loss_mean: float | None = None
    norms: Tensor | None = None
    dropped: Tensor | int = 0
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verification:
    """Whether an attack has kept to its threat model, not yet asked of the device.

    Attributes:
        broken: (), 1 if there is something to look at, float64, on the device of the images.
        verify: Looks at it.

    Raises:
        ConstraintError: `verify`, if the attack left its threat model.
    """

    broken: Tensor
    verify: Callable[[], None]


@dataclass(frozen=True)
class AttackResult:
    """A verified perturbation of a set of images.


    Attributes:
        x_adv: (N, ...), in [0, 1], this process's part.
        distances: (N,), ‖x'_i − x_i‖_r in pixel units.
        distance: W_p length of the whole set's move, over all processes; None in training.
        radii: (N,), the radius granted to each image, or None where only the set is bounded.
        threat: The attack's own threat (p = inf for `fgsm` and `pgd`).
        norms: (N,), dual norms at the clean images, or None where no clean gradient was taken.
        loss_mean: Largest mean loss on the trajectory; None in training.
        set_size: Images that shared the budget, over all processes (in training: this process's images).
        dropped: Images left out of the allocation because their gradient was not finite; 0 in training.
        accuracy: Accuracy of the whole set at `x_adv`, in [0, 1]; None in training.
        correct: (N,), bool, this process's part; None in training.
        nonfinite: Images of the whole set whose logits at `x_adv` aren't finite, which counts as misclassified.
        details: What only this attack knows; keys as in `wdat.evaluation.details`.
        verification: What is still to be asked, where that was left to the caller; else None.
    """

    x_adv: Tensor
    distances: Tensor
    distance: float | None
    radii: Tensor | None
    threat: ThreatModel
    norms: Tensor | None
    loss_mean: float | None
    set_size: int
    dropped: int
    accuracy: float | None = None
    correct: Tensor | None = None
    nonfinite: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    verification: Verification | None = None


NONFINITE = "{}: {} of {} images have logits that are not finite; they count as misclassified"

TOLERANCE = 1e-5  # relative, plus a few float32 roundings of a pixel


def check_images(network: nn.Module, x: Tensor, y: Tensor) -> None:
    """Refuse images and labels that an attack can't use.

    Raises:
        SettingError: If images aren't float in [0, 1], or labels aren't int64 classes of the network.
    """
    if x.dim() < 2 or not x.is_floating_point():
        raise SettingError(f"images must be a float tensor (N, C, H, W) in [0, 1], not {tuple(x.shape)} of {x.dtype}")
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        hint = "; if x is one image (C, H, W), give x[None]" if x.dim() == 3 and len(y.shape) == 1 else ""
        raise SettingError(f"labels must be int64 of shape ({len(x)},), not {tuple(y.shape)} of {y.dtype}{hint}")
    if not x.numel():
        return
    low, high = torch.stack(x.aminmax()).tolist()
    if not (low >= 0 and high <= 1):
        raise SettingError(
            f"images must lie in [0, 1], not [{low:g}, {high:g}]; divide uint8 by 255 and normalise inside the network"
        )
    classes = classes_of(network, x)
    first, last = torch.stack(y.aminmax()).tolist()
    if not (first >= 0 and last < classes):
        raise SettingError(
            f"labels must lie in 0 to {classes - 1}, the network's classes (data.num_classes), not {first} to {last}"
        )


@dataclass
class Attack(ABC):
    """An attack's settings; calling it attacks.

    Attributes:
        batch_size: Images per pass through the network. It doesn't change which images share the budget.
    """

    name: ClassVar[str]
    pointwise: ClassVar[bool] = False
    by_distance: ClassVar[bool] = False  # divides its budget by distances to the boundary, not by sensitivity
    for_training: ClassVar[bool] = False  # keeps no budget over a set of its own: evaluation refuses it
    batch_size: int = field(default=512, kw_only=True)

    def __post_init__(self) -> None:
        check_whole("attack.batch_size", self.batch_size)

    def threat_of(self, threat: ThreatModel) -> ThreatModel:
        """The attack's own threat: p = inf for the pointwise ones.

        Raises:
            SettingError: At p = 1, where q is infinite and no gradient method divides the budget.
        """
        if self.pointwise:
            return threat.pointwise()
        if threat.p == 1:
            raise SettingError(f"attack {self.name} needs threat.p > 1; p = 1 is for the knapsack only")
        return threat

    def is_uniform(self, threat: ThreatModel) -> bool:
        """Whether every image has the radius δ, whatever Υ is; the threat is any, this attack's own counts."""
        return self.threat_of(threat).is_pointwise and not self.by_distance

    def __call__(
        self, network: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, context: Context | None = None
    ) -> AttackResult:
        """Attack a set of images; the network is left as it was found.

        Args:
            network: Takes images in [0, 1], gives logits (N, K). Pass the inner network, not a wrapper.
            x: Images (N, C, H, W), float, in [0, 1].
            y: Labels (N,), int64.
            threat: Budget, norm and order.
            context: What surrounds the call; by default the images at hand are the whole set.

        Raises:
            SettingError: If images, labels or threat don't fit.
            ConstraintError: If the attack left its threat model (a defect of the attack, never of the input).
        """
        context = context or Context()
        own = self.threat_of(threat)
        x, y = ordinary(x, y)
        if not context.training:
            with together(context.processes):
                check_images(network, x, y)
                own.check(x.shape[1:])
        # Training attacks in the caller's precision, evaluation always in that of the images.
        with undisturbed(network), nullcontext() if context.training else float32(network, x, context.tf32):
            moved = self._run(network, x, y, own, context)
            check = partial(_verify, self.name, x, moved)
            with nullcontext() if context.deferred else together(context.processes):
                _check_form(self.name, x, moved)
                distances = own.distances(x, moved.x_adv)
                if not context.deferred:
                    check(distances)
            length = None
            if not context.training or moved.length is not None:
                length = own.length(distances, context.processes)
                _verify_length(self.name, x, moved, length)
            result = AttackResult(
                x_adv=moved.x_adv, distances=distances, distance=length, radii=moved.radii, threat=own,
                norms=moved.norms, loss_mean=moved.loss_mean, set_size=len(x), dropped=0, details=moved.details,
            )  # fmt: skip
            if context.deferred:
                unasked = Verification(_suspect(x, moved, distances), partial(check, distances))
                return replace(result, verification=unasked)
            if context.training:
                return result
            logits = forward(network, moved.x_adv, self.batch_size)
            verdict = correct(logits, y)
        left_out = moved.dropped if isinstance(moved.dropped, Tensor) else y.new_full((), moved.dropped)
        counts = torch.stack([verdict.sum(), left_out, nonfinite(logits)]).tolist()
        hits, dropped, broken, n = context.processes.sum([*map(float, counts), float(len(x))])
        if n == 0:
            raise SettingError("the set of images to attack is empty; check data.limit_test and data.val_size")
        if dropped:
            warnings.warn(
                f"{self.name}: {dropped:.0f} of {n:.0f} images had no finite gradient and stayed", stacklevel=2
            )
        if broken:
            warnings.warn(NONFINITE.format(self.name, int(broken), int(n)), stacklevel=2)
        return replace(
            result, accuracy=hits / n, correct=verdict, set_size=int(n), dropped=int(dropped), nonfinite=int(broken)
        )

    def check(self, shape: Sequence[int], classes: int, threat: ThreatModel) -> None:
        """Refuse, before any work, what this attack can't handle.

        Args:
            shape: (C, H, W) of the images.
            classes: Number of classes.
            threat: Budget, norm and order that the attack will be called with.

        Raises:
            SettingError: If the attack would fail on such images, classes or budgets.
        """
        self.threat_of(threat).check(shape)

    def prepared(
        self, network: nn.Module, x: Tensor, y: Tensor, threats: Sequence[ThreatModel], context: Context | None = None
    ) -> Attack:
        """This attack with what it finds once for several budgets; itself where budgets share nothing.

        Args:
            network: Takes images in [0, 1], gives logits (N, K); left as it was found.
            x: The images that it will be called with, (N, C, H, W).
            y: Their labels (N,).
            threats: Those that it will be called with, of one order and norm.
            context: What surrounds the calls.
        """
        return self

    def state_dict(self) -> dict[str, Any]:
        """What the attack has learnt during training, for checkpoints: plain numbers; most learn nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  # nothing to restore by default
        """Restore what `state_dict` gave."""

    def norms(self, network: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
        """What this attack's allocation wants to know of each image, (N,); call it inside `undisturbed`.

        For the gradient attacks the dual norms n_i at the clean images.
        """
        raise SettingError(f"attack {self.name} doesn't divide its budget by sensitivity; use it for evaluation only")

    @abstractmethod
    def _run(self, network: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, context: Context) -> Moved:
        """Move the images. `network` is guarded, `threat` is the attack's own."""


def _rounding(x: Tensor) -> float:
    """What rounding may add to a distance; one in l2 sums the roundings of all pixels."""
    return float(4 * torch.finfo(x.dtype).eps * x.shape[1:].numel() ** 0.5)


def _check_form(name: str, x: Tensor, moved: Moved) -> None:
    x_adv = moved.x_adv
    if x_adv.shape != x.shape:
        raise ConstraintError(f"{name} returned {tuple(x_adv.shape)} for images {tuple(x.shape)}")
    if moved.radii is None and moved.length is None:
        raise ConstraintError(f"{name} states no bound that its images could be verified against")


def _measured(moved: Moved, distances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest and largest pixel, and by how much an image was moved beyond its radius at most; each ()."""
    low, high = moved.x_adv.aminmax()
    excess = low.new_zeros(()) if moved.radii is None else (distances - moved.radii * (1 + TOLERANCE)).amax()
    return low, high, excess.to(low.dtype)


def _suspect(x: Tensor, moved: Moved, distances: Tensor) -> Tensor:
    """1 where `_verify` has something to look at, else 0; (), float64."""
    if not moved.x_adv.numel():
        return x.new_zeros((), dtype=torch.float64)
    low, high, excess = _measured(moved, distances)
    return (~((low >= 0) & (high <= 1) & (excess <= _rounding(x)))).double()  # NaN too


def _verify(name: str, x: Tensor, moved: Moved, distances: Tensor) -> None:
    """Compare each image's move with what the attack may do; trusts nothing that it says about `x_adv`."""
    if not moved.x_adv.numel():
        return
    low, high, excess = torch.stack(_measured(moved, distances)).tolist()
    if not (low >= 0 and high <= 1):  # false for NaN too
        if bool(x.isnan().any()):
            return  # not the attack's fault; training looks at the loss, evaluation at the images
        raise ConstraintError(f"{name} returned pixels in [{low:g}, {high:g}], outside [0, 1]")
    if not excess <= _rounding(x):
        raise ConstraintError(f"{name} moved an image {excess:g} beyond its radius")


def _verify_length(name: str, x: Tensor, moved: Moved, length: float) -> None:
    """Check the length of the whole set's move, which all processes know."""
    if moved.length is not None and not length <= moved.length * (1 + TOLERANCE) + _rounding(x):
        raise ConstraintError(f"{name} moved the set by {length:g}, beyond its budget {moved.length:g}")
