"""Per-sample losses: logits (N, K) and a target to values (N,), larger where the network does worse.

Every loss is computed in float32 at least. The target is the labels (N,), or for `kl` the clean log-probabilities
(N, K). Sources: CE and DLR, Croce & Hein 2020; ReDLR [B] arXiv 2306.09844; KL, TRADES (Zhang et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from wdat.errors import SettingError, unknown

Loss = Callable[[Tensor, Tensor], Tensor]

THREE_CLASSES = ("dlr", "redlr")  # losses that compare three logits
DLR_FLOOR = 1e-12  # of the denominator; more would break agreement with published values of Υ


def _precise(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def predictions(logits: Tensor) -> Tensor:
    """Predicted classes (N,), int64; −1, which is no class, where a logit isn't finite; (N, K) → (N,).

    The argmax of a row of NaN is class 0, which would make a broken network robust on that class.
    """
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """The verdict on each image: whether its logits are finite and the label's is the largest; (N, K), (N,) → (N,)."""
    return predictions(logits) == labels


def nonfinite(logits: Tensor) -> Tensor:
    """How many rows of logits (N, K) have a logit that isn't finite, (); their images count as misclassified."""
    return (~logits.isfinite().all(1)).sum()


def log_probabilities(logits: Tensor) -> Tensor:
    """Log softmax in float32 at least; (N, K) → (N, K)."""
    return F.log_softmax(_precise(logits), dim=1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy −log softmax(z)_y; (N, K), (N,) → (N,)."""
    return F.cross_entropy(_precise(logits), labels, reduction="none")


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: Tensor | float) -> Tensor:
    """Cross-entropy to smoothed labels, (1 − ε) CE + ε mean_k(−log p_k); (N, K), (N,), ε (N,) or a number → (N,).

    A share ε of the label is spread over all classes alike, its own included (Szegedy et al. 2016).
    """
    log_p = log_probabilities(logits)
    true = log_p.gather(1, labels[:, None]).squeeze(1)
    return -(1 - smoothing) * true - smoothing * log_p.mean(1)


def _true_and_best_other(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    true = z.gather(1, labels[:, None])
    other = z.scatter(1, labels[:, None], -torch.inf).amax(1)
    return true.squeeze(1), other


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{j≠y} z_j − z_y: positive exactly where the image is misclassified; (N, K), (N,) → (N,)."""
    true, other = _true_and_best_other(_precise(logits), labels)
    return other - true


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio −(z_y − max_{j≠y} z_j)/(z_(1) − z_(3)), z sorted in decreasing order; → (N,).

    Raises:
        SettingError: With fewer than three classes.
    """
    check_classes("dlr", logits.shape[1])
    z = _precise(logits)
    top = z.topk(3, dim=1).values
    return margin(z, labels) / (top[:, 0] - top[:, 2]).clamp_min(DLR_FLOOR)


def check_classes(name: str, classes: int, setting: str = "loss") -> None:
    """Refuse a loss that needs more classes than there are.

    Args:
        name: The loss.
        classes: How many there are.
        setting: Its key on the command line.

    Raises:
        SettingError: DLR and ReDLR with fewer than three classes.
    """
    if name in THREE_CLASSES and classes < 3:
        raise SettingError(
            f"{setting}={name} needs at least three classes, and there are {classes} (data.num_classes): use ce "
            "or margin, as in losses=[ce], attack.loss=ce, evaluation.attack_options.wpgd.loss=ce"
        )


def redlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Rectified DLR min(DLR, 0): zero, with zero gradient, on misclassified images [B]; (N, K), (N,) → (N,)."""
    return -F.relu(-dlr(logits, labels))


def kl_divergence(logits: Tensor, log_clean: Tensor) -> Tensor:
    """KL(f(x) ‖ f(x')) for logits at x' and clean log-probabilities at x [T]; (N, K), (N, K) → (N,).

    Written with two log-probabilities, because the gradient through a target probability of zero is NaN.
    """
    return F.kl_div(log_probabilities(logits), log_clean, reduction="none", log_target=True).sum(1)


LOSSES: dict[str, Loss] = {
    "ce": cross_entropy,
    "margin": margin,
    "dlr": dlr,
    "redlr": redlr,
    "kl": kl_divergence,
}


def get_loss(name: str, setting: str = "attack.loss") -> Loss:
    """The loss of that name.

    Raises:
        SettingError: If there is none; the message lists the nearest.
    """
    try:
        return LOSSES[name]
    except KeyError:
        raise unknown("loss", name, LOSSES, setting) from None


def get_label_loss(name: str, setting: str) -> Loss:
    """As `get_loss`, refusing `kl`, whose gradient vanishes at the clean image and so can't set radii."""
    if name == "kl":
        raise SettingError(f"{setting}=kl has no gradient at the clean image; choose one of ce, margin, dlr, redlr")
    return get_loss(name, setting)
