"""Running attacks over a whole set of images: one set, one budget, one record an attack."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wdat.attacks import ATTACKS, Attack, Context, build
from wdat.attacks.base import check_images
from wdat.errors import SettingError, unknown
from wdat.evaluation.bounds import bootstrap_interval
from wdat.gradients import input_gradients
from wdat.guard import ordinary, undisturbed
from wdat.losses import get_label_loss
from wdat.processes import ALONE, Processes
from wdat.records import Facts, Record
from wdat.threat import ThreatModel, dual_norm, power_mean

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ImageTensors:
    """A whole evaluation set, or this process's part of it, in memory.

    Attributes:
        x: Images (N, C, H, W) in [0, 1].
        y: Labels (N,).
    """

    x: Tensor
    y: Tensor

    @classmethod
    def collect(cls, batches: Iterable[Sequence[Any]], device: torch.device) -> ImageTensors:
        """Gather the first two members (images, labels) of every batch.

        Raises:
            SettingError: If there is no batch at all.
        """
        pairs = [ordinary(batch[0], batch[1]) for batch in batches]
        if not pairs:
            raise SettingError("the set of images to attack is empty; check data.limit_test and data.val_size")
        return cls(torch.cat([p[0] for p in pairs]).to(device), torch.cat([p[1] for p in pairs]).to(device))


def device_of(network: nn.Module) -> torch.device:
    """Where a network's parameters are; the CPU if it has none."""
    return next((p.device for p in network.parameters()), torch.device("cpu"))


def evaluate(
    network: nn.Module,
    loader: Iterable[Sequence[Any]] | ImageTensors,
    threat: ThreatModel,
    attacks: Sequence[str | Attack] = ("pgd", "wpgd"),
    *,
    losses: Sequence[str] = ("ce",),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    batch_size: int = 512,
    stage: str = "evaluate",
    split: str = "test",
    epoch: int | None = None,
    facts: Facts | None = None,
    processes: Processes = ALONE,
    progress: Progress | None = None,
) -> list[Record]:
    """Clean accuracy and accuracy under attacks that share one budget over the whole set.

    Always in the precision of the images (float32), in eval mode; the network is left as it was found.

    Args:
        network: Any module that takes images in [0, 1] and gives logits (N, K).
        loader: Batches whose first two members are images (N, C, H, W) and labels (N,), or the tensors themselves.
        threat: Order, norm and budget.
        attacks: Names, or attacks made with `wdat.attacks.build`; pointwise ones run at p = inf.
        losses: For each, one clean record (V(0), W(0), Υ) and one run of every attack given by name.
        options: Settings per attack name, such as `{"wpgd": {"steps": 100}}`.
        batch_size: Images per pass; it doesn't change which images share the budget.
        stage: What the records say of their stage.
        split: What they say of their split.
        epoch: What they say of the epochs trained.
        facts: What they say of network, data and seed.
        processes: The processes that hold the other parts of the set.
        progress: Called with a label, steps done and steps in all.

    Returns:
        Clean records, one a loss, then one record for each attack and loss.

    Raises:
        SettingError: If the set is empty, or a name, option or image can't be used.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> loader = [(torch.rand(8, 3, 2, 2), torch.arange(8) % 3)]
        >>> records = evaluate(network, loader, ThreatModel(2, "linf", "8/255"), ["wpgd"])
        >>> [r.attack for r in records]
        ['none', 'wpgd']
    """
    device = device_of(network)
    tensors = loader if isinstance(loader, ImageTensors) else ImageTensors.collect(loader, device)
    images = ImageTensors(*ordinary(tensors.x, tensors.y))
    check_images(network, images.x, images.y)
    facts = facts or Facts()
    for loss in losses:
        get_label_loss(loss, "losses")
    for name in options or {}:
        if name not in ATTACKS:
            raise unknown("attack", name, ATTACKS, f"attack_options.{name}")
    runs = [(a, loss) for a in attacks for loss in losses if isinstance(a, str)]
    built = [build(a, **{"loss": loss, "batch_size": batch_size, **(options or {}).get(a, {})}) for a, loss in runs]
    built += [a for a in attacks if isinstance(a, Attack)]

    def record(**values: Any) -> Record:
        hits, n = values.pop("hits"), values["n"]
        low, high = bootstrap_interval(hits, n)
        about = {"stage": stage, "split": split, "epoch": epoch, "device": str(device), **asdict(facts)}
        return Record(accuracy=hits / n, accuracy_low=low, accuracy_high=high, norm=threat.norm, **about, **values)

    records = [record(**_clean(network, images, threat, loss, batch_size, processes)) for loss in losses]
    for attack in built:
        settings = {k: v for k, v in vars(attack).items() if not k.startswith("_")}
        loss = str(settings.pop("loss", "0-1"))
        label = f"{attack.name} {loss}"
        started = time.perf_counter()
        context = Context(processes=processes, progress=partial(progress, label) if progress else None)
        result = attack(network, images.x, images.y, threat, context)
        records.append(
            record(
                attack=attack.name,
                options=settings,
                loss=loss,
                p=result.threat.p,
                delta=result.threat.delta,
                n=result.set_size,
                set_size=result.set_size,
                hits=round((result.accuracy or 0.0) * result.set_size),
                loss_mean=result.loss_mean,
                distance=result.distance,
                seconds=time.perf_counter() - started,
                dropped=result.dropped,
            )
        )
    return records


def _clean(
    network: nn.Module, images: ImageTensors, threat: ThreatModel, loss: str, batch_size: int, processes: Processes
) -> dict[str, Any]:
    """A, V(0), W(0) and Υ of one loss, from one forward and backward pass [B]."""
    started = time.perf_counter()
    loss_function = get_label_loss(loss, "losses")
    with undisturbed(network), torch.autocast(images.x.device.type, enabled=False):
        clean = input_gradients(network, images.x, images.y, loss_function, batch_size)
    wrong = clean.logits.argmax(1) != images.y
    values = clean.loss.double()
    totals = [float(len(wrong)), float(wrong.sum()), float(values.sum()), float(values[wrong].sum())]
    n, misses, total, total_wrong = processes.sum(totals)
    if n == 0:
        raise SettingError("the set of images to evaluate is empty; check data.limit_test and data.val_size")
    return {
        "attack": "none",
        "options": {},
        "loss": loss,
        "p": threat.p,
        "delta": 0.0,
        "n": int(n),
        "set_size": int(n),
        "hits": int(n - misses),
        "loss_mean": total / n,
        "distance": 0.0,
        "seconds": time.perf_counter() - started,
        "upsilon": power_mean(dual_norm(clean.gradient, threat.norm), threat.q, processes),
        "loss_misclassified": total_wrong / misses if misses else None,
        "dropped": int(processes.sum([float((~clean.finite).sum())])[0]),
    }
